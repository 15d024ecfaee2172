"""Where an adapter is placed where nobody says so: at the weight where a dW that is built anyway costs less there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import seeded
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import superlora_tn as sl
from superlora_tn.contraction.plan import choose, weight_price

OUT, IN, ROWS = 48, 32, 64
BUILT = {"shira": sl.shira(60), "fourier_ft": sl.fourier_ft(60), "waveft": sl.waveft(60)}


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def model_of(layer: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    return seeded(0, lambda: nn.Sequential(layer(IN, OUT), nn.Tanh(), layer(OUT, OUT)))


def attached(spec: sl.AdapterSpec, model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, sl.Tuned]:
    model = model_of() if model is None else model
    tuned = sl.attach(model, spec, ["0", "2"], seed=1, **options)
    with torch.no_grad():
        for p in tuned.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape))
    return model, tuned


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """The output, and the FLOPs of the products of a forward and a backward."""
    with FlopCounterMode(display=False) as counter:
        y = model(x)
        y.square().sum().backward()
    return y.detach(), counter.get_total_flops()


@pytest.mark.parametrize("name", BUILT)
def test_one_product_with_the_weight_in_place_of_two(name: str) -> None:
    x = torch.randn(ROWS, IN, requires_grad=True)
    found = {}
    for at in (None, "output"):
        model, tuned = attached(BUILT[name], at=at)
        assert tuned.held == (["0", "2"] if at is None else [])
        assert tuned.num_parameters == 120
        y, flops = step(model, x)
        found[at] = (y, [p.grad for p in tuned.parameters()], flops)
    # x through W + dW, its gradient, and the gradient of dW: three products a layer, and not one more.
    least = 3 * 2 * ROWS * (IN * OUT + OUT * OUT)
    assert found[None][2] == least < found["output"][2]
    torch.testing.assert_close(found[None][0], found["output"][0], rtol=1e-4, atol=1e-4)  # float32: W + dW rounds once more
    for one, other in zip(found[None][1], found["output"][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_the_print_says_where() -> None:
    _, tuned = attached(BUILT["shira"])
    assert "2 adapted where the weight is read (0, ...)" in str(tuned)
    assert " weight " in str(tuned).splitlines()[2]
    _, tuned = attached(BUILT["shira"], at="output")
    assert "adapted where" not in str(tuned)
    assert " weight " not in str(tuned).splitlines()[2]


@pytest.mark.parametrize("options", [{"at": "output"}, {"route": "apply"}, {"route": "delta"}], ids=str)
def test_what_is_said_in_words_stays(options: dict[str, str]) -> None:
    assert attached(BUILT["shira"], **options)[1].held == []


OTHERS = {
    "x goes through thin factors": sl.lora(2),
    "nothing is built for few rows": sl.dense(),
    "circulant blocks have a way for x": sl.c3a(16),
    "dropout needs x": sl.shira(60, dropout=0.5),
    "rows are scaled": sl.dora(sl.shira(60)),
    "a sum": sl.AdapterSpec(sl.Sum(sl.shira(60).network, sl.CP(1))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_cheaper_or_needs_the_input_stays_at_the_output(name: str) -> None:
    assert attached(OTHERS[name])[1].held == []


def test_layers_that_are_no_plain_ones_of_the_same_dtype_stay_at_the_output() -> None:
    spec = BUILT["shira"]
    # An adapter in float32 would lose its digits in W's own half precision.
    assert attached(spec, model_of().bfloat16())[1].held == []
    assert attached(spec, model_of().double(), dtype=torch.float64)[1].held == ["0", "2"]
    assert attached(spec, model_of(Own))[1].held == []
    with torch.device("meta"):
        empty = model_of()
    assert sl.attach(empty, spec, ["0", "2"]).held == []
    convolution = nn.Sequential(nn.Conv1d(4, 8, 3))
    assert sl.attach(convolution, sl.shira(9), ["0"]).held == []
    table = nn.Sequential(nn.Embedding(9, 8))
    assert sl.attach(table, sl.shira(9), ["0"]).held == []


@pytest.mark.parametrize("known", ["is_initialized", "is_torchelastic_launched"])
def test_where_several_processes_run_all_stays_at_the_outputs(known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, known, lambda: True)
    assert attached(BUILT["shira"])[1].held == []


def test_weights_of_one_network_are_all_placed_alike() -> None:
    spec = sl.AdapterSpec(sl.Network("m o i", S=sl.Node("m o i", map=sl.Selected(20))), sl.PhysicalFold("member out in"))
    plain = nn.Sequential(nn.Linear(OUT, OUT), nn.Tanh(), nn.Linear(OUT, OUT))
    assert attached(spec, plain)[1].held == ["0", "2"]
    mixed = nn.Sequential(nn.Linear(OUT, OUT), nn.Tanh(), Own(OUT, OUT))
    assert attached(spec, mixed)[1].held == []


def test_a_saved_one_is_placed_anew(tmp_path: Path) -> None:
    model, tuned = attached(BUILT["waveft"])
    x = torch.randn(5, IN)
    y = model(x)
    tuned.save(tmp_path)
    for at, held in ((None, 2), ("output", 0)):
        again = model_of()
        assert len(sl.load(again, tmp_path, at=at).held) == held
        torch.testing.assert_close(again(x), y, rtol=1e-5, atol=1e-5)  # float32, rounded in W + dW or not
    tuned.merge()
    torch.testing.assert_close(model(x), y, rtol=1e-6, atol=1e-6)
    tuned.detach()
    assert torch.equal(model(x), model_of()(x))


def test_rows_of_a_batch_are_for_outputs_and_say_so() -> None:
    model, _ = attached(BUILT["shira"])
    with pytest.raises(sl.AttachError, match="load it with at='output'"), sl.rows(model, ["superlora", None]):
        model(torch.randn(2, IN))
    model, _ = attached(BUILT["shira"], at="output")
    x = torch.randn(2, IN)
    with sl.rows(model, ["superlora", None]):
        y = model(x)
    torch.testing.assert_close(y[1], model_of()(x)[1])
    torch.testing.assert_close(y[0], model(x)[0])


def test_the_price_is_that_of_one_product_less() -> None:
    """Beside the layer: two products with dW forward and backward and its gradient; at the weight the gradient alone."""
    [(_, graph)] = sl.shira(60).lay_out({"w": (512, 512)})
    for tokens in (32, 1024, 16384):
        choice = choose(graph, (512, 512), tokens)
        product = 2 * tokens * 512 * 512 / choice.delta.device.flops
        saved = choice.delta_price - weight_price(choice)
        # Less what W + dW is written for, and the reads and writes of the two products.
        assert saved == pytest.approx(2 * product, rel=0.5)
