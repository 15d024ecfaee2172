"""Whether torch runs operations one by one as they come, so that state may be kept and written in place."""

from __future__ import annotations

import torch


def is_eager() -> bool:
    """False while torch.compile or torch.export traces, and inside torch.func transforms such as vmap and grad.

    There only plain operations on fresh tensors are right. torch has no public question for the transforms;
    autograd.Function itself asks this one.
    """
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
