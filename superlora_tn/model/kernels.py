"""Declarations with modes for a kernel, or with products that must not split one, given those of the layers they adapt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from superlora_tn.declare.fold import PhysicalFold
from superlora_tn.declare.parts import Kronecker, Part, inner_parts
from superlora_tn.declare.rows import Span
from superlora_tn.model.targets import bind, places
from superlora_tn.network.spec import AdapterSpec

Entries = tuple[tuple[AdapterSpec, tuple[str, ...]], ...]


def by_kernel(
    model: nn.Module, entries: Sequence[tuple[AdapterSpec, tuple[str, ...]]], at: str | None, rows: Mapping[str, Span]
) -> Entries:
    """The declarations with their targets; one that leaves its kernel open stands there once for each kernel."""
    known = places(model, rows) if any(_open(spec) for spec, _ in entries) else {}
    found: list[tuple[AdapterSpec, tuple[str, ...]]] = []
    for spec, names in entries:
        fold = _open(spec)
        if fold is None:
            found.append((spec, names))
            continue
        alike: dict[tuple[int, ...], list[str]] = {}
        for name in names:
            target = bind(name, known[name], at)
            alike.setdefault(target.kind.kernel(target.layer), []).append(name)
        if not fold.kernel_modes:  # a kernel of one position is none
            alike = {kernel: own for kernel, own in alike.items() if math.prod(kernel) > 1}
            real = {name for own in alike.values() for name in own}
            if single := tuple(name for name in names if name not in real):
                found.append((spec, single))
        for kernel, own in alike.items():
            found.append((replace(spec, fold=replace(fold, kernel=kernel)), tuple(own)))
    return tuple(found)


def closed(spec: AdapterSpec) -> AdapterSpec:
    """What was bought for shapes (out, in): its products split these as they were counted, whatever kernel they hold."""
    fold = _open(spec)
    return spec if fold is None or fold.kernel_modes else replace(spec, fold=replace(fold, kernel=()))


def _open(spec: AdapterSpec) -> PhysicalFold | None:
    """The fold, where it has modes for a kernel whose sizes are left open, or holds it in `in` beside Kronecker products."""
    fold = spec.fold
    if not isinstance(fold, PhysicalFold) or fold.kernel is not None:
        return None
    return fold if fold.kernel_modes or _splits(spec.network) else None


def _splits(part: Part) -> bool:
    """Whether a part has Kronecker products in it."""
    return isinstance(part, Kronecker) or any(map(_splits, inner_parts(part)))
