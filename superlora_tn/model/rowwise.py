"""Rows of one batch that meet different adapters: networks that differ in their numbers alone run as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from superlora_tn.update.base import Member
from superlora_tn.update.together import thin

Rows = Sequence[int]


def in_one(members: Sequence[tuple[Member, Rows]], x: Tensor, output: Tensor, count: int) -> Tensor | None:
    """The output with the update of each of these alike members added to its rows; None where dW of each is cheaper.

    Args:
        members: the adapters of one linear layer, with the rows of the batch that each is for.
        x: the layer's input (rows, ..., in), a multiple of the batch's rows.
        output: (rows, ..., out).
        count: rows of the batch.
    """
    if len(members) < 2:
        return None
    each, tokens = x.shape[0] // count, x.numel() // x.shape[-1] // count  # of one row of the batch
    halves = thin([member for member, _ in members], tokens)
    if halves is None:
        return None
    which = {row: k for k, (_, own) in enumerate(members) for row in own}
    rows, everything = sorted(which), len(which) == count
    chosen = torch.tensor([which[row] for row in rows], device=x.device)
    index = torch.tensor([row * each + k for row in rows for k in range(each)], dtype=torch.long, device=x.device)
    own_x, own_y = (t if everything else t.index_select(0, index) for t in (x, output))
    outer, inner = (
        (half if half.ndim == 2 else half.index_select(0, chosen)).to(output.dtype) for half in (halves.outer, halves.inner)
    )
    blocks = own_x.reshape(len(rows), tokens, x.shape[-1]).to(output.dtype)
    update = (blocks @ inner.mT) @ outer.mT
    updated = own_y + update.reshape(own_y.shape)
    return updated if everything else output.index_copy(0, index, updated)
