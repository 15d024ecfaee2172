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

from superlora_tn.update.eager import as_given, is_eager, is_recorded

RADIX_BITS = 6  # of a plain pass: few passes over memory, and more arithmetic, which accelerators have to spare
CACHED_BITS = 3  # of a pass within the cache
RUN_BITS = 20  # a run, its result and its scratch space share the last-level cache: 16 MiB in float32
PLAIN_BITS = 14  # up to this size a row takes two or three plain passes, and the cached ones do not pay


@lru_cache(maxsize=256)
def _known(bits: int, shift: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # A tensor that is made in inference mode can never be saved for a backward pass.
    with torch.inference_mode(False), torch.no_grad():
        return _sylvester(bits, torch.full((1, 1), 2.0**-shift, dtype=dtype, device=device))


def _matrix(bits: int, shift: int, like: Tensor) -> Tensor:
    """The Sylvester Hadamard matrix of size 2**bits, entries +-1, times 2**-shift, for a tensor's dtype and device.

    Kept only where torch runs plainly: what is made while a program is recorded, inside a transform or under a mode such as
    FakeTensorMode belongs to that alone.
    """
    if is_eager() and not torch._C._len_torch_dispatch_stack():
        return _known(bits, shift, like.dtype, like.device)
    return _sylvester(bits, like.new_full((1, 1), 2.0**-shift))


def _sylvester(bits: int, matrix: Tensor) -> Tensor:
    """``H' = [[H, H], [H, -H]]``, so many times; recorders know these operations, and not all of them kron."""
    for _ in range(bits):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
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
    return transform(x, size.bit_length() - 1)


def transform(x: Tensor, bits: int, shift: int = 0) -> Tensor:
    """``y = 2**-shift H x`` along the last axis, of size 2**bits; autocast leaves it alone, forward and backward.

    Args:
        x: (..., 2**bits).
        bits: as a number, since a recorder would take the axis for one that varies.
        shift: the power of two is in the first matmul: it costs and rounds nothing, and no sum grows beyond its result.
    """
    if not bits:
        return x * 2.0**-shift
    # A recorder would unroll the runs, and can save no function that is not torch's own.
    if not is_recorded():
        return _Transform.apply(x, bits, shift)  # type: ignore[no-any-return, no-untyped-call]
    with as_given(x):
        return _plain(x, bits, shift)


def _plain(x: Tensor, left: int, shift: int) -> Tensor:
    stride, y = 1, x
    while left:
        bits = min(RADIX_BITS, left)
        matrix, shift = _matrix(bits, shift, x), 0
        y = y.reshape(-1, 2**bits) @ matrix if stride == 1 else matrix @ y.reshape(-1, 2**bits, stride)
        stride, left = stride * 2**bits, left - bits
    return y.reshape(x.shape)


class _Transform(torch.autograd.Function):
    """The transform as one operation, which keeps nothing. H is symmetric, so it is its own adjoint."""

    @staticmethod
    def forward(x: Tensor, bits: int, shift: int) -> Tensor:
        with as_given(x):
            return _plain(x, bits, shift) if bits <= PLAIN_BITS or x.device.type != "cpu" else _in_runs(x, bits, shift)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        """The map is linear and fixed: nothing of x is kept."""
        ctx.settings = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return transform(gradient, *ctx.settings), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return transform(tangent, *ctx.settings)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, bits: int, shift: int) -> tuple[Tensor, int | None]:
        axis = in_dims[0]
        return (transform(x, bits, shift), None) if axis is None else (transform(x.movedim(axis, 0), bits, shift), 0)


def _in_runs(x: Tensor, bits: int, shift: int) -> Tensor:
    """Run by run, into one result."""
    x = x.contiguous()
    size, out = 1 << bits, torch.empty_like(x)
    run = min(size, 1 << RUN_BITS)
    rows = max(1, min((1 << RUN_BITS) // size, x.numel() // size))  # short rows share a run's time in the cache
    scratch = x.new_empty(2, max(rows * run, size // run))
    sources, results = x.view(-1, run), out.view(-1, run)
    for k in range(0, len(sources), rows):
        _low_bits(sources[k : k + rows], results[k : k + rows], scratch, shift)
    if size > run:
        for row in out.view(-1, size // run, run):
            _high_bits(row, scratch)
    return out


def _pieces(bits: int) -> list[int]:
    """Bits in as few pieces of at most `CACHED_BITS` as can be, as even as can be."""
    count = -(-bits // CACHED_BITS)
    return [bits // count + (k < bits % count) for k in range(count)]


def _low_bits(source: Tensor, result: Tensor, scratch: Tensor, shift: int) -> None:
    """Transform each row of (rows, run) into `result`, times 2**-shift.

    A pass transforms the last bits and moves them to the front, so that each is one wide matmul, and after all bits
    had their turn they stand in order again.
    """
    rows, run = source.shape
    pieces = _pieces(run.bit_length() - 1)
    for k, bits in enumerate(pieces):
        matrix = _matrix(bits, 0 if k else shift, source)
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
            matrix = _matrix(bits, 0, grid).expand(lines >> bits, -1, -1)
            # The last pass writes to where the first read; a single pass has to do so by a copy.
            target = block if 0 < k == len(pieces) - 1 else scratch[k % 2, : block.numel()].view(block.shape)
            torch.bmm(
                matrix, source.view(2**bits, -1, block.shape[1]).transpose(0, 1), out=target.view(-1, 2**bits, block.shape[1])
            )
            source = target
        if source is not block:
            block.copy_(source)
