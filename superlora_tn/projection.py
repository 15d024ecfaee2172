"""The fixed maps F: never trained, regenerated from their seed, bit for bit on every platform and device.

Random numbers come from the raw 64-bit stream of Philox, which NumPy guarantees, and become permutations, signs and
Gaussians by whole-number arithmetic and single IEEE divisions only: no `log` or `cos`, whose last bit varies.
"""

from __future__ import annotations

import hashlib
import math
from functools import singledispatch

import numpy as np
import torch
from torch import Tensor, nn

from superlora_tn.maps import Fastfood, Projection, Shuffle
from superlora_tn.nodes import SpecError
from superlora_tn.walsh import hadamard


def _raw(seed: int, purpose: str, count: int) -> np.ndarray:
    """`count` raw 64-bit words for a seed and a purpose, the lowest byte first in memory on every machine."""
    key = np.frombuffer(hashlib.sha256(f"superlora_tn {purpose} {seed}".encode()).digest()[:16], "<u8")
    return np.random.Philox(key=key).random_raw(count).astype("<u8")


def permutation(seed: int, count: int) -> Tensor:
    """A seeded permutation of ``0 .. count - 1``, int32 (int64 above 2**31)."""
    order = np.argsort(_raw(seed, "permutation", count), kind="stable")
    return torch.from_numpy(order.astype(np.int32 if count <= 2**31 else np.int64))


def signs(seed: int, count: int) -> Tensor:
    """Seeded signs, -1 or +1, float32 of shape (count,)."""
    bits = np.unpackbits(_raw(seed, "signs", -(-count // 64)).view(np.uint8))[:count]
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1)


def gaussians(seed: int, count: int) -> Tensor:
    """Seeded numbers of mean 0 and variance 1, float32 of shape (count,).

    Sums of twelve uniform 16-bit words (Irwin-Hall), a Gaussian to within 0.2 % of its distribution function, because
    a sum of whole numbers has the same bits everywhere.
    """
    words = _raw(seed, "gaussians", 3 * count).view("<u2").reshape(count, 12)
    total = words.astype(np.int64).sum(axis=1) * 2 - 12 * 65535
    # The variance of the doubled sum of 12 uniform words 0..65535 is 12 * (65536**2 - 1) / 3.
    return torch.from_numpy((total / math.sqrt(4 * (65536**2 - 1))).astype(np.float32))


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
    """``y = H G P H B x / sqrt(p n)``, x padded from n to p (a power of two), y truncated; keeps the elements' variance."""

    flips: Tensor
    order: Tensor
    weights: Tensor

    def __init__(self, size_in: int, size_out: int, seed: int, tanh: bool) -> None:
        super().__init__(size_in, size_out)
        self.tanh = tanh
        self.padded = 1 << (max(size_in, size_out) - 1).bit_length()
        self.register_buffer("flips", signs(seed, size_in), persistent=False)
        self.register_buffer("order", permutation(seed, self.padded), persistent=False)
        self.register_buffer("weights", gaussians(seed, self.padded), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., size_out)."""
        scaled = self.flips.to(x.dtype) * (1.0 / math.sqrt(self.padded * self.size_in))
        y = nn.functional.pad(x * scaled, (0, self.padded - self.size_in))
        y = hadamard(y).index_select(-1, self.order) * self.weights.to(x.dtype)
        y = hadamard(y)[..., : self.size_out]
        return torch.tanh(y) if self.tanh else y


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
    return FastfoodMap(size_in, size_out, projection.seed, projection.tanh)
