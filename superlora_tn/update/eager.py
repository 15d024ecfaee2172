"""What torch is doing around a call: running operations as they come, recording them, differentiating or casting them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_tracing
from torch.autograd import forward_ad
from torch.compiler import is_compiling

NOTHING = nullcontext()
# Which devices have autocast; asked once, as Dynamo does not trace the question in all releases.
CASTS = {kind: torch.amp.is_autocast_available(kind) for kind in ("cpu", "cuda", "meta", "mps", "xpu", "xla")}


def is_eager() -> bool:
    """Whether torch runs operations one by one as they come, so that state may be kept and written in place.

    False while torch.compile, torch.export or torch.jit.trace records, inside torch.func transforms such as vmap and grad,
    and inside a level of forward-mode differentiation: there only plain operations on fresh tensors are right, since a
    custom autograd function would be recorded as such or lose the tangents of its operands. torch has no public question
    for the transforms and the level; autograd.Function and forward_ad themselves ask these.
    """
    return not (is_compiling() or _are_functorch_transforms_active() or _is_tracing() or forward_ad._current_level >= 0)


def is_differentiated() -> bool:
    """Whether operations on what requires a gradient are noted for a backward pass; never in `inference_mode`."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def is_recorded() -> bool:
    """Whether a program is being recorded that will run for other numbers of tokens: no branch may hang on sizes of x."""
    return is_compiling() or _is_tracing()


def as_given(tensor: Tensor) -> AbstractContextManager[Any]:
    """Compute in the dtypes as they are: the caller has cast, and autocast would cast a second time."""
    # Dynamo cannot trace the short question, which takes 0.1 us where the long one takes 0.7.
    if not is_compiling() and not torch._C._is_any_autocast_enabled():
        return NOTHING
    kind = tensor.device.type
    casting = CASTS.get(kind) is not False and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if casting else NOTHING
