"""A tensor as a file can hold it: whole, contiguous, on the CPU, and nobody else's memory."""

from __future__ import annotations

import sys
from collections.abc import Collection

import torch
from torch import Tensor

from superlora_tn.files.errors import CheckpointError


def whole(name: str, tensor: Tensor, shape: tuple[int, ...] | None, dtypes: Collection[torch.dtype]) -> Tensor:
    """A copy of a tensor, gathered where it is sharded over processes (a DTensor: every process must save then).

    Args:
        name: what an error calls it.
        tensor: of any layout and device.
        shape: as declared; None takes the tensor's own.
        dtypes: what the file can hold.

    Raises:
        CheckpointError: on the meta device, flattened by FSDP1, of another dtype, or not to be copied.
    """
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"'{name}' is a {type(tensor).__name__}; an adapter's files hold tensors.")
    if tensor.is_meta:
        raise CheckpointError(
            f"'{name}' is on the meta device and has no values to save; give the model memory (`to_empty`) and load values."
        )
    if tensor.dtype not in dtypes:
        known = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise CheckpointError(f"'{name}' is {tensor.dtype}, which cannot be saved; convert it to one of {known}.")
    try:
        with torch.no_grad():
            gathered = _gathered(tensor.detach())
            if shape is not None and tuple(gathered.shape) != shape:
                raise CheckpointError(
                    f"'{name}' has the shape {tuple(gathered.shape)} in this process, declared is {shape}. If FSDP "
                    "flattened or sharded it, save within `FullyShardedDataParallel.summon_full_params(model)`; if DeepSpeed's "
                    "ZeRO-3, within `deepspeed.zero.GatheredParameters(list(tuned.parameters()))`."
                )
            # A copy through `copy_` ends expanded, transposed, shared and lazily negated memory all alike.
            return torch.empty(gathered.shape, dtype=gathered.dtype, device="cpu").copy_(gathered)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise CheckpointError(f"'{name}' cannot be copied to the CPU to be saved: {error}") from error


def _gathered(tensor: Tensor) -> Tensor:
    # Where nobody imported DTensor, no tensor is one; importing it costs more than a save.
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and isinstance(tensor, module.DTensor):
        full: Tensor = tensor.full_tensor()
        return full
    return tensor
