"""PEFT's folders: ``adapter_config.json`` beside ``adapter_model.safetensors`` (or the old ``.bin``, its tensors alone)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from superlora_tn.declare.fold import Shape
from superlora_tn.files.container import Container, load, read_json
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.foreign import Parsed, Projections
from superlora_tn.files.settings import Settings
from superlora_tn.files.single import Collected, build_all, collect
from superlora_tn.files.weight import Weight

CONFIG = "adapter_config.json"
TENSORS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."


def parse_folder(place: Path) -> Parsed:
    """A folder that PEFT wrote, without a model.

    Raises:
        CheckpointError: it holds anything that is not understood.
    """
    file = next((place / name for name in TENSORS if (place / name).exists()), place / TENSORS[0])
    config, container = read_json(place / CONFIG), load(file)
    source = str(place / CONFIG)
    settings = Settings.of(config, source)
    tensors, shared = _renamed(container)
    tensors = _pruned(tensors) if settings.method == "ADALORA" else tensors
    collected = _arranged(collect(tensors, str(file)), settings, shared, str(file))

    def rule(name: str, weight: Weight, alpha: float | None) -> float:
        if alpha is not None:
            raise CheckpointError(f"{file}: '{name}' has an alpha of its own; PEFT's is in {CONFIG}.")
        return settings.scale(name.removeprefix(PREFIX), weight)

    weights, added = build_all(collected, rule)
    weights = tuple(_finished(w, collected.fields[w.name], settings, bool(shared)) for w in weights)
    drawn = _projections(settings) if settings.method == "VERA" and not shared else None
    return Parsed(place, "peft", container.bytes, weights, added, collected.values, {"peft_type": settings.method}, drawn)


def _renamed(container: Container) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Keys without PEFT's wrappers, and VeRA's A and B apart."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    for key, tensor in container.tensors.items():
        words = key.split(".")
        if words[-1] in ("vera_A", "vera_B") or words[-2:-1] in (["vera_A"], ["vera_B"]):
            shared[next(w for w in words if w in ("vera_A", "vera_B"))] = tensor
            continue
        if "modules_to_save" in words:
            at = words.index("modules_to_save")
            words = words[:at] + words[max(at + 1, len(words) - 1) :]
        name = ".".join(w for w in words if w != "base_layer")
        if name in tensors:
            raise CheckpointError(f"{container.path}: '{key}' and another key are both '{name}'.")
        tensors[name] = tensor
    return tensors, shared


def _pruned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """AdaLoRA may leave a weight no triplet at all; then there is no update of it."""
    empty = {key.rpartition(".lora_")[0] for key, t in tensors.items() if not t.numel()}
    return {key: t for key, t in tensors.items() if key.rpartition(".lora_")[0] not in empty or ".lora_" not in key}


def _arranged(collected: Collected, settings: Settings, shared: Mapping[str, Tensor], source: str) -> Collected:
    """Tensors in the form that the tables have: VeRA's with A and B, GraLoRA's with an axis for each block."""
    fields = {name: dict(own) for name, own in collected.fields.items()}
    for name, own in fields.items():
        if settings.method == "VERA" and "vera_b" in own:
            out, rank = own["vera_b"].shape[0], own.get("vera_d", own["vera_b"]).shape[0]
            a, b = shared.get("vera_A", torch.zeros(rank, 1)), shared.get("vera_B", torch.zeros(out, rank))
            if a.ndim != 2 or b.ndim != 2 or b.shape[0] < out:
                raise CheckpointError(f"{source}: VeRA's A {tuple(a.shape)} and B {tuple(b.shape)} do not hold '{name}'.")
            own |= {"vera_A": a, "vera_B": b[:out]}
        if "gralora_A" in own:
            for side in ("gralora_A_general", "gralora_B_general"):
                if own.pop(side, torch.empty(0)).numel():
                    raise CheckpointError(f"{source}: '{name}' is a sum of two networks (hybrid_r); one weight has one here.")
            own |= _blocks(name, own["gralora_A"], own.get("gralora_B"), source)
    return Collected(fields, collected.values)


def _blocks(name: str, a: Tensor, b: Tensor | None, source: str) -> dict[str, Tensor]:
    """A (n, in, rank) and B (m, rank, out), the rank as blocks times their own ranks."""
    if b is None or a.ndim != 3 or b.ndim != 3 or not a.shape[0] or a.shape[2] % a.shape[0] or b.shape[1] % a.shape[0]:
        raise CheckpointError(f"{source}: '{name}' has no pair of GraLoRA's A (blocks, in, rank) and B (blocks, rank, out).")
    blocks = a.shape[0]
    return {
        "gralora_A": a.reshape(*a.shape[:2], blocks, a.shape[2] // blocks),
        "gralora_B": b.reshape(b.shape[0], blocks, b.shape[1] // blocks, b.shape[2]),
    }


def _finished(weight: Weight, fields: Mapping[str, Tensor], settings: Settings, projected: bool) -> Weight:
    """What the tables cannot say: sharing, and sides that only a model knows."""
    if weight.kind != "vera":
        return weight
    weight = replace(weight, shared=frozenset({"vera_A", "vera_B"}), open_in=True)
    if projected:
        return weight
    return replace(weight, nodes={n: node for n, node in weight.nodes.items() if n in ("vera_b", "vera_d")})


def _projections(settings: Settings) -> Projections:
    """VeRA's A and B from PEFT's seed: uniform within sqrt(6 / fan_in), A before B, both of the largest size."""

    def drawn(largest: Shape) -> dict[str, Tensor]:
        out, inward = largest
        generator = torch.Generator().manual_seed(settings.seed)
        made = {}
        for name, rows, columns in (("vera_A", settings.rank, inward), ("vera_B", out, settings.rank)):
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
            made[name] = torch.empty(rows, columns, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        return made

    return drawn
