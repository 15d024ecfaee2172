"""The fast Walsh-Hadamard transform: H of size 2**k is a Kronecker product of small Hadamard matrices.

So the transform is that network contracted with x, one small matmul for every few bits of the index. On a CPU runs
that fit the cache go through all their bits before the next run is read, eight values at a time: on
most cores the arithmetic of a larger matrix costs more than the passes over the cache that it saves.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

RADIX_BITS = 6  # of a plain pass: few passes over memory, and more arithmetic, which accelerators have to spare
CACHED_BITS = 3  # of a pass within the cache
RUN_BITS = 20  # a run, its result and its scratch space share the last-level cache: 16 MiB in float32
PLAIN_BITS = 14  # up to this size a row takes two or three plain passes, and the cached ones do not pay


@lru_cache(maxsize=64)
def _matrix(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The Sylvester Hadamard matrix of size 2**bits, entries +-1."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    block = torch.tensor([[1, 1], [1, -1]], dtype=dtype, device=device)
    for _ in range(bits):
        matrix = torch.kron(block, matrix)
    return matrix


def hadamard(x: Tensor) -> Tensor:
    """The fast Walsh-Hadamard transform along the last axis, ``y = H x`` with entries +-1 (not normalised).

    O(n log n) additions, in matmuls of 8 x 8 within the cache (CPU) or 64 x 64 over all of x (elsewhere); beside y,
    a CPU takes up to two runs of scratch space.

    Args:
        x: (..., n), n a power of two.

    Raises:
        ValueError: n is not a power of two.
    """
    size = x.shape[-1]
    if size < 1 or size & (size - 1):
        raise ValueError(f"the Walsh-Hadamard transform was given a last axis of {size}; it must be a power of two.")
    # A compiler would unroll the runs.
    plain = size.bit_length() <= PLAIN_BITS + 1 or x.device.type != "cpu" or torch.compiler.is_compiling()
    return _plain(x) if plain else _Cached.apply(x)  # type: ignore[no-untyped-call]


def _plain(x: Tensor) -> Tensor:
    left, y = x.shape[-1].bit_length() - 1, x
    stride = 1
    while left:
        bits = min(RADIX_BITS, left)
        matrix = _matrix(bits, x.dtype, x.device)
        y = y.reshape(-1, 2**bits) @ matrix if stride == 1 else matrix @ y.reshape(-1, 2**bits, stride)
        stride, left = stride * 2**bits, left - bits
    return y.reshape(x.shape)


class _Cached(torch.autograd.Function):
    """The transform run by run, into one result. H is symmetric, so it is its own adjoint."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        x = x.contiguous()
        size = x.shape[-1]
        out = torch.empty_like(x)
        run = min(size, 1 << RUN_BITS)
        rows = max(1, min((1 << RUN_BITS) // size, x.numel() // size))  # short rows share a run's time in the cache
        scratch = x.new_empty(2, max(rows * run, size // run))
        sources, results = x.view(-1, run), out.view(-1, run)
        for k in range(0, len(sources), rows):
            _low_bits(sources[k : k + rows], results[k : k + rows], scratch)
        if size > run:
            for row in out.view(-1, size // run, run):
                _high_bits(row, scratch)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing to keep: the map is linear and fixed."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return hadamard(gradient)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return hadamard(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int | None]:
        axis = in_dims[0]
        return (hadamard(x), None) if axis is None else (hadamard(x.movedim(axis, 0)), 0)


def _pieces(bits: int) -> list[int]:
    """Bits in as few pieces of at most `CACHED_BITS` as can be, as even as can be."""
    count = -(-bits // CACHED_BITS)
    return [bits // count + (k < bits % count) for k in range(count)]


def _low_bits(source: Tensor, result: Tensor, scratch: Tensor) -> None:
    """Transform each row of (rows, run) into `result`.

    A pass transforms the last bits and moves them to the front, so that each is one wide matmul, and after all bits
    had their turn they stand in order again.
    """
    rows, run = source.shape
    pieces = _pieces(run.bit_length() - 1)
    for k, bits in enumerate(pieces):
        matrix = _matrix(bits, source.dtype, source.device)
        target = result if k == len(pieces) - 1 else scratch[k % 2, : rows * run]
        if rows == 1:  # a batch of one costs more than no batch
            torch.mm(matrix, source.view(-1, 2**bits).mT, out=target.view(2**bits, -1))
        else:
            torch.bmm(matrix.expand(rows, -1, -1), source.view(rows, -1, 2**bits).mT, out=target.view(rows, 2**bits, -1))
        source = target


def _high_bits(grid: Tensor, scratch: Tensor) -> None:
    """Transform (lines, run) along its first axis, in place, as many columns at a time as the cache holds.

    A pass transforms the first bits and moves them behind the other lines', as `_low_bits` does the other way round.
    """
    lines, run = grid.shape
    pieces = _pieces(lines.bit_length() - 1)
    width = max(1, scratch.shape[1] // lines)
    for column in range(0, run, width):
        source = block = grid[:, column : column + width]
        for k, bits in enumerate(pieces):
            matrix = _matrix(bits, grid.dtype, grid.device).expand(lines >> bits, -1, -1)
            # The last pass writes to where the first read; a single pass has to do so by a copy.
            target = block if 0 < k == len(pieces) - 1 else scratch[k % 2, : block.numel()].view(block.shape)
            torch.bmm(
                matrix, source.view(2**bits, -1, block.shape[1]).transpose(0, 1), out=target.view(-1, 2**bits, block.shape[1])
            )
            source = target
        if source is not block:
            block.copy_(source)
