"""GGUF, version 3: a LoRA as llama.cpp reads it, and its names. Reading the file is in `container` and `single`.

llama.cpp takes ``*.weight.lora_a`` (r, in) and ``*.weight.lora_b`` (out, r) and one alpha for all, divided by each rank; a
weight whose scale that is not gets the rest into lora_b. Names are the model's own, or those of an architecture, through
the package ``gguf``; q and k rows of Llama and its like are stored in another order there, by heads. Of the token table, whose
rows of lora_a are looked up, lora_a is (tokens, r).
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superlora_tn.files.anatomy import method_of
from superlora_tn.files.container import GGUF_DTYPES, GGUF_TOKENS
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.foreign import Parsed
from superlora_tn.files.formats import Content, Row, Written, alpha_error, float32, upright
from superlora_tn.files.plain import Pair, Wish, pair_of, rounded
from superlora_tn.files.thin import Filled
from superlora_tn.files.weight import Weight

ALIGNMENT = 32
# Architectures whose q and k rows llama.cpp's conversion of checkpoints reorders as Llama's (its conversion/*.py, 2026-11).
PERMUTED = {
    "llama",
    "arcee",
    "arctic",
    "chameleon",
    "deepseek",
    "granite",
    "granitehybrid",
    "granitemoe",
    "llada",
    "minicpm",
    "mistral3",
    "nemotron_h",
    "nemotron_h_moe",
    "olmo",
    "smollm3",
}
# Weights that it reorders or scales in another way, by the endings of their names; all for ().
CHANGED: dict[str, tuple[str, ...]] = {
    "bailingmoe": ("query_key_value", "lm_head"),
    "bitnet": (),
    "bloom": ("query_key_value",),
    "deci": ("q_proj", "k_proj"),
    "deepseek2": ("kv_b_proj",),
    "falcon": ("query_key_value",),
    "falcon-h1": (),
    "gptneox": ("query_key_value",),
    "jais": ("wte", "lm_head"),
    "mistral4": ("kv_b_proj",),
    "plamo": ("q_proj", "o_proj"),
    "qwen35": ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"),
    "qwen35moe": ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"),
    "qwen3next": ("in_proj_qkvz",),
    "xverse": ("q_proj", "k_proj"),
}


@dataclass(frozen=True)
class Architecture:
    """What a GGUF file says of its model.

    Attributes:
        name: llama.cpp's, such as ``"llama"`` or ``"qwen2"``; "" keeps the model's own names.
        heads: of q and of k, needed where their rows are reordered (`PERMUTED`).
    """

    name: str = ""
    heads: tuple[int, int] | None = None


def content(weights: Sequence[Filled], wish: Wish, architecture: Architecture) -> Content:
    """All weights as LoRAs with one alpha.

    Raises:
        CheckpointError: a convolution, a name the architecture does not have or stores otherwise, or heads that are not given.
    """
    if convolution := next((one for one in weights if one.kernel), None):
        raise CheckpointError(f"'{convolution.name}' is a convolution; GGUF's adapters have matrices only.")
    pairs = {one.name: pair_of(one, method_of(one), _wished(one, wish)) for one in weights}
    alpha = Counter(pair.alpha for pair in pairs.values()).most_common(1)[0][0]
    alpha = alpha if float(float32(alpha)) else 1.0
    rename = _names(architecture, list(pairs))
    tensors: Written = {}
    rows = []
    for one in weights:
        name, pair = one.name, pairs[one.name]
        even = _with_alpha(pair, one, alpha, _wished(one, wish))
        down, up = upright(one, even)
        place = rename(name)
        tensors[f"{place}.weight.lora_a"] = down.T if place.endswith(GGUF_TOKENS) else down
        tensors[f"{place}.weight.lora_b"] = _reordered(up, name, architecture)
        rows.append(Row(name, "lora", (pair.rank,), even.error))
    metadata = {"architecture": architecture.name or "unknown", "alpha": repr(alpha)}
    return Content(tensors, tuple(rows), {}, metadata)


def _wished(one: Filled, wish: Wish) -> Wish:
    """The same in a dtype that llama.cpp reads: float64 becomes float32."""
    return replace(wish, dtype=torch.float32) if torch.float64 in (wish.dtype, wish.dtype or one.dtype) else wish


def _with_alpha(pair: Pair, one: Filled, alpha: float, wish: Wish) -> Pair:
    """The pair of a weight with another alpha, the rest in its up, and narrowed only then; and what all of that rounds."""
    if pair.alpha == alpha:
        return replace(pair, error=pair.error + alpha_error(alpha))
    wide = pair_of(one, method_of(one), replace(wish, dtype=torch.float64))
    up, dtype = wide.up * (pair.alpha / float(float32(alpha))), wish.dtype or torch.promote_types(pair.up.dtype, torch.float32)
    found, off = rounded(up, wide.down, one.name, dtype)
    return replace(wide, up=found[0], down=found[1], error=wide.error + off)


def _names(architecture: Architecture, names: Sequence[str]) -> Callable[[str], str]:
    if not architecture.name:
        return lambda name: name
    known = _table(architecture.name, names)

    def rename(name: str) -> str:
        found = known(name)
        if found is None:
            raise CheckpointError(f"'{name}' has no name in GGUF's architecture '{architecture.name}'.")
        if _is_changed(architecture.name, name):
            raise CheckpointError(
                f"'{name}' is scaled, or its rows are in another order, in GGUF's architecture '{architecture.name}', which is "
                "not written here; merge() the adapter and convert the model."
            )
        return found

    return rename


def _table(architecture: str, names: Iterable[str]) -> Callable[[str], str | None]:
    """What gives a module's name in an architecture, None where it has none."""
    try:
        import gguf
    except ImportError as error:
        words = f"names of the architecture '{architecture}' need the package gguf: pip install 'superlora_tn[gguf]'"
        raise CheckpointError(f"{words} ({error}).") from error
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise CheckpointError(f"'{architecture}' is no architecture of GGUF, such as llama, qwen2 or gemma2.")
    blocks = 1 + max((int(n) for name in names for n in re.findall(r"\.(\d+)\.", f".{name}.")), default=0)
    table = gguf.get_tensor_name_map(known[architecture], blocks)
    return lambda name: table.get_name(name) or table.get_name(f"model.{name}")


def _is_changed(architecture: str, name: str) -> bool:
    endings = CHANGED.get(architecture)
    return endings is not None and (not endings or name.endswith(endings))


def _is_reordered(architecture: str, name: str) -> bool:
    return architecture in PERMUTED and name.endswith(("q_proj", "k_proj"))


def heads_in(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Heads of q and of k that a model's configuration tells, as transformers writes it; None where it does not."""
    text = config.get("text_config")
    own = text if isinstance(text, Mapping) else config
    query = own.get("num_attention_heads")
    key = own.get("num_key_value_heads") or query
    return (query, key) if isinstance(query, int) and isinstance(key, int) and min(query, key) > 0 else None


def in_model(found: Parsed, modules: Iterable[str], heads: Callable[[], tuple[int, int] | None]) -> Parsed:
    """A file of llama.cpp's with a model's names, and its rows in the model's order; any other as it is.

    Args:
        found: a file.
        modules: names of the model's modules; an architecture's may lie within another model.
        heads: tells those of q and of k, where their rows are reordered (`PERMUTED`).

    Raises:
        CheckpointError: a name that several modules have, a weight that the architecture stores otherwise, heads that are not
            given, or the package ``gguf`` is not there.
    """
    modules = list(modules)
    if not found.architecture or {weight.name for weight in found.weights} <= set(modules):
        return found
    known = _table(found.architecture, modules)
    places: dict[str, dict[int, list[str]]] = {}
    for module in modules:
        words = module.split(".")
        names = (known(".".join(words[k:])) for k in range(len(words)))
        if first := next(((k, name) for k, name in enumerate(names) if name), None):
            places.setdefault(first[1], {}).setdefault(first[0], []).append(module)
    architecture = Architecture(found.architecture, heads() if found.architecture in PERMUTED else None)
    weights = []
    for weight in found.weights:
        outermost = min(places.get(weight.name, {0: [weight.name]}).items())[1]  # what has no place is told of by its own name
        if len(outermost) > 1:
            raise CheckpointError(f"{found.path}: '{weight.name}' could be each of {', '.join(map(repr, outermost))}.")
        weights.append(_in_order(replace(weight, name=outermost[0]), architecture, found.path))
    return replace(found, weights=tuple(weights))


def _in_order(weight: Weight, architecture: Architecture, path: Path) -> Weight:
    name = weight.name
    if _is_changed(architecture.name, name):
        raise CheckpointError(
            f"{path}: '{name}' is scaled, or its rows are in another order, in GGUF's architecture "
            f"'{architecture.name}', which is not read here."
        )
    if not _is_reordered(architecture.name, name):
        return weight
    if architecture.heads is None:
        raise CheckpointError(
            f"{path}: '{name}' has its rows in another order in GGUF, by heads, and the model has no configuration that tells "
            "their number (config.num_attention_heads)."
        )
    count = _heads(name, weight.shape[0], architecture.heads)
    indices, up = weight.nodes["up"]
    return replace(weight, nodes={**weight.nodes, "up": (indices, _turned(up, (count, up.shape[0] // count // 2, 2)))})


def _reordered(up: Tensor, name: str, architecture: Architecture) -> Tensor:
    """q and k rows of Llama and its like: the two halves of each head, which rotate together, lie side by side in GGUF."""
    if not _is_reordered(architecture.name, name):
        return up
    if architecture.heads is None:
        raise CheckpointError(
            f"'{name}' has its rows in another order in GGUF, by heads; give the numbers of heads of q and k."
        )
    count = _heads(name, up.shape[0], architecture.heads)
    return _turned(up, (count, 2, up.shape[0] // count // 2))


def _turned(up: Tensor, parts: tuple[int, int, int]) -> Tensor:
    """The rows of each head, in two axes, by the other of them."""
    return up.reshape(*parts, up.shape[1]).transpose(1, 2).reshape(up.shape)


def _heads(name: str, rows: int, heads: tuple[int, int]) -> int:
    """Heads of q or of k, whichever it is."""
    count = heads[name.endswith("k_proj")]
    if rows % (2 * count):
        raise CheckpointError(f"'{name}' has {rows} rows, which are not {count} heads of an even size.")
    return count


def packed(made: Content) -> bytes:
    """The bytes of the file."""
    words = {
        "general.architecture": made.metadata["architecture"],
        "general.type": "adapter",
        "adapter.type": "lora",
        **{k: v for k, v in made.metadata.items() if k not in ("architecture", "alpha")},
    }
    fields = [_string(name) + struct.pack("<I", 8) + _string(value) for name, value in words.items()]
    fields.append(_string("adapter.lora.alpha") + struct.pack("<If", 6, float(made.metadata["alpha"])))
    head, body = _tensors(made.tensors)
    start = b"GGUF" + struct.pack("<IQQ", 3, len(made.tensors), len(fields)) + b"".join(fields) + head
    return start + b"\0" * (-len(start) % ALIGNMENT) + body


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _tensors(tensors: Mapping[str, Tensor]) -> tuple[bytes, bytes]:
    """What the header says of the tensors, and their bytes."""
    kinds = {dtype: kind for kind, dtype in GGUF_DTYPES.items()}
    head, body = bytearray(), bytearray()
    for name, tensor in tensors.items():
        sizes = list(reversed(tensor.shape))
        head += _string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kinds[tensor.dtype], len(body))
        body += tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        body += b"\0" * (-len(body) % ALIGNMENT)
    return bytes(head), bytes(body)
