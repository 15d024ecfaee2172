"""Trainable numbers by the formulas of the papers, from a declaration and sizes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from superlora_tn.declare.fold import FlatFold, Shape
from superlora_tn.declare.parts import CP, Base, Dense, Frozen, Hadamard, Kronecker, Network, Part, Sum, TensorTrain
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.verification.references.mapped import stored_numbers
from superlora_tn.verification.references.textbook import KERNEL, mode_sizes


def group_count(spec: AdapterSpec, shapes: Mapping[str, Shape]) -> int:
    """Trainable numbers of one group of weights."""
    fold = spec.fold
    if isinstance(fold, FlatFold):
        total = sum(o * i for o, i in shapes.values())
        groups = 1 if fold.groups == "weight" else int(fold.groups)
        ratio = spec.projection.ratio if spec.projection else 1.0
        inner = math.ceil(round(ratio * total / groups, 9))
        width = max(i for _, i in shapes.values())
        splits = fold.splits or 1
        side = math.ceil(_side(inner, fold.order * splits) ** splits / fold.multiple) * fold.multiple
        sides = (width, math.ceil(inner / width)) if fold.stacked else (side,) * fold.order
        return groups * part_count(spec.network, {f"m{k + 1}": s for k, s in enumerate(sides)})
    sizes = mode_sizes(fold, shapes)
    return part_count(spec.network, sizes, 1 if set(sizes) & set(KERNEL) else math.prod(fold.kernel or ()))


def part_count(part: Part, sizes: Mapping[str, int], cells: int = 1) -> int:
    """Trainable numbers of a part over modes of the given sizes; of `in` so many cells are a kernel's, never split."""
    each = list(sizes.values())
    sides = [size // cells if mode == "in" else size for mode, size in sizes.items()]
    if isinstance(part, Dense) or (isinstance(part, CP) and part.dense_if_large and 2 * part.rank >= max(sides)):
        return math.prod(each)
    if isinstance(part, Base):
        return 0
    if isinstance(part, CP):
        rank = min(part.rank, math.prod(each) // max(each)) if part.over == "cap" else part.rank
        return rank * sum(each) if len(each) > 1 else each[0]
    if isinstance(part, Hadamard | Sum):
        return sum(part_count(p, sizes, cells) for p in part.parts if not isinstance(p, Frozen))
    if isinstance(part, Kronecker):
        return _kronecker_count(part, sizes, cells)
    if isinstance(part, Network):
        return _network_count(part, sizes)
    if isinstance(part, TensorTrain):
        inner = part.rank if isinstance(part.rank, tuple) else (part.rank,) * (len(each) - 1)
        if part.over == "cap":  # to the rank of the matrix that has the modes up to the bond as rows
            inner = tuple(min(r, math.prod(each[:k]), math.prod(each[k:])) for k, r in enumerate(inner, start=1))
        bonds = [1, *inner, 1]
        return sum(left * size * right for left, size, right in zip(bonds, each, bonds[1:], strict=False))
    names = list(sizes) if part.factors is None else part.factors.split()
    ranks = dict(zip(names, part.rank if isinstance(part.rank, tuple) else [part.rank] * len(names), strict=True))
    if part.over == "cap":  # to the rank of the unfolding
        ranks = {m: min(r, sizes[m], math.prod(each) // sizes[m]) for m, r in ranks.items()}
    core = math.prod(ranks.get(m, s) for m, s in sizes.items())
    return core + sum(sizes[m] * r for m, r in ranks.items())


def _kronecker_count(part: Kronecker, sizes: Mapping[str, int], cells: int) -> int:
    """All channels are split, and the last part has the kernel, apart from them or in `in`."""
    divide = sides_of if part.crop else split
    held = {m: cells if m == "in" else 1 for m in sizes if m not in KERNEL}
    splits = {m: divide(sizes[m] // cell, len(part.parts), part.factor) for m, cell in held.items()}
    *slow, last = ({m: s[k] for m, s in splits.items()} for k in range(len(part.parts)))
    last = {m: last[m] * held[m] if m in held else size for m, size in sizes.items()}
    return sum(map(part_count, part.parts, slow)) + part_count(part.parts[-1], last, cells)


def _network_count(part: Network, sizes: Mapping[str, int]) -> int:
    known = {i: s for i, s in part.sizes if not isinstance(s, str) and s != -1}
    for group, size in zip(part.mode_groups, sizes.values(), strict=True):
        free = sorted((i for i in group if i not in known), key=lambda i: (i, -1) not in part.sizes)
        given = math.prod(known.get(i, 1) for i in group)
        left, divide = (-(-size // given), sides_of) if part.crop else (size // given, split)
        known |= dict(zip(free, divide(left, len(free)), strict=True)) if free else {}
    known |= {i: known[s] for i, s in part.sizes if isinstance(s, str)}
    shapes = [(node, tuple(known[i] for i in node.index_names)) for _, node in part.nodes if node.trainable]
    return sum(math.prod(shape) if node.map is None else stored_numbers(node.map, shape) for node, shape in shapes)


def split(size: int, count: int, factor: int = -1) -> tuple[int, ...]:
    """PEFT's `factorization` for two; for more, ascending, the largest divisor not above the even share each time."""
    if count == 2 and factor > 0 and size % factor == 0:
        return (factor, size // factor)
    found, left = [], size
    for k in range(count, 1, -1):
        most = min(factor, left) if factor > 0 else left
        found.append(max(d for d in range(1, most + 1) if left % d == 0 and d**k <= left))
        left //= found[-1]
    return (*found, left) if count == 2 else tuple(sorted((*found, left)))


def sides_of(size: int, count: int, factor: int = -1) -> tuple[int, ...]:
    """Sides whose product is the size or above: of each the largest whose power does not exceed what is left to cover."""
    found, left = [], size
    for k in range(count, 1, -1):
        found.append(min(factor, left) if factor > 0 else max(d for d in range(1, left + 1) if d**k <= left))
        left = -(-left // found[-1])
    return (*found, left)


def _side(length: int, order: int) -> int:
    """The smallest d with ``d ** order >= length``, by trying."""
    side = 1
    while side**order < length:
        side += 1
    return side


def totals(groups: Sequence[Mapping[str, Shape]], spec: AdapterSpec) -> int:
    """Trainable numbers of all groups."""
    return sum(group_count(spec, shapes) for shapes in groups)
