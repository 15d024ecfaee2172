"""What the maps of `declare.node_maps` compute: nodes of the network as functions of what is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from superlora_tn.declare.node_maps import (
    Cayley,
    Circulant,
    Exponential,
    Fourier,
    Haar,
    Householder,
    Identity,
    NodeMap,
    Normalised,
    Selected,
    Softmax,
    Spread,
)
from superlora_tn.network.applied import applied
from superlora_tn.network.graph import Graph
from superlora_tn.update.eager import as_given, is_eager
from superlora_tn.update.passes import Passes, lasting


class NodeMaps:
    """The nodes of a graph from what is stored of them, with the fixed tables of their maps."""

    def __init__(self, graph: Graph) -> None:
        self._nodes = [(node.map, node.shape) for node in graph.nodes]
        self._tables = [None if made is None else table(made, shape) for made, shape in self._nodes]
        self._sources = applied(graph).sources
        names = [node.name for node in graph.nodes]
        self._from = [k if n.map is None or n.map.of is None else names.index(n.map.of) for k, n in enumerate(graph.nodes)]

    def place(self, device: torch.device) -> None:
        """Have the tables on a device; they stay where they are for one without memory."""
        if device.type != "meta":
            self._tables = [None if places is None else places.to(device) for places in self._tables]

    def __call__(self, stored: Sequence[Tensor], passes: Passes, x: bool = False) -> list[Tensor]:
        """The nodes' tensors, in the dtypes of what is stored, made once a pass for all members and calls.

        Args:
            stored: what is stored of the nodes.
            passes: of the adapter.
            x: those of the graph that x goes through, see `network.applied`.
        """

        def make() -> list[Tensor]:
            own = [stored[k] for k in self._from]
            return self._applied(own) if x else [self._node(k, one, value) for k, one in enumerate(own)]

        made = passes.kept((id(self), x), stored, make)
        return make() if made is None else cast(list[Tensor], made)

    def _applied(self, stored: Sequence[Tensor]) -> list[Tensor]:
        made: dict[int, Sequence[Tensor]] = {}
        for k, part in self._sources:
            if k in made:
                continue
            own, circulant = stored[k], self._nodes[k][0]
            if part is None:
                made[k] = [self._node(k, own, value)]
            elif isinstance(circulant, Circulant):
                both = waves(circulant.size, own)
                made[k] = [both, self._node(k, own, spectrum), both]
            else:
                made[k] = self._node(k, own, thin).unbind()
        return [made[k][part or 0] for k, part in self._sources]

    def _node(self, k: int, own: Tensor, compute: Callable[..., Tensor]) -> Tensor:
        made, shape = self._nodes[k]
        if made is None:
            return own
        places = self._tables[k]
        if places is not None and places.device != own.device:
            places = places.to(own.device)
            # Nothing is kept of what only stands for a tensor (fake ones), nor of a recorded program's own memory.
            if type(places) is Tensor and not places.is_meta and is_eager():
                self._tables[k] = places
        return lasting(partial(_widely, compute, made, shape, places), [own])


def _widely(
    compute: Callable[..., Tensor], made: NodeMap, shape: tuple[int, ...], places: Tensor | None, stored: Sequence[Tensor]
) -> Tensor:
    """One node, computed in float32 or wider, under autocast too: neither transforms nor solvers know the halves."""
    own = stored[0]
    with as_given(own):
        return compute(made, own.to(torch.promote_types(own.dtype, torch.float32)), shape, places).to(own.dtype)


def table(made: NodeMap, shape: tuple[int, ...]) -> Tensor | None:
    """The fixed numbers of a map for a node of this shape, on the CPU; None where it has none."""
    with torch.inference_mode(False), torch.device("cpu"):
        if isinstance(made, Spread):
            generator = torch.Generator().manual_seed(made.seed)
            return torch.randint(made.count, (math.prod(shape),), generator=generator)
        if isinstance(made, Selected | Fourier | Haar):
            generator = torch.Generator().manual_seed(made.seed)
            places: Tensor = torch.randperm(shape[-2] * shape[-1], generator=generator)[: made.count].clone()
            return places
        if isinstance(made, Circulant):
            one = torch.arange(made.size)
            return (one[None] - one[:, None]) % made.size
        if isinstance(made, Cayley | Exponential):
            rows, columns = torch.triu_indices(shape[-1], shape[-1], 1)
            above: Tensor = rows * shape[-1] + columns
            return above
    return None


def value(made: NodeMap, stored: Tensor, shape: tuple[int, ...], places: Tensor | None) -> Tensor:
    """A map's node, of this shape.

    Args:
        made: the map.
        stored: of the shape `made.stored(shape)`.
        shape: the node's.
        places: what `table` gave.
    """
    if isinstance(made, Circulant):
        assert places is not None
        return stored[..., places].transpose(-3, -2).reshape(shape) / shape[-1]
    if isinstance(made, Spread):
        assert places is not None
        # Not bincount: where nothing has memory, and in a recorded program, torch does not know its shape.
        ones = torch.ones(places.shape, dtype=stored.dtype, device=stored.device)
        often = torch.zeros(made.count, dtype=stored.dtype, device=stored.device).index_add(0, places, ones).clamp_min(1)
        return (stored * often.rsqrt())[places].reshape(shape)
    scales = None
    if isinstance(made, Cayley) and made.scaled:
        sides = [stored.shape[-1] - 2 * shape[-1], shape[-1], shape[-1]]
        stored, *scales = torch.split(stored, sides, -1)
    if places is not None:
        flat = stored.new_zeros(*shape[:-2], shape[-2] * shape[-1])
        stored = flat.index_copy(-1, places, stored).reshape(shape)
    result = stored
    if isinstance(made, Fourier):
        result = torch.fft.ifft2(stored).real
    elif isinstance(made, Haar):
        result = _haar(stored)
    elif isinstance(made, Exponential):
        result = torch.linalg.matrix_exp(stored - stored.mT)
    elif isinstance(made, Cayley):
        one = torch.eye(shape[-1], dtype=stored.dtype, device=stored.device)
        # (1 - S) (1 + S)^-1 is 2 (1 + S)^-1 - 1, whose gradient is two products.
        result = 2 * torch.linalg.inv(one + (stored - stored.mT)) - one
        if scales is not None:
            rows, columns = (1 + scale for scale in scales)
            result = rows[..., None] * result * columns[..., None, :]
        result = result - one if made.less_one else result
    elif isinstance(made, Householder):
        left, right = thin(made, stored, shape, None).unbind()
        result = left @ right.mT
        if not made.less_one:
            result = result + torch.eye(shape[-1], dtype=stored.dtype, device=stored.device)
    elif isinstance(made, Identity):
        result = torch.eye(shape[-1], dtype=stored.dtype, device=stored.device)
    elif isinstance(made, Softmax):
        if made.top is not None:
            largest = stored.topk(made.top, -1).indices
            stored = torch.full_like(stored, -torch.inf).scatter(-1, largest, stored.gather(-1, largest))
        result = stored.softmax(-1)
    elif isinstance(made, Normalised):
        result = functional.normalize(stored, dim=-1, eps=made.least or 1e-12)
    return result


def _haar(spectrum: Tensor) -> Tensor:
    """The matrix (..., rows, columns) of one level of Haar coefficients, whose quarters are as in `Haar`."""
    top, bottom = spectrum.chunk(2, -2)
    (mean, down), (along, both) = top.chunk(2, -1), bottom.chunk(2, -1)
    rows = [
        torch.stack([one + two, one - two], -1).flatten(-2)
        for one, two in ((mean + down, along + both), (mean - down, along - both))
    ]
    return torch.stack(rows, -2).flatten(-3, -2) / 2


def thin(made: NodeMap, stored: Tensor, shape: tuple[int, ...], places: Tensor | None) -> Tensor:
    """The two thin matrices of a map that has a bond, (2, ..., n, bond): the node is the first times the second's transpose.

    The product of the reflections is ``1 - U T U^T`` with ``T^-1 = 1/2 + (U^T U above its diagonal)`` (the compact form of
    Schreiber and Van Loan 1989).
    """
    assert isinstance(made, Householder)
    unit = functional.normalize(stored, dim=-2)
    half = torch.eye(made.count, dtype=stored.dtype, device=stored.device) / 2
    inverse = (unit.mT @ unit).triu(1) + half
    return torch.stack([-torch.linalg.solve_triangular(inverse, unit, upper=True, left=False), unit])


def waves(size: int, like: Tensor) -> Tensor:
    """Cosines and sines of all frequencies of a block, (size, size // 2 + 1, 2), in the dtype of `like` and where it lies."""
    wide = torch.promote_types(like.dtype, torch.float32)
    place, frequency = (torch.arange(n, device=like.device) for n in (size, size // 2 + 1))
    angle = (place[:, None] * frequency % size).to(wide) * (2 * torch.pi / size)
    return torch.stack([angle.cos(), angle.sin()], -1).to(like.dtype)


def spectrum(made: NodeMap, stored: Tensor, shape: tuple[int, ...], places: Tensor | None) -> Tensor:
    """What circulant blocks make of the waves of `in` for those of `out`: (..., row block, column block, frequency, 2, 2)."""
    assert isinstance(made, Circulant)
    size = made.size
    weight = torch.full((size // 2 + 1,), 2.0, dtype=stored.dtype, device=stored.device)
    weight[:: size // 2 if size % 2 == 0 else size] = 1  # the constant, and the wave that changes sign at each place
    even, odd = (torch.tensordot(stored, waves(size, stored), 1) * (weight / (size * shape[-1]))[:, None]).unbind(-1)
    return torch.stack([torch.stack([even, odd], -1), torch.stack([-odd, even], -1)], -2)
