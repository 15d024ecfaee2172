"""Single files of other libraries: kohya's, LyCORIS', diffusers', ComfyUI's, XLabs', OneTrainer's, ai-toolkit's, GGUF.

alpha, by who writes such files: an absent alpha is the rank, and so is 0 (kohya, LyCORIS); a LoKr whose factors are both
dense has the factor 1, whatever alpha says (LyCORIS, kohya, ComfyUI); ai-toolkit writes 9999999999 for "no rank", which is
1. rsLoRA is in LyCORIS' alpha already. diffusers' newer files carry PEFT's settings beside the tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from superlora_tn.files.bounds import parse
from superlora_tn.files.container import GGUF_TOKENS, SETTINGS, Container
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.foreign import Parsed
from superlora_tn.files.forms import ASIDE, PARTIAL, VALUES, foreign_method, split_key
from superlora_tn.files.settings import Settings
from superlora_tn.files.weight import Weight, build, norms_of

# ai-toolkit's number for LoKr without a rank, 9999999999, as its narrowest dtypes keep it.
NO_RANK = 9.9e9
DIFFUSERS_METADATA = "lora_adapter_metadata"
# The scale of a weight: its name, the weight, and its alpha where the file has one.
Rule = Callable[[str, Weight, float | None], float]


@dataclass(frozen=True)
class Collected:
    """A file's tensors, sorted by the weights they belong to.

    Attributes:
        fields: weight's name -> field (see `forms`) -> tensor.
        values: parameter's name -> a value that stands for itself.
    """

    fields: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Tensor]


def collect(tensors: Mapping[str, Tensor], source: str, modules: Collection[str] = ()) -> Collected:
    """Sort a file's tensors; each is taken, or the error names it.

    Args:
        tensors: by their keys.
        source: the file, for errors.
        modules: ends of the names of modules that the file holds whole, with whatever parameters and buffers they have.

    Raises:
        CheckpointError: a key of no known method, or two keys for one thing.
    """
    fields: dict[str, dict[str, Tensor]] = {}
    values: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if words := foreign_method(key):
            raise CheckpointError(
                f"{source}: '{key}' is of a method that is no sum with a network ({words}); merge it there, "
                "and extract() a network of the difference."
            )
        found = split_key(key)
        name, field_ = found if found else ("", "")
        # A whole module's own parameter may be called alpha or diff; without company it is no adapter's.
        if found and field_ in fields.setdefault(name, {}):
            raise CheckpointError(f"{source}: '{key}' is there in two ways of writing; it has to be one adapter.")
        if found:
            fields[name][field_] = tensor
        elif (key.rpartition(".")[2] in VALUES and key.rpartition(".")[0]) or _is_inside(key, modules):
            values[key] = tensor
        else:
            raise CheckpointError(f"{source}: '{key}' is of no method that is known; nothing of the file was taken.")
    if not any(set(own) - set(ASIDE) for own in fields.values()):
        raise CheckpointError(f"{source} holds no adapter, but keys such as '{next(iter(tensors), '(none)')}'.")
    return Collected(fields, values)


def _is_inside(key: str, modules: Collection[str]) -> bool:
    """Whether a module of these names is on the way to a parameter."""
    words = key.split(".")[:-1]
    return any(".".join(words[j : k + 1]) in modules for k in range(len(words)) for j in range(k + 1)) if modules else False


def number(name: str, tensor: Tensor | None) -> float | None:
    """A file's alpha as a number.

    Raises:
        CheckpointError: it is more than one number, or none.
    """
    if tensor is None:
        return None
    if tensor.numel() != 1:
        raise CheckpointError(f"'{name}' has an alpha of shape {tuple(tensor.shape)}; it is one number.")
    value = float(tensor.reshape(()).double())
    if math.isnan(value) or value == -math.inf:
        raise CheckpointError(f"'{name}' has the alpha {value}; the file is damaged.")
    return value


def plain_scale(name: str, weight: Weight, alpha: float | None) -> float:
    """alpha by the rule of all single files, see above."""
    ranks = set(weight.ranks)
    dense = weight.kind == "full" or (weight.kind == "lokr" and not ranks)
    if dense or alpha is None or alpha == 0 or alpha >= NO_RANK:
        return 1.0
    if len(ranks) > 1:
        raise CheckpointError(f"'{name}' has factors of the ranks {sorted(ranks)} and an alpha of {alpha:g}: of which rank?")
    return alpha / ranks.pop()


def build_all(collected: Collected, rule: Rule) -> tuple[tuple[Weight, ...], dict[str, Tensor]]:
    """The weights with their scales, and what is added to biases and norms.

    Raises:
        CheckpointError: tensors of a weight that do not make up a method.
    """
    weights, added = [], dict[str, Tensor]()
    for name, fields in collected.fields.items():
        alpha = number(name, fields.get("alpha"))
        if set(fields) <= set(ASIDE):
            added |= _added(name, fields, 1.0)
            if not set(fields) & {"diff_b", "w_norm", "b_norm"}:
                raise CheckpointError(f"'{name}' has {', '.join(sorted(fields))} alone; the tensors it belongs to are missing.")
            continue
        weight = build(name, fields)
        weight = replace(weight, scale=rule(name, weight, alpha))
        for field_ in ("magnitude", "dora_scale"):
            if field_ in fields:
                weight = replace(weight, magnitude=norms_of(field_, fields[field_], weight))
        weights.append(weight)
        added |= _added(name, fields, weight.scale)
    return tuple(weights), added


def _added(name: str, fields: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    kinds = {"diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}
    added = {f"{name}.{kind}": fields[f] for f, kind in kinds.items() if f in fields}
    if "up_bias" in fields:
        added[f"{name}.bias"] = fields["up_bias"] * scale
    return added


# --- whose file it is -----------------------------------------------------------------------------------------------


def origin(container: Container) -> str:
    """Who writes such files, by the words beside the tensors and the style of the keys."""
    metadata, keys = container.metadata, container.tensors.keys()
    if "adapter.type" in metadata or "general.type" in metadata:
        return "gguf"
    if "lycoris" in metadata.get("ss_network_module", ""):
        return "lycoris"
    if "ai-toolkit" in metadata.get("software", ""):
        return "ai-toolkit"
    if any(name.startswith("ot_") for name in metadata):
        return "onetrainer"
    if DIFFUSERS_METADATA in metadata:
        return "diffusers"
    styles = {
        "xlabs": re.compile(r".*\.processor\.\w+_lora\d?\..*"),
        "onetrainer": re.compile(r"lora_transformer_.*"),
        "lycoris": re.compile(r"lycoris_.*|lora_\w+\.(hada|lokr)_.*"),
        "kohya": re.compile(r"lora_(unet|te\d?|prior)_.*"),
        "comfyui": re.compile(r"(model\.)?diffusion_model\..*|text_encoders\..*"),
        "peft": re.compile(r"base_model\.model\..*"),
    }
    return next((name for name, style in styles.items() if any(style.fullmatch(key) for key in keys)), "diffusers")


def parse_single(container: Container) -> Parsed:
    """A single file, without a model.

    Raises:
        CheckpointError: it holds anything that is not understood.
    """
    source, whose = str(container.path), origin(container)
    if whose == "gguf":
        return _gguf(container)
    settings = _diffusers_settings(container)
    rule = _rule_of(settings, source) if settings else plain_scale
    collected = collect(container.tensors, source)
    if collected.values and not _values_are_kept(whose):
        raise CheckpointError(f"{source}: '{next(iter(collected.values))}' is of no method that is known.")
    weights, added = build_all(collected, rule)
    if partial := next((w for w in weights if w.kind in PARTIAL), None):
        raise CheckpointError(
            f"{source}: {partial.kind} of '{partial.name}' needs PEFT's adapter_config.json; give the folder."
        )
    return Parsed(container.path, whose, container.bytes, weights, added, collected.values, container.metadata)


def _rule_of(settings: Mapping[str, Settings], source: str) -> Rule:
    """PEFT's scale by the settings of a weight's part."""

    def rule(name: str, weight: Weight, alpha: float | None) -> float:
        part, _, inner = name.partition(".")
        own = settings.get(part) or settings.get("")
        if own is None:
            return plain_scale(name, weight, alpha)
        wanted = own.scale(inner if part in settings else name, weight)
        if alpha is not None and not math.isclose(plain_scale(name, weight, alpha), wanted, rel_tol=1e-6):
            raise CheckpointError(f"{source}: '{name}' has an alpha of {alpha:g}, which its settings contradict.")
        return wanted

    return rule


def _values_are_kept(whose: str) -> bool:
    """Whether such files hold whole parameters beside the adapters (norms of diffusers' control LoRAs, PEFT's modules)."""
    return whose in ("diffusers", "peft", "comfyui")


def _diffusers_settings(container: Container) -> dict[str, Settings]:
    """PEFT's settings as diffusers writes them, by the part of the pipeline."""
    text = container.metadata.get(DIFFUSERS_METADATA)
    if text is None:
        return {}
    found = parse(text.encode(), f"'{DIFFUSERS_METADATA}' in {container.path}", SETTINGS)
    if not isinstance(found, dict):
        raise CheckpointError(f"'{DIFFUSERS_METADATA}' in {container.path} is no table of settings.")
    parts: dict[str, dict[str, Any]] = {}
    for name, value in found.items():
        part, dot, setting = name.rpartition(".")
        parts.setdefault(part if dot else "", {})[setting] = value
    return {part: Settings.of({"peft_type": "LORA", **own}, str(container.path)) for part, own in parts.items()}


def _gguf(container: Container) -> Parsed:
    """llama.cpp's adapters: lora_a (r, in), of a token table (in, r), lora_b (out, r), one alpha for all."""
    source = str(container.path)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in container.tensors.items():
        name, _, side = key.rpartition(".lora_")
        if side not in ("a", "b") or not name.endswith(".weight"):
            raise CheckpointError(f"{source}: '{key}' is no part of a LoRA (*.weight.lora_a and .lora_b).")
        module = name.removesuffix(".weight")
        part, table = "down" if side == "a" else "up", module.endswith(GGUF_TOKENS)
        known = {f"embedding_{part}": tensor.T if side == "a" else tensor} if table else {part: tensor}
        pairs.setdefault(module, {}).update(known)
    if not pairs:
        raise CheckpointError(f"{source} holds no tensors.")
    try:
        alpha = float(container.metadata.get("adapter.lora.alpha", "0"))
    except ValueError:
        alpha = math.nan
    collected = Collected({n: {**p, "alpha": torch.tensor(alpha, dtype=torch.float64)} for n, p in pairs.items()}, {})
    weights, added = build_all(collected, plain_scale)
    return Parsed(container.path, "gguf", container.bytes, weights, added, {}, container.metadata)
