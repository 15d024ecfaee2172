"""The weight that an update makes of W, by the declaration's join, and the factors of its rows with magnitudes (DoRA)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from superlora_tn.declare.joins import Magnitude, Multiply
from superlora_tn.update.base import Member
from superlora_tn.update.based import row_norms
from superlora_tn.update.eager import as_given
from superlora_tn.update.passes import unseen

# A weight in half precision is widened for its norms, so many elements at once.
AT_ONCE = 1 << 22


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


def _norms(member: Member, weight: Tensor, owners: list[Tensor]) -> Tensor:
    """The norms of W's rows, without a gradient, found once a pass."""

    def make() -> Tensor:
        with torch.no_grad(), unseen():
            return torch.cat([row_norms(rows) for rows in torch.split(weight, max(1, AT_ONCE // max(1, weight.shape[1])))])

    found = member.adapter.passes.kept((id(member), "norms"), owners, make) if owners else None
    return make() if found is None else cast(Tensor, found)


def factors(member: Member, weight: Tensor, owners: list[Tensor] | None) -> Tensor:
    """``m / ||W + dW||`` (out,), by which the rows of W + dW are multiplied.

    Args:
        member: which weight; its declaration's join is `Magnitude`.
        weight: W (out, in).
        owners: the tensors that hold it, where its norms may be kept for the pass; they get no gradient then.
    """
    with _held(not differentiates(member)):
        more = member.adapter.more(member, weight)
        if more is None:
            delta = member.current()
            found = row_norms(weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta)
        else:
            square = (row_norms(weight) if owners is None else _norms(member, weight, owners)).square() + more
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
