"""The largest singular values of a matrix and their directions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

Triples = tuple[Tensor, Tensor, Tensor]

EXACT_SIDE = 512  # up to here a full decomposition takes less than a quarter of a second
SPARE, DEPTH, ROUNDS = 11, 3, 8
# What one more round may still find, of the energy that is missed and of the whole.
SETTLED, ROUNDING = 1e-6, 1e-15


def exact(matrix: Tensor) -> Triples:
    """The full decomposition: u, s, v, so that ``M = u diag(s) v'``."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh.T


def refined(matrix: Tensor, width: int) -> Iterator[Triples]:
    """Ever better triples of the largest singular values, by a restarted block Krylov range finder.

    A fixed seed of its own: the same result at each call, and torch's generator is left alone (Halko et al. 2011; Musco &
    Musco 2015).

    Args:
        matrix: (rows, columns).
        width: of the blocks: how many are wanted, and some to spare.
    """
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype)
    block = _orthonormal(matrix @ block)
    for _ in range(ROUNDS):
        blocks = [block]
        for _ in range(DEPTH):
            blocks.append(_orthonormal(matrix @ (matrix.T @ blocks[-1])))
        basis = _orthonormal(torch.cat(blocks, dim=1))
        inner, s, v = exact(basis.T @ matrix)
        u = basis @ inner
        yield u, s, v
        block = u[:, :width]


def is_large(matrix: Tensor, count: int) -> bool:
    """Whether `refined` pays: with many directions of few its blocks would be as large as the matrix."""
    return min(matrix.shape) > max(EXACT_SIDE, 2 * (DEPTH + 1) * (count + SPARE))


def leading(matrix: Tensor, count: int) -> Triples:
    """The first triples, u (rows, count), s (count), v (columns, count): the nearest matrix of that rank.

    Columns beyond the matrix's sides are zero. Of a large matrix the energy that is missed is the least to about 1e-6 of
    itself; where singular values are equal, the directions are any of several choices.
    """
    u, s, v = _settled(matrix, count) if is_large(matrix, count) else exact(matrix)
    more = max(count - len(s), 0)
    return pad(u[:, :count], (0, more)), pad(s[:count], (0, more)), pad(v[:, :count], (0, more))


def _settled(matrix: Tensor, count: int) -> Triples:
    whole, held = float(matrix.square().sum()), -1.0
    triples = None
    for triples in refined(matrix, count + SPARE):
        before, held = held, float(triples[1][:count].square().sum())
        if held - before <= max(SETTLED * (whole - held), ROUNDING * whole):
            break
    assert triples is not None
    return triples


def _orthonormal(matrix: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(matrix).Q
    return q
