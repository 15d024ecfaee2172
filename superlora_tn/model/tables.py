"""Embeddings: tables (num, dim) of which a call reads some rows.

A table is the weight of a linear layer that gets a row of zeros and one 1: as a matrix (out, in) it is (dim, num), the table
transposed, as PEFT has it. An update looks its rows up in the nodes and never builds the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from superlora_tn.declare.fold import Shape
from superlora_tn.declare.rows import Span
from superlora_tn.model.kinds import OPAQUE, Kind, LayerError, stored
from superlora_tn.model.spans import cut, put
from superlora_tn.update.base import Member, Side


@dataclass(frozen=True)
class Table(Kind):
    """``y = table[x]``.

    Attributes:
        side: which side of the matrix the rows of the table are on; ``"out"`` where the table is the weight (num, dim) of an
            output layer that is tied to it.
        factor: what the layer multiplies its rows by (as some models do by the root of dim).
    """

    side: Side = "in"
    factor: float = 1.0

    @property
    def inputs(self) -> int | None:
        """One: a row is looked up by a single number."""
        return 1 if self.side == "in" else None

    @property
    def looks_up(self) -> Side | None:
        """On its side."""
        return self.side

    def shape(self, layer: Any) -> Shape:
        """(dim, num), or (num, dim) of a tied one."""
        num, dim = layer.num_embeddings, layer.embedding_dim
        return (dim, num) if self.side == "in" else (num, dim)

    def read(self, layer: Any) -> Tensor:
        """A view."""
        weight = stored(layer)
        return weight.t() if self.side == "in" else weight

    def write(self, layer: Any, matrix: Tensor) -> None:
        """Turned as the table is."""
        stored(layer).copy_(matrix.t() if self.side == "in" else matrix)

    def bias(self, layer: Any) -> Tensor | None:
        """None."""
        return None

    def shares(self, layer: Any, x: Any, dtype: torch.dtype) -> Tensor | None:
        """How much of its gradient each number in x (...) hands on to what is looked up, (..., 1); None where all do all of it.

        As in the table itself: padding nothing, and frequent rows less where the layer says so.
        """
        found = None if layer.padding_idx is None else (x != layer.padding_idx).to(dtype)
        if layer.scale_grad_by_freq:
            often: Tensor = torch.bincount(x.reshape(-1), minlength=1)[x].to(dtype)
            found = 1 / often if found is None else found / often
        return None if found is None else found[..., None]

    def spread(self, layer: Any, values: Tensor, x: Tensor) -> Tensor:
        """Its rows count dim; of a tied table, the numbers in x. Each number in x hands its share of the gradient on."""
        own, shares = values if self.side == "in" else values[x][..., None], self.shares(layer, x, values.dtype)
        return own if shares is None else weighted(own.expand(*x.shape, -1), shares)

    def join(self, layer: Any, member: Member, x: Tensor, y: Tensor, base: Tensor | None) -> Tensor:
        """y (..., dim) + dW's rows of x (...), with gradients weighted as the table's own would be."""
        if x.numel() == 0:
            return y
        flat = x.reshape(-1)
        rows = _dropped(layer, member, member.lookup(flat, self.side, y.dtype))
        return torch.add(y, weighted(rows, self.shares(layer, flat, y.dtype)).reshape(y.shape), alpha=self.factor)


def weighted(values: Tensor, shares: Tensor | None) -> Tensor:
    """The values as they are, with these shares (..., 1) of their gradients."""
    if shares is None or not torch.is_grad_enabled():
        return values
    part: Tensor = values * shares
    return values.detach() + (part - part.detach())  # nothing is rounded


def _dropped(layer: Any, member: Member, rows: Tensor) -> Tensor:
    """Rows of dW (tokens, dim), of which dropout takes whole ones."""
    if not member.adapter.spec.dropout or not layer.training:
        return rows
    return rows * member.drop(torch.ones_like(rows[:, :1]), True)


ONE = Span(0, 1, 1)


@dataclass(frozen=True)
class TableRows(Table):
    """A block of a table's rows: as a matrix (dim, rows of the block). New tokens alone, say.

    Attributes:
        span: which rows, in one run.
    """

    span: Span = ONE

    @property
    def block(self) -> Span | None:
        """Its rows."""
        return self.span

    def shape(self, layer: Any) -> Shape:
        """(dim, rows of the block)."""
        return layer.embedding_dim, self.span.count(layer.num_embeddings)

    def read(self, layer: Any) -> Tensor:
        """A view."""
        return cut(stored(layer), self.span).t()

    def write(self, layer: Any, matrix: Tensor) -> None:
        """The other rows stay as they are."""
        put(stored(layer), self.span, matrix.t())

    def spread(self, layer: Any, values: Tensor, x: Tensor) -> Tensor:
        """1 for numbers in x that are not the block's."""
        inside = (x >= self.span.start) & (x < self.span.stop)
        return torch.where(inside[..., None], super().spread(layer, values, x), torch.ones_like(values))

    def join(self, layer: Any, member: Member, x: Tensor, y: Tensor, base: Tensor | None) -> Tensor:
        """y (..., dim) + dW's rows of those numbers in x (...) that the block has."""
        if x.numel() == 0:
            return y
        flat = x.reshape(-1)
        inside = (flat >= self.span.start) & (flat < self.span.stop)
        rows = member.lookup(torch.where(inside, flat - self.span.start, 0), self.side, y.dtype)
        rows = weighted(_dropped(layer, member, rows), self.shares(layer, flat, y.dtype)) * inside[:, None].to(y.dtype)
        return torch.add(y, rows.reshape(y.shape), alpha=self.factor)


@dataclass(frozen=True)
class PackedTable(Table):
    """A table that is quantised or packed: rows of dW are added to what the layer gives."""

    def read(self, layer: Any) -> Tensor:
        """Refused."""
        raise LayerError(f"the weight of a {type(layer).__name__} is quantised or packed, and does not say how to read it.")

    def refusal(self, layer: Any) -> str:
        """As of linear layers of unknown packing."""
        return OPAQUE.refusal(layer)


@dataclass(frozen=True)
class Bag(Table):
    """An `nn.EmbeddingBag` that sums or averages the rows of each bag."""

    def shares(self, layer: Any, x: Any, dtype: torch.dtype) -> Tensor | None:
        """Of a bag: padding is in none, and one that weighs its rows by how frequent they are joins where it is read."""
        return None

    @property
    def takes_all(self) -> bool:
        """Where a bag begins, and the weights of its entries, are further arguments."""
        return True

    def join(self, layer: Any, member: Member, x: Any, y: Tensor, base: Tensor | None) -> Tensor:
        """y (bags, dim) + the bags of dW's rows; x is all that the layer was called with."""
        given, offsets, weights = _arguments(*x[0], **x[1])
        if given.numel() == 0:
            return y
        flat = given.reshape(-1)
        rows = _dropped(layer, member, member.lookup(flat, self.side, y.dtype))
        rows = weighted(rows, super().shares(layer, flat, y.dtype))
        count, places = len(flat), torch.arange(len(flat), device=flat.device)
        if layer.padding_idx is not None:
            places = torch.where(flat == layer.padding_idx, count, places)
            rows = torch.cat([rows, torch.zeros_like(rows[:1])])
        more = functional.embedding_bag(
            places.reshape(given.shape),
            rows,
            None if offsets is None else offsets.to(places.dtype),
            mode=layer.mode,
            per_sample_weights=None if weights is None else weights.to(rows.dtype),
            include_last_offset=layer.include_last_offset,
            padding_idx=None if layer.padding_idx is None else count,
        )
        return y + more


def _arguments(
    input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """An EmbeddingBag's arguments by the names that it gives them."""
    return input, offsets, per_sample_weights


TABLE, PACKED_TABLE, BAG = Table(), PackedTable(), Bag()


def is_linear(layer: nn.Module) -> bool:
    """Whether what it gives is linear in the table: not where it scales rows of the table itself, or takes the largest."""
    return getattr(layer, "max_norm", None) is None and getattr(layer, "mode", "sum") != "max"
