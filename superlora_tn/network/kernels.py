"""Declarations with modes for a kernel, or with products that must not split one, given those of the weights they adapt.

A shape (out, in) counts a convolution's kernel in. Where the weights themselves are at hand, in a model or as a file's tensors,
their kernels go beside the shapes; whoever counts, fits or attaches a declaration sorts its weights here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from superlora_tn.declare.checks import SpecError, near, shown
from superlora_tn.declare.fold import Group, PhysicalFold, Shape
from superlora_tn.declare.parts import Kronecker, Part, inner_parts
from superlora_tn.network.graph import Graph
from superlora_tn.network.spec import AdapterSpec

Kernels = Mapping[str, tuple[int, ...]]


def check_kernels(kernels: object, names: Iterable[str]) -> None:
    """Raise unless they are None, or sizes of kernels by the names of weights."""
    if kernels is None:
        return
    if not isinstance(kernels, Mapping):
        raise SpecError(f"kernels were given as {shown(kernels)}; give sizes by name, such as {{'conv': (3, 3)}}, or None.")
    known = set(names)
    for name, kernel in kernels.items():
        if name not in known:
            raise SpecError(f"kernels name '{name!s:.80}', which is none of the weights; {near(name, sorted(known))}")
        if not isinstance(kernel, Sequence) or not all(isinstance(size, int) and size >= 1 for size in kernel):
            raise SpecError(f"kernels give '{name}' as {shown(kernel)}; give its sizes, such as (3, 3), or () for a matrix.")


def apart(spec: AdapterSpec, names: Sequence[str], kernels: Kernels | None) -> list[tuple[AdapterSpec, tuple[str, ...]]]:
    """The declaration with its targets; one that leaves its kernel open stands there once for each kernel.

    Args:
        spec: the declaration.
        names: of the targets.
        kernels: target -> the sizes of its kernel; a matrix has (), or is not named. None where nothing is known of them.
    """
    fold = _open(spec)
    if fold is None or kernels is None or not names:
        return [(spec, tuple(names))]
    alike: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        alike.setdefault(tuple(kernels.get(name, ())), []).append(name)
    found: list[tuple[AdapterSpec, tuple[str, ...]]] = []
    if not fold.kernel_modes:  # a kernel of one position is none
        alike = {kernel: own for kernel, own in alike.items() if math.prod(kernel) > 1}
        real = {name for own in alike.values() for name in own}
        if single := tuple(name for name in names if name not in real):
            found.append((spec, single))
    for kernel, own in alike.items():
        found.append((replace(spec, fold=replace(fold, kernel=kernel)), tuple(own)))
    return found


def lay_out(
    spec: AdapterSpec, shapes: Mapping[str, Shape], kernels: Kernels | None = None
) -> list[tuple[AdapterSpec, Group, Graph]]:
    """Groups of the given targets with their graphs, each with the declaration that its kernel makes of this one.

    Raises:
        SpecError: see `AdapterSpec.lay_out`.
    """
    parts = [(own, {name: shapes[name] for name in names}) for own, names in apart(spec, tuple(shapes), kernels)]
    return [(own, group, graph) for own, given in parts for group, graph in own.lay_out(given)]


def count(spec: AdapterSpec, shapes: Mapping[str, Shape], kernels: Kernels | None = None) -> int:
    """Trainable parameters for weights of the given shapes and kernels: those that `attach` attaches."""
    return sum(graph.num_parameters + own.magnitudes(group) for own, group, graph in lay_out(spec, shapes, kernels))


def is_open(spec: AdapterSpec) -> bool:
    """Whether a declaration waits for its weights' kernels."""
    return _open(spec) is not None


def _open(spec: AdapterSpec) -> PhysicalFold | None:
    """The fold, where it has modes for a kernel whose sizes are left open, or holds it in `in` beside Kronecker products."""
    fold = spec.fold
    if not isinstance(fold, PhysicalFold) or fold.kernel is not None:
        return None
    return fold if fold.kernel_modes or _splits(spec.network) else None


def _splits(part: Part) -> bool:
    """Whether a part has Kronecker products in it."""
    return isinstance(part, Kronecker) or any(map(_splits, inner_parts(part)))
