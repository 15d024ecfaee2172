"""Declarations that leave a kernel open, given those of the layers they adapt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from superlora_tn.declare.rows import Span
from superlora_tn.model.targets import bind, places
from superlora_tn.network.kernels import apart, is_open
from superlora_tn.network.spec import AdapterSpec

Entries = tuple[tuple[AdapterSpec, tuple[str, ...]], ...]


def by_kernel(
    model: nn.Module, entries: Sequence[tuple[AdapterSpec, tuple[str, ...]]], at: str | None, rows: Mapping[str, Span]
) -> Entries:
    """The declarations with their targets; one that leaves its kernel open stands there once for each kernel."""
    known = places(model, rows) if any(is_open(spec) for spec, _ in entries) else {}
    found: list[tuple[AdapterSpec, tuple[str, ...]]] = []
    for spec, names in entries:
        kernels = {name: bind(name, known[name], at).kernel for name in names} if is_open(spec) else None
        found += apart(spec, names, kernels)
    return tuple(found)
