"""Gauge freedom: g and its inverse on a bond change the nodes, but neither dW nor the directions in which dW can move."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from superlora_tn.declare.maps import Compose, Fastfood
from superlora_tn.verification.cases import Case, NotApplicable, Sized, as_array, ratio
from superlora_tn.verification.references.textbook import Array, Values

Places = list[tuple[str, int]]
SMALL = 200  # largest number of elements of dW, and of trainable numbers, for which a Jacobian is built
CLEAR = 1e3  # a singular value this many times above its bound is not zero


def gauge_freedom(case: Case) -> float:
    """Inserting g and its inverse on any bond leaves dW as it is; on a hyperbond, g is diagonal."""
    bonds = 0
    worst = 0.0
    for sized in case.in_float64().groups():
        if sized.graph.is_mapped:
            raise NotApplicable  # g acts on nodes, not on what is stored of them
        before = sized.delta(sized.values)
        for size, places in _bonds(sized):
            moved, positive = _insert_gauge(sized, size, places, sized.values)
            after = sized.delta(moved)
            bonds += 1
            for target in sized.shapes:
                allowed = sized.allowed(target, positive, more=2 * size)
                worst = max(worst, ratio(after[target], before[target], allowed))
    if not bonds:
        raise NotApplicable
    return worst


def _bonds(sized: Sized) -> Iterator[tuple[int, Places]]:
    """The size of each inner index with the (node, axis) places it is on, where each is an axis of its own.

    Nodes that share a bond stand in the same terms of a sum, so that one g serves all of these.
    """
    seen: list[Places] = []
    for graph in (term.graph for term in sized.graph.networks):
        open_ = {i for _, indices in graph.modes for i in indices}
        for index, size in graph.sizes:
            places = [(n.name, k) for n in graph.nodes for k, axis in enumerate(n.axes) if axis == (index,)]
            if index not in open_ and len(places) >= 2 and places not in seen:
                seen.append(places)
                yield size, places


def _insert_gauge(sized: Sized, size: int, places: Places, start: Values) -> tuple[dict[str, Array], dict[str, Array]]:
    """The moved values, and the same with all terms at their absolute values. g and its inverse are exact."""
    generator = np.random.default_rng(sized.case.seed + 4)
    scales = 2.0 ** generator.integers(-2, 3, size)
    g, inverse = np.diag(scales), np.diag(1 / scales)
    if len(places) == 2:  # a plain bond takes any invertible g; I + N with N^2 = 0 has the inverse I - N
        step = np.zeros((size, size))
        step[0, 1:] = generator.integers(-2, 3, size - 1)
        g, inverse = (np.eye(size) + step) @ g, inverse @ (np.eye(size) - step)
    (left, k), (right, j) = places[:2]
    moved, positive = dict(start), {n: np.abs(v) for n, v in start.items()}
    for values, first, second in ((moved, g, inverse), (positive, np.abs(g), np.abs(inverse))):
        values[left] = np.moveaxis(np.tensordot(values[left], first, axes=(k, 0)), -1, k)
        values[right] = np.moveaxis(np.tensordot(values[right], second, axes=(j, 1)), -1, j)
    return moved, positive


def tangent_space(case: Case) -> float:
    """g on all bonds at once leaves the span of the columns d dW / d parameter as it is: equal ranks, equal projectors.

    A rank counts the singular values above eps, which bounds by how much rounding moves any of them (Weyl): the
    Frobenius norm of the columns' rounding bounds, and max(m, n) u |J|_F for the decomposition. A value between eps and
    1000 eps leaves the case undecided, and another is drawn. The span then turns by an angle of at most
    eps / (sigma_r - eps) (Wedin), on both sides. Columns are scaled to norm 1 first, which keeps their span.
    A fastfood map follows the network, so that the network's tangent space is what matters; it is left out here.
    """
    groups, worst = case.in_float64().groups(), 0.0
    if isinstance(case.spec.projection, Fastfood | Compose) or not all(map(_is_small, groups)):
        raise NotApplicable
    bonds = [list(_bonds(sized)) for sized in groups]
    if not bonds[0] or any(sized.graph.is_mapped for sized in groups):
        raise NotApplicable
    for sized, held in zip(groups, bonds, strict=True):
        moved = dict(sized.values)
        for size, places in held:
            moved, _ = _insert_gauge(sized, size, places, moved)
        (one, turn), (other, turned) = _span(sized, sized.values), _span(sized, moved)
        if one.shape != other.shape:
            return math.inf
        sine = np.linalg.norm(one - other @ (other.T @ one), 2) if one.size else 0.0
        worst = max(worst, ratio(np.array(sine), np.zeros(()), turn + turned))
    return worst


def _is_small(sized: Sized) -> bool:
    """Whether a Jacobian is built."""
    return max(sum(o * i for o, i in sized.shapes.values()), sized.graph.num_parameters) <= SMALL


def _span(sized: Sized, values: Values) -> tuple[Array, float]:
    """An orthonormal basis of the columns d dW / d parameter, and by how much rounding may have turned it."""
    columns, size = _jacobian(sized, values), _jacobian(sized, {n: np.abs(v) for n, v in values.items()})
    norms = np.linalg.norm(columns, axis=0)
    norms[norms == 0] = 1.0
    basis, sigma, _ = np.linalg.svd(columns / norms, full_matrices=False)
    rounding = sized.roundings * sized.unit * np.linalg.norm(size / norms)
    eps = float(rounding + max(columns.shape) * sized.unit * np.linalg.norm(sigma))
    rank = int((sigma > eps).sum())
    if rank and sigma[rank - 1] < CLEAR * eps:
        raise NotApplicable
    return basis[:, :rank], float(eps / (sigma[rank - 1] - eps) if rank else eps)


def _jacobian(sized: Sized, values: Values) -> Array:
    """d dW / d parameter, (elements of all weights, trainable numbers): dW is linear in a node, so dW of unit tensors."""
    adapter, columns = sized.adapter(values=values), []
    with torch.no_grad():
        for tensor in adapter.parameters():
            kept = tensor.clone()
            for k in range(tensor.numel()):
                tensor.zero_().view(-1)[k] = 1.0
                columns.append(np.concatenate([as_array(adapter.delta(t)).reshape(-1) for t in sized.shapes]))
            tensor.copy_(kept)
    return np.stack(columns, axis=1)
