"""Random sequences of operations on several adapters of one model, at outputs and at weights, against its dense weights.

After each operation the model computes as a plain one whose weights are the base's and the sum of all dW that act, with their
strengths; when all have left, every weight has its own bits and trains again. The thorough profile runs 1,000 sequences.
"""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from models import noise
from torch import Tensor, nn

import superlora_tn as sl

WIDTH, LAYERS, NAMES = 8, ("0", "2"), ("a", "b", "c")
SPECS = {
    "lora": sl.lora(2),
    "lokr": sl.lokr(1),
    "shira": sl.shira(9),
    "fourier_ft": sl.fourier_ft(7),
    "hira": sl.hira(1),
    "lorta": sl.lorta(2),
    "sum": sl.AdapterSpec(sl.Sum(sl.CP(1), sl.Kronecker(sl.Dense(), sl.Dense()))),
}
THOROUGH = settings().max_examples > 100
SEQUENCES, STEPS = (1000, 14) if THOROUGH else (40, 10)
X = noise(3, WIDTH, seed=9, dtype=torch.float64)


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).double()


@dataclass
class Known:
    """What is known of an adapter without asking it: dW of strength 1 by layer, and how it is used."""

    deltas: dict[str, Tensor]
    strength: float = 1.0
    is_on: bool = True
    is_merged: bool = False


class Several(RuleBasedStateMachine):
    """One model, at most three adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.model = net()
        self.weights = {name: self.stored(name).detach().clone() for name in LAYERS}
        self.known: dict[str, Known] = {}

    @initialize(places=st.permutations(["output", "weight"]), specs=st.tuples(*[st.sampled_from(sorted(SPECS))] * 2))
    def begin(self, places: list[Any], specs: tuple[str, str]) -> None:
        """Two on one layer, of which one shows W + dW."""
        for k in range(2):
            self.add(NAMES[k], specs[k], ["0"], places[k], seed=10 * k)

    def stored(self, name: str) -> Tensor:
        found = self.model.get_submodule(name)._parameters["weight"]
        assert found is not None
        return found

    def expected(self) -> Tensor:
        whole = {name: weight.clone() for name, weight in self.weights.items()}
        for own in self.known.values():
            for name, delta in own.deltas.items() if own.is_on else ():
                whole[name] += own.strength * delta
        plain = net()
        for name, weight in whole.items():
            plain.get_submodule(name).weight.data.copy_(weight)
        found: Tensor = plain(X).detach()
        return found

    def compare(self) -> None:
        # A few dozen float64 products in another order; a weight that was merged and left holds its own bits again.
        torch.testing.assert_close(self.model(X).detach(), self.expected(), rtol=1e-11, atol=1e-11)

    @invariant()
    def agrees(self) -> None:
        self.compare()
        assert set(self.known) == set(self.handles())
        base = {p.requires_grad for n, p in self.model.named_parameters() if n.split(".")[0] in (*LAYERS, "1")}
        assert base == {not self.known}

    def handles(self) -> dict[str, sl.Tuned]:
        return {n: m for n, m in self.model.named_modules() if isinstance(m, sl.Tuned)}

    def some(self, data: st.DataObject, **wanted: bool) -> str | None:
        names = [n for n, own in self.known.items() if all(getattr(own, key) is value for key, value in wanted.items())]
        return data.draw(st.sampled_from(sorted(names))) if names else None

    @rule(
        name=st.sampled_from(NAMES),
        spec=st.sampled_from(sorted(SPECS)),
        where=st.sampled_from([["0"], ["2"], ["0", "2"]]),
        at=st.sampled_from([None, "output", "weight"]),
        seed=st.integers(0, 99),
    )
    def attach(self, name: str, spec: str, where: list[str], at: Any, seed: int) -> None:
        if name not in self.known:
            self.add(name, spec, where, at, seed)

    def add(self, name: str, spec: str, where: list[str], at: Any, seed: int) -> None:
        handle = sl.attach(self.model, SPECS[spec], where, name=name, at=at, dtype=torch.float64)
        with torch.no_grad():
            for k, parameter in enumerate(handle.parameters()):
                parameter.copy_(0.3 * noise(parameter.numel(), seed=seed + k, dtype=torch.float64).reshape(parameter.shape))
        self.known[name] = Known({target: handle.delta(target).detach().clone() for target in where})

    @rule(data=st.data())
    def merge(self, data: st.DataObject) -> None:
        name = self.some(data, is_merged=False)
        if name is None:
            return
        if not self.known[name].is_on:
            with pytest.raises(sl.AttachError, match="switched off"):
                self.handles()[name].merge()
            return
        self.handles()[name].merge()
        self.known[name].is_merged = True

    @rule(data=st.data())
    def unmerge(self, data: st.DataObject) -> None:
        if (name := self.some(data, is_merged=True)) is not None:
            self.handles()[name].unmerge()
            self.known[name].is_merged = False

    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        if (name := self.some(data)) is not None:
            self.handles()[name].detach()
            del self.known[name]

    @rule(data=st.data())
    def bake(self, data: st.DataObject) -> None:
        """Refused where another is merged into one of its weights; then nothing of the weights changes but the merge."""
        name = self.some(data, is_on=True)
        if name is None:
            return
        own = self.known[name]
        if any(o.is_merged and set(o.deltas) & set(own.deltas) for n, o in self.known.items() if n != name):
            with pytest.raises(sl.AttachError, match="another adapter is merged"):
                self.handles()[name].bake()
            own.is_merged = self.handles()[name].merged
            return
        self.handles()[name].bake()
        del self.known[name]
        for target, delta in own.deltas.items():
            wanted = self.weights[target] + own.strength * delta
            torch.testing.assert_close(self.stored(target).detach(), wanted, rtol=1e-13, atol=1e-13)
            self.weights[target] = self.stored(target).detach().clone()

    @rule(data=st.data(), value=st.sampled_from([0.5, 2.0, -1.0]))
    def strengthen(self, data: st.DataObject, value: float) -> None:
        if (name := self.some(data, is_merged=False)) is not None:
            self.handles()[name].strength = value
            self.known[name].strength = value

    @precondition(lambda self: not any(own.is_merged for own in self.known.values()))
    @rule(data=st.data(), back=st.booleans())
    def use(self, data: st.DataObject, back: bool) -> None:
        wanted = (
            data.draw(st.dictionaries(st.sampled_from(sorted(self.known)), st.sampled_from([1.0, 0.25]))) if self.known else {}
        )
        before = copy.deepcopy(self.known)
        used = sl.use(self.model, wanted)
        for name, own in self.known.items():
            own.is_on, own.strength = name in wanted, wanted.get(name, own.strength)
        self.compare()
        if back:
            with used:
                pass
            self.known = before

    @rule(data=st.data())
    def disabled(self, data: st.DataObject) -> None:
        name = self.some(data)
        if name is not None and not any(own.is_merged for n, own in self.known.items() if n != name):
            was, self.known[name].is_on = self.known[name].is_on, False
            with self.handles()[name].disabled():
                self.compare()
            self.known[name].is_on = was

    @rule()
    def rows(self) -> None:
        """Of adapters at outputs that are on, each row its own; one that is off is refused."""
        handles = self.handles()
        if any(handle.merged or handle.held for handle in handles.values()):
            return
        for name in (n for n, own in self.known.items() if not own.is_on):
            with pytest.raises(sl.AttachError, match=f"'{name}' is switched off"), sl.rows(self.model, [name] * 3):
                pass
        names = [*(n for n, own in self.known.items() if own.is_on), None, None, None][:3]
        wanted = []
        for k, name in enumerate(names):
            own = {n: copy.copy(o) for n, o in self.known.items()}
            for n, o in own.items():
                o.is_on = o.is_on and n == name
            kept, self.known = self.known, own
            wanted.append(self.expected()[k])
            self.known = kept
        with sl.rows(self.model, names):
            torch.testing.assert_close(self.model(X).detach(), torch.stack(wanted), rtol=1e-11, atol=1e-11)

    @rule(way=st.sampled_from(["deepcopy", "pickle", "save"]))
    def copied(self, way: str) -> None:
        if way == "deepcopy":
            self.model = copy.deepcopy(self.model)
        elif way == "pickle":
            self.model = pickle.loads(pickle.dumps(self.model))
        else:
            buffer = io.BytesIO()
            torch.save(self.model, buffer)
            buffer.seek(0)
            self.model = torch.load(buffer, weights_only=False)

    @rule(assign=st.booleans())
    def state(self, assign: bool) -> None:
        self.model.load_state_dict({k: v.clone() for k, v in self.model.state_dict().items()}, assign=assign)

    def teardown(self) -> None:
        for handle in self.handles().values():
            handle.detach()
        for name, weight in self.weights.items():
            assert torch.equal(self.stored(name), weight)
            assert type(self.model.get_submodule(name)) is nn.Linear
        assert all(p.requires_grad for p in self.model.parameters())


TestSeveral = Several.TestCase
TestSeveral.settings = settings(
    max_examples=SEQUENCES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
