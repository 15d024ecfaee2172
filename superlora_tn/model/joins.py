"""Updates that are not added: the output of a layer whose weight is scaled row by row, or multiplied from a side."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from superlora_tn.declare.joins import Join, Magnitude, Multiply
from superlora_tn.model.convolutions import Convolution
from superlora_tn.model.kinds import Held, Kind, LayerError, Linear, RowsOf
from superlora_tn.model.spans import columns, joined
from superlora_tn.model.tables import Bag, Table, TableRows, weighted
from superlora_tn.model.targets import AttachError, Place, Target, bind
from superlora_tn.update.base import Member
from superlora_tn.update.eager import is_eager
from superlora_tn.update.joined import differentiates, factors, multiplied, unkept
from superlora_tn.update.joined import joined as weight_of


class Scaled:
    """With magnitudes: ``s (y - b + x dW^T) + b`` for the output y, with s = m / ||W + dW|| for each row of W."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def __call__(self, layer: Any, member: Member, x: Any, y: Tensor, base: Tensor | None) -> Tensor:
        """See `Kind.join`."""
        kind, weight = self.kind, _whole(self.kind, layer, member)
        if isinstance(kind, Linear | RowsOf) and x.is_nested:
            return _nested(kind, layer, member, x, y)
        # Kept norms have no gradient, and a recorded program keeps nothing beside it.
        kept = is_eager() and not (weight.requires_grad and differentiates(member))
        scale = factors(member, weight, list((kind.owners(layer) or {}).values()) if kept else None)
        if member.adapter.spec.dropout and layer.training and not isinstance(kind, Table):
            return self._dropped(layer, member, x, y, weight, scale)
        plain = kind.join(layer, member, x, y, base)
        scale, bias = kind.spread(layer, scale, x), kind.bias(layer)
        whole = plain * scale if bias is None else torch.addcmul(bias * (1 - scale), plain, scale)
        return whole.to(plain.dtype)

    def _dropped(self, layer: Any, member: Member, x: Tensor, y: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """Dropout takes elements of the whole change's input, as in PEFT: ``y + drop(x) (W' - W)^T``."""
        kind, given, x = self.kind, x, member.drop(x, True).to(y.dtype)
        if isinstance(kind, Linear | RowsOf):
            y = _plain(kind).passed(layer, member, given, y)
            own = functional.linear(x, weight.to(x.dtype)) * (scale - 1)
            more = (own + member.update(x, None, None, False) * scale).to(y.dtype)
            return y + more if isinstance(kind, Linear) else joined(y, more, kind.span, False)
        change = scale[:, None] * (weight + member.current()) - weight
        assert isinstance(kind, Convolution)
        return y + kind.convolve(layer, x, change.reshape(change.shape[0], -1, *layer.kernel_size).to(y.dtype), y)


class FromLeft:
    """``R (y - b) + b`` for the output y."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def __call__(self, layer: Any, member: Member, x: Any, y: Tensor, base: Tensor | None) -> Tensor:
        """See `Kind.join`."""
        kind, bias = self.kind, self.kind.bias(layer)
        if isinstance(kind, Linear | RowsOf):
            if x.is_nested:
                return _nested(kind, layer, member, x, y)
            y = _plain(kind).passed(layer, member, x, y)
        plain = y if bias is None else y - bias
        if isinstance(kind, RowsOf):
            own = columns(plain, kind.span).flatten(-2)
            return joined(y, _turned(member, own, layer.training, torch.zeros_like(own)), kind.span, False)
        shares = kind.shares(layer, x, y.dtype) if isinstance(kind, Table) else None
        if shares is not None:
            return _looked_up(member, plain, layer.training, shares)
        axis = kind.axis(layer)
        return _turned(member, plain.movedim(axis, -1), layer.training, y.movedim(axis, -1)).movedim(-1, axis)


class FromRight:
    """The layer was given ``R x`` for x (see `entering`); of a block of rows, which shares x with others, y gets the change."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def __call__(self, layer: Any, member: Member, x: Tensor, y: Tensor, base: Tensor | None) -> Tensor:
        """See `Kind.join`."""
        kind = self.kind
        if isinstance(kind, Linear):
            return kind.passed(layer, member, x, y)
        assert isinstance(kind, RowsOf)
        if x.is_nested:
            return _nested(kind, layer, member, x, y)
        x = x.to(y.dtype)
        change = _turned(member, x, layer.training, torch.zeros_like(x))
        return joined(y, functional.linear(change, kind.read(layer).to(y.dtype)), kind.span, False)


class Rescaled:
    """``s (y - b) + b`` for the output y of what multiplies, s one number for each row of W."""

    def __init__(self, kind: Kind, plain: Any) -> None:
        self.kind, self.plain = kind, plain

    def __call__(self, layer: Any, member: Member, x: Any, y: Tensor, base: Tensor | None) -> Tensor:
        """See `Kind.join`."""
        kind = self.kind
        own = cast(Tensor, self.plain(layer, member, x, y, base))
        scale, bias = kind.spread(layer, member.magnitude(), x), kind.bias(layer)
        if own.is_nested:
            built = isinstance(kind, RowsOf) or isinstance(self.plain, FromLeft)  # by a change that is scaled already
            return own if built else _scaled(own, scale, bias)
        found = own * scale if bias is None else torch.addcmul(bias * (1 - scale), own, scale)
        return found.to(own.dtype)


def _scaled(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The same of sequences of several lengths."""
    rest = None if bias is None else (bias * (1 - scale)).to(y.dtype)
    return functional.linear(y, scale.diag().to(y.dtype), rest)


def joiner(kind: Kind, member: Member) -> Any:
    """What gives a layer's output with the update, called as `Kind.join`."""
    join = member.adapter.spec.join
    if join is None:
        return kind.join
    if isinstance(join, Magnitude):
        return Scaled(kind)
    plain = FromLeft(kind) if join.side == "left" else FromRight(kind)
    return Rescaled(kind, plain) if join.scaled else plain


def enters(kind: Kind, member: Member) -> bool:
    """Whether the layer is to be given another input, by `entering`."""
    join = member.adapter.spec.join
    return isinstance(join, Multiply) and join.side == "right" and isinstance(kind, Linear)


def entering(member: Member, x: Tensor, training: bool) -> Tensor:
    """``R x`` for the layer's input x (..., in)."""
    return _turned(member, x, training, x)


def bound(join: Join | None, name: str, place: Place, at: str | None = None) -> Target:
    """`bind` for a join: where a layer's input and output do not serve, its weight is adapted where it is read.

    Raises:
        AttachError: it cannot be adapted, or not so.
    """
    target = bind(name, place, at)
    if isinstance(target.kind, Bag) and join is not None and cast(Any, target.layer).scale_grad_by_freq:
        return bind(name, place, "weight")  # a bag's sum does not tell how frequent each of its rows is
    if not isinstance(join, Multiply):
        return target
    if target.tied or isinstance(target.kind, TableRows):
        raise AttachError(f"'{name}' is a tied weight or a block of a table, which no network multiplies; add dW there.")
    if isinstance(target.kind, Held | Linear | RowsOf):
        return target
    layer: Any = target.layer
    # A product from the left mixes rows of all groups, which read different channels.
    grouped = isinstance(target.kind, Convolution) and layer.groups > 1
    return bind(name, place, "weight") if join.side == "right" or grouped else target


def _turned(member: Member, x: Tensor, training: bool, y: Tensor) -> Tensor:
    """``y + (R - 1) x`` for x (..., side): R x where y is x."""
    if x.is_nested:
        join, network = member.adapter.spec.join, member.current()
        assert isinstance(join, Multiply)
        one = torch.eye(member.shape[0], dtype=network.dtype, device=network.device)
        change = multiplied(member, join, one, network) - one
        return y + functional.linear(member.drop(x, training), change.to(x.dtype))
    away = unkept(member)
    if away == 1 and y is x:
        return member.update(x, None, None, training)
    return member.update(x, y if away == 0 else y - away * x, None, training)


def _looked_up(member: Member, y: Tensor, training: bool, shares: Tensor) -> Tensor:
    """``R y`` for rows y (..., dim) of a table, with these shares of the network's gradients; y gets all of R's."""
    x, away = member.drop(y, training), unkept(member)
    change = weighted(member.update(x.detach(), None, None, False), shares)
    if y.requires_grad:  # zeros, through which the gradient reaches y and nothing the network
        change = change + member.update(x - x.detach(), None, None, False)
    return (y if away == 0 else y - away * y) + change


def _plain(kind: Linear | RowsOf) -> Linear:
    """The kind of the whole layer."""
    return kind.kind if isinstance(kind, RowsOf) else kind


def _nested(kind: Linear | RowsOf, layer: Any, member: Member, x: Tensor, y: Tensor) -> Tensor:
    """``y + x (W' - W)^T`` for sequences of several lengths, by the built change."""
    weight = _whole(kind, layer, member)
    change = weight_of(member, weight, member.current()) - weight
    if isinstance(kind, RowsOf):
        change = functional.pad(change, (0, 0, kind.span.start, kind.span.period - kind.span.stop))
    return y + functional.linear(member.drop(x, layer.training), change.to(y.dtype))


def _whole(kind: Kind, layer: Any, member: Member) -> Tensor:
    """W (out, in) as it is now, noted for a gradient where it trains; norms of rows and products with it need all of it."""
    join = member.adapter.spec.join
    try:
        weight = kind.read(layer)
    except LayerError as error:
        raise LayerError(f"magnitudes (DoRA) on '{member.name}' need the norms of the weight's rows: {error}") from error
    if not isinstance(weight, Tensor):
        raise LayerError(
            f"the join of '{member.name}' (magnitudes, products) needs the weight, and the {type(layer).__name__} that is in "
            "its layer's place now shows none; merge before the layer is quantised or replaced."
        )
    shape = tuple(weight.shape)
    found = join.sides(shape) if isinstance(join, Multiply) and len(shape) == 2 else shape
    if found != member.shape or type(weight).__name__ == "DTensor":
        raise LayerError(
            f"the join of '{member.name}' (magnitudes, products) needs the whole weight, and it is sharded now: "
            f"{tuple(weight.shape)}. Add dW there (join=None), or leave it out."
        )
    return weight
