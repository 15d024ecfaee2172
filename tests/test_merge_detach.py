"""Merging, unmerging, disabling and detaching: the base comes back byte for byte, and merged equals attached."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from models import (
    DIM,
    TARGETS,
    VARIANTS,
    ConvNet,
    Tied,
    Tiny,
    assert_untouched,
    noise,
    perturb,
    same_state,
    seeded,
    snapshot,
)
from torch import Tensor, nn

import superlora_tn as sl

every_variant = pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONVOLUTIONS = ["first", "grouped", "strided", "line", "head"]


def trained(spec: sl.AdapterSpec, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, sl.Tuned]:
    model = seeded(0, Tiny).to(dtype)
    tuned = sl.attach(model, spec, TARGETS, seed=0)
    perturb(tuned, size=0.2)
    return model, tuned


def with_deltas(plain: nn.Module, deltas: dict[str, Tensor]) -> nn.Module:
    """A plain model in float64 whose weights are W + dW: what every state of an adapter must compute."""
    plain = copy.deepcopy(plain).double()
    for name, delta in deltas.items():
        weight = plain.get_submodule(name).weight
        weight.data += delta.double().reshape(weight.shape)
    return plain


def deltas_of(tuned: sl.Tuned) -> dict[str, Tensor]:
    return {name: tuned.delta(name).detach() for name in tuned.targets}


@every_variant
def test_merged_equals_attached_equals_dense(spec: sl.AdapterSpec) -> None:
    model, tuned = trained(spec)
    x = noise(2, 3, DIM)
    attached, expected = model(x), with_deltas(seeded(0, Tiny), deltas_of(tuned))(x.double()).float()
    tuned.merge()
    # float32 sums of up to 20 terms of order 1 in another order, through two blocks: a few tens of roundings of 6e-8.
    torch.testing.assert_close(attached, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@every_variant
@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerge_and_detach_give_the_base_back_byte_for_byte(spec: sl.AdapterSpec, dtype: torch.dtype) -> None:
    model, tuned = trained(spec, dtype)
    base = seeded(0, Tiny).to(dtype).state_dict()
    tuned.merge()
    assert not same_state(base, {k: model.state_dict()[k] for k in base})
    tuned.unmerge()
    assert same_state(base, {k: model.state_dict()[k] for k in base})
    tuned.merge()
    assert tuned.detach() is model
    assert same_state(base, model.state_dict())
    assert not any(m._forward_hooks for m in model.modules())


@every_variant
def test_delta_is_merged_minus_base(spec: sl.AdapterSpec) -> None:
    model, tuned = trained(spec)
    deltas, base = deltas_of(tuned), seeded(0, Tiny)
    tuned.merge()
    for name, delta in deltas.items():
        difference = model.get_submodule(name).weight - base.get_submodule(name).weight
        torch.testing.assert_close(difference, delta, rtol=0, atol=1e-6)  # one rounding of a weight of order 1
        assert torch.equal(tuned.delta(name), delta)
        assert delta.abs().max() > 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_rounds_once(dtype: torch.dtype) -> None:
    model, tuned = trained(sl.lora(2), dtype)
    deltas, base = deltas_of(tuned), seeded(0, Tiny).to(dtype)
    tuned.merge()
    for name, delta in deltas.items():
        expected = (base.get_submodule(name).weight.float() + delta).to(dtype)
        assert torch.equal(model.get_submodule(name).weight, expected)


def test_repeated_merging_does_not_drift() -> None:
    model, tuned = trained(sl.lotr(2), torch.bfloat16)
    tuned.merge()
    merged = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(20):
        tuned.unmerge()
        tuned.merge()
    assert same_state(model.state_dict(), merged)


@pytest.mark.parametrize("targets", [CONVOLUTIONS, *([c] for c in CONVOLUTIONS)], ids=str)
@pytest.mark.parametrize("variant", ["lora", "lotr", "lokr", "lorta groups", "dense", "stacked"])
def test_convolutions_merge(variant: str, targets: list[str]) -> None:
    model, x = seeded(0, ConvNet), noise(2, 4, 8, 8)
    tuned = sl.attach(model, VARIANTS[variant], targets, seed=0)
    perturb(tuned, size=0.2)
    attached, expected = model(x), with_deltas(seeded(0, ConvNet), deltas_of(tuned))(x.double()).float()
    torch.testing.assert_close(attached, expected, rtol=1e-4, atol=1e-5)
    tuned.merge()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    tuned.detach()
    assert same_state(model.state_dict(), seeded(0, ConvNet).state_dict())


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_is_the_base_bit_for_bit_also_while_merged(merged: bool) -> None:
    model, tuned = trained(sl.lokr(1))
    x, base = noise(2, 3, DIM), seeded(0, Tiny)
    if merged:
        tuned.merge()
    before = model(x)
    with tuned.disabled():
        assert torch.equal(model(x), base(x))
    assert tuned.merged is merged
    assert torch.equal(model(x), before)


def test_disabled_nests_and_survives_errors() -> None:
    model, tuned = trained(sl.lora(2))
    x, base = noise(2, 3, DIM), seeded(0, Tiny)
    before = model(x)
    with tuned.disabled():
        with tuned.disabled():
            assert torch.equal(model(x), base(x))
        assert torch.equal(model(x), base(x))
    with pytest.raises(KeyError), tuned.disabled():
        raise KeyError
    assert torch.equal(model(x), before)


def test_a_second_merge_raises_and_changes_nothing() -> None:
    model, tuned = trained(sl.lora(2))
    tuned.merge()
    before = snapshot(model)
    with pytest.raises(sl.AttachError, match=r"merged already; unmerge\(\) first"):
        tuned.merge()
    assert_untouched(model, before)
    tuned.unmerge()
    with pytest.raises(sl.AttachError, match="not merged"):
        tuned.unmerge()


def test_a_detached_handle_refuses_to_act() -> None:
    _, tuned = trained(sl.lora(2))
    tuned.detach()
    with pytest.raises(sl.AttachError, match="cannot merge: the adapter is detached; attach it again"):
        tuned.merge()
    with pytest.raises(sl.AttachError, match="cannot detach"):
        tuned.detach()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_variant
def test_nan_raises_and_merges_nothing(spec: sl.AdapterSpec, bad: float) -> None:
    model, tuned = trained(spec)
    with torch.no_grad():
        list(tuned.parameters())[-1].view(-1)[0] = bad
    if all(torch.isfinite(d).all() for d in deltas_of(tuned).values()):
        pytest.skip("tanh turns infinity into one")
    before = snapshot(model)
    with pytest.raises(sl.AttachError, match=r"dW of 'layers\.\d\..*' holds NaN or infinity; nothing was merged"):
        tuned.merge()
    assert not tuned.merged
    assert_untouched(model, before)


def test_a_weight_that_overflows_when_merged_raises() -> None:
    """A finite dW of 1e6 does not fit into float16, so the merged weight would be infinite."""
    model, tuned = trained(sl.lora(2), torch.float16)
    perturb(tuned, size=1e6)
    before = snapshot(model)
    assert all(torch.isfinite(d).all() for d in deltas_of(tuned).values())
    with pytest.raises(sl.AttachError):
        tuned.merge()
    assert_untouched(model, before)


def test_merging_a_tied_weight_raises() -> None:
    model = seeded(0, Tied)
    tuned = sl.attach(model, sl.lora(2), ["body", "lm_head"], seed=0)
    perturb(tuned)
    before = snapshot(model)
    with pytest.raises(sl.AttachError, match=r"weight of 'lm_head' is shared with 'embed.weight'"):
        tuned.merge()
    assert_untouched(model, before)
    assert not tuned.merged


def test_merging_one_module_of_several_names_works() -> None:
    """The same module under two names is one weight used twice, both times through the adapter: no one else changes."""
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    tuned = sl.attach(model, sl.lora(2), "all-linear", seed=0)
    perturb(tuned)
    x = noise(3, 4)
    before = model["b"](x)
    try:
        tuned.merge()
    except sl.AttachError:  # refusing is safe as well
        assert torch.equal(model["b"](x), before)
        return
    torch.testing.assert_close(model["b"](x), before)


def test_merging_a_computed_weight_holds_or_raises() -> None:
    """A parametrised weight is computed afresh at each use, so adding to it would be lost without a word."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    model = nn.ModuleDict({"layer": layer})
    try:
        tuned = sl.attach(model, sl.lora(2), ["layer"], seed=0)
        perturb(tuned)
        x = noise(3, 6)
        y = layer(x)
        tuned.merge()
    except (sl.AttachError, sl.LayerError):
        return
    torch.testing.assert_close(layer(x), y)


def test_detach_restores_requires_grad() -> None:
    model = seeded(0, Tiny)
    wanted = {n: k % 3 != 0 for k, (n, _) in enumerate(model.named_parameters())}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted[name])
    sl.attach(model, sl.lora(2), TARGETS).detach()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted


@pytest.mark.parametrize("first", [0, 1])
def test_detaching_two_handles_in_either_order_restores_requires_grad(first: int) -> None:
    model = seeded(0, Tiny)
    handles = [sl.attach(model, sl.lora(2), ["up"]), sl.attach(model, sl.lora(2), ["down"], name="second")]
    handles[first].detach()
    base = [p for n, p in model.named_parameters() if not n.startswith(("superlora", "second"))]
    assert not any(p.requires_grad for p in base)
    handles[1 - first].detach()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_handles_merge_and_unmerge_apart(order: tuple[int, int]) -> None:
    model = seeded(0, Tiny)
    handles = [sl.attach(model, sl.lora(2), ["up"], seed=0), sl.attach(model, sl.lotr(2), ["down"], name="second", seed=1)]
    for handle in handles:
        perturb(handle)
    x = noise(2, 3, DIM)
    y = model(x)
    for k in order:
        handles[k].merge()
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    for k in order:
        handles[k].detach()
    assert same_state(model.state_dict(), seeded(0, Tiny).state_dict())


def test_merged_models_predict_without_the_adapter() -> None:
    model, tuned = trained(sl.lotr(2))
    x = noise(2, 3, DIM)
    tuned.merge()
    plain = Tiny()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("superlora.")})
    assert torch.equal(model(x), plain(x))


def test_saving_while_merged_saves_the_adapter(tmp_path: Path) -> None:
    model, tuned = trained(sl.lotr(2))
    x = noise(2, 3, DIM)
    y = model(x)
    tuned.merge()
    tuned.save(tmp_path)
    fresh = seeded(0, Tiny)
    sl.load(fresh, tmp_path)
    assert torch.equal(fresh(x), y)


def test_a_copy_made_while_merged_unmerges_to_the_base() -> None:
    model, tuned = trained(sl.lotr(2))
    tuned.merge()
    twin = copy.deepcopy(model)
    handle = sl.tuned(twin)
    assert handle.merged
    handle.detach()
    assert same_state(twin.state_dict(), seeded(0, Tiny).state_dict())
    assert tuned.merged


class Life(RuleBasedStateMachine):
    """An adapter's life in random order, against a plain model: the base never changes, and outputs are W + dW's."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()

    @initialize(variant=st.sampled_from(sorted(VARIANTS)), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def start(self, variant: str, dtype: torch.dtype) -> None:
        self.spec, self.dtype = VARIANTS[variant], dtype
        self.base = seeded(0, Tiny).to(dtype)
        self.model: nn.Module = copy.deepcopy(self.base)
        self.tuned: sl.Tuned | None = None
        self.deltas: dict[str, Tensor] = {}
        self.saved: dict[str, Tensor] | None = None
        self.count = 0

    def is_attached(self) -> bool:
        return self.tuned is not None

    def is_merged(self) -> bool:
        return self.tuned is not None and self.tuned.merged

    @rule()
    @precondition(lambda self: not self.is_attached())
    def attach(self) -> None:
        self.tuned = sl.attach(self.model, self.spec, TARGETS, seed=self.count)
        self.deltas = {name: torch.zeros(shape) for name, shape in self.tuned.targets.items()}
        self.count += 1

    @rule()
    @precondition(lambda self: self.is_attached() and not self.is_merged())
    def train(self) -> None:
        optimizer = torch.optim.SGD(self.tuned.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            self.model(noise(2, 3, DIM, seed=self.count, dtype=self.dtype)).float().square().mean().backward()
            optimizer.step()
        self.count += 1
        self.deltas = deltas_of(self.tuned)

    @rule()
    @precondition(is_attached)
    def fill(self) -> None:
        perturb(self.tuned, seed=self.count, size=0.2)
        self.count += 1
        if self.is_merged():  # the weights hold the dW of before; the new one enters at the next merge
            self.tuned.unmerge()
        self.deltas = deltas_of(self.tuned)

    @rule()
    @precondition(lambda self: self.is_attached() and not self.is_merged())
    def merge(self) -> None:
        self.tuned.merge()

    @rule()
    @precondition(is_merged)
    def unmerge(self) -> None:
        self.tuned.unmerge()

    @rule()
    @precondition(is_attached)
    def disabled(self) -> None:
        x = noise(2, 3, DIM, seed=self.count, dtype=self.dtype)
        with self.tuned.disabled():
            assert torch.equal(self.model(x), self.base(x))

    @rule()
    @precondition(is_attached)
    def save(self) -> None:
        self.tuned.save(self.folder.name)
        self.saved = self.deltas

    @rule()
    @precondition(lambda self: self.saved is not None)
    def load(self) -> None:
        self.model = copy.deepcopy(self.base)
        self.tuned, self.deltas = sl.load(self.model, self.folder.name), self.saved

    @rule()
    @precondition(is_attached)
    def detach(self) -> None:
        assert self.tuned.detach() is self.model
        self.tuned, self.deltas = None, {}
        assert same_state(self.model.state_dict(), self.base.state_dict())
        assert all(p.requires_grad for p in self.model.parameters())

    @rule()
    def deepcopy(self) -> None:
        old, self.model = self.model, copy.deepcopy(self.model)
        if self.is_attached():
            perturb(sl.tuned(old), seed=99, size=9.0)  # must not reach the copy
            self.tuned = sl.tuned(self.model)

    def teardown(self) -> None:
        self.folder.cleanup()

    @invariant()
    def base_and_outputs_hold(self) -> None:
        values = self.model.state_dict()
        base = self.base.state_dict()
        changed = {f"{n}.weight" for n in self.deltas} if self.is_merged() else set()
        assert same_state({k: v for k, v in base.items() if k not in changed}, {k: values[k] for k in base if k not in changed})
        for name, delta in self.deltas.items():
            if self.is_attached():
                assert torch.equal(self.tuned.delta(name), delta)
        x = noise(2, 3, DIM, seed=1000)
        expected = with_deltas(self.base, self.deltas)(x.double())
        # Half the digits of the dtype, through two blocks of values of order 1.
        tolerance = 1e-4 if self.dtype == torch.float32 else 0.15
        torch.testing.assert_close(self.model(x.to(self.dtype)).double(), expected, rtol=tolerance, atol=tolerance)


TestLife = Life.TestCase
TestLife.settings = settings(stateful_step_count=12, suppress_health_check=list(HealthCheck))
