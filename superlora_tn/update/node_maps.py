"""What the maps of `declare.node_maps` compute: nodes of the network as functions of what is stored."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from superlora_tn.declare.node_maps import (
    Cayley,
    Circulant,
    Exponential,
    Fourier,
    Householder,
    NodeMap,
    Normalised,
    Selected,
    Softmax,
)
from superlora_tn.network.graph import Graph
from superlora_tn.update.passes import lasting


class NodeMaps:
    """The nodes of a graph from what is stored of them, with the fixed tables of their maps."""

    def __init__(self, graph: Graph) -> None:
        self._nodes = [(node.map, node.shape) for node in graph.nodes]
        self._tables = [None if made is None else table(made, shape) for made, shape in self._nodes]

    def __call__(self, stored: Sequence[Tensor]) -> list[Tensor]:
        """The nodes' tensors, in the dtypes of what is stored."""
        nodes = list(stored)
        for k, (made, shape) in enumerate(self._nodes):
            if made is not None:
                # No copy where it is there already; nothing is kept on the meta device, on which nothing lies.
                places = self._tables[k]
                if places is not None and places.device != nodes[k].device:
                    places = places.to(nodes[k].device)
                    if not places.is_meta:
                        self._tables[k] = places
                nodes[k] = lasting(partial(_value, made, shape, places), [nodes[k]])
        return nodes


def _value(made: NodeMap, shape: tuple[int, ...], places: Tensor | None, stored: Sequence[Tensor]) -> Tensor:
    """One node, computed in float32 or wider: neither transforms nor solvers know the halves."""
    own = stored[0]
    wide = own.to(torch.promote_types(own.dtype, torch.float32))
    return value(made, wide, shape, places).to(own.dtype)


def table(made: NodeMap, shape: tuple[int, ...]) -> Tensor | None:
    """The fixed numbers of a map for a node of this shape, on the CPU; None where it has none."""
    with torch.inference_mode(False), torch.device("cpu"):
        if isinstance(made, Selected | Fourier):
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
    if places is not None:
        flat = stored.new_zeros(*shape[:-2], shape[-2] * shape[-1])
        stored = flat.index_copy(-1, places, stored).reshape(shape)
    result = stored
    if isinstance(made, Fourier):
        result = torch.fft.ifft2(stored).real
    elif isinstance(made, Exponential):
        result = torch.linalg.matrix_exp(stored - stored.mT)
    elif isinstance(made, Cayley):
        skew, one = stored - stored.mT, torch.eye(shape[-1], dtype=stored.dtype, device=stored.device)
        result = torch.linalg.solve(one + skew, one - skew, left=False)
    elif isinstance(made, Householder):
        result = torch.eye(shape[-1], dtype=stored.dtype, device=stored.device).expand(shape)
        for u in functional.normalize(stored, dim=-2).unbind(-1):
            result = result - 2 * (result @ u[..., None]) * u[..., None, :]
    elif isinstance(made, Softmax):
        result = stored.softmax(-1)
    elif isinstance(made, Normalised):
        result = functional.normalize(stored, dim=-1)
    return result
