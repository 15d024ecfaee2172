"""What is written for other libraries, these libraries read: equal outputs, and the stated error is the true one."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import Net, close, deltas, inputs, parsed, shapes, shuffle
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import superlora_tn as sl
from superlora_tn.files import own
from superlora_tn.files.base_model import base_model
from superlora_tn.files.convert import convert
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.foreign import Fitted
from superlora_tn.files.gguf import CHANGED, PERMUTED, Architecture
from superlora_tn.files.record import Entry, tensor_name
from superlora_tn.files.writes import Report, save_as
from superlora_tn.verification.references.peers import quiet

# Outputs of size 1 through nine layers in float32, by two orders of summation.
OUTPUTS = 2e-5
# Exact factors of a product, rounded to float32: some roundings of 6e-8.
FACTORS = 1e-6

LAYERS = ["attn_1.to_q", "attn_1.to_k", "attn_1.to_v", "attn_1.to_out.0", "ff.0", "ff.2"]
CONVOLUTIONS = ["conv_in", "down_blocks.0", "down_blocks.1"]


def made(spec: sl.AdapterSpec, targets: list[str], seed: int = 0, dtype: torch.dtype = torch.float32) -> Fitted:
    """An adapter of this library with random values."""
    sizes = {n: s for n, s in shapes(Net()).items() if n in targets}
    return filled_in(Entry(spec, sizes), seed, dtype)


def filled_in(entry: Entry, seed: int = 0, dtype: torch.dtype = torch.float32) -> Fitted:
    """Random values for a declaration."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for k, (_, graph) in enumerate(entry.spec.lay_out(entry.targets)):
        for node in graph.nodes:
            tensors[tensor_name(k, node)] = (torch.randn(node.shape, generator=generator) * 0.5).to(dtype)
    kernels = {n: tuple(m.kernel_size) for n, m in Net().named_modules() if isinstance(m, nn.Conv2d) and n in entry.targets}
    return Fitted((entry,), tensors, kernels=kernels)  # type: ignore[arg-type]


def save(adapter: Fitted, path: Path, format: Any, **more: Any) -> Report:
    """Write it."""
    return save_as(adapter.entries, adapter.tensors, path, format, kernels=adapter.kernels, **more)


def merged(model: nn.Module, adapter: Fitted) -> nn.Module:
    """A copy of a model with dW in its weights, in float64."""
    copied = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, delta in deltas(adapter).items():
            weight = copied.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight += torch.from_numpy(delta).reshape(weight.shape)
    return copied


SPECS: dict[str, tuple[sl.AdapterSpec, str, str]] = {
    # spec, method in PEFT's folder, method in LyCORIS' file
    "lora": (sl.lora(3, alpha=5), "lora", "lora"),
    "lora of rank 1": (sl.lora(1), "lora", "lora"),
    "rslora": (sl.lora(4, alpha=3, rslora=True), "lora", "lora"),
    "loha": (sl.loha(2, alpha=3), "loha", "loha"),
    "lokr": (sl.lokr(2, alpha=3), "lokr", "lokr"),
    "lokr with both of low rank": (sl.lokr(1, decompose_both=True, alpha=2), "lokr", "lokr"),
    "lokr of a factor": (sl.lokr(1, factor=4, alpha=2), "lokr", "lokr"),
    "lokr, both dense": (sl.lokr(64, alpha=16), "lokr", "lokr"),
    "vera": (sl.vera(3), "lora", "lora"),
    "lotr": (sl.lotr(3, alpha=5), "lora", "lora"),
    "lorta": (sl.lorta(2, alpha=3), "lora", "full"),
    "lonkr": (sl.lonkr(1, splits=3), "lora", "lora"),
    "dense": (sl.dense(), "lora", "full"),
    "cp over heads": (sl.AdapterSpec(sl.CP(3), sl.PhysicalFold("head out in", heads=2), alpha=2), "lora", "lora"),
    "tucker": (sl.AdapterSpec(sl.Tucker(3), alpha=2), "lora", "lora"),
    "hadamard of three": (sl.AdapterSpec(sl.Hadamard(sl.CP(2), sl.CP(1), sl.CP(2))), "lora", "lora"),
    "projected": (sl.lorta(2, projection=sl.Fastfood(0.5)), "lora", "full"),
}


@pytest.mark.parametrize("case", SPECS)
def test_peft_takes_it_back(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    spec, method, _ = SPECS[case]
    model, x = Net(), inputs()
    adapter = made(spec, LAYERS)
    report = save(adapter, tmp_path, "peft")
    assert {row.method for row in report.rows} == {method}
    assert max(report.errors.values()) < FACTORS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        tuned = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path))
    with torch.no_grad():
        wanted = merged(model, adapter)(x.double())
        assert (wanted - model(x)).abs().max() > 100 * OUTPUTS
        torch.testing.assert_close(tuned(x).double(), wanted, atol=OUTPUTS, rtol=OUTPUTS)


@pytest.mark.parametrize("case", SPECS)
def test_lycoris_takes_it_back(case: str, tmp_path: Path) -> None:
    lycoris = pytest.importorskip("lycoris")
    spec, _, method = SPECS[case]
    model, x = Net(), inputs()
    adapter = made(spec, LAYERS)
    report = save(adapter, tmp_path / "x.safetensors", "lycoris")
    assert {row.method for row in report.rows} <= {method, "lora"}
    assert method in {row.method for row in report.rows}
    assert max(report.errors.values()) < FACTORS
    copied = copy.deepcopy(model)
    with quiet():
        network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "x.safetensors"), copied)
    assert len(network.loras) == len(LAYERS)
    network.apply_to()
    with torch.no_grad():
        wanted = merged(model, adapter)(x.double())
        torch.testing.assert_close(copied(x).double(), wanted, atol=OUTPUTS, rtol=OUTPUTS)


def kernel_network(spec: str) -> sl.AdapterSpec:
    """LyCORIS' Tucker kernels, for the convolution of 24 to 24 channels of 3 x 3."""
    lora = sl.Network("o (i h w)", {"r": 3, "s": 3, "i": 24, "h": 3, "w": 3}, up="o r", mid="r s h w", down="s i")
    kron = sl.Network(
        "(o1 o2) (i1 i2 h w)",
        {"o1": 4, "o2": 6, "i1": 4, "i2": 6, "h": 3, "w": 3, "r": 2, "s": 2},
        w1="o1 i1",
        t="r s h w",
        a="r o2",
        b="s i2",
    )
    return sl.AdapterSpec({"lora": lora, "lokr": kron}[spec], alpha=0.5)


CONV_SPECS = {
    "lora": sl.lora(3, alpha=5),
    "loha": sl.loha(2, alpha=3),
    "lokr": sl.lokr(2, alpha=3),
    "lotr": sl.lotr(2),
    "lora with kernels": kernel_network("lora"),
    "lokr with kernels": kernel_network("lokr"),
}


def taken_back(model: nn.Module, folder: Path, format: str, count: int) -> nn.Module:
    """A model with so many weights' adapter from a folder, by PEFT, or by LyCORIS from its x.safetensors."""
    if format == "peft":
        peft = pytest.importorskip("peft")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned: nn.Module = peft.PeftModel.from_pretrained(model, str(folder))
            return tuned
    lycoris = pytest.importorskip("lycoris")
    with quiet():
        lycoris.LycorisNetwork.apply_preset({"lora_prefix": "lycoris" if format == "lycoris" else "lora_unet"})
        try:
            network, _ = lycoris.create_lycoris_from_weights(1.0, str(folder / "x.safetensors"), model)
        finally:
            lycoris.LycorisNetwork.apply_preset({"lora_prefix": "lycoris"})
    assert len(network.loras) == count
    network.apply_to()
    return model


@pytest.mark.parametrize("format", ["peft", "lycoris", "kohya"])
@pytest.mark.parametrize("case", CONV_SPECS)
def test_convolutions(case: str, format: str, tmp_path: Path) -> None:
    """The format's own library, or this one where LyCORIS reads kohya's."""
    targets = ["down_blocks.1"] if "kernels" in case else CONVOLUTIONS
    adapter = made(CONV_SPECS[case], targets)
    model, x = Net(), inputs()
    report = save(adapter, tmp_path / "x.safetensors" if format != "peft" else tmp_path, format)
    assert max(report.errors.values()) < FACTORS
    copied = taken_back(copy.deepcopy(model), tmp_path, format, len(targets))
    with torch.no_grad():
        wanted = merged(model, adapter)(x.double())
        torch.testing.assert_close(copied(x).double(), wanted, atol=OUTPUTS, rtol=OUTPUTS)


def net() -> Net:
    """The same base each time."""
    torch.manual_seed(0)
    return Net()


def with_dora(spec: sl.AdapterSpec, targets: list[str]) -> tuple[nn.Module, sl.Tuned]:
    """A model with DoRA of a declaration, its magnitudes moved too."""
    model = net()
    tuned = sl.attach(model, sl.dora(spec), targets)
    with torch.no_grad():
        for k, parameter in enumerate(tuned.parameters()):
            generator = torch.Generator().manual_seed(k)
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model, tuned


@pytest.mark.parametrize("format", ["peft", "lycoris", "kohya"])
@pytest.mark.parametrize("case", ["lora", "loha", "lokr", "lotr"])
@pytest.mark.parametrize("targets", [LAYERS, CONVOLUTIONS], ids=["linear", "convolutions"])
def test_dora_is_taken_back_as_such(case: str, format: str, targets: list[str], tmp_path: Path) -> None:
    """By the format's own library, and by this one as magnitudes that train on."""
    model, tuned = with_dora(SPECS[case][0], targets)
    place, x = tmp_path if format == "peft" else tmp_path / "x.safetensors", inputs()
    tuned.save(place, format=format)
    copied, again = net(), net()
    loaded = sl.load(again, place)
    assert {type(entry.spec.join) for entry in loaded.entries} == {sl.Magnitude}
    copied = taken_back(copied, tmp_path, format, len(targets))
    with torch.no_grad():
        wanted = model(x)
        assert (wanted - net()(x)).abs().max() > 100 * OUTPUTS
        torch.testing.assert_close(again(x), wanted, atol=OUTPUTS, rtol=OUTPUTS)
        torch.testing.assert_close(copied(x), wanted, atol=OUTPUTS, rtol=OUTPUTS)


def test_formats_without_magnitudes_say_so(tmp_path: Path) -> None:
    _, tuned = with_dora(sl.lora(2), LAYERS)
    with pytest.raises(CheckpointError, match=r"is joined by magnitudes \(DoRA\), and gguf files hold no magnitudes"):
        tuned.save(tmp_path / "x.gguf", format="gguf")
    assert not (tmp_path / "x.gguf").exists()
    model = Net()
    mixed = sl.attach(model, {"to_q": sl.dora(sl.lora(2)), "to_k": sl.lora(2)})
    with pytest.raises(CheckpointError, match="either all weights have magnitudes or none"):
        mixed.save(tmp_path / "peft", format="peft")


@pytest.mark.parametrize("format", ["peft", "lycoris", "kohya", "diffusers", "gguf"])
@pytest.mark.parametrize("case", SPECS)
def test_this_library_takes_it_back(case: str, format: str, tmp_path: Path) -> None:
    adapter = made(SPECS[case][0], LAYERS)
    save(adapter, tmp_path, format)
    close(deltas(parsed(tmp_path).fitted(shapes(Net()))), deltas(adapter), 2 * FACTORS)


@pytest.mark.parametrize("format", ["peft", "lycoris", "kohya", "diffusers", "gguf"])
def test_lora_is_kept_bit_for_bit(format: str, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        adapter = made(sl.lora(3, alpha=6), LAYERS, dtype=dtype)
        report = save(adapter, tmp_path / str(dtype), format)
        assert set(report.errors.values()) == {0.0}
        found = parsed(tmp_path / str(dtype)).weights
        for weight, k in zip(sorted(found, key=lambda w: w.name), _order(adapter), strict=True):
            assert torch.equal(weight.nodes["up"][1], adapter.tensors[f"group{k}.factor_out"])
            assert torch.equal(weight.nodes["down"][1], adapter.tensors[f"group{k}.factor_in"].T)
            assert weight.scale == 2.0


def _order(adapter: Fitted) -> list[int]:
    names = list(adapter.targets)
    return [names.index(n) for n in sorted(names, key=lambda n: n.replace(".", "_"))]


# --- diffusers and GGUF ---------------------------------------------------------------------------------------------


def test_diffusers_takes_it_back(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            norm_num_groups=4,
            attention_head_dim=4,
        )
        base = copy.deepcopy(model).double()
        layers = {n: m for n, m in model.named_modules() if n.endswith(("to_q", "to_v", "to_out.0", "conv1"))}
        sizes = {n: tuple(m.weight.flatten(1).shape) for n, m in layers.items()}
        kernels = {n: tuple(m.kernel_size) for n, m in layers.items() if isinstance(m, nn.Conv2d)}
        linear = {n: s for n, s in sizes.items() if n not in kernels}
        adapter = filled_in(Entry(sl.lokr(2, alpha=3), sizes))
        report = save_as(adapter.entries, adapter.tensors, tmp_path, "diffusers", prefix="unet", kernels=kernels)
        assert max(report.errors.values()) < FACTORS
        assert len(linear) < len(sizes)
        model.load_lora_adapter(str(tmp_path), prefix="unet", weight_name="pytorch_lora_weights.safetensors")
        wanted = merged(base, adapter)
        sample = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 16)
        with torch.no_grad():
            found = model(*sample).sample.double()
            oracle = wanted(sample[0].double(), sample[1], sample[2].double()).sample
            before = base(sample[0].double(), sample[1], sample[2].double()).sample
    assert (oracle - before).abs().max() > 100 * OUTPUTS
    # Some thirty layers in float32.
    torch.testing.assert_close(found, oracle, atol=1e-4, rtol=1e-4)


def test_a_pipeline_of_diffusers_takes_it_back(tmp_path: Path) -> None:
    """`load_lora_weights` itself, which passes the settings beside the tensors on."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = diffusers.FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4),
        )
        base = copy.deepcopy(model).double()
        pipeline = diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=model,
        )
        layers = {n: m for n, m in model.named_modules() if n.endswith(("to_q", "to_k", "to_v", "proj_mlp"))}
        adapter = filled_in(Entry(sl.lora(3, alpha=2), {n: tuple(m.weight.shape) for n, m in layers.items()}))
        save_as(adapter.entries, adapter.tensors, tmp_path, "diffusers")
        pipeline.load_lora_weights(str(tmp_path))
        wanted = merged(base, adapter)
        given = {
            "hidden_states": torch.randn(1, 4, 4),
            "encoder_hidden_states": torch.randn(1, 3, 8),
            "pooled_projections": torch.randn(1, 8),
            "timestep": torch.tensor([0.5]),
            "img_ids": torch.zeros(4, 3),
            "txt_ids": torch.zeros(3, 3),
        }
        with torch.no_grad():
            found = model(**given).sample.double()
            oracle = wanted(**{k: v.double() for k, v in given.items()}).sample
            before = base(**{k: v.double() for k, v in given.items()}).sample
    assert (oracle - before).abs().max() > 100 * OUTPUTS
    torch.testing.assert_close(found, oracle, atol=1e-4, rtol=1e-4)


def test_a_gguf_reader_takes_it_back(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    entries = (
        Entry(sl.lora(3, alpha=6), {"layers.0.q": (8, 6), "layers.1.q": (8, 6)}),
        Entry(sl.loha(2, alpha=1), {"layers.0.v": (4, 6)}),
    )
    first, second = (filled_in(e, seed=k) for k, e in enumerate(entries))
    tensors = {**first.tensors, **{k.replace("group0", "group2"): t for k, t in second.tensors.items()}}
    both = Fitted(entries, tensors)
    save_as(entries, tensors, tmp_path / "x.gguf", "gguf")
    reader = gguf.GGUFReader(str(tmp_path / "x.gguf"))
    words = {name: field.contents() for name, field in reader.fields.items()}
    assert (words["general.type"], words["adapter.type"]) == ("adapter", "lora")
    alpha = words["adapter.lora.alpha"]
    found = {t.name: np.array(t.data, dtype=np.float64) for t in reader.tensors}
    wanted = deltas(both)
    for name, delta in wanted.items():
        a, b = found[f"{name}.weight.lora_a"], found[f"{name}.weight.lora_b"]
        assert np.abs(alpha / b.shape[1] * b @ a - delta).max() < FACTORS * np.abs(delta).max()


@pytest.mark.parametrize("name", ["llama", "granite", "smollm3"])
def test_llamas_names_and_rows_in_gguf(name: str, tmp_path: Path) -> None:
    """q and k rows are reordered by heads, as llama.cpp's own conversion of a checkpoint does."""
    pytest.importorskip("gguf")
    names = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    adapter = filled_in(Entry(sl.lora(2), dict.fromkeys(names, (16, 8))))
    with pytest.raises(CheckpointError, match="by heads"):
        save(adapter, tmp_path / "x.gguf", "gguf", architecture=Architecture(name))
    save(adapter, tmp_path / "x.gguf", "gguf", architecture=Architecture(name, (4, 2)))
    found = {w.name: w.nodes["up"][1] for w in parsed(tmp_path / "x.gguf").weights}
    assert found.keys() == {"blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v"}
    for k, (name, heads) in enumerate((("q", 4), ("k", 2))):
        up = adapter.tensors[f"group{k}.factor_out"].numpy()
        size = 16 // heads
        rows = [h * size + half * size // 2 + j for h in range(heads) for j in range(size // 2) for half in range(2)]
        assert np.array_equal(found[f"blk.0.attn_{name}"].numpy(), up[rows])
    assert torch.equal(found["blk.0.attn_v"], adapter.tensors["group2.factor_out"])


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("falcon", "transformer.h.0.self_attention.query_key_value"), ("falcon-h1", "model.layers.0.self_attn.v_proj")],
)
def test_what_gguf_stores_otherwise_is_refused(architecture: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    adapter = filled_in(Entry(sl.lora(2), {name: (16, 8)}))
    with pytest.raises(CheckpointError, match=rf"in GGUF's architecture '{architecture}', which is not written here; merge"):
        save(adapter, tmp_path / "x.gguf", "gguf", architecture=Architecture(architecture))
    assert not list(tmp_path.iterdir())


def test_architectures_of_gguf_are_gguf_s() -> None:
    gguf = pytest.importorskip("gguf")
    assert PERMUTED | CHANGED.keys() <= set(gguf.MODEL_ARCH_NAMES.values())
    assert not PERMUTED & CHANGED.keys()


def test_a_token_table_in_gguf_is_looked_up_by_rows_of_its_a(tmp_path: Path) -> None:
    """llama.cpp adds lora_b times row t of lora_a, which is (tokens, r), to the embedding of token t."""
    gguf = pytest.importorskip("gguf")

    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = torch.nn.Embedding(11, 6)
            self.lm_head = torch.nn.Linear(6, 11, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.lm_head(self.embed_tokens(x))

    model = Tokens().double()
    before = model.embed_tokens.weight.detach().clone()
    tuned = sl.attach(model, sl.lora(3, alpha=6), ["embed_tokens", "lm_head"])
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_()
        delta = model.embed_tokens(torch.arange(11)) - before
    tuned.save(tmp_path, "gguf", architecture=Architecture("qwen2"))
    place = next(tmp_path.glob("*.gguf"))
    found = {t.name: torch.from_numpy(np.array(t.data)).double() for t in gguf.GGUFReader(str(place)).tensors}
    a, b = found["token_embd.weight.lora_a"], found["token_embd.weight.lora_b"]
    assert (a.shape, b.shape) == ((11, 3), (6, 3))
    torch.testing.assert_close(6 / 3 * a @ b.T, delta, atol=1e-5, rtol=1e-5)  # float32's rounding of both
    assert found["output.weight.lora_a"].shape == (3, 6)

    # There and back by PEFT's, which calls it an embedding's.
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    convert(place, tmp_path / "peft", "peft", base=base_model(tmp_path / "base.safetensors"))
    keys = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    inner, outer = (keys[f"base_model.model.embed_tokens.lora_embedding_{side}"].double() for side in "AB")
    assert torch.equal(inner.T, a)
    assert torch.equal(outer, b)
    tuned.save(tmp_path / "own", "peft")
    convert(tmp_path / "own", tmp_path / "plain.gguf", "gguf", architecture=Architecture("qwen2"))
    as_kept = parsed(tmp_path / "own").fitted({"embed_tokens": (11, 6), "lm_head": (11, 6)})  # the table as torch has it
    more = {"embeddings": as_kept.embeddings, "architecture": Architecture("qwen2")}
    save_as(as_kept.entries, as_kept.tensors, tmp_path / "turned.gguf", "gguf", **more)
    for name in ("plain", "turned"):
        again = {t.name: t.data for t in gguf.GGUFReader(str(tmp_path / f"{name}.gguf")).tensors}
        assert all(np.array_equal(again[key], value.float()) for key, value in found.items())


# --- rank and error -------------------------------------------------------------------------------------------------


def true_error(adapter: Fitted, path: Path) -> dict[str, float]:
    """Of a file, against dW built densely in float64."""
    wanted = deltas(adapter)
    found = deltas(parsed(path).fitted({n: d.shape for n, d in wanted.items()}))  # type: ignore[misc]
    return {n: float(np.linalg.norm(found[n] - d) / np.linalg.norm(d)) for n, d in wanted.items()}


TRUNCATED = ["lora", "loha", "lokr", "lokr, both dense", "lotr", "lorta", "dense", "hadamard of three"]


@pytest.mark.parametrize("case", TRUNCATED)
@pytest.mark.parametrize("rank", [1, 3])
def test_a_given_rank_is_the_nearest_one(case: str, rank: int, tmp_path: Path) -> None:
    adapter = made(SPECS[case][0], LAYERS)
    report = save(adapter, tmp_path, "peft", rank=rank)
    found = true_error(adapter, tmp_path)
    for row in report.rows:
        assert row.ranks[0] <= rank
        values = np.linalg.svd(deltas(adapter)[row.name], compute_uv=False)
        best = float(np.sqrt((values[rank:] ** 2).sum() / (values**2).sum()))
        # The optimum, plus what float32 rounds; and the stated error is the true one.
        assert row.error <= best + FACTORS
        assert abs(found[row.name] - row.error) < FACTORS


@pytest.mark.parametrize("case", TRUNCATED)
@pytest.mark.parametrize("error", [0.5, 0.1, 1e-3])
def test_a_given_error_takes_the_smallest_rank(case: str, error: float, tmp_path: Path) -> None:
    adapter = made(SPECS[case][0], LAYERS)
    report = save(adapter, tmp_path, "lycoris", error=error)
    found = true_error(adapter, tmp_path)
    for row in report.rows:
        assert found[row.name] <= error + FACTORS
        values = np.linalg.svd(deltas(adapter)[row.name], compute_uv=False)
        tails = [float(np.sqrt((values[r:] ** 2).sum() / (values**2).sum())) for r in range(len(values) + 1)]
        assert row.ranks[0] == max(1, next(r for r, t in enumerate(tails) if t <= error))


def test_an_error_that_the_rank_does_not_reach(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"needs rank \d+ for a relative error of 0.001, above rank=2"):
        save(made(sl.loha(3), LAYERS), tmp_path, "peft", rank=2, error=1e-3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["peft", "lycoris"])
@pytest.mark.parametrize("case", ["lora", "loha", "lokr", "lokr, both dense", "lotr"])
def test_a_narrower_dtype_has_its_true_error(case: str, format: str, tmp_path: Path) -> None:
    adapter = made(SPECS[case][0], LAYERS)
    report = save(adapter, tmp_path, format, dtype=torch.bfloat16)
    assert {t.dtype for n, t in _tensors(tmp_path).items() if not n.endswith("alpha")} == {torch.bfloat16}
    found = true_error(adapter, tmp_path)
    for row in report.rows:
        assert 1e-4 < row.error < 0.02
        assert abs(found[row.name] - row.error) < 1e-6


@pytest.mark.parametrize("format", ["peft", "lycoris", "kohya"])
@pytest.mark.parametrize("spec", [sl.conv_lora(2, tucker=True, alpha=3), sl.conv_lokr(1, tucker=True)], ids=["lora", "lokr"])
@pytest.mark.parametrize(("of", "dtype"), [(torch.float64, torch.float16), (torch.bfloat16, None), (torch.float32, None)])
def test_a_core_that_is_multiplied_in_has_its_true_error(
    spec: sl.AdapterSpec, format: Any, of: torch.dtype, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """A kernel of one position is no axis in other libraries' files, so its core goes into a factor: narrowed once, by both."""
    model = Net()
    names = ["attn_1.to_q", "down_blocks.0"]
    tuned = sl.attach(model, spec, names, dtype=torch.float64, seed=0)
    shuffle(tuned.parameters(), by=0.5)
    tuned.to(of)
    exact = {name: tuned.to(torch.float64).delta(name).detach().numpy() for name in names}
    report = tuned.to(of).save(tmp_path, format, dtype=dtype)
    found = deltas(parsed(tmp_path).fitted(shapes(Net())))
    assert report.errors.keys() == set(names)
    for name, error in report.errors.items():
        true = float(np.linalg.norm(found[name] - exact[name]) / np.linalg.norm(exact[name]))
        # Halves in a file of halves are as they were but for the product, which is float32.
        assert true < (1e-3 if dtype else 1e-6)
        assert abs(true - error) < 1e-9 + 1e-3 * true


def _tensors(folder: Path) -> Mapping[str, Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def test_errors_are_printed_and_stored(tmp_path: Path) -> None:
    report = save(made(sl.loha(3), LAYERS), tmp_path, "peft", rank=2)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["superlora_tn_errors"]) == report.errors
    assert all(f"{row.name}" in str(report) and f"{row.error:.2e}" in str(report) for row in report.rows)


def test_ranks_and_alphas_that_differ(tmp_path: Path) -> None:
    """PEFT's patterns name whole weights; one name may be the end of another."""
    peft = pytest.importorskip("peft")

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(6, 6)
            self.block = nn.ModuleDict({"q": nn.Linear(6, 6)})

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.block["q"](self.q(x))
            return y

    entries = (Entry(sl.lora(2, alpha=3), {"q": (6, 6)}), Entry(sl.lora(3, alpha=7), {"block.q": (6, 6)}))
    first, second = (filled_in(e, seed=k) for k, e in enumerate(entries))
    tensors = {**first.tensors, **{k.replace("group0", "group1"): t for k, t in second.tensors.items()}}
    save_as(entries, tensors, tmp_path, "peft")
    model, x = Nested(), torch.randn(4, 6)
    tuned = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path))
    with torch.no_grad():
        wanted = merged(model, Fitted(entries, tensors))(x.double())
        torch.testing.assert_close(tuned(x).double(), wanted, atol=OUTPUTS, rtol=OUTPUTS)


def test_this_librarys_own_format(tmp_path: Path) -> None:
    adapter = made(sl.lokr(2), LAYERS)
    save(adapter, tmp_path, "superlora")
    found = own.read(tmp_path)
    assert found.entries == adapter.entries
    assert all(torch.equal(t, adapter.tensors[n]) for n, t in found.tensors.items())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a format": ({"format": "onnx"}, "'onnx' is no format; choose one of superlora, peft"),
    "a rank": ({"rank": 0}, "rank=0; give a whole number"),
    "an error": ({"error": 1.5}, "error=1.5; a relative error is from 0 to 1"),
    "a dtype": ({"dtype": torch.int8}, r"in torch\.int8; give a floating-point dtype"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_write_nothing(case: str, tmp_path: Path) -> None:
    change, words = WRONG[case]
    with pytest.raises(CheckpointError, match=words):
        save(made(sl.lora(2), LAYERS), tmp_path / "x", **({"format": "peft"} | change))
    assert not (tmp_path / "x").exists()


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    adapter = made(sl.loha(2), LAYERS)
    adapter.tensors["group0.h1_factor_out"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        save(adapter, tmp_path, "kohya")
    wide = made(sl.lora(2), LAYERS)
    wide.tensors["group0.factor_out"].fill_(1e6)
    with pytest.raises(CheckpointError, match=r"does not fit into torch\.float16"):
        save(wide, tmp_path, "kohya", dtype=torch.float16)


def test_a_weight_without_an_update(tmp_path: Path) -> None:
    adapter = made(sl.loha(2), LAYERS)
    for tensor in adapter.tensors.values():
        tensor.zero_()
    report = save(adapter, tmp_path, "peft", rank=1)
    assert set(report.errors.values()) == {0.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, None])
@pytest.mark.parametrize("of", [torch.float16, torch.float64])
def test_gguf_has_one_dtype_and_its_true_error(dtype: torch.dtype | None, of: torch.dtype, tmp_path: Path) -> None:
    """Also of what takes another weight's alpha; llama.cpp reads no float64."""
    parts = (Entry(sl.lora(2, alpha=4), {"a": (8, 6)}), Entry(sl.lora(3), {"b": (8, 6)}), Entry(sl.loha(2), {"c": (6, 8)}))
    tensors = {}
    for k, part in enumerate(parts):
        tensors |= {n.replace("group0", f"group{k}"): t for n, t in filled_in(part, seed=k, dtype=of).tensors.items()}
    adapter = Fitted(parts, tensors)
    report = save_as(parts, tensors, tmp_path, "gguf", dtype=dtype)
    # By default a LoRA of the common alpha keeps its halves; what takes a factor, and products, are float32.
    kept = {"a": of if of is torch.float16 else torch.float32, "b": torch.float32, "c": torch.float32}
    wanted = {name: torch.float32 if dtype is torch.float64 else dtype or own for name, own in kept.items()}
    weights = {weight.name: weight for weight in parsed(tmp_path).weights}
    assert {n: {t.dtype for t in w.tensors().values()} for n, w in weights.items()} == {n: {d} for n, d in wanted.items()}
    found = true_error(adapter, tmp_path)
    for row in report.rows:
        assert abs(found[row.name] - row.error) < 1e-6 * max(1.0, row.error / 1e-3)


@pytest.mark.parametrize("format", ["peft", "lycoris", "kohya", "diffusers", "gguf"])
@pytest.mark.parametrize("case", ["lora", "loha", "lokr", "lokr, both dense", "lotr"])
def test_a_scale_of_zero_stays_zero(case: str, format: str, tmp_path: Path) -> None:
    """Readers of kohya's and LyCORIS' files take an alpha of 0 for the rank, those of GGUF for 1: the factors are zero."""
    spec = dataclasses.replace(SPECS[case][0], alpha=0.0)
    names = ["attn_1.to_q", "ff.0"]
    report = save(made(spec, names), tmp_path, format)
    assert set(report.errors.values()) == {0.0}
    found = deltas(parsed(tmp_path).fitted(shapes(Net())))
    assert found.keys() == set(names)
    assert not any(delta.any() for delta in found.values())


@pytest.mark.parametrize("format", ["peft", "lycoris", "kohya", "gguf"])
@pytest.mark.parametrize("case", ["lora", "loha", "lotr"])
@pytest.mark.parametrize("alpha", [0.1, 1e-44, 1e-60])
def test_an_alpha_that_float32_does_not_hold_has_its_true_error(alpha: float, case: str, format: str, tmp_path: Path) -> None:
    """0.1 is rounded, 1e-44 is some seven of the smallest steps, and 1e-60 is zero, all of dW."""
    adapter = made(dataclasses.replace(SPECS[case][0], alpha=alpha), ["attn_1.to_q"], dtype=torch.float64)
    report = save(adapter, tmp_path, format)
    [(name, found)] = true_error(adapter, tmp_path).items()
    # What is stated is the sum of the errors of alpha and factors, a bound of the two together.
    assert 0.5 * report.errors[name] - 1e-12 < found < 1.01 * report.errors[name] + 1e-12


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "lora.safetensors").symlink_to(tmp_path / "victim")
    save(made(sl.lora(2), LAYERS), tmp_path, "kohya")
    assert (tmp_path / "victim").read_text() == "kept"
    assert not (tmp_path / "lora.safetensors").is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"victim", "lora.safetensors"}


def test_two_names_that_become_one(tmp_path: Path) -> None:
    adapter = filled_in(Entry(sl.lora(1), {"a.b_c": (4, 4), "a_b.c": (4, 4)}))
    with pytest.raises(CheckpointError, match="are both 'lora_unet_a_b_c' in such a file"):
        save(adapter, tmp_path, "kohya")
