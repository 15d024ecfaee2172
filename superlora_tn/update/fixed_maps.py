"""The fixed maps F: never trained, regenerated from their seed, bit for bit on every platform and device.

They compute in float32 at least, whatever the nodes' dtype: half a million numbers summed in float16 overflow, or vanish, on
the way there or on the way back. And their tables stay as they were made, whatever dtype the model is cast to.

Random numbers come from the raw 64-bit stream of Philox, which NumPy guarantees, and become permutations, signs and
Gaussians by whole-number arithmetic and single IEEE divisions only: no `log` or `cos`, whose last bit varies.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import singledispatch
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from superlora_tn.declare.maps import Compose, Fastfood, Projection, Shuffle, power_above
from superlora_tn.declare.parts import SpecError
from superlora_tn.update.eager import as_given
from superlora_tn.update.walsh import transform


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


@dataclass(frozen=True)
class Table:
    """A table of a fixed map as it is declared, from which it can be made wherever it is needed.

    Attributes:
        kind: a key of `TABLES`.
        seed, count, purpose: what its function is given.
    """

    kind: str
    seed: int
    count: int
    purpose: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it is exact, and stays."""
        return torch.float32 if self.kind != "P" else torch.int32 if self.count <= 2**31 else torch.int64

    def on(self, device: torch.device) -> Tensor:
        """The table on a device; on the meta device its shape alone."""
        # A tensor that is made in inference mode can never be saved for a backward pass.
        with torch.inference_mode(False):
            if device.type == "meta":
                return torch.empty(self.count, dtype=self.dtype, device=device)
            return TABLES[self.kind][2](self.seed, self.count, self.purpose).to(device)


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in for numbers that are stored in another: float32 (complex64) at least."""
    if dtype in (torch.float64, torch.complex128):
        return dtype
    return torch.complex64 if dtype.is_complex else torch.float32


class FixedMap(nn.Module, ABC):
    """A fixed map from vectors of length `size_in` to `size_out`, applied along the last axis.

    Its tables are buffers that follow the module's device, but never its dtype, and are not saved: the seed is part of the
    spec.

    Args:
        size_in, size_out: lengths.
        tables: the buffers, in the order they are used.
        device: where the tables are made, whatever torch's default is; None takes the CPU.
    """

    def __init__(
        self, size_in: int, size_out: int, tables: Mapping[str, Table], device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.size_in, self.size_out, self.tables = size_in, size_out, dict(tables)
        self.reset(device or "cpu")

    def reset(self, device: torch.device | str) -> None:
        """Make the tables on a device, again where they are there already."""
        for name, table in self.tables.items():
            self.register_buffer(name, table.on(torch.device(device)), persistent=False)

    def table(self, name: str, x: Tensor) -> Tensor:
        """A table as it was declared: one that was cast, or left empty, from outside is made again for x."""
        table, declared = self.get_buffer(name), self.tables[name]
        if table.dtype is declared.dtype and (x.is_meta or not table.is_meta):
            return table
        self.reset(x.device)
        return self.get_buffer(name)

    @abstractmethod
    def carry(self, x: Tensor) -> Tensor:
        """(..., size_in) -> (..., size_out), both in a dtype of `widened`."""

    def forward(self, x: Tensor, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """``scale F(x)``, computed in float32 at least and rounded once.

        Args:
            x: (..., size_in).
            scale: a factor of the result; a map may be nonlinear, so it acts behind it.
            dtype: of the result; None takes that of x.

        Returns:
            (..., size_out).
        """
        with as_given(x):
            y = self.carry(x.to(widened(x.dtype)))
            return (y if scale == 1.0 else y * scale).to(dtype or x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `half`, `to_empty` and the like do to every tensor: here only the device follows."""
        for stage in self.children() if recurse else ():
            stage._apply(fn)  # type: ignore[no-untyped-call]
        for name, table in self.named_buffers(recurse=False):
            found = fn(torch.ones(1, device=table.device))
            if found.device.type == "cpu" and found.is_shared():  # type: ignore[no-untyped-call]
                table.share_memory_()  # type: ignore[no-untyped-call]
            if found.device != table.device:
                empty = table.is_meta or found.is_meta
                with torch.inference_mode(False):
                    self._buffers[name] = self.tables[name].on(found.device) if empty else table.to(found.device)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy that was made in inference mode serves a backward pass all the same."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        with torch.inference_mode(False):
            for name, table in self.named_buffers(recurse=False):
                self._buffers[name] = table.clone() if table.is_inference() else table


class ShuffleMap(FixedMap):
    """``y = P x``."""

    def __init__(self, size_in: int, size_out: int, declared: Shuffle, device: torch.device | str | None = None) -> None:
        if size_in != size_out:
            raise SpecError(f"Shuffle keeps the length, but was asked to map {size_in} to {size_out}; use Fastfood(ratio=...).")
        super().__init__(size_in, size_out, {"order": Table("P", declared.seed, size_in, "permutation")}, device)

    def carry(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., n)."""
        return x.index_select(-1, self.table("order", x))


class FastfoodMap(FixedMap):
    """``y = H G P H B x`` (or another order), x padded from n to p (a power of two), y truncated."""

    def __init__(self, size_in: int, size_out: int, declared: Fastfood, device: torch.device | str | None = None) -> None:
        self.padded = power_above(max(size_in, size_out))
        tables: dict[str, Table] = {}
        mixed = False  # signs and Gaussians in front of the first H and P meet the elements of x alone
        for k, factor in enumerate(declared.order):
            mixed = mixed or factor in "HP"
            if factor != "H":
                purpose, name, _ = TABLES[factor]
                again = str(declared.order[:k].count(factor) + 1) if factor in declared.order[:k] else ""
                count = self.padded if mixed else size_in
                tables[f"{name}{again}"] = Table(factor, declared.seed, count, f"{purpose} {again}".strip())
        super().__init__(size_in, size_out, tables, device)
        self.declared = declared

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

    def carry(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., size_out)."""
        names, length, bits = iter(self.tables), self.size_in, self.padded.bit_length() - 1
        # Each transform brings half of its bits itself, so that sizes stay about those of x, and of the gradient in backward.
        shift = bits // 2
        y = x * math.ldexp(self.scale, shift * self.declared.order.count("H"))
        for factor in self.declared.order:
            if factor in "HP" and length < self.padded:
                y, length = nn.functional.pad(y, (0, self.padded - length)), self.padded
            if factor == "H":
                y = transform(y, bits, shift)
            elif factor == "P":
                y = y.index_select(-1, self.table(next(names), x))
            else:
                y = y * self.table(next(names), x)
        y = nn.functional.pad(y, (0, self.size_out - length)) if length < self.size_out else y[..., : self.size_out]
        return torch.tanh(y) if self.declared.tanh else y


class ComposedMap(FixedMap):
    """Maps one after another."""

    def __init__(self, stages: Sequence[FixedMap]) -> None:
        super().__init__(stages[0].size_in, stages[-1].size_out, {})
        self.stages = nn.ModuleList(stages)

    def reset(self, device: torch.device | str) -> None:
        """See `FixedMap.reset`."""
        for stage in self._parts():
            stage.reset(device)

    def carry(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., size_out)."""
        for stage in self._parts():
            x = stage.carry(x)
        return x

    def _parts(self) -> Iterable[FixedMap]:
        for stage in self.stages if "stages" in self._modules else ():
            assert isinstance(stage, FixedMap)
            yield stage


@singledispatch
def fixed_map(
    projection: Projection | None, size_in: int, size_out: int, device: torch.device | str | None = None
) -> FixedMap | None:
    """The map a declaration stands for; None for no projection. A new kind of map registers itself here.

    Args:
        projection: the declaration.
        size_in, size_out: lengths of the network's vector and of the group's.
        device: where its tables are made; None takes the CPU, "meta" makes none of them.
    """
    if projection is None:
        return None
    raise SpecError(f"{projection!r} is not a projection; register it with fixed_maps.fixed_map.")


@fixed_map.register
def _shuffle(projection: Shuffle, size_in: int, size_out: int, device: torch.device | str | None = None) -> FixedMap:
    return ShuffleMap(size_in, size_out, projection, device)


@fixed_map.register
def _fastfood(projection: Fastfood, size_in: int, size_out: int, device: torch.device | str | None = None) -> FixedMap:
    return FastfoodMap(size_in, size_out, projection, device)


@fixed_map.register
def _compose(projection: Compose, size_in: int, size_out: int, device: torch.device | str | None = None) -> FixedMap:
    lengths = [size_in]
    for k in range(1, len(projection.maps)):
        rest = math.prod(Fraction(str(m.ratio)) for m in projection.maps[k:])
        # A shuffle keeps the length, and a map never shortens.
        least = lengths[-1]
        lengths.append(least if isinstance(projection.maps[k - 1], Shuffle) else max(least, math.ceil(rest * size_out)))
    lengths.append(size_out)
    stages = [fixed_map(m, a, b, device) for m, (a, b) in zip(projection.maps, pairwise(lengths), strict=True)]
    return ComposedMap([stage for stage in stages if stage is not None])
