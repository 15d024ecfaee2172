"""Nodes that are functions of what is stored, by their definitions in numpy: loops, waves, inverses, one reflection at a time.

All take complex numbers too, so that a derivative along E is the imaginary part at ``stored + 1e-30 i E``: no step is too long.
Shared with the code under test: the declarations, and torch's permutation of a seed, which is data.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

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
    Same,
    Selected,
    Softmax,
    Spread,
)
from superlora_tn.verification.references.textbook import Array

LINEAR = (Selected, Fourier, Haar, Spread, Same, Circulant, Identity)


def node(made: NodeMap, stored: Array, shape: tuple[int, ...]) -> Array:
    """The node (of this shape) from what is stored: each entry of the batch, the axes before the map's own, by itself."""
    return _each(made, stored, shape, _one)


def size(made: NodeMap, stored: Array, shape: tuple[int, ...]) -> Array:
    """What the node's rounding errors are relative to: its terms at their absolute values, times its conditioning."""
    return _each(made, stored, shape, _size)


def slope(made: NodeMap, stored: Array, direction: Array, shape: tuple[int, ...]) -> Array:
    """The same of the node's derivative along a direction."""
    if isinstance(made, LINEAR):
        return size(made, direction, shape)
    return np.full(shape, max(_steepness(made, one, two) for one, two in _entries(made, stored, shape, direction)))


def stored_numbers(made: NodeMap, shape: tuple[int, ...]) -> int:
    """How many numbers are stored for a node, by the papers' counts."""
    batch, (rows, columns) = math.prod(shape[:-2]), (*(1, 1), *shape)[-2:]
    if made.of is not None:
        return 0
    if isinstance(made, Spread):
        return made.count
    if isinstance(made, Selected | Fourier | Haar):
        return batch * made.count
    if isinstance(made, Circulant):
        return batch * rows * columns // made.size
    if isinstance(made, Cayley | Exponential):
        scales = 2 * rows if isinstance(made, Cayley) and made.scaled else 0
        return batch * (rows * (rows - 1) // 2 + scales)
    if isinstance(made, Householder):
        return batch * rows * made.count
    return 0 if isinstance(made, Identity) else math.prod(shape)


def _entries(made: NodeMap, stored: Array, shape: tuple[int, ...], *others: Array) -> list[tuple[Array, ...]]:
    batch = shape[: len(shape) - made.axes]
    own = made.stored(shape)[len(batch) :]
    flat = [value.reshape(-1 if own != (0,) else math.prod(batch), *own) for value in (stored, *others)]
    return list(zip(*flat, strict=True))


def _each(made: NodeMap, stored: Array, shape: tuple[int, ...], function: object) -> Array:
    assert callable(function)
    if isinstance(made, Identity):
        return np.broadcast_to(np.eye(shape[-1]), shape).copy()
    if isinstance(made, Same):
        return stored if function is _one else np.abs(stored)
    if isinstance(made, Spread):
        drawn = torch.randint(made.count, (math.prod(shape),), generator=torch.Generator().manual_seed(made.seed)).numpy()
        lengths = np.array([math.sqrt(max(1, int((drawn == k).sum()))) for k in range(made.count)])
        found = (stored / lengths)[drawn].reshape(shape)
        return np.asarray(found if function is _one else np.abs(found))
    own = shape[len(shape) - made.axes :]
    return np.stack([function(made, one, own) for (one,) in _entries(made, stored, shape)]).reshape(shape)


def _places(made: Selected | Fourier | Haar, rows: int, columns: int) -> list[tuple[int, int]]:
    flat = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(made.seed))[: made.count]
    return [divmod(int(place), columns) for place in flat]


def _skew(stored: Array, n: int) -> Array:
    found = np.zeros((n, n), dtype=stored.dtype)
    for number, (i, j) in zip(stored, itertools.combinations(range(n), 2), strict=True):
        found[i, j], found[j, i] = number, -number
    return found


def _power_series(matrix: Array) -> Array:
    """``exp``: the series of a matrix halved until it is short, squared as often."""
    times = max(0, math.ceil(math.log2(max(float(np.linalg.norm(matrix)), 1e-300))) + 1)
    term, total = np.eye(len(matrix), dtype=matrix.dtype), np.eye(len(matrix), dtype=matrix.dtype)
    for k in range(1, 25):  # 2^-k / k! is below 1e-30 there
        term = term @ matrix / (k * 2.0**times)
        total = total + term
    for _ in range(times):
        total = total @ total
    return total


def _one(made: NodeMap, stored: Array, shape: tuple[int, ...]) -> Array:
    if isinstance(made, Softmax):
        raised = np.exp(stored - stored.real.max())
        if made.top is not None:
            raised = np.where(stored.real >= np.sort(stored.real)[-made.top], raised, 0)
        return np.asarray(raised / raised.sum())
    if isinstance(made, Normalised):
        length = np.sqrt((stored**2).sum())
        return np.asarray(stored / (length if length.real > made.least else made.least))
    rows, columns = shape
    result = np.zeros(shape, dtype=stored.dtype)
    if isinstance(made, Selected):
        for number, place in zip(stored, _places(made, rows, columns), strict=True):
            result[place] = number
    elif isinstance(made, Fourier):
        p, q = np.ogrid[:rows, :columns]
        for number, (k, m) in zip(stored, _places(made, rows, columns), strict=True):
            turns = (k * p % rows) / rows + (m * q % columns) / columns
            result += number * np.cos(2 * np.pi * turns) / (rows * columns)
    elif isinstance(made, Haar):  # a wave of each coefficient: signs on one square of 2 x 2 elements
        for number, (k, m) in zip(stored, _places(made, rows, columns), strict=True):
            (low, k), (right, m) = divmod(k, rows // 2), divmod(m, columns // 2)
            for p, q in np.ndindex(2, 2):
                result[2 * k + p, 2 * m + q] += number * (-1.0) ** (right * p + low * q) / 2
    elif isinstance(made, Circulant):
        for p, q in np.ndindex(rows, columns):
            result[p, q] = stored[p // made.size, q // made.size, (q - p) % made.size] / columns
    elif isinstance(made, Cayley):
        one, numbers = np.eye(rows), rows * (rows - 1) // 2
        result = (one - _skew(stored[:numbers], rows)) @ np.linalg.inv(one + _skew(stored[:numbers], rows))
        if made.scaled:
            result = np.diag(1 + stored[numbers : numbers + rows]) @ result @ np.diag(1 + stored[numbers + rows :])
        result = result - one if made.less_one else result
    elif isinstance(made, Exponential):
        result = _power_series(_skew(stored, rows))
    elif isinstance(made, Householder):
        result = np.eye(rows, dtype=stored.dtype)
        for u in stored.T:
            result = result @ (np.eye(rows) - 2 * np.outer(u, u) / (u @ u))
        result = result - np.eye(rows) if made.less_one else result
    return result


def _size(made: NodeMap, stored: Array, shape: tuple[int, ...]) -> Array:
    if isinstance(made, Haar):
        return np.full(shape, np.abs(stored).sum())
    if isinstance(made, Fourier):
        return np.full(shape, np.abs(stored).sum() / math.prod(shape))
    if isinstance(made, LINEAR):
        return _one(made, np.abs(stored), shape)
    if isinstance(made, Softmax | Normalised):
        spread = float(np.ptp(stored)) if isinstance(made, Softmax) else 0.0  # an error of the exponent is a relative one
        return np.asarray((4 + spread) * np.abs(_one(made, stored, shape)))
    if isinstance(made, Householder):  # the compact form 1 - U T U^T, T by a triangular solve (Higham 2002, theorem 8.5)
        unit = stored / np.sqrt((stored**2).sum(0))
        inverse = np.triu(unit.T @ unit, 1) + np.eye(made.count) / 2
        solved = np.abs(np.linalg.inv(inverse))
        return np.asarray(np.eye(shape[0]) + np.abs(unit) @ solved @ np.abs(inverse) @ solved @ np.abs(unit.T))
    # 1 + S has an inverse of norm 1 at most, and exp(S) is a rotation, so both are off by the norm of S.
    # Scales of rows and columns are at most as large as the norm of all that is stored, plus 1.
    norm = 1 + 2 * float(np.linalg.norm(stored))
    return np.full(shape, 4 * norm**3 if isinstance(made, Cayley) and made.scaled else 4 * norm)


def _steepness(made: NodeMap, stored: Array, direction: Array) -> float:
    length = float(np.linalg.norm(direction))
    if isinstance(made, Softmax):
        return (8 + float(np.ptp(stored))) * length
    if isinstance(made, Normalised):
        return 8 * length / max(made.least, float(np.linalg.norm(stored)))
    if isinstance(made, Householder):
        norms = np.sqrt((stored**2).sum(0))
        inverse = np.triu((stored / norms).T @ (stored / norms), 1) + np.eye(made.count) / 2
        steps = float((np.sqrt((direction**2).sum(0)) / norms).sum())
        return 8 * steps * float(np.linalg.norm(inverse) * np.linalg.norm(np.linalg.inv(inverse))) ** 2
    norm = 1 + 2 * float(np.linalg.norm(stored))
    return 8 * length * (norm**3 if isinstance(made, Cayley) and made.scaled else norm)
