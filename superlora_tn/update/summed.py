"""The adapter of a sum of networks: each term runs at its own plan, on nodes that the sum holds.

A term whose modes are larger than the weight's is cropped: x is padded by zeros, and the surplus of outputs and of dW is cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from superlora_tn.contraction.plan import make_plan
from superlora_tn.declare.fold import Mode, PhysicalGroup
from superlora_tn.network.graph import Term
from superlora_tn.update.base import NOMINAL_TOKENS, Adapter, Member, Side
from superlora_tn.update.physical import PhysicalAdapter
from superlora_tn.update.plain import by_halves


class _Crop:
    """The sizes of a side's modes, and those of the larger ones that they lie in."""

    def __init__(self, own: Sequence[Mode], padded: Sequence[Mode], role: str) -> None:
        self.own = [mode.size for mode in own if mode.role == role]
        self.padded = [mode.size for mode in padded if mode.role == role]

    @property
    def whole(self) -> int:
        """Numbers of the larger side."""
        return math.prod(self.padded)

    def pad(self, x: Tensor) -> Tensor:
        """The last axis, of the weight's side, with zeros where the larger one has more."""
        if self.own == self.padded:
            return x
        sides = [n for own, padded in zip(reversed(self.own), reversed(self.padded), strict=True) for n in (0, padded - own)]
        return functional.pad(x.reshape(*x.shape[:-1], *self.own), sides).flatten(-len(self.own))

    def cut(self, x: Tensor) -> Tensor:
        """The last axis, of the larger side, without its surplus."""
        if self.own == self.padded:
            return x
        found = x.reshape(*x.shape[:-1], *self.padded)
        for k, size in enumerate(self.own):
            found = found.narrow(k - len(self.own), 0, size)
        return found.flatten(-len(self.own))


class TermAdapter(PhysicalAdapter):
    """One term, whose nodes are those of the sum: it holds no parameter of its own."""

    def __init__(self, whole: SumAdapter, term: Term) -> None:
        own, larger = [mode for mode, _ in whole.graph.modes], [mode for mode, _ in term.graph.modes]
        self.out, self.inward = (_Crop(own, larger, role) for role in ("out", "in"))
        self.is_cropped = own != larger
        group = whole.group
        if self.is_cropped:
            group = replace(group, modes=tuple(larger), shape=(self.out.whole, self.inward.whole))
        # Dropout is the sum's: all terms see the same x.
        super().__init__(replace(whole.spec, dropout=0.0), group, term.graph, whole.settings, whole.passes)
        self._term, self._whole = term, (whole,)  # in a tuple, or the sum would be a module in its own parts
        self.strengthen(1.0)

    def _own(self) -> list[Tensor]:
        nodes = self._whole[0].stored()
        return [nodes[k] for k in self._term.nodes]

    def is_thin(self) -> bool:
        """Whether x goes through two thin matrices, at any number of tokens, for no more than the network costs."""
        if self.is_cropped or self._halves is None or any(stage.rest is None for _, stage in self._runs):
            return False
        shape = self.group.shape
        plan = make_plan(self.graph, "apply", NOMINAL_TOKENS, self.profile, self.settings.optimize)
        return 2 * self._halves.cost(shape, NOMINAL_TOKENS) <= plan.flops

    def cut(self, delta: Tensor) -> Tensor:
        """dW (..., out, in) without the surplus."""
        return self.out.cut(self.inward.cut(delta).mT).mT if self.is_cropped else delta

    def update(
        self, member: Member, x: Tensor, out: Tensor | None, base: Tensor | None = None, training: bool = True
    ) -> Tensor:
        """See `Adapter.update`."""
        if not self.is_cropped:
            return super().update(member, x, out, base, training)
        found = self.out.cut(super().update(member, self.inward.pad(x if out is None else x.to(out.dtype)), None))
        return found if out is None else out + found

    def strengthen(self, strength: float) -> None:
        """See `Adapter.strengthen`; a term has a weight."""
        self._scale = self.spec.scale * strength * self._term.weight


class SumAdapter(Adapter):
    """The adapter of weights of one shape whose network is a sum of networks."""

    group: PhysicalGroup

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._parts = tuple(TermAdapter(self, term) for term in self.graph.terms)
        self._is_cropped = any(part.is_cropped for part in self._parts)

    def prepare(self) -> None:
        """See `Adapter.prepare`."""
        for part in self._parts:
            part.profile = self.profile
            part.prepare()
        thin = [part for part in self._parts if part.is_thin()]
        self._thin = tuple(thin) if len(thin) > 1 else ()
        if self._thin:
            bond = sum(part._halves.bond for part in thin if part._halves is not None)
            self._through = by_halves(self.group.shape, bond, self.profile, self.settings)
        for name, member in self.members.items():
            member.shape = self.group.shape
            member.place = tuple(part.members[name] for part in self._parts)

    def strengthen(self, strength: float) -> None:
        """See `Adapter.strengthen`."""
        super().strengthen(strength)
        for part in self._parts:
            part.strengthen(strength)

    def _each(self, member: Member) -> Sequence[Member]:
        """A member in each term."""
        found: Sequence[Member] = member.place
        return found

    @property
    def fan_in(self) -> int:
        """The members' in."""
        return self.group.shape[1]

    def delta_of(self, member: Member) -> Tensor:
        """See `Adapter.delta`."""
        found = [part.cut(own.delta()) for part, own in zip(self._parts, self._each(member), strict=True)]
        return _added(found).contiguous() if self._is_cropped else _added(found)

    def current(self, member: Member) -> Tensor:
        """See `Adapter.current`."""
        return _added([part.cut(own.current()) for part, own in zip(self._parts, self._each(member), strict=True)])

    def stack_up(self) -> None:
        """See `Adapter.stack_up`."""
        for part in self._parts:
            part.stack_up()

    def together(self, members: Sequence[Member]) -> Tensor | None:
        """See `Adapter.together`."""
        if self._is_cropped:
            return None
        each = zip(*(self._each(member) for member in members), strict=True)
        found = [own[0].adapter.together(own) for own in each]
        whole = [one for one in found if one is not None]
        return _added(whole) if len(whole) == len(found) else None

    def halves(self, member: Member, rows: int, blocks: int = 1) -> tuple[Tensor, Tensor] | None:
        """See `Adapter.halves`: those of all terms side by side."""
        found = [own.halves(rows, blocks) for own in self._each(member)]
        whole = [one for one in found if one is not None]
        if len(whole) < len(found):
            return None
        outers = [part.out.cut(outer.mT).mT for part, (outer, _) in zip(self._parts, whole, strict=True)]
        inners = [part.inward.cut(inner) for part, (_, inner) in zip(self._parts, whole, strict=True)]
        return torch.cat(outers, 1), torch.cat(inners)

    def look_up(self, side: Side) -> None:
        """See `Adapter.look_up`."""
        for part in self._parts:
            part.look_up(side)

    def lookup(self, member: Member, numbers: Tensor, side: Side, dtype: torch.dtype) -> Tensor:
        """See `Adapter.lookup`."""
        if self._is_cropped:
            return super().lookup(member, numbers, side, dtype)
        return _added([own.lookup(numbers, side, dtype) for own in self._each(member)])

    @property
    def applies(self) -> bool:
        """See `Adapter.applies`."""
        return all(part.applies for part in self._parts)

    @property
    def shares(self) -> bool:
        """See `Adapter.shares`."""
        return any(part.shares for part in self._parts)

    def update(
        self, member: Member, x: Tensor, out: Tensor | None, base: Tensor | None = None, training: bool = True
    ) -> Tensor:
        """See `Adapter.update`."""
        if self.spec.dropout:
            # In the dtype that is computed in; the layer's own gradient goes through x itself.
            x, base = self.drop(x if out is None else x.to(out.dtype), training), None
        each = self._each(member)
        if self._thin:
            out, base = self._through_thin(each, x, out, base), None
        for own in each:
            if own.adapter not in self._thin:
                out, base = own.update(x, out, base, training), None
        assert out is not None
        return out

    def _through_thin(self, each: Sequence[Member], x: Tensor, out: Tensor | None, base: Tensor | None) -> Tensor:
        """x through the thin matrices of several terms, side by side as two."""
        dtype = x.dtype if out is None else out.dtype
        pairs = [part.both_halves(own) for part, own in zip(self._parts, each, strict=True) if part in self._thin]
        outer, inner = torch.cat([o for o, _ in pairs], 1).to(dtype), torch.cat([i for _, i in pairs]).to(dtype)
        found: Tensor = self._through(x.to(dtype), outer, inner, out=out, base=base)
        return found if out is not None else found.reshape(*x.shape[:-1], self.group.shape[0])


def _added(found: Sequence[Tensor]) -> Tensor:
    whole = found[0]
    for one in found[1:]:
        whole = whole + one
    return whole
