"""Random sequences of calls against a dense oracle: a call depends on its arguments, the parameters and the mode alone.

Each rule does one thing in both worlds (see `worlds`), and compares all outputs, the gradients of all nodes, accumulated since
the beginning, and those of x. The thorough profile runs 1,000 sequences.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from models import noise, same_state
from strategies import Bound
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint
from worlds import SPECS, TOKENS, WIDTH, Net, Ours, Theirs, base, event

import superlora_tn as sl

THOROUGH = settings().max_examples > 100
SEQUENCES, STEPS = (1000, 12) if THOROUGH else (60, 8)
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
PLACES = {"model": "blocks", "block": "block", "siblings": "siblings"}


class Broken(Exception):
    """What a program raises on purpose."""


def close(ours: Tensor, theirs: Tensor) -> None:
    """The same sums in another order: numbers of order 1 to 1,000 through two blocks, of at most some hundred terms each."""
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-9, atol=1e-9)


def close_gradients(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> None:
    """None is a gradient of zeros; relative to the largest number, as a gradient is a sum of terms of both signs."""
    for own, other in zip(ours, theirs, strict=True):
        if own is None or other is None:
            assert all(t is None or not t.any() for t in (own, other)), (own, other)
            continue
        largest = float(other.detach().abs().max())
        torch.testing.assert_close(own.detach(), other.detach(), rtol=1e-8, atol=1e-10 + 1e-10 * largest)


@dataclass(frozen=True)
class Program:
    """One call, and what is done with it.

    Attributes:
        where: "model", "block" (the second one alone), "layer" (a target of it alone), "fork" (the model, both blocks on x)
            or "siblings" (the model, q, k and v on x).
        mode: of the call; "enabled" is grad within no_grad.
        saved: how it is checkpointed: "", "blocks", "reentrant blocks", "whole", "reentrant whole".
        place: where in the call something happens, once.
        act: what: "" nothing; "raise", "interrupt"; "write" to the nodes; or a call within the call, as (where, mode).
        loss: "backward"; "twice" (retain_graph); "each" (one backward an output); "grad" (autograd.grad); "again"
            (create_graph, and a backward of the gradient); "drop" (none).
        wants: whether x requires a gradient: "no", "yes", "later" (from k's call on).
        only: which of the siblings run with gradients.
        within: "" or "fixed" or "disabled".
    """

    where: str
    mode: str
    saved: str
    place: str
    act: str | tuple[str, str]
    loss: str
    wants: str
    only: tuple[bool, bool, bool]
    within: str

    @property
    def differentiates(self) -> bool:
        return self.mode in ("grad", "enabled") and self.loss != "drop" and self.act not in ("raise", "interrupt")

    def tidied(self) -> Program:
        """Without what would be refused by torch itself, adapters or not."""
        this = dict(self.__dict__)
        trains = self.mode in ("grad", "enabled")
        if not trains or self.where in ("fork", "siblings", "layer"):
            this["saved"] = ""
        elif self.where == "block" and "blocks" in self.saved:
            this["saved"] = self.saved.replace("blocks", "whole")
        if self.where in ("siblings", "layer", "fork"):
            this["place"] = "siblings"
        if this["saved"].startswith("reentrant"):
            # Needs an input that wants a gradient, and does not go with autograd.grad or a second backward of a gradient.
            this["wants"] = "yes"
            this["loss"] = self.loss if self.loss in ("backward", "drop") else "backward"
        if this["saved"] and isinstance(self.act, tuple) and not (self.place == "blocks" and "blocks" in this["saved"]):
            # Something that is done once within a region must save nothing, as it is not there when the region runs again.
            this["act"] = (self.act[0], "no_grad" if self.act[1] == "grad" else self.act[1])
        if self.act == "write" and (trains or self.mode == "inference"):
            this["act"] = ""
        if self.wants == "later" and (self.where != "siblings" or self.act or not trains):
            this["wants"] = "yes" if trains else "no"
        if this["wants"] == "later" and this["loss"] == "again":
            # What was recorded before x wanted a gradient has x in its second derivatives or not, in torch too, by the order in
            # which its product is taken: (x A) B saves x A where A is frozen, x (A B) saves x.
            this["loss"] = "grad"
        if not trains:
            this["wants"] = "no"
        if self.where == "layer":
            this["act"] = ""
        return Program(**this)


PROGRAMS = st.builds(
    Program,
    where=st.sampled_from(["model", "model", "model", "block", "layer", "fork", "siblings"]),
    mode=st.sampled_from(["grad", "grad", "grad", "no_grad", "inference", "enabled"]),
    saved=st.sampled_from(["", "", "blocks", "reentrant blocks", "whole", "reentrant whole"]),
    place=st.sampled_from(["blocks", "block", "siblings"]),
    act=st.sampled_from(
        [
            *("", "", "", "raise", "interrupt", "write"),
            *(("model", "no_grad"), ("model", "inference"), ("model", "grad"), ("block", "no_grad")),
            *(("layer", "no_grad"), ("layer", "grad"), ("broken", "no_grad"), ("broken", "grad")),
        ]
    ),
    loss=st.sampled_from(["backward", "backward", "twice", "each", "grad", "again", "drop"]),
    wants=st.sampled_from(["no", "yes", "later"]),
    only=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    within=st.sampled_from(["", "", "", "fixed", "disabled"]),
).map(Program.tidied)


class Run:
    """A program in one world.

    Attributes:
        outputs: of the call, and of calls within it.
        found: gradients that `autograd.grad` gave.
        x: the input.
    """

    def __init__(self, program: Program, world: Ours | Theirs, seed: int) -> None:
        self.program, self.world = program, world
        self.outputs: list[Tensor] = []
        self.inner: list[Tensor] = []
        self.found: list[Tensor | None] = []
        self.x = noise(TOKENS, WIDTH, seed=seed, dtype=torch.float64).requires_grad_(program.wants == "yes")
        self.other = noise(TOKENS, WIDTH, seed=seed + 1, dtype=torch.float64)
        self.model: Net = world.model

    def run(self) -> None:
        program = self.program
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad() if program.mode == "enabled" else torch.enable_grad())
            stack.enter_context(MODES["grad" if program.mode == "enabled" else program.mode]())
            stack.enter_context(event(program.place, self._act))
            stack.enter_context(self._as_said())
            try:
                y = self._call(program.where, self.x)
            except (Broken, KeyboardInterrupt):
                assert program.act in ("raise", "interrupt")
                return
            self.outputs += [y] if isinstance(y, Tensor) else list(y)
        if program.differentiates:
            getattr(self, f"_{program.loss}")()

    @contextmanager
    def _as_said(self) -> Iterator[None]:
        saved, model = self.program.saved, self.model
        model.how = {"blocks": "again", "reentrant blocks": "reentrant"}.get(saved, "plain")
        model.how = "fork" if self.program.where == "fork" else model.how
        model.only = self.program.only if self.program.where == "siblings" else ()
        try:
            yield
        finally:
            model.how, model.only = "plain", ()

    def _call(self, where: str, x: Tensor) -> Any:
        block = self.model.layers[1]
        call = {"block": block, "layer": block.attn.k_proj}.get(where, self.model)
        if self.program.saved.endswith("whole") and x is self.x:
            return checkpoint(call, x, use_reentrant=self.program.saved.startswith("reentrant"))
        return call(x)

    def _act(self, x: Tensor) -> None:
        act = self.program.act
        if act == "raise":
            raise Broken
        if act == "interrupt":
            raise KeyboardInterrupt
        if act == "write":
            with torch.no_grad():
                for node in self.world.nodes:
                    node.mul_(1.25)
        elif isinstance(act, tuple):
            self._within(*act)
        elif self.program.wants == "later":
            self.x.requires_grad_(True)

    def _within(self, where: str, mode: str) -> None:
        """A call within the call; a broken one is broken off half way, and the outer one goes on."""
        how, only = self.model.how, self.model.only
        self.model.how, self.model.only = "plain", ()
        try:
            with MODES[mode]():
                if where == "broken":
                    with event("block", _break), pytest.raises(KeyboardInterrupt):
                        self.model(self.other)
                else:
                    self.inner.append(self._call(where, self.other))
        finally:
            self.model.how, self.model.only = how, only

    # --- what is done with the outputs ---

    def _losses(self) -> list[Tensor]:
        return [torch.sin(y).pow(2).sum() for y in (*self.outputs, *self.inner) if y.requires_grad]

    def _sources(self) -> list[Tensor]:
        return [*self.world.nodes, *([self.x] if self.x.requires_grad else [])]

    def _backward(self) -> None:
        if losses := self._losses():
            sum(losses).backward()

    def _twice(self) -> None:
        if losses := self._losses():
            loss = sum(losses)
            loss.backward(retain_graph=True)
            loss.backward()

    def _each(self) -> None:
        for loss in self._losses():
            loss.backward()

    def _grad(self) -> None:
        if losses := self._losses():
            self.found += torch.autograd.grad(sum(losses), self._sources(), allow_unused=True)

    def _again(self) -> None:
        if losses := self._losses():
            first = torch.autograd.grad(sum(losses), self._sources(), allow_unused=True, create_graph=True)
            self.found += [None if g is None else g.detach().clone() for g in first]
            second = [g.pow(2).sum() for g in first if g is not None and g.requires_grad]
            if second:
                sum(second).backward()


def _break(x: Tensor) -> None:
    raise KeyboardInterrupt


class Sequences(RuleBasedStateMachine):
    """An adapted model and its oracle through the same random calls and writes."""

    @initialize(name=st.sampled_from(sorted(SPECS)))
    def start(self, name: str) -> None:
        self.name = name
        spec, options = SPECS[name]
        self.ours = Ours(spec, **options)
        self.ours.fill(1)
        self.theirs = Theirs(self.ours)
        self.count = 0

    def seed(self) -> int:
        self.count += 10
        return self.count

    def is_on(self) -> bool:
        return self.theirs.state == "on"

    def is_merged(self) -> bool:
        return self.theirs.state == "merged"

    @rule(program=PROGRAMS)
    def call(self, program: Program) -> None:
        if program.within and self.is_merged() and program.act == "write":
            return
        seed, runs, before = self.seed(), [], self.theirs.state
        for world in (self.ours, self.theirs):
            if world is self.theirs and program.within == "disabled":
                self.theirs.state = "off"
            run = Run(program, world, seed)
            with self._context(world, program.within):
                run.run()
            runs.append(run)
        self.theirs.state = before
        ours, theirs = runs
        assert len(ours.outputs) == len(theirs.outputs)
        for own, other in zip([*ours.outputs, *ours.inner], [*theirs.outputs, *theirs.inner], strict=True):
            close(own, other)
        close_gradients(ours.found, theirs.found)
        close_gradients([ours.x.grad], [theirs.x.grad])
        self.compare()

    def _context(self, world: Ours | Theirs, within: str) -> AbstractContextManager[Any]:
        if world is self.ours and within == "fixed":
            return self.ours.handle.fixed()
        if world is self.ours and within == "disabled":
            return self.ours.handle.disabled()
        return ExitStack()

    def compare(self) -> None:
        close_gradients([n.grad for n in self.ours.nodes], [n.grad for n in self.theirs.nodes])

    @rule()
    def forget_gradients(self) -> None:
        for node in (*self.ours.nodes, *self.theirs.nodes):
            node.grad = None

    # --- writing parameters ---

    @rule(
        way=st.sampled_from(["step", "copy_", "data.copy_", "data", "vector", "load", "assign", "numpy"]), fixed=st.booleans()
    )
    @precondition(is_on)
    def write(self, way: str, fixed: bool) -> None:
        seen = way not in ("data.copy_", "numpy")  # by the count of writes, on which `fixed` relies
        with self.ours.handle.fixed() if fixed and seen else ExitStack():
            x = noise(TOKENS, WIDTH, seed=self.seed(), dtype=torch.float64)
            with torch.no_grad():
                close(self.ours.model(x), self.theirs.model(x))
            getattr(self, f"_{way.replace('.', '_').strip('_')}")()
            self.theirs.follow(self.ours)
            with torch.no_grad():
                close(self.ours.model(x), self.theirs.model(x))

    def _new(self) -> list[Tensor]:
        seed = self.seed()
        return [
            0.9 * n.detach() + 0.1 * noise(*n.shape, seed=seed + k, dtype=torch.float64) for k, n in enumerate(self.ours.nodes)
        ]

    def _step(self) -> None:
        for own, other in zip(self.ours.nodes, self.theirs.nodes, strict=True):
            if other.grad is None:
                own.grad = None
        torch.optim.SGD(
            self.ours.nodes, lr=1e-3 / max([1.0, *(float(n.grad.norm()) for n in self.ours.nodes if n.grad is not None)])
        ).step()

    def _copy(self) -> None:
        with torch.no_grad():
            for node, value in zip(self.ours.nodes, self._new(), strict=True):
                node.copy_(value)

    def _data_copy(self) -> None:
        for node, value in zip(self.ours.nodes, self._new(), strict=True):
            node.data.copy_(value)

    def _data(self) -> None:
        for node, value in zip(self.ours.nodes, self._new(), strict=True):
            node.data = value

    def _vector(self) -> None:
        vector_to_parameters(1.1 * parameters_to_vector(self.ours.nodes).detach(), self.ours.nodes)

    def _load(self, assign: bool = False) -> None:
        state = {k: v.clone() for k, v in self.ours.model.state_dict().items()}
        for name in state:
            if name.startswith("superlora.") and not name.endswith("fixed"):
                state[name] = 0.9 * state[name]
        self.ours.model.load_state_dict(state, assign=assign)

    def _assign(self) -> None:
        before = [node.grad for node in self.ours.nodes]
        self._load(assign=True)
        # New parameters: their gradients begin anew, in both worlds.
        for node, old in zip(self.theirs.nodes, before, strict=True):
            node.grad = None if old is None else node.grad
        self.forget_gradients()

    def _numpy(self) -> None:
        for node in self.ours.nodes:
            node.detach().numpy()[...] *= 1.1

    @rule()
    @precondition(is_on)
    def swap(self) -> None:
        """Other values by `functional_call`, whose own gradients come."""
        x = noise(TOKENS, WIDTH, seed=self.seed(), dtype=torch.float64)
        names = {id(p): name for name, p in self.ours.model.named_parameters()}
        for factor in (0.7, 1.3):
            own = {names[id(n)]: (factor * n.detach()).requires_grad_() for n in self.ours.nodes}
            kept = self.theirs.tensors
            self.theirs.tensors = [
                [(factor * t.detach()).requires_grad_() if t.requires_grad else t for t in tensors] for tensors in kept
            ]
            ours, theirs = functional_call(self.ours.model, own, (x,)), self.theirs.model(x)
            close(ours, theirs)
            ours.pow(2).sum().backward()
            theirs.pow(2).sum().backward()
            close_gradients([t.grad for t in own.values()], [t.grad for t in self.theirs.nodes])
            self.theirs.tensors = kept
        self.compare()

    # --- states ---

    @rule()
    @precondition(is_on)
    def merge(self) -> None:
        self.ours.handle.merge()
        self.theirs.merge()

    @rule()
    @precondition(is_merged)
    def unmerge(self) -> None:
        self.ours.handle.unmerge()
        self.theirs.state = "on"

    @rule(way=st.sampled_from(["deepcopy", "pickle", "save"]))
    def copy(self, way: str) -> None:
        """Go on with a copy; the original, destroyed, is not missed."""
        old = self.ours.model
        if way == "deepcopy":
            self.ours.model = copy.deepcopy(old)
        elif way == "pickle":
            self.ours.model = pickle.loads(pickle.dumps(old))
        else:
            file = io.BytesIO()
            torch.save(old, file)
            file.seek(0)
            self.ours.model = torch.load(file, weights_only=False)
        with torch.no_grad():
            for parameter in (*sl.tuned(old).parameters(), *old.parameters()):
                parameter.fill_(9.0)
        self.ours.handle = sl.tuned(self.ours.model)
        for node in self.theirs.nodes:
            node.grad = None
        self.compare()

    @rule()
    @precondition(is_on)
    def restart(self) -> None:
        """Off the model, which is as it was, and on again."""
        self.ours.handle.detach()
        assert same_state(self.ours.model.state_dict(), base().state_dict())
        assert all(p.requires_grad for p in self.ours.model.parameters())
        self.ours.handle = sl.attach(
            self.ours.model, self.ours.spec, list(self.ours.handle.targets), dtype=torch.float64, seed=3, **self.ours.options
        )
        self.ours.fill(self.seed())
        self.theirs.follow(self.ours, fresh=True)


TestSequences = Sequences.TestCase
TestSequences.settings = settings(
    max_examples=SEQUENCES, stateful_step_count=STEPS, suppress_health_check=list(HealthCheck), print_blob=True
)


@pytest.mark.parametrize("name", SPECS)
def test_the_oracle_is_the_other_oracle(name: str) -> None:
    """dW in torch, from which gradients come, is dW in numpy, written apart from it."""
    spec, options = SPECS[name]
    ours = Ours(spec, **options)
    ours.fill(1)
    found = Theirs(ours).deltas()
    for adapter in ours.adapters():
        shapes = {t: tuple(found[t].shape) for t in adapter.group.members}
        for target, expected in Bound(spec, adapter.group, adapter.graph, shapes, adapter).reference.items():
            torch.testing.assert_close(found[target].numpy(), expected, rtol=1e-12, atol=1e-14)


def test_the_sequences_meet_what_is_shared() -> None:
    """The specs do share roots and common factors at these sizes, so that the machine above has something to find."""
    shared = {"roots": 0, "common": 0, "flat": 0}
    for spec, options in SPECS.values():
        for adapter in Ours(spec, **options).adapters():
            scheme = getattr(adapter, "_scheme", None)
            shared["flat"] += scheme is None
            shared["roots"] += scheme is not None and bool(scheme.roots)
            shared["common"] += scheme is not None and bool(scheme.common)
    assert min(shared.values()) >= 6, shared
    assert isinstance(base(), nn.Module)
