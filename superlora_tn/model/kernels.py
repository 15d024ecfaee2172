"""Declarations with modes for a kernel, given the kernels of the layers that they adapt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from superlora_tn.declare.fold import PhysicalFold
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
        for kernel, own in alike.items():
            found.append((replace(spec, fold=replace(fold, kernel=kernel)), tuple(own)))
    return tuple(found)


def _open(spec: AdapterSpec) -> PhysicalFold | None:
    """The fold, where it has modes for a kernel of sizes that are left open."""
    fold = spec.fold
    return fold if isinstance(fold, PhysicalFold) and fold.kernel_modes and fold.kernel is None else None
