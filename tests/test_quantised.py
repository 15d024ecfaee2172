"""Layers whose weights are quantised or packed: as plain ones with the dequantised weight, in forward, gradients and merge."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import noise, perturb
from optional import library
from torch import Tensor, nn
from torch.nn import functional as F

import superlora_tn as sl

IN, OUT = 64, 48
SPECS = {
    "lora": sl.lora(3, alpha=4),
    "lokr": sl.lokr(2),
    "lotr": sl.lotr(2),
    "vera": sl.vera(4),
    "lorta": sl.lorta(2, groups=2),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


class Scaled8(nn.Linear):
    """A checkpoint's fp8 layer: weight and scales by blocks."""

    def __init__(self, d_in: int, d_out: int, block: tuple[int, int] | None = (16, 32)) -> None:
        super().__init__(d_in, d_out)
        self.block_size = block
        blocks = [1, 1] if block is None else [-(-d_out // block[0]), -(-d_in // block[1])]
        weight = self.weight.detach()
        scale = torch.rand(blocks, generator=torch.Generator().manual_seed(3)) + 0.5
        self.weight = nn.Parameter((weight / self.spread(scale)).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)

    def spread(self, scale: Tensor) -> Tensor:
        block = self.block_size or (self.out_features, self.in_features)
        return scale.repeat_interleave(block[0], 0)[: self.out_features].repeat_interleave(block[1], 1)[:, : self.in_features]

    def dequantised(self) -> Tensor:
        return self.weight.to(torch.float32) * self.spread(self.weight_scale_inv)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantised().to(x.dtype), self.bias)


class Hidden(nn.Module):
    """A layer of a library that nobody has heard of: packed into bytes, two numbers in each."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.register_buffer("packed", torch.randint(0, 256, (d_out * d_in // 2,), dtype=torch.uint8))

    def dequantised(self) -> Tensor:
        return torch.stack([self.packed & 15, self.packed >> 4], 1).reshape(self.out_features, self.in_features) / 40 - 0.2

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantised().to(x.dtype))


def torchao(config: str, dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[int, int], nn.Module]:
    def make(d_in: int, d_out: int) -> nn.Module:
        quantization = library("torchao.quantization")
        model = nn.Sequential(nn.Linear(d_in, d_out).to(dtype))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantization.quantize_(model, getattr(quantization, config)(**options))
        return model[0]

    return make


def bitsandbytes(name: str, **options: Any) -> Callable[[int, int], nn.Module]:
    def make(d_in: int, d_out: int) -> nn.Module:
        layers = library("bitsandbytes.nn")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(layers, name)(d_in, d_out, **options).to("cpu")

    return make


def dynamic(dtype: torch.dtype) -> Callable[[int, int], nn.Module]:
    def make(d_in: int, d_out: int) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(d_in, d_out)), {nn.Linear}, dtype=dtype)[0]

    return make


def dequantised(layer: Any) -> Tensor:
    """W by the library's own word."""
    if isinstance(layer, Scaled8 | Hidden):
        return layer.dequantised()
    if callable(layer.weight):
        return layer.weight().dequantize()
    if type(layer.weight).__module__.startswith("bitsandbytes"):
        functional = library("bitsandbytes.functional")
        if type(layer.weight).__name__ == "Params4bit":
            return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        scale = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        return layer.weight.data * scale[:, None] / 127
    return layer.weight.dequantize()


WRITTEN: dict[str, Callable[[int, int], nn.Module]] = {
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao int8 bf16": torchao("Int8WeightOnlyConfig", torch.bfloat16),
    "torchao int8 dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao fp8": torchao("Float8WeightOnlyConfig"),
    "torchao intx": torchao("IntxWeightOnlyConfig"),
    "torchao intx dynamic": torchao("Int8DynamicActivationIntxWeightConfig"),
    "bitsandbytes 4 bit": bitsandbytes("Linear4bit", quant_type="nf4", compute_dtype=torch.float32),
    "bitsandbytes fp4 twice": bitsandbytes("Linear4bit", quant_type="fp4", compress_statistics=True),
    "bitsandbytes 8 bit": bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "torch int8": dynamic(torch.qint8),
    "torch fp16": dynamic(torch.float16),
    "fp8 with blocks": Scaled8,
    "fp8 with one scale": lambda d_in, d_out: Scaled8(d_in, d_out, None),
}
KINDS = {**WRITTEN, "unheard of": Hidden}
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
each_written = pytest.mark.parametrize("make", WRITTEN.values(), ids=WRITTEN)


def attached(layer: nn.Module, spec: sl.AdapterSpec = SPECS["lora"], **options: Any) -> tuple[nn.Module, sl.Tuned]:
    model = nn.ModuleDict({"layer": layer})
    tuned = sl.attach(model, spec, ["layer"], seed=0, **options)
    perturb(tuned)
    return model, tuned


def dtype_of(layer: nn.Module) -> torch.dtype:
    return next((p.dtype for p in layer.parameters() if p.dtype in (torch.float32, torch.bfloat16)), torch.float32)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Sums of 64 products in another order: some roundings of the layer's dtype."""
    loose = 2e-5 if dtype == torch.float32 else 3e-2
    found, expected = found.detach(), expected.detach()
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.to(torch.float64), expected.to(torch.float64), rtol=loose, atol=loose * scale)


@each_kind
@each_spec
@pytest.mark.parametrize("route", [None, "delta"])
def test_outputs_and_gradients_are_those_of_the_dequantised_weight(
    make: Callable[[int, int], nn.Module], spec: sl.AdapterSpec, route: str | None
) -> None:
    layer = make(IN, OUT)
    dtype = dtype_of(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, at their first call
        base = layer(noise(5, IN, dtype=dtype)).detach()
    model, tuned = attached(layer, spec, route=route)
    assert tuned.targets == {"layer": (OUT, IN)}
    x, g = noise(5, IN, dtype=dtype).requires_grad_(), noise(5, OUT, seed=1, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*autograd kernel was not registered")
        y = model["layer"](x)
        y.backward(g)
    delta = tuned.delta("layer")
    wide = x.detach().double()
    close(y, base.double() + wide @ delta.double().T, dtype)
    close(x.grad, g.double() @ (dequantised(layer).double() + delta.double()), dtype)
    expected = torch.autograd.grad(delta, list(tuned.parameters()), (g.double().T @ wide).to(delta.dtype))
    for parameter, other in zip(tuned.parameters(), expected, strict=True):
        close(parameter.grad, other, dtype)


@each_kind
def test_the_layer_below_learns_through_a_quantised_one(make: Callable[[int, int], nn.Module]) -> None:
    """Also where the layer's own forward passes no gradient on."""
    layer = make(IN, OUT)
    dtype = dtype_of(layer)
    model = nn.Sequential(nn.Linear(IN, IN).to(dtype), layer)
    tuned = sl.attach(model, sl.lora(2), ["0", "1"], seed=0)
    perturb(tuned)
    x = noise(4, IN, dtype=dtype)
    model(x).float().square().sum().backward()
    first = (x.double() @ (model[0].weight.double() + tuned.delta("0").double()).T + model[0].bias.double()).to(dtype)
    y = model[1](first.detach()).detach()
    through = 2 * y.double() @ (dequantised(layer).double() + tuned.delta("1").double())
    delta = tuned.delta("0")
    own = list(tuned.adapters[0].parameters())
    for parameter, other in zip(own, torch.autograd.grad(delta, own, (through.T @ x.double()).float()), strict=True):
        # bf16, int8 sums and quantised activations change y by some percent between the two calls of the check.
        torch.testing.assert_close(parameter.grad, other, rtol=0.05, atol=0.05 * float(other.abs().max()))


@each_written
def test_merge_quantises_again_and_unmerge_gives_back_every_bit(make: Callable[[int, int], nn.Module]) -> None:
    layer = make(IN, OUT)
    dtype = dtype_of(layer)
    x = noise(5, IN, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = layer(x).detach()
    model, tuned = attached(layer)
    before, adapted, weight = dequantised(layer).clone(), model["layer"](x).detach(), dequantised(layer).double()
    with pytest.warns(UserWarning, match=r"quantised 1 weights again.*of dW's norm \(at 'layer'\)"):
        tuned.merge()
    expected, merged = weight + tuned.delta("layer").double(), dequantised(layer).double()
    # 16 values leave about a tenth of a normal weight's norm, 256 of them, or three bits behind the comma, some percent.
    assert (merged - expected).norm() < expected.norm() * (0.2 if type(layer).__name__ == "Linear4bit" else 0.05)
    assert (model["layer"](x) - adapted).abs().max() < 0.4 * (adapted - base).abs().max()
    tuned.unmerge()
    assert torch.equal(dequantised(layer), before)
    close(model["layer"](x), adapted, dtype)
    tuned.detach()
    assert torch.equal(layer(x), base)


@each_written
def test_what_is_baked_is_a_plain_quantised_layer(make: Callable[[int, int], nn.Module]) -> None:
    layer = make(IN, OUT)
    kind = type(layer), type(getattr(layer, "weight", None))
    model, tuned = attached(layer)
    with pytest.warns(UserWarning, match="quantised"):
        tuned.bake()
    assert (type(layer), type(getattr(layer, "weight", None))) == kind
    assert not layer._forward_hooks
    copy.deepcopy(model)["layer"](noise(2, IN, dtype=dtype_of(layer)))


def test_merging_into_an_unknown_packing_is_refused_by_name() -> None:
    layer = Hidden(IN, OUT)
    model, tuned = attached(layer)
    x, packed = noise(3, IN), layer.packed.clone()
    before = model["layer"](x)
    with pytest.raises(
        sl.AttachError, match=r"the weight of 'layer' \(Hidden\) is quantised or packed and cannot hold W \+ dW"
    ):
        tuned.merge()
    assert torch.equal(layer.packed, packed)
    torch.testing.assert_close(model["layer"](x), before)


def test_an_eight_bit_weight_whose_layer_computes_something_else_is_not_merged() -> None:
    class Doubled(Scaled8):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    _, tuned = attached(Doubled(IN, OUT))
    with pytest.raises(sl.AttachError, match=r"\(Doubled\) is kept in torch.float8_e4m3fn, and what .* computes is not x \(w"):
        tuned.merge()


@each_written
def test_saved_and_loaded(make: Callable[[int, int], nn.Module], tmp_path: Path) -> None:
    layer = make(IN, OUT)
    other = copy.deepcopy(layer)
    model, tuned = attached(layer)
    tuned.save(tmp_path)
    again = nn.ModuleDict({"layer": other})
    sl.load(again, tmp_path)
    x = noise(3, IN, dtype=dtype_of(layer))
    torch.testing.assert_close(again["layer"](x), model["layer"](x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_bases(dtype: torch.dtype) -> None:
    layer = nn.Linear(IN, OUT).to(dtype)
    model, tuned = attached(layer)
    x = noise(5, IN, dtype=dtype)
    expected = F.linear(x.double(), layer.weight.double() + tuned.delta("layer").double(), layer.bias.double())
    y = model["layer"](x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2)
    tuned.merge()
    torch.testing.assert_close(model["layer"](x).double(), expected, rtol=2e-2, atol=2e-2)


@each_kind
def test_it_compiles(make: Callable[[int, int], nn.Module]) -> None:
    layer = make(IN, OUT)
    x = noise(5, IN, dtype=dtype_of(layer))
    model = nn.Sequential(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer(x)
        tuned = sl.attach(model, sl.lora(2), ["0"], seed=0)
        perturb(tuned)
        expected = model(x)
        try:
            found = torch.compile(model, backend="eager")(x)
        except Exception as error:  # then the base does not compile either
            tuned.detach()
            with pytest.raises(type(error)):
                torch.compile(model, backend="eager")(x)
            return
    close(found, expected.double(), dtype_of(layer))


def test_at_weight_is_refused_by_name() -> None:
    model = nn.ModuleDict({"layer": Scaled8(IN, OUT)})
    with pytest.raises(sl.AttachError, match="'layer' is a Scaled8 whose weight is quantised or packed, so that reading it"):
        sl.attach(model, sl.lora(2), ["layer"], at="weight")


class Activated(nn.Module):
    """Says in_features and out_features, and is not linear."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        self.matrix = nn.Parameter(torch.randn(OUT, IN))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(x, self.matrix))


def test_a_layer_that_is_not_linear_is_refused_by_name() -> None:
    with pytest.raises(
        sl.AttachError, match="'layer' is a Activated, which has in_features and out_features but is not linear"
    ):
        attached(Activated())


def test_dropout_in_a_packed_layer_is_no_nonlinearity() -> None:
    class Dropping(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.5, self.training))

    model, _ = attached(Dropping(IN, OUT))
    assert model["layer"].training


def test_static_quantisation_is_refused_in_words() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = torch.ao.nn.quantized.Linear(IN, OUT)
        x = torch.quantize_per_tensor(noise(2, IN), 0.1, 0, torch.quint8)
        model, _ = attached(layer)
        with pytest.raises(sl.LayerError, match="'layer' is a Linear that was called with a quantised tensor"):
            model["layer"](x)


def test_other_convolutions_of_few_bits_are_refused_by_name() -> None:
    layer = nn.Conv2d(3, 4, 3)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(sl.AttachError, match="'layer' is a Conv2d whose weight is quantised or packed"):
        attached(layer)


def test_the_trainer_takes_a_quantised_model_while_an_adapter_is_on_it(tmp_path: Path) -> None:
    """transformers refuses purely quantised models; with an adapter it trains, saves, and after detach refuses again."""
    transformers, quantization = library("transformers"), library("torchao.quantization")
    library("accelerate")
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
        settings = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings, device_map="cpu")
        kind = type(model.hf_quantizer)
        tuned = sl.attach(model, sl.lora(2), ["q_proj", "v_proj"], seed=0)
        batch = {"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9)}
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path / "out"),
            report_to=[],
            use_cpu=True,
            max_steps=3,
            save_steps=3,
            disable_tqdm=True,
            learning_rate=0.05,
            gradient_checkpointing=True,
        )
        with torch.no_grad():
            before = model(**{k: v[None] for k, v in batch.items()}).loss
        transformers.Trainer(model, options, train_dataset=[batch] * 8).train()
        with torch.no_grad():
            after = model(**{k: v[None] for k, v in batch.items()}).loss
        assert after < before - 0.01
        copied = copy.deepcopy(model)
        sl.tuned(copied).detach()
        assert type(copied.hf_quantizer) is kind
        transformers.Trainer(model, options, train_dataset=[])
        tuned.detach()
        assert type(model.hf_quantizer) is kind
        with pytest.raises(ValueError, match="purely quantized"):
            transformers.Trainer(model, options, train_dataset=[])


def test_a_detached_adapter_does_nothing_in_a_layer_that_took_its_hooks_over() -> None:
    """As those that quantize_dynamic puts in the place of the adapted ones."""
    base = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN))
    model, x = copy.deepcopy(base), noise(4, IN)
    tuned = sl.attach(model, SPECS["lora"], ["0", "2"])
    perturb(tuned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in (base, model):
            torch.ao.quantization.quantize_dynamic(one, {nn.Linear}, inplace=True)
    assert not torch.allclose(model(x), base(x), atol=0.1)
    tuned.detach()
    assert torch.equal(model(x), base(x))
    tuned.strength = 2.0
    assert torch.equal(model(x), base(x))


def test_a_join_says_what_to_do_where_another_layer_took_its_hooks_over() -> None:
    model, x = nn.Sequential(nn.Linear(IN, OUT)), noise(4, IN)
    tuned = sl.attach(model, sl.dora(sl.lora(2)), ["0"])
    perturb(tuned)
    y = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        late = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        tuned.merge()
        early = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(
        sl.LayerError, match=r"join of '0' .* needs the weight, and the Linear that .*; merge before the layer is q"
    ):
        late(x)
    torch.testing.assert_close(early(x), y, rtol=0, atol=0.1)  # 8 bits for x and W, some dozens of products
