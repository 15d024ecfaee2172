"""What a budget buys and what a dW holds, against counts, plans and decompositions made apart."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import Largest
from torch import nn

import superlora_tn as sl
from superlora_tn.cli import main
from superlora_tn.contraction.plan import choose
from superlora_tn.network.catalogue import VARIANTS
from superlora_tn.tools.decompose import FitError
from superlora_tn.tools.suggest import cost

SHAPES = {f"layers.{k}.{name}": (48, 32) for k in range(4) for name in ("q", "v")}


def test_every_variant_is_suggested_or_refused_with_a_reason():
    made = sl.suggest(SHAPES, 2000)
    assert {one.variant for one in made.found} | set(made.refused) == set(VARIANTS)
    assert not {one.variant for one in made.found} & set(made.refused)
    assert "dense" in made.refused
    assert "2,000" in made.refused["dense"]
    assert len(made.found) > 15
    assert "lokr" in str(made)


def test_suggestions_fit_and_the_next_rank_does_not():
    made = sl.suggest(SHAPES, 2000)
    for one in made.found:
        tuned = sl.attach(model := blocks(), one.spec, ["q", "v"], seed=0)
        assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == one.count <= 2000
        assert model is not None
    ranks = {one.variant: one for one in made.found}
    assert ranks["lora"].spec == sl.lora(3)  # 8 weights of 80 numbers a rank: 3 ranks are 1,920
    assert ranks["lora"].count == 1920


def blocks() -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList()
    for _ in range(4):
        layer = nn.Module()
        layer.q, layer.v = nn.Linear(32, 48), nn.Linear(32, 48)
        model.layers.append(layer)
    return model


def test_a_model_and_its_shapes_are_suggested_the_same():
    model = blocks()
    assert sl.suggest(model, 2000, ["q", "v"]) == sl.suggest(SHAPES, 2000)
    halved = sl.suggest(model, 2000, ["q"])
    assert {one.variant: one.count for one in halved.found}["lora"] == 6 * 4 * 80


@pytest.mark.parametrize("budget", [600, 1900, 2400])
def test_a_budget_of_convolutions_is_what_is_attached(budget):
    """Their kernels stay whole: krona's 8 x 8 and 8 x 8 x 9 of one, 8 x 8 and 16 x 8 x 9 of the other."""

    def convolutions() -> nn.Module:
        return nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 128, 3))

    made = sl.suggest(convolutions(), budget, ["0", "1"])
    counts = {one.variant: one.count for one in made.found}
    assert {"lokr", "lonkr"} <= set(counts)
    assert counts.get("krona") == (None if budget < 1856 else 64 + 576 + 64 + 1152)
    for one in made.found:
        assert sl.attach(convolutions(), one.spec, ["0", "1"]).num_parameters == one.count <= budget
    shapes, kernels = {"0": (64, 576), "1": (128, 576)}, {"0": (3, 3), "1": (3, 3)}
    assert sl.suggest(shapes, budget, kernels=kernels) == made
    for rank in (1, 2, 5):  # no rank between is left out
        found = sl.attach(convolutions(), sl.lokr(rank), ["0", "1"]).num_parameters
        assert found > budget or found <= counts["lokr"]
    with pytest.raises(sl.SpecError, match="the model shows its own"):
        sl.suggest(convolutions(), budget, ["0"], kernels=kernels)


def test_the_cost_of_a_step_is_that_of_its_plans():
    (_, graph), *rest = sl.lora(3).lay_out(SHAPES)
    assert len(rest) == 7
    choice = choose(graph, (48, 32), 256)
    price = choice.delta_price if choice.route == "delta" else choice.chosen.price
    found = cost(sl.lora(3), SHAPES, 256)
    assert found.seconds == pytest.approx(8 * price, rel=1e-12)
    assert found.state == 16 * 1920
    frozen = cost(sl.lora_fa(3), SHAPES, 256)
    assert frozen.state == 8 * (16 * 48 * 3 + 4 * 32 * 3)
    mapped = cost(sl.fourier_ft(5), SHAPES, 256)
    assert mapped.state == 16 * 5 * 8  # the coefficients; the dense matrix that they make is on no list of tensors
    assert cost(sl.dora(sl.lora(3)), SHAPES, 256).state == 16 * (1920 + 8 * 48)
    flat = cost(sl.lorta(2), SHAPES, 256)
    assert flat.peak >= 4 * 8 * 48 * 32  # the vector of all weights
    assert cost(sl.lora(3), SHAPES, 4096).seconds > found.seconds


def test_a_flat_sum_builds_each_term_and_multiplies_each_weight_once():
    part, fold = sl.CP(2), sl.FlatFold(2)
    ((_, graph),) = sl.AdapterSpec(part, fold).lay_out(SHAPES)
    one, two = (cost(sl.AdapterSpec(sl.Sum(*parts), fold), SHAPES, 256).seconds for parts in ([part], [part, part]))
    assert two - one == pytest.approx(sl.make_plan(graph, "delta").price, rel=1e-9)


def test_the_groups_of_a_flat_fold_are_built_together():
    """Their time was that of one group alone, and the surplus was on no list of tensors."""
    ((group, graph),) = sl.AdapterSpec(sl.CP(2), sl.FlatFold(5, groups=4)).lay_out(SHAPES)
    assert group.volume == 5**5 > 8 * 48 * 32 / 4  # 3,072 elements a group
    found = cost(sl.AdapterSpec(sl.CP(2), sl.FlatFold(5, groups=4)), SHAPES, 256)
    assert found.peak == 4 * 4 * 5**5
    dense = sl.AdapterSpec(sl.Dense(), sl.FlatFold(2))
    product = cost(dense, SHAPES, 256).seconds - sl.make_plan(dense.lay_out(SHAPES)[0][1], "delta").price
    assert found.seconds - product == pytest.approx(sl.make_plan(graph, "delta", fixed=False).price, rel=1e-9)


def test_a_flat_network_that_multiplies_is_of_its_own_side():
    """It was priced as a matrix (out, in), which it is not."""
    spec, shapes = sl.AdapterSpec(sl.CP(2), sl.FlatFold(2)), {"w": (200, 10)}
    found, square = cost(replace(spec, join=sl.Multiply("right")), shapes, 16), cost(spec, {"w": (10, 10)}, 16)
    assert (found.seconds, found.peak) == (square.seconds, square.peak) == (found.seconds, 4 * 10 * 10)


@pytest.mark.parametrize(
    ("spec", "tokens", "numbers"),
    [
        (sl.oft(32), 16, 2 * 32 * 32),  # the rotations of 2 blocks
        (sl.hra(2), 1024, 1024 * 2),  # x goes through two thin matrices, and none of 64 x 64 is made
        (sl.fourier_ft(5), 16, 96 * 64),
        (sl.uni_lora(9, rank=2), 16, 3 * 96 * 2),  # B of all weights at once, drawn from the 9 numbers
    ],
    ids=["oft", "hra", "fourier_ft", "uni_lora"],
)
def test_what_maps_make_counts_as_memory(spec, tokens, numbers):
    """The rotations of `oft` took none, and the vectors of `uni_lora` those of one weight."""
    assert cost(spec, {f"layers.{k}.q": (96, 64) for k in range(3)}, tokens).peak == 4 * numbers


class Beside(nn.Module):
    """All weights on one input."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*reversed(shape), bias=False) for shape in SHAPES.values())

    def forward(self, x):
        return [layer(x) for layer in self.layers]


@pytest.mark.parametrize(
    ("projection", "numbers"),
    [
        (sl.Fastfood(0.25), 2 * 8192),  # of 6,144
        (sl.Fastfood(0.25, order="GB"), 8 * 48 * 32),
        (sl.Compose(sl.Shuffle(1), sl.Fastfood(0.25)), 2 * 8192),
        (sl.Shuffle(1), 2 * 79**2),  # the surplus
    ],
)
def test_what_a_fixed_map_pads_counts_as_memory(projection, numbers):
    spec = sl.AdapterSpec(sl.CP(2), sl.FlatFold(2, groups=2), projection)
    assert cost(spec, SHAPES, 16).peak == 4 * numbers
    model = Beside()
    sl.attach(model, spec, [f"layers.{k}" for k in range(len(SHAPES))], seed=0)
    with Largest() as seen, torch.no_grad():
        model(torch.randn(16, 32))
    assert seen.numel == numbers


def test_suggestions_come_cheapest_first():
    seconds = [one.cost.seconds for one in sl.suggest(SHAPES, 2000).found]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sl.suggest(SHAPES, 0), "budget=0"),
        (lambda: sl.suggest(SHAPES, 9, variants=["lorra"]), "'lorra'"),
        (lambda: sl.suggest(SHAPES, 9, variants="lora"), r"variants='lora'; give a list, such as variants=\['lora', 'lokr'\]"),
        (lambda: sl.suggest(SHAPES, 9, device="cpu"), "device='cpu'; give a Device"),
        (lambda: sl.suggest(SHAPES, 9, kernels={"conv": (3, 3)}), "kernels name 'conv'"),
        (lambda: sl.probe(torch.ones(4, 4), variants="lora"), "variants='lora'; give a list"),
        (lambda: sl.probe(torch.ones(4, 4), 9), "budgets=9; give a list"),
        (lambda: sl.suggest({}, 9), "no weight"),
        (lambda: sl.suggest(SHAPES, 9, ["q"]), "shapes and targets"),
        (lambda: sl.suggest(blocks(), 9), "without targets"),
        (lambda: sl.probe(torch.ones(4, 4), variants=["lorra"]), "'lorra'"),
        (lambda: sl.probe(torch.ones(4, 4), [0]), "budgets=0"),
        (lambda: sl.probe(torch.ones(4, 4), [1]), "budget of 1"),
        (lambda: sl.probe(torch.ones(4, 4), []), "no budget"),
    ],
)
def test_requests_that_make_no_sense_are_refused(call, words):
    with pytest.raises(sl.SpecError, match=words):
        call()


def test_a_dw_of_zeros_is_refused():
    with pytest.raises(FitError, match="zeros"):
        sl.probe(torch.zeros(4, 4))


@pytest.mark.parametrize(("delta", "words"), [(np.ones((4, 4)), "a ndarray"), (torch.ones(4), r"\(4,\) of torch.float32")])
def test_a_dw_that_is_no_matrix_is_refused(delta, words):
    with pytest.raises(FitError, match=words):
        sl.probe(delta)


def test_loras_energy_is_that_of_the_singular_values():
    delta = torch.randn(24, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = np.linalg.svd(delta.numpy(), compute_uv=False) ** 2
    found = sl.probe(delta, [40, 80, 160, 640], ["lora"])
    assert [p.parameters for p in found.points] == [40, 80, 160, 640]
    for point, rank in zip(found.points, (1, 2, 4, 16), strict=True):
        # Both are singular value decompositions in float64.
        assert point.energy == pytest.approx(values[:rank].sum() / values.sum(), abs=1e-12)


def test_a_structure_is_known_by_its_energy():
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    found = sl.probe(torch.kron(one, two), [32], ["lora", "krona"])
    held = {point.variant: point.energy for point in found.points}
    assert held["krona"] == pytest.approx(1, abs=1e-12)  # nearest Kronecker product, float64
    assert held["lora"] < 0.9
    low = torch.randn(16, 1, generator=generator, dtype=torch.float64) @ torch.randn(1, 16, generator=generator).double()
    held = {point.variant: point.energy for point in sl.probe(low, [32], ["lora", "krona"]).points}
    assert held["lora"] == pytest.approx(1, abs=1e-12)
    assert held["krona"] < 0.9


def test_all_structures_are_probed_by_default_and_drawn(tmp_path):
    delta = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    found = sl.probe({"layers.0.q": delta, "layers.1.q": 2 * delta}, [256, 512])
    assert {p.variant for p in found.points} >= {"lora", "lokr", "lotr", "lorta"}
    assert all(0 < p.energy <= 1 and p.parameters <= 512 for p in found.points)
    shared = max(p.energy for p in found.points if p.variant == "lotr")
    apart = max(p.energy for p in found.points if p.variant == "lora")
    assert shared > apart  # the two weights are multiples of each other
    assert "energy" in str(found)
    pytest.importorskip("matplotlib", reason="the demo extra is not installed")
    assert found.plot(tmp_path / "probe.png").stat().st_size > 10_000


def test_the_command_suggests(capsys):
    assert main(["suggest", "2000", "--shape", "48x32", "--weights", "8", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    lora = next(row for row in data["found"] if row["variant"] == "lora")
    assert lora["parameters"] == 1920
    assert sl.AdapterSpec.from_dict(lora["spec"]) == sl.lora(3)
    assert main(["suggest", "2000", "--shape", "48x32", "--weights", "8"]) == 0
    assert "at most 2,000 parameters" in capsys.readouterr().out
    assert main(["suggest", "2000", "--device", "abacus"]) == 2


def test_what_takes_more_than_dense_fine_tuning_is_left_out() -> None:
    found = sl.suggest([(64, 64)] * 2, 20_000)
    assert max(one.count for one in found.found) == 2 * 64 * 64
    assert {"uni_lora", "tiny_lora", "lora_fa", "hra"} <= set(found.refused)
    assert "more than the 8,192 of dense fine-tuning" in found.refused["hra"]
    assert "left out: " in str(found)
