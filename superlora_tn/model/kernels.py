"""Declarations that leave a kernel open, given those of the layers they adapt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from superlora_tn.declare.rows import Span
from superlora_tn.model.targets import bind, places
from superlora_tn.network.kernels import apart, is_open
from superlora_tn.network.spec import AdapterSpec

Entries = tuple[tuple[AdapterSpec, tuple[str, ...]], ...]


def kernels_in(model: nn.Module, names: Iterable[str], at: str | None, rows: Mapping[str, Span]) -> dict[str, tuple[int, ...]]:
    """The sizes of the targets' kernels, by name; () for a matrix, and none of what the model has not."""
    known = places(model, rows)
    return {name: bind(name, known[name], at).kernel for name in names if name in known}


def by_kernel(
    model: nn.Module, entries: Sequence[tuple[AdapterSpec, tuple[str, ...]]], at: str | None, rows: Mapping[str, Span]
) -> Entries:
    """The declarations with their targets; one that leaves its kernel open stands there once for each kernel."""
    waiting = [name for spec, names in entries if is_open(spec) for name in names]
    kernels = kernels_in(model, waiting, at, rows) if waiting else None
    return tuple(part for spec, names in entries for part in apart(spec, names, kernels))
