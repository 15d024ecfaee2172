"""Blocks of rows in tensors: read, written, and replaced without writing. See `declare.rows.Span`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from superlora_tn.declare.rows import Span


def meet(one: Span | None, other: Span | None) -> bool:
    """Whether two blocks of one matrix have a row in common; None means all rows."""
    return one is None or other is None or one.meets(other)


def grid(matrix: Tensor, span: Span) -> Tensor:
    """The block's rows of a matrix (rows, columns), a view (runs, rows of a run, columns)."""
    return torch.unflatten(matrix, 0, (-1, span.period))[:, span.start : span.stop]


def cut(matrix: Tensor, span: Span | None) -> Tensor:
    """The block's rows as a matrix; a view where they lie in one run."""
    if span is None:
        return matrix
    return matrix[span.start : span.stop] if span.period == len(matrix) else grid(matrix, span).flatten(0, 1)


def put(matrix: Tensor, span: Span | None, value: Tensor) -> None:
    """Write the block's rows."""
    own = matrix if span is None else grid(matrix, span)
    own.copy_(value.reshape(own.shape))


def replaced(matrix: Tensor, blocks: Sequence[tuple[Span | None, Tensor]]) -> Tensor:
    """A matrix with other values in some blocks, which have no row in common where they repeat alike; nothing is written to."""
    for span, value in blocks:
        if span is None:
            matrix = value
    periods = dict.fromkeys(span.period for span, _ in blocks if span is not None)
    for period in periods:
        own = sorted(((s, v) for s, v in blocks if s is not None and s.period == period), key=lambda one: one[0].start)
        matrix = _woven(matrix, period, own)
    return matrix


def _woven(matrix: Tensor, period: int, blocks: Sequence[tuple[Span, Tensor]]) -> Tensor:
    runs, done, pieces = torch.unflatten(matrix, 0, (-1, period)), 0, []
    for span, value in blocks:
        pieces += [runs[:, done : span.start], torch.unflatten(value, 0, (runs.shape[0], -1))]
        done = span.stop
    pieces.append(runs[:, done:])
    return torch.cat([piece for piece in pieces if piece.shape[1]], 1).flatten(0, 1)


def columns(y: Tensor, span: Span) -> Tensor:
    """The block's columns of an output (..., rows of the weight), a view (..., runs, rows of a run)."""
    return torch.unflatten(y, -1, (-1, span.period))[..., span.start : span.stop]


def joined(y: Tensor, update: Tensor, span: Span, mine: bool) -> Tensor:
    """y (..., rows) with an update (..., rows of the block) added to the block's columns; `mine`: y may be written to."""
    if not mine:
        runs = torch.unflatten(y, -1, (-1, span.period))
        new = columns(y, span) + torch.unflatten(update, -1, (runs.shape[-2], -1))
        return torch.slice_scatter(runs, new, -1, span.start, span.stop).flatten(-2)
    if torch.is_grad_enabled() and (y.requires_grad or update.requires_grad):
        found: Tensor = _Joined.apply(y, y.detach(), update, span)  # type: ignore[no-untyped-call]
        return found
    own = columns(y, span)
    own.add_(update.reshape(own.shape))
    return y


class _Joined(torch.autograd.Function):
    """Adds to a block's columns in place; the gradient of y passes as it is, without a copy."""

    @staticmethod
    def forward(ctx: Any, graph: Tensor, y: Tensor, update: Tensor, span: Span) -> Tensor:
        ctx.span, ctx.shape = span, update.shape
        own = columns(y, span)
        own.add_(update.reshape(own.shape))
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None, columns(grad, ctx.span).reshape(ctx.shape), None
