"""Each layer type with an adapter computes what the layer with the weight W + dW computes, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import noise, perturb
from torch import Tensor, nn
from torch.nn import functional as F

import superlora_tn as sl
from superlora_tn.model import kinds, recognise
from superlora_tn.update.base import Member

SPECS = {
    "lora": sl.lora(2, alpha=3),
    "lokr": sl.lokr(1),
    "lotr": sl.lotr(2),
    "lorta": sl.lorta(2, groups=2),
    "dense": sl.dense(),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
LINEAR = {
    "bias": (6, 4, True),
    "no bias": (6, 4, False),
    "one out": (6, 1, True),
    "one in": (1, 4, True),
    "wide": (3, 40, True),
}
Convolution = tuple[type[nn.Module], dict[str, object], tuple[int, ...]]
CONVOLUTIONS: dict[str, Convolution] = {
    "1d": (nn.Conv1d, {"kernel_size": 3}, (2, 4, 9)),
    "1d causal": (nn.Conv1d, {"kernel_size": 2, "dilation": 3, "padding": 3, "groups": 2}, (2, 4, 9)),
    "1d same": (nn.Conv1d, {"kernel_size": 3, "padding": "same"}, (2, 4, 9)),
    "2d": (nn.Conv2d, {"kernel_size": 3}, (2, 4, 7, 6)),
    "2d strided": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)}, (2, 4, 7, 6)),
    "2d dilated": (nn.Conv2d, {"kernel_size": 3, "dilation": 2, "padding": 2}, (2, 4, 7, 6)),
    "2d grouped": (nn.Conv2d, {"kernel_size": 3, "groups": 2, "bias": False}, (2, 4, 7, 6)),
    "2d depthwise": (nn.Conv2d, {"kernel_size": 3, "groups": 4, "padding": 1}, (2, 4, 7, 6)),
    "2d pointwise": (nn.Conv2d, {"kernel_size": 1}, (2, 4, 7, 6)),
    "2d circular": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, (2, 4, 7, 6)),
    "2d reflect": (nn.Conv2d, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"}, (2, 4, 7, 6)),
    "2d replicate": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": 2}, (2, 4, 7, 6)),
    "2d valid": (nn.Conv2d, {"kernel_size": 2, "padding": "valid"}, (2, 4, 7, 6)),
    "2d no batch": (nn.Conv2d, {"kernel_size": 3}, (4, 7, 6)),
    "3d": (nn.Conv3d, {"kernel_size": (2, 1, 3), "stride": (1, 2, 1), "padding": (0, 0, 1)}, (2, 4, 4, 4, 3)),
    "3d grouped": (nn.Conv3d, {"kernel_size": 2, "groups": 2, "padding": 1, "padding_mode": "circular"}, (2, 4, 4, 4, 3)),
}
# The layers' own functional forms, with no adapter near.
FUNCTION: dict[type[nn.Module], Callable[..., Tensor]] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def adapted(layer: nn.Module, spec: sl.AdapterSpec) -> tuple[nn.Module, sl.Tuned, Tensor]:
    """The layer in float64 with a trained adapter, and its dW (out, in)."""
    model = nn.ModuleDict({"layer": layer.double()})
    tuned = sl.attach(model, spec, ["layer"], seed=0, dtype=torch.float64)
    perturb(tuned)
    return model["layer"], tuned, tuned.delta("layer").detach()


def padded(layer: nn.Module, x: Tensor) -> Tensor:
    """x padded by hand, as padding_mode says."""
    widths = [w for width in reversed(layer.padding) for w in (width, width)]
    return F.pad(x, widths, mode=layer.padding_mode)


@each_spec
@pytest.mark.parametrize("sizes", LINEAR.values(), ids=LINEAR)
def test_linear(spec: sl.AdapterSpec, sizes: tuple[int, int, bool]) -> None:
    d_in, d_out, bias = sizes
    if spec in (SPECS["lora"], SPECS["lotr"]) and min(d_in, d_out) < 2:
        spec = sl.lora(1)
    layer, _, delta = adapted(nn.Linear(d_in, d_out, bias=bias), spec)
    x = noise(2, 3, d_in, dtype=torch.float64)
    assert delta.shape == (d_out, d_in)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight + delta, layer.bias))


@each_spec
@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions(spec: sl.AdapterSpec, case: Convolution) -> None:
    kind, options, shape = case
    layer, tuned, delta = adapted(kind(4, 6 if options.get("groups", 1) < 4 else 8, **options), spec)
    x = noise(*shape, dtype=torch.float64)
    weight = layer.weight + delta.reshape(layer.weight.shape)
    plain = layer.padding_mode == "zeros"
    rest = (layer.stride, layer.padding if plain else 0, layer.dilation, layer.groups)
    expected = FUNCTION[kind](x if plain else padded(layer, x), weight, layer.bias, *rest)
    torch.testing.assert_close(layer(x), expected)
    assert tuned.targets == {"layer": (layer.out_channels, layer.weight[0].numel())}
    with tuned.disabled():
        assert not torch.allclose(layer(x), expected, atol=1e-3)


@pytest.fixture
def gpt2_layer() -> nn.Module:
    utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed", exc_type=ImportError)
    layer = utils.Conv1D(5, 4)  # out, in; the weight is kept as (in, out)
    nn.init.normal_(layer.bias)
    return layer


@each_spec
def test_gpt2s_conv1d(spec: sl.AdapterSpec, gpt2_layer: nn.Module) -> None:
    layer, tuned, delta = adapted(gpt2_layer, spec)
    x = noise(2, 3, 4, dtype=torch.float64)
    expected = x @ (layer.weight + delta.T) + layer.bias
    assert delta.shape == (5, 4)
    before = layer.weight.clone()
    torch.testing.assert_close(layer(x), expected)
    tuned.merge()
    torch.testing.assert_close(layer(x), expected)
    tuned.detach()
    assert torch.equal(layer.weight, before)


def test_all_linear_finds_gpt2s_conv1d(gpt2_layer: nn.Module) -> None:
    model = nn.ModuleDict({"c_attn": gpt2_layer, "head": nn.Linear(2, 2), "conv": nn.Conv1d(2, 2, 1)})
    assert sl.match(model, "all-linear") == ["c_attn", "head"]


def test_a_subclass_with_a_forward_of_its_own_computes_what_it_would_with_the_merged_weight() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Spelled(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden @ self.weight.T + self.bias

    x = noise(5, 4, dtype=torch.float64)
    for kind, scale in ((Scaled, 2), (Spelled, 1)):
        layer, tuned, delta = adapted(kind(4, 3), sl.lora(2))
        stored = layer.state_dict()["weight"]
        expected = scale * F.linear(x, stored + delta, layer.bias)
        torch.testing.assert_close(layer(x), expected)
        tuned.merge()
        torch.testing.assert_close(layer(x), expected)
        tuned.detach()
        assert type(layer) is kind
        torch.testing.assert_close(layer(x), scale * F.linear(x, stored, layer.bias))


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.LayerNorm(4), "LayerNorm"),
        (nn.ReLU(), "ReLU"),
        (nn.LSTM(4, 4), "LSTM"),
        (nn.MultiheadAttention(4, 2), "MultiheadAttention"),
        (nn.Sequential(nn.Linear(2, 2)), "Sequential"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_other_layers_raise_and_name_the_supported_ones(layer: nn.Module, kind: str) -> None:
    model = nn.ModuleDict({"layer": layer})
    with pytest.raises(sl.AttachError, match=f"'layer' is a {kind}, which cannot be adapted; supported are Bilinear, Conv1"):
        sl.attach(model, sl.lora(1), ["layer"])
    with pytest.raises(sl.LayerError, match=f"is a {kind}, which cannot be adapted; supported are .*Linear"):
        recognise.kind_of(layer)
    assert not recognise.is_supported(layer)


@pytest.mark.parametrize("given", [(nn.ReLU, "x"), ("ReLU", kinds.Linear()), (int, kinds.Linear())])
def test_what_is_no_layer_type_or_no_kind_is_not_registered(given: tuple[type[nn.Module], kinds.Kind]) -> None:
    with pytest.raises(sl.LayerError, match=r"give a subclass of nn\.Module, and a kind"):
        recognise.register_layer(*given)
    assert not recognise.is_supported(nn.ReLU())


def test_a_new_layer_type_registers_a_kind() -> None:
    class Scale(nn.Module):
        """A layer of our own: its matrix is kept transposed."""

        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix

    class Scaling(kinds.Kind):
        """Our layer's kind."""

        def shape(self, layer: Scale) -> tuple[int, int]:
            return layer.matrix.shape[1], layer.matrix.shape[0]

        def read(self, layer: Scale) -> Tensor:
            return layer.matrix.t()

        def write(self, layer: Scale, matrix: Tensor) -> None:
            layer.matrix.copy_(matrix.t())

        def owners(self, layer: Scale) -> dict[str, Tensor]:
            return {"matrix": layer.matrix}

        def join(self, layer: Scale, member: Member, x: Tensor, y: Tensor, base: Tensor | None) -> Tensor:
            return member.update(x, y)

    recognise.register_layer(Scale, Scaling())
    layer, tuned, delta = adapted(Scale(), sl.lora(2))
    x = noise(5, 4, dtype=torch.float64)
    expected = x @ (layer.matrix + delta.T)
    torch.testing.assert_close(layer(x), expected)
    tuned.merge()
    torch.testing.assert_close(layer(x), expected)
    tuned.detach()
    assert "Scale" in recognise.supported()


def test_adding_to_a_weight_rounds_once() -> None:
    layer = nn.Linear(3, 2).to(torch.bfloat16)
    before, tuned = layer.weight.detach().clone(), sl.attach(nn.Sequential(layer), sl.dense(), ["0"])
    perturb(tuned)
    tuned.merge()
    assert torch.equal(layer.weight, (before.float() + tuned.delta("0")).bfloat16())


@pytest.mark.parametrize("before", [True, False], ids=["hook before", "hook after"])
@pytest.mark.parametrize("always", [True, False])
def test_an_output_that_a_users_hook_kept_is_not_overwritten(before: bool, always: bool) -> None:
    """The adapter may write into the layer's output only while nobody else has seen it."""
    layer, kept = nn.Linear(4, 3), []
    model = nn.ModuleDict({"layer": layer})
    keep = lambda module, args, y: kept.append(y)  # noqa: E731
    if before:
        layer.register_forward_hook(keep, always_call=always)
    tuned = sl.attach(model, sl.lora(2), ["layer"], seed=0)
    perturb(tuned)
    if not before:
        layer.register_forward_hook(keep, always_call=always)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            x = noise(5, 4)
            y = layer(x)
        base = F.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(y, base + x @ tuned.delta("layer").T)
        torch.testing.assert_close(kept[-1], base if before else y)


def test_a_hook_that_replaces_the_output_goes_first() -> None:
    layer, seen = nn.Linear(4, 3), noise(5, 3, seed=7)
    layer.register_forward_hook(lambda module, args, y: seen)
    model = nn.ModuleDict({"layer": layer})
    tuned = sl.attach(model, sl.lora(2), ["layer"], seed=0)
    perturb(tuned)
    x, kept = noise(5, 4), seen.clone()
    torch.testing.assert_close(layer(x), kept + x @ tuned.delta("layer").T)
    assert torch.equal(seen, kept)


def test_the_input_and_the_weight_are_never_written_to() -> None:
    for layer in (nn.Linear(4, 4), nn.Conv1d(4, 4, 1)):
        model = nn.ModuleDict({"layer": layer})
        tuned = sl.attach(model, sl.lora(2), ["layer"], seed=0)
        perturb(tuned)
        x = noise(4, 4) if isinstance(layer, nn.Linear) else noise(2, 4, 3)
        before = [t.detach().clone() for t in (x, *layer.parameters(), *tuned.parameters())]
        layer(x).sum().backward()
        with torch.no_grad():
            layer(x)
        assert all(torch.equal(a, b) for a, b in zip(before, (x, *layer.parameters(), *tuned.parameters()), strict=True))


def test_a_bias_that_trains_gets_its_gradient() -> None:
    layer = nn.Linear(4, 3)
    tuned = sl.attach(nn.ModuleDict({"layer": layer}), sl.lora(2), ["layer"], seed=0)
    perturb(tuned)
    for parameter in layer.parameters():
        parameter.requires_grad_(True)
    x = noise(5, 4)
    layer(x).square().sum().backward()
    y = layer(x).detach()
    torch.testing.assert_close(layer.bias.grad, 2 * y.sum(0))
    torch.testing.assert_close(layer.weight.grad, 2 * y.T @ x)


def test_second_derivatives_exist() -> None:
    layer = nn.Linear(3, 2).double()
    tuned = sl.attach(nn.ModuleDict({"layer": layer}), sl.lora(1), ["layer"], seed=0, dtype=torch.float64)
    perturb(tuned)
    x = noise(4, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(layer, (x,))
    inner = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)[0]
    inner.square().sum().backward()
    weight = (layer.weight + tuned.delta("layer")).detach().requires_grad_()
    z = x.detach().requires_grad_()
    expected = torch.autograd.grad(F.linear(z, weight, layer.bias).pow(3).sum(), z, create_graph=True)[0]
    torch.testing.assert_close(inner, expected)
    factors = [p.detach().clone().requires_grad_() for p in tuned.parameters()]
    assert all(p.grad is not None for p in tuned.parameters())
    again = layer.weight.detach() + factors[0] @ factors[1].T
    torch.testing.assert_close(again, weight)
    outer = torch.autograd.grad(F.linear(z, again, layer.bias).pow(3).sum(), z, create_graph=True)[0].square().sum()
    for ours, theirs in zip(tuned.parameters(), torch.autograd.grad(outer, factors), strict=True):
        torch.testing.assert_close(ours.grad, theirs)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 4, 3), lambda: nn.Linear(3, 4)], ids=["convolutions", "linear layers"])
def test_layers_of_a_flat_fold_build_dw_once_a_pass(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    from superlora_tn.update.flat import FlatAdapter

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = make(), make()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    model, built = Two(), []
    sl.attach(model, sl.lorta(2), ["a", "b"], seed=0)
    elements = FlatAdapter._elements
    monkeypatch.setattr(FlatAdapter, "_elements", lambda self, *given: built.append(1) or elements(self, *given))
    model(torch.randn(2, 3, 5, 5) if isinstance(model.a, nn.Conv2d) else torch.randn(2, 3)).sum().backward()
    assert len(built) == 1
