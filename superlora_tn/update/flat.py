"""The adapter of a flat fold: one long vector in groups, of which each weight is a slice. Delta route only.

Three ways to dW. `begin` builds all of it once a pass of the model. `delta` builds one weight's slice alone: where nothing
is projected, the slowest mode's factors are cut to the rows that the slice needs. With `recompute`, each layer builds its
slice when it runs, keeps nothing of it, and builds it again in backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from superlora_tn.contraction.backend import compiled
from superlora_tn.contraction.plan import make_plan
from superlora_tn.declare.fold import FlatGroup
from superlora_tn.declare.parts import SpecError
from superlora_tn.network.graph import Term
from superlora_tn.update.base import Adapter, Member, Run
from superlora_tn.update.eager import as_given, is_differentiated, is_eager
from superlora_tn.update.fixed_maps import fixed_map, widened
from superlora_tn.update.passes import lasting
from superlora_tn.update.plain import by_matrix


@dataclass(frozen=True)
class _Rows:
    """Rows (values of the slowest index) of one term of the network, in which a slab lies.

    Attributes:
        weight: the term's.
        nodes: numbers of its nodes, each with the index expression that cuts it.
        run: contracts the cut nodes.
        skip: elements before those that are meant.
    """

    weight: float
    nodes: tuple[tuple[int, tuple[int | slice, ...]], ...]
    run: Run
    skip: int


@dataclass(frozen=True)
class _Slab:
    """Elements of a run of groups: whole ones, or a part of one.

    Attributes:
        groups: first and last (not included).
        terms: the rows of each term of the network.
        count: how many elements of one group are meant.
    """

    groups: tuple[int, int]
    terms: tuple[_Rows, ...]
    count: int


@dataclass(frozen=True)
class _Place:
    """A member's slabs of the vector, and the product by its dW."""

    slabs: tuple[_Slab, ...]
    multiply: Run


class FlatAdapter(Adapter):
    """The adapter of a flat fold: groups are runs of one long vector, and a weight is a slice of it.

    With `Settings.recompute` backward builds dW again, in place of keeping it.
    """

    group: FlatGroup

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.settings.route == "apply":
            raise SpecError("a flat fold has no apply route: its modes are not the weight's in and out. Leave route=None.")
        self.map = fixed_map(self.spec.projection, self.group.inner, self.group.length, "meta")  # `fill` knows the device

    def fill(self, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None) -> None:
        """See `Adapter.fill`."""
        super().fill(dtype, device, generator)
        if self.map is not None:
            self.map.reset(device)

    def prepare(self) -> None:
        """See `Adapter.prepare`."""
        for name, (start, d_out, d_in) in self.group.members.items():
            member = self.members[name]
            member.shape = (d_out, d_in)
            member.place = _Place(self._cut(start, start + d_out * d_in), by_matrix(member.shape, self.profile, self.settings))
        (self._all,) = self._cut(0, self.group.total)

    @property
    def fan_in(self) -> int:
        """The members' largest in."""
        return max(d_in for _, _, d_in in self.group.members.values())

    def _cut(self, start: int, end: int) -> tuple[_Slab, ...]:
        """The slabs that the elements `start .. end` lie in: a part of a group, whole groups, a part of a group."""
        runs: list[tuple[int, int, int, int]] = []  # groups from .. to, and elements from .. to in them
        for g in range(self.group.group_of(start), self.group.groups):
            first, last = self.group.start(g), self.group.start(g + 1)
            if first >= end:
                break
            begin, stop = max(start - first, 0), min(end, last) - first
            before = runs[-1] if runs else (g, g, 0, 0)
            if before[2] == begin == 0 and stop == last - first and before[3] == first - self.group.start(before[0]):
                runs[-1:] = [(before[0], g + 1, 0, before[3] + stop)]
            else:
                runs.append((g, g + 1, begin, stop))
        return tuple(self._slab(*run) for run in runs)

    def _slab(self, first: int, last: int, begin: int, stop: int) -> _Slab:
        """Elements `begin .. stop` of the groups `first .. last`."""
        terms = self.graph.networks
        return _Slab((first, last), tuple(self._rows_of(term, first, last, begin, stop) for term in terms), stop - begin)

    def _rows_of(self, term: Term, first: int, last: int, begin: int, stop: int) -> _Rows:
        """Those of one term."""
        graph, groups = term.graph, last - first
        flat = graph.open("flat")
        row = math.prod(graph.size[i] for i in flat[1:])
        low, high = begin // row, -(-stop // row)
        # A projection mixes all elements of a group, so it needs them all.
        if groups > 1 or self.map is not None or not flat:
            low, high = 0, graph.size[flat[0]] if flat else 1
        elif high - low < graph.size[flat[0]]:
            graph = graph.narrowed(flat[0], high - low)
        if 1 < groups < self.group.groups:
            graph = graph.narrowed(graph.open("member")[0], groups)
        run = compiled(
            make_plan(graph, "delta", 1, self.profile, self.settings.optimize, fixed=groups == 1), self.settings.backend
        )
        select: list[tuple[int | slice, ...]] = [term.graph.rows_of(node, low, high) for node in term.graph.nodes]
        if self.group.groups > 1:
            select = [(first if groups == 1 else slice(first, last), *rows[1:]) for rows in select]
        return _Rows(term.weight, tuple(zip(term.nodes, select, strict=True)), run, begin - low * row)

    def _contracted(self, slab: _Slab, nodes: Sequence[Tensor], scale: float, wide: bool) -> Tensor:
        """The slab's elements of the network, a row a group; of one group from the first that is meant."""
        first, last = slab.groups
        found: Tensor | None = None
        for own in slab.terms:
            cut = [nodes[k][select] for k, select in own.nodes]
            if wide:
                cut = [tensor.to(widened(tensor.dtype)) for tensor in cut]
            rows = own.run(*cut, alpha=scale * own.weight).reshape(last - first, -1)
            if last - first == 1 and not wide:
                rows = rows[:, own.skip : own.skip + slab.count]
            found = rows if found is None else found + rows
        assert found is not None
        return found

    def _elements(self, slab: _Slab, nodes: Sequence[Tensor], scale: float) -> Tensor:
        """The elements of a slab, scale included, as a vector."""
        (first, last), inner = slab.groups, self.group.inner
        if self.map is None:
            rows = self._contracted(slab, nodes, scale, wide=False)
            if last - first == 1:
                return rows[0]
        else:  # dW is rounded to the nodes' dtype once, at the end; a map may be nonlinear, so the scale acts behind it
            wide = self._contracted(slab, nodes, 1.0, wide=True)
            rows = cast(Tensor, self.map(wide[:, :inner], scale, nodes[0].dtype))
            if last - first == 1:
                return rows[0, slab.terms[0].skip : slab.terms[0].skip + slab.count]
        lengths = [self.group.start(g + 1) - self.group.start(g) for g in range(first, last)]
        longer, length = lengths.count(self.group.length), self.group.length
        if longer == len(lengths):
            return rows[:, :length].reshape(-1)
        return torch.cat([rows[:longer, :length].reshape(-1), rows[longer:, : length - 1].reshape(-1)])

    def _slice(self, member: Member, nodes: Sequence[Tensor], scale: float) -> Tensor:
        """dW of a member from its own slabs."""
        pieces = [self._elements(slab, nodes, scale) for slab in member.place.slabs]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).reshape(member.shape)

    def delta_of(self, member: Member) -> Tensor:
        """dW of a member, scale included, shape (out, in): cut from the groups it lies in."""
        return self._slice(member, self.tensors(), self.scale)

    @property
    def shares(self) -> bool:
        """Whether dW is built once a pass."""
        return not self.settings.recompute

    def current(self, member: Member) -> Tensor:
        """dW of a member: this pass builds that of all members at once, outside of any it builds its own."""
        # The scale of now, also where backward builds again: it may be another one then.
        nodes, scale, made = self.tensors(), self.scale, None
        if self.shares or (is_eager() and (found := self.passes.current()) is not None and found.whole):
            made = self.passes.kept((id(self), scale), nodes, lambda: self._pieces(nodes, scale))
        return lasting(lambda own: self._slice(member, own, scale), nodes) if made is None else cast(Tensor, made[member.name])

    def _pieces(self, nodes: Sequence[Tensor], scale: float) -> dict[str, Tensor]:
        """dW of all members, by name."""
        flat = lasting(lambda own: self._elements(self._all, own, scale), nodes)
        pieces = torch.split(flat, [math.prod(member.shape) for member in self.members.values()])
        return {name: piece.reshape(self.members[name].shape) for name, piece in zip(self.members, pieces, strict=True)}

    def update(
        self, member: Member, x: Tensor, out: Tensor | None, base: Tensor | None = None, training: bool = True
    ) -> Tensor:
        """See `Adapter.update`."""
        dtype = x.dtype if out is None else out.dtype
        x = x if x.dtype == dtype else x.to(dtype)
        if self.spec.dropout:
            x, base = self.drop(x, training), None
        if self.settings.recompute and is_eager() and is_differentiated():
            base = None if out is None or out.is_complex() else base  # programs write to no complex output
            given = None if base is None or out is None else out.detach()
            arguments = (self, member, dtype, base, given, x, *self.tensors())
            update: Tensor = _Recomputed.apply(*arguments)  # type: ignore[no-untyped-call]
            if out is None:
                return update.reshape(*x.shape[:-1], member.shape[0])
            return out + update.reshape(out.shape) if base is None else update
        multiply: Run = member.place.multiply
        found = multiply(x, self.current(member).to(dtype), out=out, base=base)
        return found.reshape(*x.shape[:-1], member.shape[0]) if out is None else found


class _Recomputed(torch.autograd.Function):
    """``x dW^T`` that keeps x and the nodes alone; with `out`, a frozen layer's output, added to it in place."""

    @staticmethod
    def forward(
        ctx: Any,
        adapter: FlatAdapter,
        member: Member,
        dtype: torch.dtype,
        base: Tensor | None,
        out: Tensor | None,
        x: Tensor,
        *nodes: Tensor,
    ) -> Tensor:
        delta = adapter._slice(member, nodes, adapter.scale).to(dtype)
        ctx.adapter, ctx.member, ctx.dtype, ctx.fused, ctx.scale = adapter, member, dtype, base is not None, adapter.scale
        ctx.save_for_backward(x, *nodes, *([] if base is None else [base]))
        if out is None:
            return member.place.multiply(x, delta)  # type: ignore[no-any-return]
        ctx.mark_dirty(out)
        return member.place.multiply(x, delta, out=out, base=base)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: checkpointing unpacks it for a single reading
        x, nodes, again = saved[0], saved[1 : len(saved) - ctx.fused], torch.is_grad_enabled()
        source, *wanted = ctx.needs_input_grad[5:]
        rows = grad.reshape(-1, grad.shape[-1])
        with torch.enable_grad(), as_given(grad):
            # Views, as a node may depend on another one, and as torch.func makes no leaves.
            views = [
                n.view_as(n) if again or not is_eager() else n.detach().requires_grad_(w)
                for n, w in zip(nodes, wanted, strict=True)
            ]
            delta = ctx.adapter._slice(ctx.member, views, ctx.scale).to(ctx.dtype)
            with torch.set_grad_enabled(again):
                through = rows @ delta.conj() if source else None  # of real numbers the same tensor
                if through is not None and ctx.fused:
                    through = through.addmm_(rows, saved[-1]) if is_eager() else through + rows @ saved[-1]
                outer = rows.t() @ x.reshape(-1, x.shape[-1]).conj()
            inputs = [n for n, want in zip(views, wanted, strict=True) if want]
            found = iter(torch.autograd.grad(delta, inputs, outer, create_graph=again) if inputs else ())
        grads = (next(found) if want else None for want in wanted)
        return (None, None, None, None, None, None if through is None else through.reshape(x.shape), *grads)
