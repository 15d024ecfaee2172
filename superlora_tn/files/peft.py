"""PEFT's folders: ``adapter_config.json`` beside ``adapter_model.safetensors`` (or the old ``.bin``, its tensors alone)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from superlora_tn.files.container import Container, load, read_json
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.foreign import Parsed
from superlora_tn.files.settings import Settings
from superlora_tn.files.single import build_all, collect
from superlora_tn.files.structured import SHARED, arranged, finished, projections
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
    collected = arranged(collect(tensors, str(file), settings.modules), settings, shared, str(file))

    def rule(name: str, weight: Weight, alpha: float | None) -> float:
        if alpha is not None:
            raise CheckpointError(f"{file}: '{name}' has an alpha of its own; PEFT's is in {CONFIG}.")
        return settings.scale(name.removeprefix(PREFIX), weight)

    weights, added = build_all(collected, rule)
    weights = tuple(finished(w, settings.seed, shared, str(file)) for w in weights)
    drawn = projections(settings) if settings.method == "VERA" and not shared else None
    return Parsed(place, "peft", container.bytes, weights, added, collected.values, {"peft_type": settings.method}, drawn)


def _renamed(container: Container) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Keys without PEFT's wrappers, and what all weights share apart."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    for key, tensor in container.tensors.items():
        words = key.split(".")
        if common := next((w for w in words[-2:] if w in SHARED), None):
            shared[common] = tensor
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
