"""The weight that an update makes of W, by the declaration's join, and the factors of its rows with magnitudes (DoRA)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from superlora_tn.declare.joins import Magnitude, Multiply
from superlora_tn.update.base import Member
from superlora_tn.update.based import row_norms
from superlora_tn.update.eager import as_given
from superlora_tn.update.passes import state, unseen


def joined(member: Member, weight: Tensor, network: Tensor) -> Tensor:
    """W' (out, in), in the wider of the two dtypes.

    Args:
        member: which weight.
        weight: W (out, in).
        network: the network's matrix as it stands, `Member.current`: dW, or N of a network that multiplies.
    """
    join, wide = member.adapter.spec.join, torch.promote_types(weight.dtype, network.dtype)
    if join is None:
        return weight.to(wide) + network
    weight, network = weight.to(wide), network.to(wide)
    if isinstance(join, Magnitude):
        whole = weight + network
        with _held(join.detached):
            norms = row_norms(whole)
        return whole * _factors(member, norms)[:, None].to(wide)
    whole = multiplied(member, join, weight, network)
    return whole * member.magnitude()[:, None].to(wide) if join.scaled else whole


def multiplied(member: Member, join: Multiply, weight: Tensor, network: Tensor) -> Tensor:
    """R W or W R."""
    with as_given(weight):
        product = network @ weight if join.side == "left" else weight @ network
    away = unkept(member)
    return weight + product if away == 0 else product if away == 1 else weight * (1 - away) + product


def unkept(member: Member) -> float:
    """How much of W a network that multiplies takes away: the strength where it is R itself, 0 where R is 1 + N."""
    join = member.adapter.spec.join
    return member.adapter.scale if isinstance(join, Multiply) and not join.residual else 0.0


class Norms:
    """The norms of the rows of one weight W, kept as long as W is not written to."""

    def __init__(self) -> None:
        self._held: tuple[object, Tensor] | None = None

    def of(self, weight: Tensor, owners: list[Tensor]) -> Tensor:
        """(out,) in float32 or wider.

        Args:
            weight: W (out, in) as it is now.
            owners: the tensors that hold it.
        """
        now = state(owners) if owners else None
        if self._held is None or now is None or self._held[0] != now:
            with torch.no_grad(), unseen():
                found = row_norms(weight)
            if now is None:
                return found
            self._held = (now, found)
        return self._held[1]

    def __deepcopy__(self, memo: object) -> Norms:
        return Norms()

    def __reduce__(self) -> tuple[type[Norms], tuple[()]]:
        return Norms, ()


def factors(member: Member, weight: Tensor, norms: Tensor | None) -> Tensor:
    """``m / ||W + dW||`` (out,), by which the rows of W + dW are multiplied.

    Args:
        member: which weight; its declaration's join is `Magnitude`.
        weight: W (out, in).
        norms: those of W's rows; None has them found anew.
    """
    with _held(not differentiates(member)):
        more = member.adapter.more(member, weight)
        if more is None:
            delta = member.current()
            found = row_norms(weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta)
        else:
            square = (row_norms(weight) if norms is None else norms).square() + more
            # Rounding may bring it below zero; the root of a number's square is that number, so nothing moves where dW is 0.
            found = square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()
    return _factors(member, found)


def differentiates(member: Member) -> bool:
    """Whether the norms of a member with magnitudes are differentiated, those of W too where it trains."""
    join = member.adapter.spec.join
    assert isinstance(join, Magnitude)
    return not join.detached


def _held(detached: bool) -> AbstractContextManager[Any]:
    """Where norms that get no gradient are found: nothing is noted for one. Tangents need `_factors` to be stopped."""
    return torch.no_grad() if detached else nullcontext()


def _factors(member: Member, norms: Tensor) -> Tensor:
    magnitude = member.magnitude()
    if not differentiates(member):
        norms = norms.detach()  # no_grad stops no tangents
    # In the magnitudes' dtype first: at the start both are the same numbers, and their quotient is one.
    norms = norms.to(magnitude.dtype)
    return magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny)
