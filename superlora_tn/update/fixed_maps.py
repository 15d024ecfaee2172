"""The fixed maps F: never trained, regenerated from their seed, bit for bit on every platform and device.

Random numbers come from the raw 64-bit stream of Philox, which NumPy guarantees, and become permutations, signs and
Gaussians by whole-number arithmetic and single IEEE divisions only: no `log` or `cos`, whose last bit varies.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import singledispatch
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from superlora_tn.declare.maps import Compose, Fastfood, Projection, Shuffle
from superlora_tn.declare.parts import SpecError
from superlora_tn.update.walsh import hadamard


def _raw(seed: int, purpose: str, count: int) -> np.ndarray:
    """`count` raw 64-bit words for a seed and a purpose, the lowest byte first in memory on every machine."""
    key = np.frombuffer(hashlib.sha256(f"superlora_tn {purpose} {seed}".encode()).digest()[:16], "<u8")
    return np.random.Philox(key=key).random_raw(count).astype("<u8")


def permutation(seed: int, count: int, purpose: str = "permutation") -> Tensor:
    """A seeded permutation of ``0 .. count - 1``, int32 (int64 above 2**31)."""
    order = np.argsort(_raw(seed, purpose, count), kind="stable")
    return torch.from_numpy(order.astype(np.int32 if count <= 2**31 else np.int64))


def signs(seed: int, count: int, purpose: str = "signs") -> Tensor:
    """Seeded signs, -1 or +1, float32 of shape (count,)."""
    bits = np.unpackbits(_raw(seed, purpose, -(-count // 64)).view(np.uint8))[:count]
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1)


def gaussians(seed: int, count: int, purpose: str = "gaussians") -> Tensor:
    """Seeded numbers of mean 0 and variance 1, float32 of shape (count,).

    Sums of twelve uniform 16-bit words (Irwin-Hall), a Gaussian to within 0.2 % of its distribution function, because
    a sum of whole numbers has the same bits everywhere.
    """
    words = _raw(seed, purpose, 3 * count).view("<u2").reshape(count, 12)
    total = words.astype(np.int64).sum(axis=1) * 2 - 12 * 65535
    # The variance of the doubled sum of 12 uniform words 0..65535 is 12 * (65536**2 - 1) / 3.
    return torch.from_numpy((total / math.sqrt(4 * (65536**2 - 1))).astype(np.float32))


TABLES = {"B": ("signs", "flips", signs), "P": ("permutation", "order", permutation), "G": ("gaussians", "weights", gaussians)}


class FixedMap(nn.Module):
    """A fixed map from vectors of length `size_in` to `size_out`, applied along the last axis.

    Its tables are buffers that follow the module's device and are not saved: the seed is part of the spec.
    """

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__()
        self.size_in, self.size_out = size_in, size_out


class ShuffleMap(FixedMap):
    """``y = P x``."""

    order: Tensor

    def __init__(self, size_in: int, size_out: int, seed: int) -> None:
        super().__init__(size_in, size_out)
        if size_in != size_out:
            raise SpecError(f"Shuffle keeps the length, but was asked to map {size_in} to {size_out}; use Fastfood(ratio=...).")
        self.register_buffer("order", permutation(seed, size_in), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., n)."""
        return x.index_select(-1, self.order)


class FastfoodMap(FixedMap):
    """``y = H G P H B x`` (or another order), x padded from n to p (a power of two), y truncated."""

    def __init__(self, size_in: int, size_out: int, declared: Fastfood) -> None:
        super().__init__(size_in, size_out)
        self.declared = declared
        self.padded = 1 << (max(size_in, size_out) - 1).bit_length()
        mixed = False  # signs and Gaussians in front of the first H and P meet the elements of x alone
        for k, factor in enumerate(declared.order):
            mixed = mixed or factor in "HP"
            if factor != "H":
                purpose, name, make = TABLES[factor]
                again = str(declared.order[:k].count(factor) + 1) if factor in declared.order[:k] else ""
                table = make(declared.seed, self.padded if mixed else size_in, f"{purpose} {again}".strip())
                self.register_buffer(f"{name}{again}", table, persistent=False)

    @property
    def scale(self) -> float:
        """The factor of all that `scaling` asks for."""
        transforms = self.declared.order.count("H")
        if self.declared.scaling == "orthonormal":
            return math.pow(self.padded, -transforms / 2)
        if self.declared.scaling == "none" or not transforms:
            return 1.0
        # The first transform sums the n elements that are not padding, each further one all p.
        return 1.0 / math.sqrt(self.size_in * math.pow(self.padded, transforms - 1))

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., size_out)."""
        tables = iter([buffer for buffer in self._buffers.values() if buffer is not None])
        y = x * self.scale
        for factor in self.declared.order:
            if factor in "HP" and y.shape[-1] < self.padded:
                y = nn.functional.pad(y, (0, self.padded - self.size_in))
            if factor == "H":
                y = hadamard(y)
            elif factor == "P":
                y = y.index_select(-1, next(tables))
            else:
                y = y * next(tables).to(y.dtype)
        y = nn.functional.pad(y, (0, self.size_out - y.shape[-1])) if y.shape[-1] < self.size_out else y[..., : self.size_out]
        return torch.tanh(y) if self.declared.tanh else y


class ComposedMap(FixedMap):
    """Maps one after another."""

    def __init__(self, stages: Sequence[FixedMap]) -> None:
        super().__init__(stages[0].size_in, stages[-1].size_out)
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., size_out)."""
        for stage in self.stages:
            x = stage(x)
        return x


@singledispatch
def fixed_map(projection: Projection | None, size_in: int, size_out: int) -> FixedMap | None:
    """The map a declaration stands for; None for no projection. A new kind of map registers itself here."""
    if projection is None:
        return None
    raise SpecError(f"{projection!r} is not a projection; register it with projection.fixed_map.")


@fixed_map.register
def _shuffle(projection: Shuffle, size_in: int, size_out: int) -> FixedMap:
    return ShuffleMap(size_in, size_out, projection.seed)


@fixed_map.register
def _fastfood(projection: Fastfood, size_in: int, size_out: int) -> FixedMap:
    return FastfoodMap(size_in, size_out, projection)


@fixed_map.register
def _compose(projection: Compose, size_in: int, size_out: int) -> FixedMap:
    lengths = [size_in]
    for k in range(1, len(projection.maps)):
        rest = math.prod(Fraction(str(m.ratio)) for m in projection.maps[k:])
        # A shuffle keeps the length, and a map never shortens.
        least = lengths[-1]
        lengths.append(least if isinstance(projection.maps[k - 1], Shuffle) else max(least, math.ceil(rest * size_out)))
    lengths.append(size_out)
    stages = [fixed_map(m, a, b) for m, (a, b) in zip(projection.maps, pairwise(lengths), strict=True)]
    return ComposedMap([stage for stage in stages if stage is not None])
