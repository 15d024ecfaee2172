"""What the calls of one adapter share: x through common factors, and sub-networks without x. Against dW written out."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import noise
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import superlora_tn as sl

WIDTH, TOKENS, TARGETS = 64, 10, ["q_proj", "k_proj", "v_proj"]


class Attend(nn.Module):
    """q, k and v of one input, (batch, tokens, WIDTH) -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.q_proj(x)) * torch.tanh(self.k_proj(x)) + self.v_proj(x)


class Stack(nn.Module):
    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor] = lambda block, x: block(x)) -> None:
        super().__init__()
        self.layers, self.call = nn.ModuleList(Attend() for _ in range(2)), call

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.call(layer, x)
        return x


SPECS = {
    "lotr": sl.lotr(4, alpha=3),
    "CP over layer, type and head": sl.AdapterSpec(sl.CP(4), sl.PhysicalFold("layer type head out in", heads=4)),
    "Tucker over layer and type": sl.AdapterSpec(sl.Tucker((2, 2, 4, 4)), sl.PhysicalFold("layer type out in")),
    "tensor train over layer and type": sl.AdapterSpec(sl.TensorTrain(2), sl.PhysicalFold("layer type out in")),
    "vera": sl.vera(4),
}
# Each network in index notation, and the positions of a member (its layer and its type), apart from the library.
EQUATIONS = {
    "lotr": "ab,oa,ib->oi",
    "CP over layer, type and head": "r,r,hr,or,ir->hoi",
    "Tucker over layer and type": "lton,l,t,po,qn->pq",
    "tensor train over layer and type": "a,ab,boc,ci->oi",
    "vera": "o,or,r,ri->oi",
}
each_spec = pytest.mark.parametrize("name", SPECS)


def adapted(name: str, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> tuple[nn.Module, sl.Tuned]:
    torch.manual_seed(0)
    model = (Stack() if call is None else Stack(call)).double()
    tuned = sl.attach(model, SPECS[name], TARGETS, dtype=torch.float64, seed=0)
    with torch.no_grad():
        for k, parameter in enumerate(tuned.parameters()):
            parameter.add_(noise(*parameter.shape, seed=k, dtype=torch.float64), alpha=0.3)
    adapter = tuned.adapters[0]
    assert adapter._scheme.common, f"{name}: nothing is shared, so nothing is tested"
    assert adapter._roots or name == "vera", f"{name}: no sub-network is contracted beforehand"
    return model, tuned


def dense(name: str, tuned: sl.Tuned, nodes: list[Tensor]) -> dict[str, Tensor]:
    """dW of every target, written out as one einsum over its member's slices."""
    deltas = {}
    for target in tuned.targets:
        layer, kind = int(target.split(".")[1]), TARGETS.index(target.split(".")[-1])
        member = 3 * layer + kind
        own = list(nodes)
        if name == "lotr":
            own[0] = own[0][member]
        elif name == "vera":
            own[0], own[2] = own[0][member], own[2][member]
        else:
            first = 1 if name.startswith("Tucker") else 0
            own[first], own[first + 1] = own[first][layer], own[first + 1]
            if name.startswith("tensor"):
                own[1] = own[1][:, kind]
            else:
                own[first + 1] = own[first + 1][kind]
        deltas[target] = tuned.spec.scale * torch.einsum(EQUATIONS[name], *own).reshape(WIDTH, WIDTH)
    return deltas


def oracle(name: str, model: nn.Module, tuned: sl.Tuned, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Output of the base with W + dW, its nodes, and those of them that are trained."""
    nodes = [n.detach().clone() for n in tuned.adapters[0].tensors()]
    trained = [n.requires_grad_() for n, own in zip(nodes, tuned.adapters[0].tensors(), strict=True) if own.requires_grad]
    base = Stack().double()
    weights = {k: v.detach() for k, v in model.state_dict().items() if not k.startswith("superlora")}
    changed = {f"{t}.weight": weights[f"{t}.weight"] + d for t, d in dense(name, tuned, nodes).items()}
    return functional_call(base, weights | changed, (x,)), nodes, trained


def close(left: Tensor, right: Tensor) -> None:
    # The same products in another order: a few hundred float64 roundings of numbers of order 1 to 100.
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-10)


def compare(name: str, model: nn.Module, tuned: sl.Tuned, passes: int = 1) -> None:
    """Outputs and all gradients against the oracle's; the handle's gradients start from none."""
    x, z = (noise(2, TOKENS, WIDTH, dtype=torch.float64).requires_grad_() for _ in range(2))
    for _ in range(passes):
        ours = model(x)
        ours.pow(2).sum().backward()
    theirs, _, trained = oracle(name, model, tuned, z)
    close(ours, theirs)
    theirs.pow(2).sum().backward()
    close(x.grad, passes * z.grad)
    for own, parameter in zip(trained, [p for p in tuned.adapters[0].tensors() if p.requires_grad], strict=True):
        assert own.grad.abs().max() > 0
        close(parameter.grad, passes * own.grad)


@each_spec
@pytest.mark.parametrize("passes", [1, 3])
def test_outputs_and_gradients_are_the_oracles_also_accumulated(name: str, passes: int) -> None:
    compare(name, *adapted(name), passes)


@each_spec
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing_of_each_block(name: str, reentrant: bool) -> None:
    model, tuned = adapted(name, lambda block, x: checkpoint(block, x, use_reentrant=reentrant))
    compare(name, model, tuned, passes=2)


@each_spec
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing_of_the_whole_model(name: str, reentrant: bool) -> None:
    model, tuned = adapted(name)
    x, z = (noise(2, TOKENS, WIDTH, dtype=torch.float64).requires_grad_() for _ in range(2))
    checkpoint(model, x, use_reentrant=reentrant).pow(2).sum().backward()
    oracle(name, model, tuned, z)[0].pow(2).sum().backward()
    close(x.grad, z.grad)


@each_spec
def test_a_block_called_on_its_own_computes_the_same(name: str) -> None:
    model, _ = adapted(name)
    x = noise(2, TOKENS, WIDTH, dtype=torch.float64)
    whole = model(x)
    close(model.layers[1](model.layers[0](x)), whole)


@each_spec
def test_parameters_changed_between_passes_are_seen(name: str) -> None:
    model, tuned = adapted(name)
    x = noise(2, TOKENS, WIDTH, dtype=torch.float64)
    for change in range(3):
        for context in (torch.no_grad(), torch.enable_grad(), torch.inference_mode()):
            with context:
                close(model(x), oracle(name, model, tuned, x)[0].detach())
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.mul_(1.1 + 0.1 * change)


@each_spec
def test_values_written_through_data_between_passes_are_seen(name: str) -> None:
    # As averages of weights are often put in place; no version counter notes it.
    model, tuned = adapted(name)
    x = noise(2, TOKENS, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        model(x)
        for parameter in tuned.parameters():
            parameter.data.mul_(1.3)
        close(model(x), oracle(name, model, tuned, x)[0].detach())


@each_spec
@pytest.mark.parametrize("before", [torch.no_grad, torch.inference_mode])
def test_gradients_come_after_a_pass_without_them(name: str, before: Callable[[], Any]) -> None:
    model, tuned = adapted(name)
    with before():
        model(noise(2, TOKENS, WIDTH, dtype=torch.float64))
    compare(name, model, tuned)


@each_spec
def test_an_x_changed_in_place_between_two_calls_is_seen(name: str) -> None:
    model, tuned = adapted(name)
    x = noise(TOKENS, WIDTH, dtype=torch.float64)
    layer = model.layers[0]
    with torch.no_grad():
        layer.q_proj(x)
        x.mul_(2)
        delta = tuned.delta("layers.0.k_proj")
        close(layer.k_proj(x), nn.functional.linear(x, layer.k_proj.weight + delta, layer.k_proj.bias))


@each_spec
def test_copies_share_nothing_with_the_original(name: str) -> None:
    model, _ = adapted(name)
    x = noise(2, TOKENS, WIDTH, dtype=torch.float64)
    model.layers[0].q_proj(x)  # leaves something carried
    twin = copy.deepcopy(model)
    before = model(x).detach()
    with torch.no_grad():
        for parameter in sl.tuned(twin).parameters():
            parameter.zero_()
    twin(x)
    close(model(x), before)
    assert (twin(x) - before).abs().max() > 1e-3


class Products(TorchDispatchMode):
    """Counts matrix products that read x: (tokens, WIDTH) times something thin."""

    def __init__(self) -> None:
        super().__init__()
        self.thin, self.all = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm_.default):
            self.all += 1
            left, right = args[-2:]
            self.thin += left.shape[-1] == WIDTH and left.shape[-2] == 2 * TOKENS and right.shape[-1] < WIDTH
        return function(*args, **(kwargs or {}))


@each_spec
def test_x_meets_the_common_factors_once_a_block(name: str) -> None:
    model, _ = adapted(name)
    with Products() as products:
        model(noise(2, TOKENS, WIDTH, dtype=torch.float64))
    assert products.thin == len(model.layers)


def test_a_sub_network_without_x_is_contracted_once_for_all_members(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tuned = adapted("Tucker over layer and type")
    x = noise(2, TOKENS, WIDTH, dtype=torch.float64)
    with Products() as products:
        model(x)
    # Per block: x through the factor of `in`, and one product for each of q, k and v that adds to the output.
    blocks = len(model.layers) * (1 + 3)
    (root, _, _) = tuned.adapters[0]._roots[0]
    assert products.all <= blocks + len(root.together.steps)
    # Passes without gradients share them where they are asked to, as long as no parameter changes.
    with torch.no_grad(), tuned.fixed():
        model(x)
        with Products() as products:
            model(x)
        assert products.all == blocks
        for parameter in tuned.parameters():
            parameter.mul_(1.5)
        close(model(x), oracle("Tucker over layer and type", model, tuned, x)[0].detach())


@each_spec
def test_nothing_is_held_after_a_step(name: str) -> None:
    model, tuned = adapted(name)
    x = noise(2, TOKENS, WIDTH, dtype=torch.float64).requires_grad_()
    held: list[Any] = []

    def look(*_: Any) -> None:
        inside = tuned._passes.current()
        assert inside is not None
        held.extend(weakref.ref(t) for _, made in inside.kept.values() for t in made)
        held.extend(weakref.ref(carried[2].value) for carried in inside.carried.values())

    model.layers[-1].register_forward_hook(look)
    y = model(x)
    assert held
    assert tuned._passes.current() is None
    y.sum().backward()
    del y
    gc.collect()
    assert not [r for r in held if r() is not None]


@each_spec
def test_gradients_can_be_differentiated_again(name: str) -> None:
    model, tuned = adapted(name)
    found = []
    for ours in (True, False):
        x = noise(2, TOKENS, WIDTH, dtype=torch.float64).requires_grad_()
        if ours:
            y, inputs = model(x), [x, *(p for p in tuned.adapters[0].tensors() if p.requires_grad)]
        else:
            y, _, trained = oracle(name, model, tuned, x)
            inputs = [x, *trained]
        first = torch.autograd.grad(y.pow(2).sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs))
    for left, right in zip(*found, strict=True):
        # Second derivatives of a sum over 1,280 outputs, each squared again: relative to the largest.
        torch.testing.assert_close(left, right, rtol=1e-9, atol=float(1e-11 * right.abs().max()))


def test_an_adapter_that_moves_to_another_kind_of_device_is_planned_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from superlora_tn.contraction.profile import CPU, H200
    from superlora_tn.update import base

    for spec in (sl.lotr(4), sl.lorta(2)):
        model = Stack()
        adapter = sl.attach(model, spec, TARGETS).adapters[0]
        assert adapter.profile == CPU
        # The meta device stands in for a GPU.
        monkeypatch.setattr(base, "DEVICES", {"meta": H200})
        model.to("meta")
        assert adapter.profile == H200
        assert model(torch.empty(2, 3, WIDTH, device="meta")).shape == (2, 3, WIDTH)
        plans = [run.plan for run in (adapter._all.terms[0].run if spec == sl.lorta(2) else adapter._build,)]
        assert all(plan.device == H200 for plan in plans)
        monkeypatch.undo()
        model.to_empty(device="cpu")
        assert adapter.profile == CPU
