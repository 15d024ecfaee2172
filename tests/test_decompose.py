"""Networks from weights: recovered where a network made them, nearest where theory says what is, errors as they truly are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from strategies import SHAPES, Case, cases, targets
from torch import Tensor, nn

import superlora_tn as sl
from superlora_tn.declare.fold import FlatFold, PhysicalFold
from superlora_tn.declare.maps import Compose, Fastfood, Shuffle
from superlora_tn.declare.parts import CP, Dense, Kronecker, Network, Node, SpecError, TensorTrain, Tucker
from superlora_tn.network.budget import Budget
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.variants import dense, loha, lokr, lonkr, lora, lorta, lotr, superlora, vera
from superlora_tn.tools.decompose import Decomposition, FitError, Progress, decompose

Array = np.ndarray
# Sums of a few hundred products in float64, divided by the size of dW: 1e-13 leaves a factor of some hundreds.
ROUNDING = 1e-13
# Gauss-Newton steps end below 1e-14 or where rounding stops them; ten times the largest seen over the seeds here.
CONVERGED = 1e-12


def made(spec: AdapterSpec, shapes: Mapping[str, tuple[int, int]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """dW that a spec makes of random nodes, by the oracle, and its frozen nodes as files name them."""
    weights, frozen = {}, {}
    for k, bound in enumerate(Case(spec, dict(shapes)).bound()):
        weights |= {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in bound.reference.items()}
        for node in bound.graph.nodes:
            if not node.trainable:
                frozen[f"group{k}.{node.name}"] = torch.from_numpy(bound.values[node.name])
    return weights, frozen


def by_oracle(found: Decomposition) -> dict[str, Array]:
    """dW of a decomposition's nodes, by the oracle."""
    weights: dict[str, Array] = {}
    for k, bound in enumerate(Case(found.spec, dict(found.shapes)).bound()):
        weights |= bound.weights({n.name: found.tensors[f"group{k}.{n.name}"].numpy() for n in bound.graph.nodes})
    return weights


def noise(shapes: Mapping[str, tuple[int, int]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def distance(weights: Mapping[str, Tensor], found: Mapping[str, Array]) -> dict[str, float]:
    """The true relative error of each weight."""
    return {n: float(np.linalg.norm(w.numpy() - found[n]) / np.linalg.norm(w.numpy())) for n, w in weights.items()}


# --- what a declaration made is found again -------------------------------------------------------------------------

ADALORA = Network("o i", {"r": 3}, P="o r", lam=Node("r", init="zeros"), Q="r i")
BY_MEMBER = Network("m o i", {"r": 3}, B="m o r", A="r m i")
CLOSED = {
    "dense": (dense(alpha=2.0), SHAPES),
    "lora": (lora(3, alpha=6.0, rslora=True), SHAPES),
    "lora in a flat fold": (superlora(3, 2, 2), SHAPES),
    "lokr": (lokr(2), targets(2, 2, (24, 36))),
    "lokr, both low": (lokr(1, decompose_both=True), SHAPES),
    "lonkr": (lonkr(1, 3), targets(2, 1, (24, 36))),
    "kronecker": (AdapterSpec(Kronecker(Dense(), Dense())), SHAPES),
    "lotr": (lotr(3), SHAPES),
    "tucker with heads": (AdapterSpec(Tucker(2), PhysicalFold("layer head out in", 3)), targets(3, 1, (12, 10))),
    "train": (AdapterSpec(TensorTrain(2), PhysicalFold("layer type out in")), SHAPES),
    "lorta": (lorta(2, 3), SHAPES),
    "lorta in groups that cut weights": (lorta(2, 3, 5), SHAPES),
    "lorta of order 4": (lorta(2, 4, 2), SHAPES),
    "lorta by weight": (AdapterSpec(Tucker(2), FlatFold(3, "weight")), SHAPES),
    "shuffled": (lorta(2, 3, 2, projection=Shuffle(3)), SHAPES),
    "flat splits": (superlora(1, 3, 2, splits=2), SHAPES),
    "stacked": (AdapterSpec(CP(2), FlatFold(2, 3, stacked=True)), SHAPES),
    "adalora's form": (AdapterSpec(ADALORA), SHAPES),
    "a lora a member": (AdapterSpec(BY_MEMBER, PhysicalFold("member out in")), SHAPES),
}


@pytest.mark.parametrize("name", CLOSED)
def test_networks_without_loops_are_recovered_to_rounding(name: str) -> None:
    spec, shapes = CLOSED[name]
    weights, _ = made(spec, shapes)
    found = decompose(weights, spec)
    assert found.error < ROUNDING
    assert max(distance(weights, by_oracle(found)).values()) < ROUNDING
    assert all(f.start in ("singular values", "least squares") for f in found.fits)


RING = Network("(o1 o2) (i1 i2)", {"a": 2, "b": 2, "c": 2, "d": 2}, A="d o1 a", B="a o2 b", C="b i1 c", D="c i2 d")
FROZEN_A = Network("o i", {"r": 3}, B=Node("o r", init="zeros"), A=Node("r i", trainable=False))
INNER = Network("o i", {"r": 4, "s": 4}, B=Node("o r", trainable=False), R="r s", A=Node("s i", trainable=False))
ITERATED = {
    "loha of rank 1": (loha(1), SHAPES),
    "loha of rank 2": (loha(2), targets(2, 1, (24, 36))),
    "vera": (vera(4), SHAPES),
    "vera of a rank above in": (vera(24), targets(2, 1, (12, 18))),
    "lora with a frozen a": (AdapterSpec(FROZEN_A), SHAPES),
    "lora-xs": (AdapterSpec(INNER), SHAPES),
    "cp": (AdapterSpec(CP(4), PhysicalFold("layer type head out in", 3)), SHAPES),
    "flat cp": (AdapterSpec(CP(3), FlatFold(3, 2)), SHAPES),
    "ring": (AdapterSpec(RING), {"w": (12, 18)}),
    "fastfood": (lorta(2, 3, projection=Fastfood(0.5)), SHAPES),
    "fastfood in groups": (lorta(2, 3, 3, projection=Fastfood(0.3)), SHAPES),
    "fastfood of one length": (superlora(2, 2, projection=Fastfood(1.0)), SHAPES),
    "fastfood with tanh": (superlora(2, 2, projection=Fastfood(0.5, tanh=True)), SHAPES),
}


@pytest.mark.parametrize("name", ITERATED)
def test_other_networks_are_recovered_by_alternating_and_joint_steps(name: str) -> None:
    spec, shapes = ITERATED[name]
    weights, frozen = made(spec, shapes)
    found = decompose(weights, spec, start=frozen, steps=400, restarts=12)
    assert found.error < CONVERGED
    assert max(distance(weights, by_oracle(found)).values()) < 10 * CONVERGED  # a small weight beside large ones


def test_a_composed_map_is_seen_through() -> None:
    """Its oracle is the fold's own adapter, which `test_projections` compares with explicit matrices."""
    spec = superlora(2, 2, projection=Compose(Fastfood(0.5), Shuffle(1)))
    [bound] = Case(spec, dict(SHAPES)).bound()
    weights = {name: bound.adapter.delta(name).detach() for name in SHAPES}
    assert decompose(weights, spec).error < CONVERGED


def test_a_saved_adapter_gives_the_model_these_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(18, 12), nn.Linear(12, 18))
    weights = noise({"0": (12, 18), "1": (18, 12)})
    found = decompose(weights, lora(3, alpha=6.0))
    found.write(tmp_path, dtype=torch.float64)
    tuned = sl.load(model, tmp_path)
    for name, delta in found.deltas().items():
        assert torch.allclose(tuned.delta(name), delta, rtol=0, atol=1e-13)  # sums of three products of numbers below 4
    found.write(tmp_path)
    assert (
        next(iter(sl.load(nn.Sequential(nn.Linear(18, 12), nn.Linear(12, 18)), tmp_path).parameters())).dtype == torch.float32
    )


# --- what is nearest ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "rank"), [((12, 18), 3), ((30, 7), 7), ((5, 5), 1)])
def test_lora_is_the_truncated_singular_value_decomposition(shape: tuple[int, int], rank: int) -> None:
    weights = noise({"w": shape})
    found = decompose(weights, lora(rank))
    values = np.linalg.svd(weights["w"].numpy(), compute_uv=False)
    assert found.error == pytest.approx(math.sqrt((values[rank:] ** 2).sum() / (values**2).sum()), abs=ROUNDING)
    up, down = found.tensors["group0.factor_out"], found.tensors["group0.factor_in"]
    # Both factors carry half of each singular value: an unbalanced start trains unevenly.
    assert np.allclose((up**2).sum(0), values[:rank], atol=1e-12)
    assert np.allclose((down**2).sum(0), values[:rank], atol=1e-12)


def test_a_large_lora_is_as_near_as_can_be() -> None:
    """Of white noise, whose singular values hardly fall: the hardest case for the range finder."""
    weights = noise({"w": (700, 600)})
    values = np.linalg.svd(weights["w"].numpy(), compute_uv=False)
    least = math.sqrt((values[8:] ** 2).sum() / (values**2).sum())
    error = decompose(weights, lora(8)).error
    assert least - ROUNDING <= error <= least * (1 + 1e-6)  # as `singular.SETTLED` promises


def test_a_kronecker_product_is_van_loans_nearest() -> None:
    weights = noise({"w": (12, 20)})
    spec = AdapterSpec(Kronecker(Dense(), Dense(), factor=4))
    rearranged = weights["w"].numpy().reshape(4, 3, 4, 5).transpose(0, 2, 1, 3).reshape(16, 15)
    values = np.linalg.svd(rearranged, compute_uv=False)
    least = math.sqrt((values[1:] ** 2).sum() / (values**2).sum())
    assert decompose(weights, spec).error == pytest.approx(least, abs=ROUNDING)


def tails(tensor: Array, ranks: Mapping[int, int]) -> list[float]:
    """For each mode the energy that its rank alone must lose."""
    found = []
    for mode, rank in ranks.items():
        values = np.linalg.svd(np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1), compute_uv=False)
        found.append(float((values[rank:] ** 2).sum()))
    return found


def test_a_tucker_is_between_the_bounds_and_no_further_than_tensorlys() -> None:
    from tensorly.backend.pytorch_backend import PyTorchBackend
    from tensorly.decomposition import partial_tucker

    shapes = targets(5, 1, (9, 8))
    weights = noise(shapes)
    stacked = np.stack([w.numpy() for w in weights.values()])
    found = decompose(weights, lotr(3), tolerance=1e-9)
    lost = tails(stacked, {1: 3, 2: 3})
    energy = float((stacked**2).sum())
    assert max(lost) <= found.error**2 * energy <= sum(lost)  # De Lathauwer et al. 2000
    (core, factors), _ = partial_tucker(stacked, rank=[3, 3], modes=[1, 2], n_iter_max=500, tol=1e-10)
    theirs = stacked - np.einsum("mrs,or,is->moi", core, *factors)
    assert PyTorchBackend is not None
    # Both end at a best fit near the HOSVD; tolerances of 1e-9 a step leave less than 1e-6.
    assert found.error <= np.linalg.norm(theirs) / np.sqrt(energy) * (1 + 1e-6)


def test_a_train_is_no_further_than_tensorlys() -> None:
    from tensorly.decomposition import tensor_train

    weights = noise(targets(4, 1, (6, 7)))
    stacked = np.stack([w.numpy() for w in weights.values()])
    found = decompose(weights, AdapterSpec(TensorTrain(2), PhysicalFold("layer out in")))
    one, two, three = tensor_train(stacked, rank=[1, 2, 2, 1])
    theirs = np.linalg.norm(stacked - np.einsum("xla,aob,biy->loi", one, two, three)) / np.linalg.norm(stacked)
    assert found.error <= theirs  # the same decomposition, then improved


def test_loha_is_no_further_than_lora_of_its_rank() -> None:
    """LoHa with one factor at one is LoRA, and a fit starts there."""
    weights = noise({"w": (20, 24)})
    assert decompose(weights, loha(3), steps=30, restarts=0).error < decompose(weights, lora(3)).error


# --- errors are true, and no step makes them larger -----------------------------------------------------------------


@settings(max_examples=15)
@given(cases())
def test_errors_are_those_of_the_oracle_and_never_rise(case: Case) -> None:
    weights = noise(case.shapes, seed=1)
    found = decompose(weights, case.spec, steps=4, restarts=1)
    for name, error in distance(weights, by_oracle(found)).items():
        # Random nodes next to a tanh or a nearly singular least-squares problem may be large, and cancel.
        assert error == pytest.approx(found.errors[name], rel=1e-9, abs=1e-9)
    whole = [float(w.norm()) for w in weights.values()]
    missed = math.hypot(*(found.errors[n] * size for n, size in zip(weights, whole, strict=True)))
    assert found.error == pytest.approx(missed / math.hypot(*whole), rel=1e-12, abs=1e-12)
    assert found.error <= 1 + 1e-12
    for one in found.fits:
        # A network contracted again differs by rounding from the one that was improved.
        assert all(b <= a * (1 + 1e-12) + 1e-13 for a, b in zip(one.errors, one.errors[1:], strict=False))


def test_a_nonlinear_map_is_never_further_than_no_update() -> None:
    """Noise of size 1 is out of tanh's reach, and the closed form for its linear part lands far away."""
    shapes = {"layer.0.q_proj": (1, 1), "layer.1.q_proj": (8, 3)}
    found = decompose(noise(shapes, seed=1), AdapterSpec(CP(1), FlatFold(3, "weight"), Fastfood(1.0, 0, True)), steps=4)
    assert found.error <= 1


def test_more_rank_is_never_further() -> None:
    weights = noise(SHAPES)
    for family in (lora, lotr, lambda r: AdapterSpec(TensorTrain(r), PhysicalFold("layer type out in"))):
        errors = [decompose(weights, family(r)).error for r in (1, 2, 3)]
        assert errors == sorted(errors, reverse=True)


# --- what is given --------------------------------------------------------------------------------------------------


def test_frozen_nodes_are_those_that_attach_draws_or_that_are_given() -> None:
    spec, shapes = vera(3), {"0": (12, 18), "1": (12, 18)}
    model = nn.Sequential(nn.Linear(18, 12), nn.Linear(18, 12))
    drawn = dict(sl.attach(model, spec, ["0", "1"], seed=7).named_buffers())
    found = decompose(noise(shapes), spec, seed=7, steps=3)
    [b] = [t for name, t in drawn.items() if name.endswith("node_B")]
    assert torch.equal(found.tensors["group0.B"], b.double())
    mine = torch.randn(12, 3, dtype=torch.float64)
    given_ = decompose(noise(shapes), spec, seed=7, steps=3, start={"group0.B": mine})
    assert torch.equal(given_.tensors["group0.B"], mine)
    assert torch.equal(given_.tensors["group0.A"], found.tensors["group0.A"])


def test_weights_of_zeros_give_an_adapter_that_starts_there() -> None:
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    found = decompose(zeros, lora(3), seed=5)
    assert found.error == 0.0
    assert all(error == 0.0 for error in found.errors.values())
    assert not any(bool(d.any()) for d in found.deltas().values())
    assert bool(found.tensors["group0.factor_in"].any())  # or it would never train


def test_a_weight_of_zeros_beside_others_has_the_error_it_has() -> None:
    weights = noise(SHAPES) | {next(iter(SHAPES)): torch.zeros(12, 18)}
    found = decompose(weights, lotr(2))
    assert found.errors[next(iter(SHAPES))] in (0.0, math.inf)
    assert 0 < found.error < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_any_dtype_and_memory_are_read_in_float64(dtype: torch.dtype) -> None:
    weight = torch.randn(18, 12).to(dtype).t().requires_grad_()
    found = decompose({"w": weight}, dense())
    assert torch.equal(found.deltas()["w"], weight.detach().double())
    assert found.tensors["group0.weight"].dtype == torch.float64


def test_a_budget_buys_the_declaration() -> None:
    found = decompose(noise(SHAPES), superlora(budget=500), steps=2)
    assert found.spec == superlora(budget=500).choose(SHAPES).spec
    assert isinstance(superlora(budget=500), Budget)


def test_a_seed_gives_one_result_and_leaves_torchs_generator_alone() -> None:
    weights, before = noise(targets(2, 1, (8, 9))), torch.get_rng_state()
    first, second = (decompose(weights, loha(2), steps=5, seed=3) for _ in range(2))
    assert all(torch.equal(first.tensors[n], second.tensors[n]) for n in first.tensors)
    assert torch.equal(before, torch.get_rng_state())
    assert not all(torch.equal(t, decompose(weights, loha(2), steps=5, seed=4).tensors[n]) for n, t in first.tensors.items())


def test_progress_is_told_of_every_step() -> None:
    told: list[Progress] = []
    found = decompose(noise(SHAPES), lorta(2, 3, 3), steps=3, progress=told.append)
    assert [p.steps for p in told] == [1, 2, 3] * 3
    assert [(p.group, p.groups) for p in told] == [(g, 3) for g in (1, 2, 3) for _ in range(3)]
    assert [p.error for p in told[:3]] == list(found.fits[0].errors[1:])


def test_it_prints() -> None:
    text = str(decompose(noise(SHAPES), lora(2)))
    assert "attention.q_proj" in text
    assert f"{lora(2).count(SHAPES):,} parameters" in text
    assert "in all the relative error is 0." in text
    assert text.endswith(f"; {len(decompose(noise(SHAPES), lora(2)).fits)} solved by SVD")
    fitted = str(decompose(noise(SHAPES), loha(2), steps=2, restarts=1))
    assert re.search(r"; \d+ fitted from [a-z ]+, \d+ steps", fitted), fitted
    same = {"weight": torch.zeros(4, 4)}
    assert str(decompose(same, lora(1))).endswith("1 with nothing to fit")


REFUSED = {
    "a vector": ({"w": torch.zeros(3)}, lora(1), {}, FitError, "'w' was given as (3,)"),
    "a convolution": ({"w": torch.zeros(3, 4, 1, 1)}, lora(1), {}, FitError, "(out, in * kernel)"),
    "whole numbers": ({"w": torch.zeros(3, 4, dtype=torch.int64)}, lora(1), {}, FitError, "torch.int64"),
    "complex": ({"w": torch.zeros(3, 4, dtype=torch.complex64)}, lora(1), {}, FitError, "real numbers"),
    "infinite": ({"w": torch.full((3, 4), math.inf)}, lora(1), {}, FitError, "'w' has numbers that are not finite"),
    "no weight": ({}, lora(1), {}, SpecError, "at least one weight"),
    "a bare matrix": (torch.ones(3, 4), lora(1), {}, FitError, "was given a Tensor; give dW by module name"),
    "no declaration": ({"w": torch.ones(3, 4)}, "lora", {}, SpecError, "spec='lora'; give an AdapterSpec"),
    "a scale of zero": ({"w": torch.ones(3, 4)}, lora(1, alpha=0.0), {}, FitError, "alpha=0.0"),
    "no step": ({"w": torch.ones(3, 4)}, lora(1), {"steps": 0}, SpecError, "steps=0"),
    "a tolerance of one": ({"w": torch.ones(3, 4)}, lora(1), {"tolerance": 1.0}, SpecError, "tolerance=1.0"),
    "restarts below zero": ({"w": torch.ones(3, 4)}, lora(1), {"restarts": -1}, SpecError, "restarts=-1"),
    "a seed in words": ({"w": torch.ones(3, 4)}, lora(1), {"seed": "a"}, SpecError, "seed='a'; a seed is a whole number"),
    "an array": ({"w": torch.ones(3, 4).numpy()}, lora(1), {}, FitError, "'w' was given as a ndarray; give a tensor"),
    "a tensor without memory": ({"w": torch.ones(3, 4, device="meta")}, lora(1), {}, FitError, "'w' was given without memory"),
    "a trained node": (
        {"w": torch.ones(3, 4)},
        lora(1),
        {"start": {"group0.factor_in": torch.ones(4, 1)}},
        FitError,
        "trained",
    ),
    "an unknown node": (
        {"w": torch.ones(3, 4)},
        vera(1),
        {"start": {"group0.C": torch.ones(4, 1)}},
        FitError,
        "group0.B, group0.A",
    ),
    "a frozen node's shape": ({"w": torch.ones(3, 4)}, vera(1), {"start": {"group0.A": torch.ones(1, 5)}}, FitError, "(1, 5)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fitted_is_refused_in_words(case: str) -> None:
    weights, spec, options, kind, words = REFUSED[case]
    with pytest.raises(kind) as caught:
        decompose(weights, spec, **options)
    assert words in str(caught.value)
