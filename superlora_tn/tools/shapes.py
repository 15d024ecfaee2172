"""The shapes and kernels of a model's weights from its folder alone: no weight is read, no memory is taken."""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch

from superlora_tn.declare.fold import Shape
from superlora_tn.files.base_model import base_model, within
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.folder import place_of
from superlora_tn.model.targets import targets_of


def model_shapes(path: str | PathLike[str], targets: Sequence[str] = ()) -> tuple[dict[str, Shape], dict[str, tuple[int, ...]]]:
    """(out, in) of a model's weights, and the sizes of the kernels of those that are convolutions, by module.

    Args:
        path: a folder whose ``config.json`` transformers reads (the model is built without memory), or any safetensors file or
            folder of them, whose headers are read; there an embedding's rows count as out.
        targets: names of modules or their endings; none takes all linear layers, of headers all matrices and kernels.

    Raises:
        CheckpointError: neither is there, or it cannot be read.
        AttachError: the model has no such target.
    """
    place = place_of(path)
    config = place / "config.json"
    if _names_a_model(config):
        from transformers import AutoConfig, AutoModel

        try:
            with torch.device("meta"):
                model = AutoModel.from_config(AutoConfig.from_pretrained(place))
        except ImportError:
            raise
        except Exception as error:  # whatever transformers raises for settings that it does not take
            raise CheckpointError(f"transformers makes no model of {config}: {error}") from error
        bound = targets_of(model, list(targets) or "all-linear")
        return {target.name: target.shape for target in bound}, {target.name: target.kernel for target in bound}
    found = base_model(place)
    return {name: shape for name, shape in found.shapes.items() if within(name, targets)}, found.kernels


def _names_a_model(config: Path) -> bool:
    """Whether it is a config of which transformers knows the model's type."""
    if not config.is_file():
        return False
    try:
        found = json.loads(config.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{config} is no JSON ({error}), so no model is made of it.") from error
    return isinstance(found, dict) and "model_type" in found
