"""Convolutions with a mode for the kernel, as chains of thin layers, and transposed ones: equal to the dense oracle's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import noise, perturb
from optional import library
from safetensors.torch import load_file, save_file
from test_halves import multiply_adds
from test_layers import CONVOLUTIONS, FUNCTION, Convolution, padded
from torch import Tensor, nn
from torch.nn import functional as F

import superlora_tn as sl
from superlora_tn.contraction.chain import chain
from superlora_tn.contraction.profile import CPU

ONE, EACH = sl.PhysicalFold("out in kernel"), sl.PhysicalFold("out in kd kh kw")
TUCKER = sl.Tucker(2, factors="out in", over="cap")
SPECS = {
    "lora": sl.AdapterSpec(sl.Tucker(2, factors="out", over="cap"), ONE, alpha=3),
    "tucker": sl.AdapterSpec(TUCKER, ONE, alpha=3),
    "tucker in all modes": sl.AdapterSpec(sl.Tucker(2, over="cap"), EACH),
    "cp": sl.AdapterSpec(sl.CP(3, over="keep"), EACH, alpha=2),
    "train": sl.AdapterSpec(sl.TensorTrain(2, over="cap"), ONE),
    "lokr": sl.AdapterSpec(sl.Kronecker(sl.Dense(), sl.Dense()), ONE, alpha=0.5),
    "lokr, thin": sl.AdapterSpec(sl.Kronecker(sl.CP(1), TUCKER), EACH),
    "loha": sl.AdapterSpec(sl.Hadamard(TUCKER, TUCKER), ONE),
    "three splits": sl.AdapterSpec(sl.Kronecker(sl.Dense(), sl.Dense(), sl.CP(2, over="keep")), ONE),
    "nodes": sl.AdapterSpec(sl.Network("o (i1 i2) k", {"r": 2}, b="o r", m="r i1", a=sl.Node("r i2 k", init="zeros")), ONE),
}
TURNED: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "1d": (nn.ConvTranspose1d, {"kernel_size": 3}, (2, 4, 9)),
    "1d dilated": (nn.ConvTranspose1d, {"kernel_size": 2, "dilation": 3, "padding": 1}, (2, 4, 9)),
    "2d": (nn.ConvTranspose2d, {"kernel_size": 4, "stride": 2, "padding": 1}, (2, 4, 5, 6)),
    "2d output padding": (
        nn.ConvTranspose2d,
        {"kernel_size": (3, 2), "stride": (3, 2), "output_padding": (2, 1)},
        (2, 4, 5, 6),
    ),
    "2d grouped": (nn.ConvTranspose2d, {"kernel_size": 3, "groups": 2, "bias": False}, (2, 4, 5, 6)),
    "2d no batch": (nn.ConvTranspose2d, {"kernel_size": 3, "stride": 2}, (4, 5, 6)),
    "3d": (nn.ConvTranspose3d, {"kernel_size": (2, 1, 3), "stride": (1, 2, 1), "groups": 2}, (2, 4, 3, 4, 3)),
}
TURNED_FUNCTION: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}
ROUTES = (None, "apply")


def adapted(layer: nn.Module, spec: sl.AdapterSpec, **options: Any) -> tuple[nn.Module, sl.Tuned]:
    model = nn.ModuleDict({"layer": layer.double()})
    tuned = sl.attach(model, spec, ["layer"], seed=0, dtype=torch.float64, **options)
    perturb(tuned)
    return model["layer"], tuned


def compare(layer: nn.Module, tuned: sl.Tuned, shape: tuple[int, ...], plain: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Values and gradients beside a dense layer with W + dW, whose dW is the oracle of the nodes' gradients too."""
    x = noise(*shape, dtype=torch.float64).requires_grad_()
    parameters = list(tuned.parameters())
    y = layer(x)
    expected = plain(x, tuned.delta("layer"))
    gradient = noise(*y.shape, seed=1, dtype=torch.float64)
    found = [y, *torch.autograd.grad(y, [x, *parameters], gradient)]
    wanted = [expected, *torch.autograd.grad(expected, [x, *parameters], gradient)]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)  # float64's own tolerance: two orders of sums of at most 200 terms
    with tuned.disabled():
        assert not torch.allclose(layer(x), expected, atol=1e-3)
    before = layer.weight.detach().clone()
    tuned.merge()
    torch.testing.assert_close(layer(x), expected)
    tuned.unmerge()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_with_kernel_modes_is_one_by_dw(spec: sl.AdapterSpec, case: Convolution, route: Any) -> None:
    kind, options, shape = case
    layer, tuned = adapted(kind(4, 8, **options), spec, route=route)

    def plain(x: Tensor, delta: Tensor) -> Tensor:
        zeros = layer.padding_mode == "zeros"
        rest = (layer.stride, layer.padding if zeros else 0, layer.dilation, layer.groups)
        weight = layer.weight + delta.reshape(layer.weight.shape)
        return FUNCTION[kind](x if zeros else padded(layer, x), weight, layer.bias, *rest)

    compare(layer, tuned, shape, plain)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("spec", [*SPECS.values(), sl.lora(2), sl.lokr(2), sl.lotr(2)], ids=[*SPECS, "plain", "kron", "lotr"])
@pytest.mark.parametrize("case", TURNED.values(), ids=TURNED)
def test_a_transposed_convolution_is_one_by_dw(spec: sl.AdapterSpec, case: Any, route: Any) -> None:
    kind, options, shape = case
    layer, tuned = adapted(kind(4, 8, **options), spec, route=route)
    groups = layer.groups

    def plain(x: Tensor, delta: Tensor) -> Tensor:
        # dW[(g o) i k] -> torch's [(g i) o k], block by block.
        blocks = [b.reshape(8 // groups, 4 // groups, *layer.kernel_size).transpose(0, 1) for b in delta.chunk(groups)]
        weight, rest = layer.weight + torch.cat(blocks), (layer.stride, layer.padding, layer.output_padding)
        return TURNED_FUNCTION[kind](x, weight, layer.bias, *rest, groups, layer.dilation)

    assert tuned.targets == {"layer": (8, layer.weight.numel() // 8)}
    compare(layer, tuned, shape, plain)


def test_output_size_is_an_argument_of_the_call() -> None:
    layer, tuned = adapted(nn.ConvTranspose2d(4, 4, 3, stride=2), SPECS["tucker"])
    x = noise(1, 4, 3, 3, dtype=torch.float64)
    weight = tuned.delta("layer").reshape(4, 4, 3, 3).transpose(0, 1) + layer.weight
    for size in (7, 8):
        expected = F.conv_transpose2d(x, weight, layer.bias, 2, 0, size - 7)
        torch.testing.assert_close(layer(x, output_size=(size, size)), expected)


# The core's (out, in) channels, its groups, and the sizes around it: o1, i1, o2, i2.
CHAINS = {
    "lora": (1, (8, 2), (1, 1, 16, 8)),
    "tucker": (1, (2, 2), (1, 1, 16, 8)),
    "tucker in all modes": (1, (2, 2), (1, 1, 16, 8)),
    "cp": (3, (3, 3), (1, 1, 16, 8)),
    "train": None,
    "lokr": (1, (4, 4), (4, 2, 4, 4)),
    "lokr, thin": (1, (2, 2), (4, 2, 4, 4)),
    "loha": (1, (4, 4), (1, 1, 16, 8)),
    "three splits": (2, (2, 2), (4, 4, 4, 2)),
    "nodes": None,
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_an_empty_batch_comes_through(kind: Any, spec: sl.AdapterSpec, route: Any) -> None:
    base = kind(4, 6, 3)
    model = nn.Sequential(base)
    x = torch.empty(0, 4, 5, 6, requires_grad=True)
    shape = model(x).shape
    tuned = sl.attach(model, spec, ["0"], route=route)
    y = model(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and not p.grad.any() for p in tuned.parameters())


@pytest.mark.parametrize("name", CHAINS)
def test_the_chain_is_as_thin_as_the_network(name: str) -> None:
    spec = replace(SPECS[name], fold=replace(SPECS[name].fold, kernel=(3, 3)))
    [(_, graph)] = spec.lay_out({"layer": (16, 8 * 9)})
    found = chain(graph, 9, CPU, "dp")
    if CHAINS[name] is None or name == "lora":
        assert (found is None) == (CHAINS[name] is None)
        return
    assert found is not None
    assert (found.terms, found.widths, found.sizes) == CHAINS[name]


def test_a_chain_of_what_has_no_kernel_or_no_thin_part_is_none() -> None:
    shapes = {"layer": (16, 72)}
    dense = sl.AdapterSpec(sl.Dense(), sl.PhysicalFold("out in kernel", kernel=(3, 3)))
    for spec in (sl.lora(2), sl.loha(2), dense, replace(dense, fold=sl.PhysicalFold("out in kernel", kernel=(1, 1)))):
        assert chain(spec.lay_out(shapes)[0][1], 9, CPU, "dp") is None
    # LoKr's rule splits 72 as (8, 9), and 24 * 9 as (12, 18): there, and not in 20 * 9 = (12, 15), channels stay whole.
    for d_in, sizes in ((72, (4, 8, 4, 1)), (216, (4, 12, 4, 2)), (180, None)):
        found = chain(sl.lokr(2).lay_out({"layer": (16, d_in)})[0][1], 9, CPU, "dp")
        assert (found and found.sizes) == sizes


def cost(spec: sl.AdapterSpec, layer: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    """Multiplications and additions of the layer's step alone, and what the adapter adds."""
    model = nn.ModuleDict({"layer": layer}).requires_grad_(False)
    before = multiply_adds(model["layer"], x)
    perturb(sl.attach(model, spec, ["layer"]))
    return before, multiply_adds(model["layer"], x) - before


def test_a_chain_costs_its_thin_layers() -> None:
    x = noise(1, 64, 20, 20).requires_grad_()
    _, more = cost(sl.conv_lora(4, tucker=True), nn.Conv2d(64, 64, 3, padding=1), x)
    # Forward and the gradients of both sides, position by position; small nodes are built beforehand, none here.
    assert more == 3 * 20 * 20 * (64 * 4 + 4 * 4 * 9 + 4 * 64)
    before, more = cost(sl.conv_lokr(4, tucker=True), nn.Conv2d(64, 64, 3, padding=1), x)
    assert more == 3 * 20 * 20 * 8 * (8 * 4 + 4 * 4 * 9 + 4 * 8 + 8 * 8)
    assert more < 0.1 * before
    _, whole = cost(sl.conv_lokr(), nn.Conv2d(64, 64, 3, padding=1), x)
    assert whole == 3 * 20 * 20 * 8 * (8 * 8 * 9 + 8 * 8)


def test_layers_of_several_kernels_take_one_declaration(tmp_path: Path) -> None:
    def make() -> nn.ModuleDict:
        torch.manual_seed(0)
        layers = {
            "a": nn.Conv2d(4, 8, 3),
            "b": nn.Conv2d(8, 8, 1),
            "c": nn.Conv1d(8, 4, 5),
            "d": nn.Linear(4, 4),
            "e": nn.Conv2d(4, 8, 3),
        }
        return nn.ModuleDict(layers)

    model = make()
    tuned = sl.attach(model, sl.conv_lora(2, tucker=True), r"[a-e]", seed=0)
    assert [e.spec.fold.kernel for e in tuned.entries] == [(3, 3), (1, 1), (5,), ()]
    assert [list(e.targets) for e in tuned.entries] == [["a", "e"], ["b"], ["c"], ["d"]]
    perturb(tuned)
    # Of kernels of size 1 the core is a matrix.
    assert tuned.num_parameters == 2 * (2 * 12 + 36) + (2 * 16 + 4) + (2 * 12 + 20) + (2 * 8 + 4)
    tuned.save(tmp_path / "own")
    again = sl.load(make(), tmp_path / "own")
    for name in "abcde":
        assert torch.equal(again.delta(name), tuned.delta(name))
    assert again.entries == tuned.entries
    with pytest.raises(sl.SpecError, match="sizes are in no shape"):
        sl.conv_lora(2).count({"a": (4, 36)})


@pytest.mark.parametrize("format", ["peft", "lycoris", "kohya"])
@pytest.mark.parametrize("name", ["lora", "tucker", "cp", "lokr", "lokr, thin", "loha"])
def test_other_formats_hold_the_same_dw(name: str, format: Any, tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Conv2d(8, 16, 3), "b": nn.Conv2d(16, 16, 1)})
    tuned = sl.attach(model, SPECS[name], ["a", "b"], seed=0)
    perturb(tuned)
    wanted = {n: tuned.delta(n).detach() for n in "ab"}
    report = tuned.save(tmp_path / "there.safetensors" if format != "peft" else tmp_path, format)
    tuned.detach()
    again = sl.load(model, tmp_path / "there.safetensors" if format != "peft" else tmp_path)
    for n in "ab":
        # float32 files; a truncated form would report a larger error.
        torch.testing.assert_close(again.delta(n), wanted[n], rtol=1e-4, atol=1e-4)
    assert report is not None


def test_kernels_are_written_by_the_methods_that_have_them(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Conv2d(36, 64, 3)})
    tuned = sl.attach(model, sl.conv_lora(2, tucker=True), ["a"])
    tuned.save(tmp_path / "x.safetensors", "lycoris")
    assert load_file(tmp_path / "x.safetensors")["lycoris_a.lora_mid.weight"].shape == (2, 2, 3, 3)
    tuned.detach()
    tuned = sl.attach(model, sl.conv_lokr(2, tucker=True), ["a"])
    assert [row.method for row in tuned.save(tmp_path / "peft", "peft").rows] == ["lokr"]
    assert load_file(tmp_path / "peft" / "adapter_model.safetensors")["base_model.model.a.lokr_t2"].shape == (2, 2, 3, 3)


def test_a_transposed_convolution_is_not_written_in_formats_that_lack_it(tmp_path: Path) -> None:
    model = nn.ModuleDict({"up": nn.ConvTranspose2d(4, 4, 2)})
    tuned = sl.attach(model, sl.lora(1), ["up"], seed=0)
    with pytest.raises(sl.CheckpointError, match="'up' is a ConvTranspose2d, for which the format 'peft' has no method"):
        tuned.save(tmp_path, "peft")
    perturb(tuned)
    tuned.save(tmp_path / "own")
    again = sl.load(nn.ModuleDict({"up": nn.ConvTranspose2d(4, 4, 2)}), tmp_path / "own")
    assert torch.equal(again.delta("up"), tuned.delta("up"))


def test_a_transposed_convolution_of_another_kind_is_refused() -> None:
    class Own(nn.ConvTranspose1d):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * super().forward(x)

    for layer, at in ((Own(2, 2, 2), None), (nn.ConvTranspose1d(2, 2, 2), "weight")):
        with pytest.raises(sl.AttachError, match="which is adapted at its output and with torch's own forward alone"):
            sl.attach(nn.ModuleDict({"layer": layer}), sl.lora(1), ["layer"], at=at)


def test_kernels_are_seen_where_weights_are_read() -> None:
    model = nn.ModuleDict({"layer": nn.Conv2d(4, 4, 3).double()})
    tuned = sl.attach(model, SPECS["tucker"], ["layer"], at="weight", dtype=torch.float64)
    perturb(tuned)
    x = noise(1, 4, 5, 5, dtype=torch.float64)
    found = model["layer"](x)
    tuned.merge()
    torch.testing.assert_close(model["layer"](x), found)


def test_a_forward_that_is_patched_is_run() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1).double()

    def wrapped(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    layer._conv_forward = wrapped  # as those do who make images that repeat
    model = nn.ModuleDict({"layer": layer})
    tuned = sl.attach(model, SPECS["tucker"], ["layer"], dtype=torch.float64, route="apply")
    perturb(tuned)
    x = noise(1, 4, 6, 6, dtype=torch.float64)
    found = layer(x)
    tuned.merge()
    torch.testing.assert_close(layer(x), found)


@pytest.mark.parametrize(("channels", "rank"), [((12, 20), 1), ((12, 20), 2), ((16, 16), 2), ((7, 12), 1)])
@pytest.mark.parametrize("both", [False, True])
def test_lokr_of_a_convolution_splits_its_channels_as_peft_does(channels: tuple[int, int], rank: int, both: bool) -> None:
    """The preset itself: PEFT's factors in PEFT's shapes give PEFT's dW, also beside a linear layer and a pointwise one."""
    peft = library("peft")
    d_in, d_out = channels
    make = lambda: nn.Sequential(nn.Conv2d(d_in, d_out, 3), nn.Conv2d(d_out, d_in, 1), nn.Conv2d(d_in, d_out, (1, 2))).double()  # noqa: E731
    model = make()
    tuned = sl.attach(model, sl.lokr(rank, decompose_both=both), ["0", "1", "2"], dtype=torch.float64)
    perturb(tuned)
    config = peft.LoKrConfig(r=rank, alpha=rank, decompose_both=both, target_modules=["0", "1", "2"])
    other = peft.get_peft_model(make(), config)
    for name in ("0", "1", "2"):
        theirs = other.base_model.model.get_submodule(name)
        adapter = next(a for a in tuned.adapters if name in a.group.members)
        ours = {node.name: value.detach() for node, value in zip(adapter.graph.nodes, adapter.tensors(), strict=True)}
        fields = {
            "lokr_w1": ours.get("k1_weight"),
            "lokr_w2": ours.get("k2_weight"),
            "lokr_w1_a": ours.get("k1_factor_out"),
            "lokr_w2_a": ours.get("k2_factor_out"),
            "lokr_w1_b": None if "k1_factor_in" not in ours else ours["k1_factor_in"].T,
            "lokr_w2_b": None if "k2_factor_in" not in ours else ours["k2_factor_in"].T,
        }
        for field, value in fields.items():
            held = dict(theirs.named_parameters()).get(f"{field}.default")
            assert (value is None) == (held is None), (name, field)
            if value is not None:
                assert value.numel() == held.numel()
                held.data = value.reshape(held.shape)
        torch.testing.assert_close(tuned.delta(name), theirs.get_delta_weight("default").flatten(1))
    assert tuned.spec == sl.lokr(rank, decompose_both=both)
    x = noise(2, d_in, 6, 6, dtype=torch.float64)
    layer = model[0]
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight + tuned.delta("0").reshape(layer.weight.shape), layer.bias))


def test_what_a_budget_bought_is_what_is_attached() -> None:
    model = nn.Sequential(nn.Conv2d(12, 20, 3), nn.Linear(12, 12))
    budget = sl.Budget(400, lambda rank, *_, **__: sl.lokr(rank))
    tuned = sl.attach(model, budget, ["0", "1"])
    assert tuned.num_parameters == budget.choose(tuned.targets, {"0": (3, 3)}).count <= 400
    # Channels 4 x 5 by 3 x 4, and 3 x 4 by 3 x 4; all is dense at rank 3, which is half of 5 and more.
    assert tuned.num_parameters == 4 * 3 + 5 * 4 * 9 + 3 * 3 + 4 * 4
    assert [entry.spec.fold.kernel for entry in tuned.entries] == [None, (3, 3)]
    tuned.detach()
    made = sl.Budget(200, lambda rank, *_, **__: sl.conv_lora(rank))
    assert sl.attach(model, made, ["0"]).num_parameters == 20 + 12 * 9


@pytest.mark.parametrize(
    ("modes", "kernel", "said"),
    [
        ("out kernel in", None, "a kernel stands behind 'in'"),
        ("out in kw kh", None, "a kernel stands behind 'in'"),
        ("out in kernel kw", None, "a kernel stands behind 'in'"),
        ("out in kw", (3, 3), "lacks modes"),
        ("out in kernel", (0,), "each size of kernel"),
        ("out in kernel", [3], "give sizes such as"),
    ],
)
def test_folds_say_what_is_wrong_with_a_kernel(modes: str, kernel: Any, said: str) -> None:
    with pytest.raises(sl.SpecError, match=said):
        sl.PhysicalFold(modes, kernel=kernel)


def test_a_kernel_has_to_divide_in() -> None:
    with pytest.raises(sl.SpecError, match="does not hold a kernel"):
        sl.AdapterSpec(sl.CP(1), sl.PhysicalFold("out in kernel", kernel=(3, 3))).lay_out({"a": (4, 10)})


LYCORIS = {
    "lora": ("lora", sl.conv_lora(2, alpha=3), {}),
    "tucker": ("lora", sl.conv_lora(2, True, alpha=3), {"use_tucker": True}),
    "lokr": ("lokr", sl.conv_lokr(2, alpha=3), {}),
    "lokr, tucker": ("lokr", sl.conv_lokr(2, tucker=True, alpha=3), {"use_tucker": True}),
    "lokr, both": ("lokr", sl.conv_lokr(1, decompose_both=True, alpha=3), {"decompose_both": True}),
    "lokr, factor": ("lokr", sl.conv_lokr(2, factor=4, tucker=True, alpha=3), {"use_tucker": True, "factor": 4}),
}


@pytest.mark.parametrize("case", LYCORIS)
def test_the_splits_are_those_of_lycoris(case: str) -> None:
    lycoris = library("lycoris")
    algo, spec, more = LYCORIS[case]
    layer = nn.Conv2d(36, 64, 3, padding=1, stride=2).double()
    kind = lycoris.modules.locon.LoConModule if algo == "lora" else lycoris.modules.lokr.LokrModule
    rank = 1 if case == "lokr, both" else 2
    theirs = kind("x", layer, 1.0, rank, 3, bypass_mode=True, **more).double()
    with torch.no_grad():
        for k, parameter in enumerate(theirs.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=k))
    own = {n.removesuffix(".weight"): p.detach() for n, p in theirs.named_parameters()}
    model = nn.ModuleDict({"layer": layer})
    tuned = sl.attach(model, spec, ["layer"], dtype=torch.float64, route="apply")
    assert tuned.num_parameters == sum(p.numel() for p in theirs.parameters())
    nodes = dict(tuned.named_parameters())
    with torch.no_grad():
        for name, node in nodes.items():
            node.copy_(_of_lycoris(name.rpartition("node_")[2], own, case).reshape(node.shape))
    x = noise(2, 36, 8, 8, dtype=torch.float64)
    # LoKr's own get_diff_weight has the scale twice.
    wanted = theirs.get_diff_weight(1.0)[0] if algo == "lora" else theirs.get_weight(layer.weight.shape)
    torch.testing.assert_close(tuned.delta("layer"), wanted.flatten(1))
    torch.testing.assert_close(layer(x) - F.conv2d(x, layer.weight, layer.bias, 2, 1), theirs.bypass_forward_diff(x))


def _of_lycoris(node: str, own: dict[str, Tensor], case: str) -> Tensor:
    """LyCORIS's tensor for one of our nodes."""
    tucker = "lora_mid" in own or "lokr_t2" in own
    names = {
        "core": "lora_mid" if tucker else "lora_down",
        "factor_out": "lora_up",
        "factor_in": "lora_down",
        "k1_weight": "lokr_w1",
        "k1_factor_out": "lokr_w1_a",
        "k1_factor_in": "lokr_w1_b",
        "k2_core": "lokr_t2" if tucker else "lokr_w2_b",
        "k2_factor_out": "lokr_w2_a",
        "k2_factor_in": "lokr_w2_b",
    }
    value = own[names[node]]
    turned = node in ("factor_in", "k1_factor_in", "k2_factor_in") or (node == "k2_factor_out" and tucker)
    return value.flatten(1).t() if turned else value


@pytest.mark.parametrize("tucker", [False, True])
def test_the_splits_are_those_of_peft(tucker: bool) -> None:
    peft = library("peft")
    base = nn.Sequential(nn.Conv2d(36, 64, 3, padding=1))
    config = peft.LoKrConfig(r=2, alpha=3, target_modules=["0"], use_effective_conv2d=tucker, init_weights=False)
    theirs = peft.get_peft_model(base, config).double()
    own = {n.split(".")[-2]: p.detach() for n, p in theirs.named_parameters() if "lokr" in n}
    layer = nn.Conv2d(36, 64, 3, padding=1).double()
    tuned = sl.attach(nn.ModuleDict({"layer": layer}), sl.conv_lokr(2, tucker=tucker, alpha=3), ["layer"], dtype=torch.float64)
    assert tuned.num_parameters == sum(p.numel() for p in own.values())
    with torch.no_grad():
        for name, node in tuned.named_parameters():
            node.copy_(_of_lycoris(name.rpartition("node_")[2], own, "").reshape(node.shape))
    wanted = theirs.base_model.model[0].get_delta_weight("default").flatten(1)
    torch.testing.assert_close(tuned.delta("layer"), wanted)


@pytest.mark.parametrize("case", ["lokr", "lokr, both", "lokr, factor"])
def test_a_file_of_lycoris_runs_as_a_chain(case: str, tmp_path: Path) -> None:
    lycoris = library("lycoris")
    _, _, more = LYCORIS[case]
    layer = nn.Conv2d(36, 64, 3, padding=1)
    theirs = lycoris.modules.lokr.LokrModule(
        "lycoris_layer", layer, 1.0, 2, 3, bypass_mode=True, **{**more, "use_tucker": False}
    )
    with torch.no_grad():
        for k, parameter in enumerate(theirs.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=k))
    save_file({f"lycoris_layer.{n}": t.contiguous() for n, t in theirs.state_dict().items()}, tmp_path / "x.safetensors")
    model = nn.ModuleDict({"layer": layer}).requires_grad_(False)
    x = noise(1, 36, 8, 8).requires_grad_()
    before = multiply_adds(layer, x)
    tuned = sl.load(model, tmp_path / "x.safetensors")
    found = layer(x) - F.conv2d(x, layer.weight, layer.bias, padding=1)
    # float32, outputs of some tens.
    torch.testing.assert_close(found, theirs.bypass_forward_diff(x), rtol=1e-4, atol=1e-3)
    [(sized, _)] = [c for a in tuned.adapters for c in a._chains.values()]
    assert sized.sizes[1] * sized.sizes[3] == 36
    assert multiply_adds(layer, x) - before < 0.5 * before


@pytest.mark.parametrize("name", ["tucker", "lokr, thin"])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_chains_compile_whole(kind: Any, name: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(kind(8, 8, 3, stride=2))
    perturb(sl.attach(model, SPECS[name], ["0"], route="apply"))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = noise(2, 8, 7, 9)
    torch.testing.assert_close(compiled(x), model(x))


def test_the_plug_in_for_peft_runs_chains_and_lays_out_transposed_weights() -> None:
    peft = library("peft")
    plugin = library("superlora_tn.peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ConvTranspose2d(16, 8, 3, groups=2, padding=1)).double()
    spec = replace(sl.conv_lokr(2, tucker=True), fold=sl.PhysicalFold("out in kernel", kernel=(3, 3)))
    x = noise(1, 8, 5, 5, dtype=torch.float64)
    model = peft.get_peft_model(base, plugin.SuperLoraConfig(spec=spec, target_modules=["0", "1"], init_weights=False))
    found = model(x)
    layers = [model.base_model.model[k] for k in (0, 1)]
    assert all(c is not None for layer in layers for c in layer.superlora_members["default"].adapter._chains.values())
    weights = [layer.base_layer.weight + layer.get_delta_weight("default") for layer in layers]
    expected = F.conv2d(x, weights[0], layers[0].base_layer.bias, padding=1)
    expected = F.conv_transpose2d(expected, weights[1], layers[1].base_layer.bias, padding=1, groups=2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # the plug-in's nodes are float32
    torch.testing.assert_close(model.merge_and_unload()(x), found, rtol=1e-5, atol=1e-5)


KERNELS = st.sampled_from([(1,), (3,), (2, 3), (1, 3), (3, 3)])


@settings(max_examples=25, deadline=None)
@given(
    kernel=KERNELS,
    sides=st.tuples(st.sampled_from([4, 6, 12]), st.sampled_from([4, 8, 12])),
    groups=st.sampled_from([1, 2, 4]),
    name=st.sampled_from(sorted(SPECS)),
    turned=st.booleans(),
    stride=st.integers(1, 3),
)
def test_any_convolution_is_one_by_dw(
    kernel: tuple[int, ...], sides: tuple[int, int], groups: int, name: str, turned: bool, stride: int
) -> None:
    d_in, d_out = (side * groups for side in sides)
    kinds = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d)}[len(kernel)]
    layer, tuned = adapted(kinds[turned](d_in, d_out, kernel, stride=stride, groups=groups), SPECS[name], route="apply")
    x = noise(2, d_in, *(5,) * len(kernel), dtype=torch.float64)
    found = layer(x)
    tuned.merge()
    torch.testing.assert_close(found, layer(x))
