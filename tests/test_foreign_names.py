"""Names of publishers and trainers against a model's own, fused projections against split ones, alpha, and what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign import DATA, close, deltas, parsed, shapes, write
from hypothesis import given
from hypothesis import strategies as st
from oracle import loha, lokr, lora
from torch import Tensor

from superlora_tn.files.container import Container
from superlora_tn.files.dialects import atoms, unet
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.foreign import Fitted
from superlora_tn.files.names import label, seats
from superlora_tn.files.single import parse_single
from superlora_tn.files.weight import Weight

KEYS = DATA / "adapter_keys"
LISTS = sorted(p.name for p in KEYS.glob("*.json")) if KEYS.exists() else []
# Sums of a few products of the same float32 numbers, in float64 on both sides.
EXACT = 1e-11


def random(*shape: int, seed: int = 0) -> Tensor:
    """Values of size 1."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def pair(name: str, out: int, inward: int, rank: int = 2, style: str = "kohya", seed: int = 0) -> dict[str, Tensor]:
    """A LoRA under a name."""
    up, down = {"kohya": ("lora_up", "lora_down"), "peft": ("lora_B", "lora_A")}[style]
    return {
        f"{name}.{up}.weight": random(out, rank, seed=seed),
        f"{name}.{down}.weight": random(rank, inward, seed=seed + 1),
    }


def product(tensors: dict[str, Tensor], name: str) -> np.ndarray:
    """Its dW at scale 1."""
    up, down = (next(t for k, t in tensors.items() if k.startswith(f"{name}.") and w in k) for w in ("_up", "_down"))
    return lora(up.double().numpy(), down.double().numpy())


def fitted(tmp_path: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """dW of a file on a model of these shapes."""
    return deltas(parsed(write(tmp_path / "x.safetensors", tensors)).fitted(shapes))


# --- the published lists --------------------------------------------------------------------------------------------


def small(key: str, shape: list[int]) -> Tensor:
    """A tensor for a key at a sixteenth of the published size."""
    if not shape:
        return torch.tensor(4.0)
    return random(*(s if s <= 64 else max(s // 16, 1) for s in shape), seed=len(key))


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("style", ["own", "dots", "nested"])
def test_published_keys(name: str, style: str, tmp_path: Path) -> None:
    """Each list fits a model of its modules, whatever stands in front of them, and every key is used."""
    tensors = {k: small(k, s) for k, s in json.loads((KEYS / name).read_text()).items()}
    found = parsed(write(tmp_path / name, tensors))
    assert sum(len(w.nodes) for w in found.weights) + sum(k.endswith(".alpha") for k in tensors) == len(tensors)
    for part in found.parts:
        own = found.only(part)
        names = {w.name: label(w.name).rest if style != "own" else w.name for w in own.weights}
        shapes = {f"wrapped.{names[w.name]}" if style == "nested" else names[w.name]: w.shape for w in own.weights}
        made = own.fitted(shapes)
        assert made.targets == shapes
        assert sum(t.numel() for t in made.tensors.values()) == sum(w.size for w in own.weights)


# BFL's Flux at a 64th of its size, and the same model as diffusers has it.
W, M = 12, 20
BFL = {
    **{f"double_blocks.{k}.{t}_attn.qkv": (3 * W, W) for k in range(2) for t in ("img", "txt")},
    **{f"double_blocks.{k}.{t}_attn.proj": (W, W) for k in range(2) for t in ("img", "txt")},
    **{f"double_blocks.{k}.{t}_mlp.0": (M, W) for k in range(2) for t in ("img", "txt")},
    **{f"double_blocks.{k}.{t}_mod.lin": (6 * W, W) for k in range(2) for t in ("img", "txt")},
    **{f"single_blocks.{k}.linear1": (3 * W + M, W) for k in range(2)},
    **{f"single_blocks.{k}.linear2": (W, W + M) for k in range(2)},
    **{f"single_blocks.{k}.modulation.lin": (3 * W, W) for k in range(2)},
    "img_in": (W, 8),
    "final_layer.linear": (8, W),
    "final_layer.adaLN_modulation.1": (2 * W, W),
}
SPLIT = {
    **{f"transformer_blocks.{k}.attn.to_{x}": (W, W) for k in range(2) for x in "qkv"},
    **{f"transformer_blocks.{k}.attn.add_{x}_proj": (W, W) for k in range(2) for x in "qkv"},
    **{f"transformer_blocks.{k}.attn.{n}": (W, W) for k in range(2) for n in ("to_out.0", "to_add_out")},
    **{f"transformer_blocks.{k}.{n}.net.0.proj": (M, W) for k in range(2) for n in ("ff", "ff_context")},
    **{f"transformer_blocks.{k}.{n}.linear": (6 * W, W) for k in range(2) for n in ("norm1", "norm1_context")},
    **{f"single_transformer_blocks.{k}.attn.to_{x}": (W, W) for k in range(2) for x in "qkv"},
    **{f"single_transformer_blocks.{k}.proj_mlp": (M, W) for k in range(2)},
    **{f"single_transformer_blocks.{k}.proj_out": (W, W + M) for k in range(2)},
    **{f"single_transformer_blocks.{k}.norm.linear": (3 * W, W) for k in range(2)},
    "x_embedder": (W, 8),
    "proj_out": (8, W),
    "norm_out.linear": (2 * W, W),
}


def flux(dense: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """dW by diffusers' names as dW by BFL's, written out."""
    made: dict[str, np.ndarray] = {}
    for k in range(2):
        d, s, own = f"transformer_blocks.{k}", f"single_transformer_blocks.{k}", f"double_blocks.{k}"
        made[f"{own}.img_attn.qkv"] = np.concatenate([dense[f"{d}.attn.to_{x}"] for x in "qkv"])
        made[f"{own}.txt_attn.qkv"] = np.concatenate([dense[f"{d}.attn.add_{x}_proj"] for x in "qkv"])
        made[f"{own}.img_attn.proj"] = dense[f"{d}.attn.to_out.0"]
        made[f"{own}.txt_attn.proj"] = dense[f"{d}.attn.to_add_out"]
        for t, ff, norm in (("img", "ff", "norm1"), ("txt", "ff_context", "norm1_context")):
            made[f"{own}.{t}_mlp.0"] = dense[f"{d}.{ff}.net.0.proj"]
            made[f"{own}.{t}_mod.lin"] = dense[f"{d}.{norm}.linear"]
        rows = [dense[f"{s}.attn.to_{x}"] for x in "qkv"]
        made[f"single_blocks.{k}.linear1"] = np.concatenate([*rows, dense[f"{s}.proj_mlp"]])
        made[f"single_blocks.{k}.linear2"] = dense[f"{s}.proj_out"]
        made[f"single_blocks.{k}.modulation.lin"] = dense[f"{s}.norm.linear"]
    made["img_in"], made["final_layer.linear"] = dense["x_embedder"], dense["proj_out"]
    scale, shift = np.split(dense["norm_out.linear"], 2)
    made["final_layer.adaLN_modulation.1"] = np.concatenate([shift, scale])
    return made


@pytest.mark.parametrize("prefix", ["", "transformer.", "lora_transformer_"])
def test_a_flux_of_diffusers_on_bfls_model(prefix: str, tmp_path: Path) -> None:
    names = {n: prefix + (n.replace(".", "_") if prefix.endswith("_") else n) for n in SPLIT}
    tensors = {k: t for n, (o, i) in SPLIT.items() for k, t in pair(names[n], o, i, seed=len(n)).items()}
    wanted = flux({n: product(tensors, own) for n, own in names.items()})
    close(fitted(tmp_path, tensors, BFL), wanted, EXACT)
    close(fitted(tmp_path, tensors, SPLIT), {n: product(tensors, own) for n, own in names.items()}, EXACT)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "lora_unet_"])
def test_a_flux_of_bfl_on_diffusers_model(prefix: str, tmp_path: Path) -> None:
    names = {n: prefix + (n.replace(".", "_") if prefix.endswith("_") else n) for n in BFL}
    tensors = {k: t for n, (o, i) in BFL.items() for k, t in pair(names[n], o, i, seed=len(n)).items()}
    found = fitted(tmp_path, tensors, SPLIT)
    assert found.keys() == SPLIT.keys()
    close(flux(found), {n: product(tensors, own) for n, own in names.items()}, EXACT)
    close(fitted(tmp_path, tensors, BFL), {n: product(tensors, own) for n, own in names.items()}, EXACT)


def test_xlabs_processors(tmp_path: Path) -> None:
    tensors = {}
    for home in ("double_blocks.0", "single_blocks.1"):
        for name, out, inward in (("qkv", 3 * W, W), ("proj", W, W + M if home.startswith("single") else W)):
            for number in ("1", "2") if home.startswith("double") else ("",):
                place = f"{home}.processor.{name}_lora{number}"
                tensors[f"{place}.up.weight"] = random(out, 2, seed=len(place))
                tensors[f"{place}.down.weight"] = random(2, inward, seed=len(place) + 1)

    def dense(place: str) -> np.ndarray:
        return lora(*(tensors[f"{place}.{x}.weight"].double().numpy() for x in ("up", "down")))

    wanted = {
        "double_blocks.0.img_attn.qkv": dense("double_blocks.0.processor.qkv_lora1"),
        "double_blocks.0.img_attn.proj": dense("double_blocks.0.processor.proj_lora1"),
        "double_blocks.0.txt_attn.qkv": dense("double_blocks.0.processor.qkv_lora2"),
        "double_blocks.0.txt_attn.proj": dense("double_blocks.0.processor.proj_lora2"),
        "single_blocks.1.linear1": np.concatenate([dense("single_blocks.1.processor.qkv_lora"), np.zeros((M, W))]),
        "single_blocks.1.linear2": dense("single_blocks.1.processor.proj_lora"),
    }
    close(fitted(tmp_path, tensors, BFL), wanted, EXACT)
    split = fitted(tmp_path, tensors, SPLIT)
    assert np.array_equal(
        np.concatenate([split[f"single_transformer_blocks.1.attn.to_{x}"] for x in "qkv"]),
        wanted["single_blocks.1.linear1"][: 3 * W],
    )


def test_the_u_net_of_stable_diffusion(tmp_path: Path) -> None:
    """LDM's numbers against diffusers' blocks, at places that are known from both published models."""
    table = {
        "input_blocks.0.0": "conv_in",
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        "input_blocks.8.1.proj_out": "down_blocks.2.attentions.1.proj_out",
        "middle_block.1.proj_in": "mid_block.attentions.0.proj_in",
        "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
        "output_blocks.0.0.emb_layers.1": "up_blocks.0.resnets.0.time_emb_proj",
        "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks.5.1.transformer_blocks.1.ff.net.0.proj": "up_blocks.1.attentions.2.transformer_blocks.1.ff.net.0.proj",
        "time_embed.2": "time_embedding.linear_2",
        "out.2": "conv_out",
    }
    for old, new in table.items():
        assert unet(old) == new
        assert atoms(old.replace(".", "_")) == atoms(new)
    tensors = {k: t for n in table for k, t in pair("lora_unet_" + n.replace(".", "_"), 6, 4, seed=len(n)).items()}
    wanted = {new: product(tensors, "lora_unet_" + old.replace(".", "_")) for old, new in table.items()}
    close(fitted(tmp_path, tensors, dict.fromkeys(table.values(), (6, 4))), wanted, EXACT)


# --- fused and split ------------------------------------------------------------------------------------------------

FAMILIES = [
    ("to_q", "to_k", "to_v"),
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
]
FUSED = ["qkv", "qkv_proj", "to_qkv", "in_proj", "Wqkv", "c_attn"]


@pytest.mark.parametrize("names", FAMILIES, ids="-".join)
@pytest.mark.parametrize("fused", FUSED)
def test_fused_and_split_in_both_directions(names: tuple[str, str, str], fused: str, tmp_path: Path) -> None:
    split = {f"layers.0.attn.{n}": (12, 8) for n in names}
    tensors = pair(f"layers.0.attn.{fused}", 36, 8)
    whole = product(tensors, f"layers.0.attn.{fused}")
    close(fitted(tmp_path, tensors, split), dict(zip(split, np.split(whole, 3), strict=True)), EXACT)
    tensors = {k: t for n, name in enumerate(split) for k, t in pair(name, 12, 8, seed=10 * n).items()}
    whole = np.concatenate([product(tensors, n) for n in split])
    close(fitted(tmp_path, tensors, {f"layers.0.attn.{fused}": (36, 8)}), {f"layers.0.attn.{fused}": whole}, EXACT)


@pytest.mark.parametrize("given_", ["q", "k", "v", "qk", "qv", "kv"])
@pytest.mark.parametrize(("q", "kv"), [(12, 12), (12, 4)])
def test_parts_that_are_not_adapted_stay(given_: str, q: int, kv: int, tmp_path: Path) -> None:
    """Grouped queries too: the sizes of the missing parts follow from those that are there."""
    sizes = {"q": q, "k": kv, "v": kv}
    tensors = {k: t for x in given_ for k, t in pair(f"a.{x}_proj", sizes[x], 8, rank=1 + (x == "v"), seed=ord(x)).items()}
    rows = [product(tensors, f"a.{x}_proj") if x in given_ else np.zeros((sizes[x], 8)) for x in "qkv"]
    close(fitted(tmp_path, tensors, {"a.qkv_proj": (q + 2 * kv, 8)}), {"a.qkv_proj": np.concatenate(rows)}, EXACT)


def test_scales_of_parts_differ(tmp_path: Path) -> None:
    tensors = {k: t for n, x in enumerate("qkv") for k, t in pair(f"a.{x}_proj", 4, 6, seed=n).items()}
    tensors |= {f"a.{x}_proj.alpha": torch.tensor(alpha) for x, alpha in zip("qkv", (1.0, 4.0, 3.0), strict=True)}
    rows = [product(tensors, f"a.{x}_proj") * alpha / 2 for x, alpha in zip("qkv", (1.0, 4.0, 3.0), strict=True)]
    # The ratio of two scales goes into a float32 node.
    close(fitted(tmp_path, tensors, {"a.qkv": (12, 6)}), {"a.qkv": np.concatenate(rows)}, 1e-6)


def kron(name: str, w1: tuple[int, int], w2: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    """A LoKr of dense factors."""
    return {f"{name}.lokr_w1": random(*w1, seed=seed), f"{name}.lokr_w2": random(*w2, seed=seed + 5)}


@pytest.mark.parametrize(
    ("w1", "w2"), [((6, 2), (2, 3)), ((3, 2), (4, 3)), ((4, 2), (3, 3)), ((2, 2), (6, 3)), ((12, 2), (1, 3))]
)
def test_kronecker_products_cut_to_rows(w1: tuple[int, int], w2: tuple[int, int], tmp_path: Path) -> None:
    """Along w1's rows, within one of them, or across both."""
    tensors = kron("a.qkv", w1, w2)
    whole = lokr(tensors["a.qkv.lokr_w1"].double().numpy(), tensors["a.qkv.lokr_w2"].double().numpy())
    split = {f"a.to_{x}": (4, 6) for x in "qkv"}
    close(fitted(tmp_path, tensors, split), dict(zip(split, np.split(whole, 3), strict=True)), 1e-6)


@pytest.mark.parametrize("sizes", [(6, 3, 3), (4, 4, 4), (1, 7, 4), (10, 1, 1)])
@pytest.mark.parametrize(("w1", "w2"), [((3, 2), (4, 3)), ((4, 2), (3, 3)), ((2, 2), (6, 3)), ((1, 2), (12, 3))])
def test_doras_norms_are_cut_once_with_their_rows(
    w1: tuple[int, int], w2: tuple[int, int], sizes: tuple[int, int, int], tmp_path: Path
) -> None:
    """Through however many indices the network is cut, down to single rows; and laid under each other again."""
    tensors = kron("a.qkv_proj", w1, w2)
    magnitude = random(12, 1, seed=3).abs() + 0.5
    delta = lokr(tensors["a.qkv_proj.lokr_w1"].double().numpy(), tensors["a.qkv_proj.lokr_w2"].double().numpy())
    base = random(12, 6, seed=4).double()
    moved = base.numpy() + delta
    whole = magnitude.double().numpy() * moved / np.linalg.norm(moved, axis=1, keepdims=True) - base.numpy()
    names, ends = [f"a.{x}_proj" for x in "qkv"], np.cumsum(sizes)[:-1]
    split = {name: (size, 6) for name, size in zip(names, sizes, strict=True)}
    bases = dict(zip(names, torch.split(base, list(sizes)), strict=True))
    file = parsed(write(tmp_path / "x.safetensors", tensors | {"a.qkv_proj.dora_scale": magnitude}))
    wanted = dict(zip(names, np.split(whole, ends), strict=True))
    # dW of a DoRA is built in float64 and kept in that of the base.
    close(deltas(file.fitted(split, weights=bases.__getitem__)), wanted, 1e-6)
    joined = file.fitted(split, joined=True)
    close(deltas_of_rows(joined), dict(zip(names, np.split(delta, ends), strict=True)), 1e-6)
    norms = dict(zip(names, torch.split(magnitude[:, 0], list(sizes)), strict=True))
    assert {n: m.tolist() for n, m in magnitudes(joined).items()} == {n: m.tolist() for n, m in norms.items()}
    parts = {k: t for n, x in enumerate(names) for k, t in pair(x, split[x][0], 6, seed=n).items()}
    delta = np.concatenate([product(parts, name) for name in names])
    moved = base.numpy() + delta
    whole = magnitude.double().numpy() * moved / np.linalg.norm(moved, axis=1, keepdims=True) - base.numpy()
    parts |= {f"{name}.dora_scale": norms[name][:, None] for name in names}
    file = parsed(write(tmp_path / "y.safetensors", parts))
    close(deltas(file.fitted({"a.qkv_proj": (12, 6)}, weights=lambda _: base)), {"a.qkv_proj": whole}, 1e-6)


def deltas_of_rows(found: Fitted) -> dict[str, np.ndarray]:
    """dW of a DoRA before its rows are scaled."""
    plain = tuple(replace(entry, spec=replace(entry.spec, join=None)) for entry in found.entries)
    return deltas(Fitted(plain, found.tensors))


def magnitudes(found: Fitted) -> dict[str, Tensor]:
    """DoRA's norms by their targets."""
    groups = [group for entry in found.entries for group, _ in entry.spec.lay_out(entry.targets)]
    return {name: found.tensors[f"magnitude{k}"] for k, group in enumerate(groups) for name in group.members}


def test_kronecker_products_under_each_other_stay_kronecker_products(tmp_path: Path) -> None:
    tensors = {k: t for n, x in enumerate("qkv") for k, t in kron(f"a.to_{x}", (2, 2), (3, 4), seed=n).items()}
    rows = [lokr(*(tensors[f"a.to_{x}.lokr_w{k}"].double().numpy() for k in (1, 2))) for x in "qkv"]
    found = parsed(write(tmp_path / "x.safetensors", tensors)).fitted({"a.qkv": (18, 8)})
    close(deltas(found), {"a.qkv": np.concatenate(rows)}, EXACT)
    assert sum(t.numel() for t in found.tensors.values()) == sum(t.numel() for t in tensors.values())


def test_different_methods_under_each_other(tmp_path: Path) -> None:
    tensors = pair("a.to_q", 6, 8) | kron("a.to_v", (2, 2), (3, 4))
    tensors |= {f"a.to_k.hada_w{j}_{x}": random(*s, seed=j) for j in (1, 2) for x, s in (("a", (6, 2)), ("b", (2, 8)))}
    k = loha(*(tensors[f"a.to_k.hada_w{j}_{x}"].double().numpy() for j in (1, 2) for x in "ab"))
    v = lokr(*(tensors[f"a.to_v.lokr_w{j}"].double().numpy() for j in (1, 2)))
    whole = np.concatenate([product(tensors, "a.to_q"), k, v])
    # Exact factors of the products, rounded to float32.
    close(fitted(tmp_path, tensors, {"a.qkv": (18, 8)}), {"a.qkv": whole}, 1e-6)


def test_interleaved_heads_are_refused(tmp_path: Path) -> None:
    """BLOOM's and GPT-NeoX's rows are not q, then k, then v."""
    tensors = {k: t for x in "qkv" for k, t in pair(f"h.0.attn.{x}_proj", 4, 4).items()}
    with pytest.raises(CheckpointError, match="are no module of this model"):
        fitted(tmp_path, tensors, {"h.0.attn.query_key_value": (12, 4)})


# --- what is not clear ----------------------------------------------------------------------------------------------


UNCLEAR: dict[str, tuple[list[str], dict[str, tuple[int, int]], str]] = {
    "two modules with '_' for '.'": (["lora_unet_a_b_c"], {"a.b_c": (4, 4), "a_b.c": (4, 4)}, "is each of 'a.b_c', 'a_b.c'"),
    "two parts of the model": (["lora_unet_a_b"], {"x.a.b": (4, 4), "y.a.b": (4, 4)}, "'x' and 'y' of this model alike"),
    "another layer": (["blocks.0.q"], {"blocks.1.q": (4, 4)}, "are no module"),
    "another half": (["decoder.block.0.q"], {"encoder.block.0.q": (4, 4)}, "are no module"),
    "one rows twice": (["a.qkv", "a.to_q"], {"a.to_q": (4, 4), "a.to_k": (4, 4), "a.to_v": (4, 4)}, "both adapt 'a.to_q'"),
    "whole and part": (["a.qkv", "a.to_k"], {"a.qkv": (12, 4)}, "both adapt 'a.qkv'"),
    "a text encoder that is not there": (["lora_unet_a", "lora_te_b"], {"a": (4, 4)}, "They are of the part 'text_encoder'"),
    "sizes that do not add up": (["a.to_q", "a.to_k", "a.to_v"], {"a.qkv": (11, 4)}, "is of another model"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_is_not_clear_raises(case: str, tmp_path: Path) -> None:
    names, shapes, words = UNCLEAR[case]
    tensors = {k: t for n in names for k, t in pair(n, 12 if n.endswith("qkv") else 4, 4).items()}
    with pytest.raises(CheckpointError, match=words):
        fitted(tmp_path, tensors, shapes)


def test_parts_of_a_pipeline(tmp_path: Path) -> None:
    names = ["lora_unet_mid_q", "lora_te1_layers_0_fc1", "lora_te2_layers_0_fc1"]
    tensors = {k: t for n, name in enumerate(names) for k, t in pair(name, 4, 4, seed=n).items()}
    shapes = dict.fromkeys(["unet.mid.q", "text_encoder.layers.0.fc1", "text_encoder_2.layers.0.fc1"], (4, 4))
    close(
        fitted(tmp_path, tensors, shapes), {new: product(tensors, old) for new, old in zip(shapes, names, strict=True)}, EXACT
    )
    found = parsed(tmp_path / "x.safetensors")
    assert found.parts == ("text_encoder", "text_encoder_2", "unet")
    alone = found.fitted({"mid.q": (4, 4)}, part="unet")
    close(deltas(alone), {"mid.q": product(tensors, names[0])}, EXACT)
    with pytest.raises(CheckpointError, match="has no part 'vae'; it has 'text_encoder'"):
        found.only("vae")


def test_text_encoders_of_comfyui(tmp_path: Path) -> None:
    tensors = {}
    for name in ("clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", "t5xxl.transformer.encoder.block.0.layer.1.wo"):
        tensors |= pair(f"text_encoders.{name}", 4, 6, seed=len(name))
    found = parsed(write(tmp_path / "x.safetensors", tensors))
    assert found.parts == ("clip_l", "t5xxl")
    assert found.fitted({"encoder.layers.0.mlp.fc1": (4, 6)}, part="clip_l").targets
    assert found.fitted({"encoder.block.0.layer.1.wo": (4, 6)}, part="t5xxl").targets


def test_a_factor_of_1x1_beside_a_kernel(tmp_path: Path) -> None:
    tensors = {"lycoris_c.lokr_w1": random(2, 2, 1, 1), "lycoris_c.lokr_w2": random(3, 2, 3, 3)}
    (weight,) = parsed(write(tmp_path / "x.safetensors", tensors)).weights
    assert (weight.shape, weight.kernel) == ((6, 36), (3, 3))


@given(st.lists(st.sampled_from(["a", "b", "a_b", "q", "0", "1"]), min_size=1, max_size=4), st.data())
def test_an_underscored_name_is_found_or_is_ambiguous(words: list[str], data: st.DataObject) -> None:
    """Against all names that are written alike: one is found, several raise, and never is another one taken."""
    pool = st.lists(st.sampled_from(["a", "b", "a_b", "q", "0", "1"]), min_size=1, max_size=4).map(".".join)
    targets = data.draw(st.sets(pool, max_size=6)) | {".".join(words)}
    alike = {t for t in targets if t.replace(".", "_") == "_".join(words)}
    name = "lora_unet_" + "_".join(words)
    if len(alike) == 1:
        (seat,) = seats([name], targets, "file")[name]
        assert seat.target == alike.pop()
    else:
        with pytest.raises(CheckpointError):
            seats([name], targets, "file")


# --- alpha ----------------------------------------------------------------------------------------------------------


def scale(tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, object] | None = None) -> float:
    """The factor that one weight is read with."""
    (weight,) = parsed(write(tmp_path / "x.safetensors", tensors, metadata)).weights
    assert isinstance(weight, Weight)
    return weight.scale


LOW = {"x.lokr_w1": torch.ones(2, 2), "x.lokr_w2_a": torch.ones(3, 4), "x.lokr_w2_b": torch.ones(4, 3)}
DENSE = {"x.lokr_w1": torch.ones(2, 2), "x.lokr_w2": torch.ones(3, 3)}
ALPHAS: dict[str, tuple[Callable[[], dict[str, Tensor]], float]] = {
    "alpha / rank": (lambda: pair("x", 4, 4) | {"x.alpha": torch.tensor(3.0)}, 1.5),
    "half precision": (lambda: pair("x", 4, 4) | {"x.alpha": torch.tensor(3.0, dtype=torch.bfloat16)}, 1.5),
    "one number in a list": (lambda: pair("x", 4, 4) | {"x.alpha": torch.tensor([3.0])}, 1.5),
    "a whole number": (lambda: pair("x", 4, 4) | {"x.alpha": torch.tensor(3)}, 1.5),
    "absent": (lambda: pair("x", 4, 4), 1.0),
    "zero": (lambda: pair("x", 4, 4) | {"x.alpha": torch.tensor(0.0)}, 1.0),
    "lokr of low rank": (lambda: LOW | {"x.alpha": torch.tensor(2.0)}, 0.5),
    "lokr, both dense": (lambda: DENSE | {"x.alpha": torch.tensor(2.0)}, 1.0),
    "ai-toolkit's": (lambda: LOW | {"x.alpha": torch.tensor(9999999999.0)}, 1.0),
    "ai-toolkit's in bfloat16": (lambda: LOW | {"x.alpha": torch.tensor(9999999999.0).bfloat16()}, 1.0),
    "ai-toolkit's in float16": (lambda: LOW | {"x.alpha": torch.tensor(9999999999.0).half()}, 1.0),
    "a difference": (lambda: {"x.diff": torch.ones(3, 3), "x.alpha": torch.tensor(2.0)}, 1.0),
}


@pytest.mark.parametrize("case", ALPHAS)
def test_alpha(case: str, tmp_path: Path) -> None:
    tensors, wanted = ALPHAS[case]
    assert scale(tmp_path, tensors()) == wanted


@pytest.mark.parametrize("value", [torch.tensor(float("nan")), torch.tensor([1.0, 2.0]), torch.tensor(-torch.inf)])
def test_an_alpha_that_is_no_number(value: Tensor, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="alpha"):
        scale(tmp_path, pair("x", 4, 4) | {"x.alpha": value})


def test_settings_beside_the_tensors(tmp_path: Path) -> None:
    """diffusers' newer files carry PEFT's."""
    tensors = pair("unet.x", 4, 4, style="peft")
    settings = {"unet.r": 2, "unet.lora_alpha": 6, "unet.use_rslora": True}
    assert scale(tmp_path, tensors, {"lora_adapter_metadata": settings}) == pytest.approx(6 / 2**0.5, rel=1e-15)
    patterns = {"unet.r": 8, "unet.lora_alpha": 8, "unet.rank_pattern": {"x": 2}, "unet.alpha_pattern": {"x": 5}}
    assert scale(tmp_path, tensors, {"lora_adapter_metadata": patterns}) == 2.5
    with pytest.raises(CheckpointError, match="which its settings contradict"):
        scale(tmp_path, tensors | {"unet.x.alpha": torch.tensor(1.0)}, {"lora_adapter_metadata": settings})


ORIGINS = {
    "kohya": (pair("lora_unet_x", 4, 4), {}),
    "lycoris": (pair("lora_unet_x", 4, 4), {"ss_network_module": "lycoris.kohya"}),
    "onetrainer": (pair("lora_transformer_x", 4, 4), {}),
    "ai-toolkit": (pair("transformer.x", 4, 4, style="peft"), {"software": '{"name": "ai-toolkit"}'}),
    "diffusers": (pair("unet.x", 4, 4, style="peft"), {}),
    "comfyui": (pair("diffusion_model.x", 4, 4, style="peft"), {}),
    "peft": (pair("base_model.model.x", 4, 4, style="peft"), {}),
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_whose_file_it_is(origin: str, tmp_path: Path) -> None:
    tensors, metadata = ORIGINS[origin]
    assert parsed(write(tmp_path / "x.safetensors", tensors, metadata)).origin == origin


def test_old_attention_processors_of_diffusers(tmp_path: Path) -> None:
    tensors = {}
    for part in ("to_q", "to_out"):
        tensors[f"unet.mid.attn1.processor.{part}_lora.up.weight"] = random(4, 2)
        tensors[f"unet.mid.attn1.processor.{part}_lora.down.weight"] = random(2, 6)
    shapes = {"mid.attn1.to_q": (4, 6), "mid.attn1.to_out.0": (4, 6)}
    assert fitted(tmp_path, tensors, shapes).keys() == shapes.keys()


def test_names_of_an_adapter_in_the_keys(tmp_path: Path) -> None:
    tensors = {"x.lora_A.default.weight": random(2, 6), "x.lora_B.default.weight": random(4, 2)}
    assert fitted(tmp_path, tensors, {"x": (4, 6)}).keys() == {"x"}
    more = {"x.lora_A.other.weight": random(2, 6), "x.lora_B.other.weight": random(4, 2)}
    with pytest.raises(CheckpointError, match="two ways of writing"):
        fitted(tmp_path, tensors | more, {"x": (4, 6)})


FLUX = ["aitoolkit", "kohya", "kohya_with_te1", "xlabs", "diffusers", "diffusers_base_model"]


@pytest.mark.skipif(not KEYS.exists(), reason="the published lists lie beside the repository")
@pytest.mark.parametrize("publisher", FLUX)
def test_published_adapters_of_flux_fit_the_real_model(publisher: str) -> None:
    """At the published sizes, on the meta device: six publishers' names and fused projections against diffusers' model."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    published = json.loads((KEYS / f"flux_lora_{publisher}.json").read_text())
    tensors = {k: torch.empty(s, device="meta") if s else torch.tensor(4.0) for k, s in published.items()}
    found = parse_single(Container(Path(publisher), 0, tensors, {}))
    fitted = found.fitted(shapes(model), part=None if len(found.parts) == 1 else "unet")
    rows = {target: shape[0] for target, shape in fitted.targets.items()}
    own = found if len(found.parts) == 1 else found.only("unet")
    assert sum(rows.values()) == sum(w.shape[0] for w in own.weights)
