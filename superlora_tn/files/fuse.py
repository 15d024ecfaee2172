"""Rows of weights: cut one into several, or lay several under each other, as networks and not as dW where that can be.

A cut takes a run of the slowest index that out is made of; weights of one form and size stand as one network with an index
more, over which each node is stacked. Where neither holds, the weights become plain LoRAs of their own ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from superlora_tn.declare.fold import Shape
from superlora_tn.declare.parts import parse_modes
from superlora_tn.files.dialects import classes
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.names import Seat
from superlora_tn.files.thin import thin
from superlora_tn.files.weight import Weight

PART = "part"
# (the file's weight, its atom) or nothing, for each atom of a target in order.
Pieces = list[tuple[str, int] | None]


def _written(groups: Sequence[Sequence[str]]) -> str:
    return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups)


def cut(weight: Weight, start: int, stop: int) -> Weight:
    """The rows from `start` up to, not including, `stop`.

    Raises:
        CheckpointError: DoRA's norms over all rows cannot be cut.
    """
    if (start, stop) == (0, weight.shape[0]):
        return weight
    magnitude = weight.magnitude
    if magnitude is not None and magnitude.shape[0] != weight.shape[0]:
        raise CheckpointError(f"'{weight.name}' has DoRA's norms over all of its rows, but the model has it in several parts.")
    network = _cut(replace(weight, magnitude=None, shared=frozenset()), start, stop)
    return replace(network, magnitude=None if magnitude is None else magnitude[start:stop])


def _cut(weight: Weight, start: int, stop: int) -> Weight:
    """The same of a network alone, index by index."""
    if (start, stop) == (0, weight.shape[0]):
        return weight
    out, inward = parse_modes(weight.modes)
    inner = math.prod(weight.sizes[i] for i in out[1:])
    first = out[0]
    if start % inner == 0 and stop % inner == 0:
        low, count = start // inner, (stop - start) // inner
        return _map(weight, weight.modes, first, lambda t, axis: t.narrow(axis, low, count).clone())
    if start // inner == (stop - 1) // inner:
        chosen = start // inner
        modes = _written([out[1:], inward])
        picked = _map(weight, modes, first, lambda t, axis: t.select(axis, chosen).clone(), gone=True)
        return _cut(picked, start - chosen * inner, stop - chosen * inner)
    return _cut(as_lora(weight), start, stop)


def _map(weight: Weight, modes: str, index: str, change: Callable[[Tensor, int], Tensor], gone: bool = False) -> Weight:
    """Change the axis of an index in every node that has it; with `gone`, the index is left out."""
    nodes = {}
    for name, (indices, tensor) in weight.nodes.items():
        words = indices.split()
        if index in words:
            tensor = change(tensor, words.index(index))
            words = [w for w in words if w != index or not gone]
        nodes[name] = (" ".join(words), tensor)
    return replace(weight, modes=modes, nodes=nodes)


def as_lora(weight: Weight) -> Weight:
    """The same dW as a plain LoRA of the network's own rank, exact but for rounding to float32 at least."""
    if weight.kind == "lora" and set(weight.nodes) == {"up", "down"}:
        return weight
    found = thin(weight)
    up, down = found.exact()
    dtype = torch.promote_types(found.filled.dtype, torch.float32)
    nodes = {"up": ("o r", up.to(dtype)), "down": ("r i", down.to(dtype))}
    fresh: frozenset[str] = frozenset()
    return replace(weight, kind="lora", modes="o i", nodes=nodes, ranks=(up.shape[1],), frozen=fresh, shared=fresh)


def join(parts: Sequence[Weight | int], name: str) -> Weight:
    """Weights under each other; a number stands for so many rows without an update.

    Raises:
        CheckpointError: they read inputs of different sizes, or only some of them have DoRA's norms.
    """
    real = [p for p in parts if isinstance(p, Weight)]
    if len(parts) == 1:
        return real[0]
    if len({w.shape[1] for w in real}) > 1:
        raise CheckpointError(
            f"the parts of '{name}' read {', '.join(str(w.shape[1]) for w in real)} inputs; they are of one layer."
        )
    norms = [w.magnitude for w in real if w.magnitude is not None]
    rows = [w for w in real if w.magnitude is not None and w.magnitude.shape == (w.shape[0], 1)]
    if norms and len(rows) < len(parts):
        raise CheckpointError(f"some parts of '{name}' lack DoRA's norms of their rows, so its weight cannot be made whole.")
    # The largest scale stays one factor; the others' share goes into a node.
    scale = max((w.scale for w in real), key=abs)
    dtype = real[0].nodes[next(iter(real[0].nodes))][1].dtype
    for tensor in (t for w in real for _, t in w.nodes.values()):
        dtype = torch.promote_types(dtype, tensor.dtype)
    even = [_scaled(p, scale, dtype) if isinstance(p, Weight) else p for p in parts]
    lay = _rows if all(w.kind == "full" for w in real) else _stack if _alike(even) else _blocks
    return replace(lay(even), name=name, magnitude=torch.cat(norms) if norms else None, shared=frozenset())


def _scaled(weight: Weight, scale: float, dtype: torch.dtype) -> Weight:
    """The same dW with another scale; what it differs by goes into the first node that is trained."""
    own = next(name for name in weight.nodes if name not in weight.frozen)
    ratio = weight.scale / scale if scale else 1.0
    nodes = {
        name: (i, (t if name != own or ratio == 1.0 else t.double() * ratio).to(dtype)) for name, (i, t) in weight.nodes.items()
    }
    return replace(weight, nodes=nodes, scale=scale)


def _first(parts: Sequence[Weight | int]) -> Weight:
    return next(p for p in parts if isinstance(p, Weight))


def _form(weight: Weight) -> tuple[object, ...]:
    return weight.kind, weight.modes, [(name, indices) for name, (indices, _) in weight.nodes.items()], weight.sizes


def _alike(parts: Sequence[Weight | int]) -> bool:
    """Whether all parts are one network with the same sizes."""
    first = _first(parts)
    same = all(_form(p) == _form(first) if isinstance(p, Weight) else p == first.shape[0] for p in parts)
    return same and PART not in first.sizes


def _stack(parts: Sequence[Weight | int]) -> Weight:
    """One network with an index more: which part."""
    first = _first(parts)
    out, inward = parse_modes(first.modes)
    nodes = {}
    for name, (indices, tensor) in first.nodes.items():
        values = [p.nodes[name][1] if isinstance(p, Weight) else torch.zeros_like(tensor) for p in parts]
        nodes[name] = (f"{PART} {indices}".strip(), torch.stack(values))
    return replace(first, modes=_written([(PART, *out), inward]), nodes=nodes)


def _rows(parts: Sequence[Weight | int]) -> Weight:
    """dW under dW."""
    first = _first(parts)
    rows = [p.nodes["diff"][1] if isinstance(p, Weight) else first.nodes["diff"][1].new_zeros(p, first.shape[1]) for p in parts]
    return replace(first, nodes={"diff": ("o i", torch.cat(rows))})


def _blocks(parts: Sequence[Weight | int]) -> Weight:
    """A LoRA whose up is block-diagonal: the ranks add up."""
    loras = [as_lora(p) if isinstance(p, Weight) else p for p in parts]
    first = _first(loras)
    rank = sum(p.ranks[0] for p in loras if isinstance(p, Weight))
    ups, downs, at = [], [], 0
    for part in loras:
        if isinstance(part, int):
            ups.append(first.nodes["up"][1].new_zeros(part, rank))
            continue
        up = part.nodes["up"][1]
        row = up.new_zeros(up.shape[0], rank)
        row[:, at : at + up.shape[1]] = up
        ups.append(row)
        downs.append(part.nodes["down"][1])
        at += up.shape[1]
    nodes = {"up": ("o r", torch.cat(ups)), "down": ("r i", torch.cat(downs))}
    return replace(first, nodes=nodes, ranks=(rank,))


# --- a whole file ---------------------------------------------------------------------------------------------------


def assemble(
    weights: Mapping[str, Weight], placed: Mapping[str, tuple[Seat, ...]], shapes: Mapping[str, Shape], source: str
) -> dict[str, Weight]:
    """The weights of a file as a model has them.

    Args:
        weights: by their names in the file.
        placed: where each belongs.
        shapes: of the model's weights, (out, in).
        source: the file, for errors.

    Returns:
        target -> its weight, named as the target.

    Raises:
        CheckpointError: sizes that do not fit.
    """
    sizes = _sizes(weights, placed, shapes)
    pieces: dict[str, Pieces] = {}
    atoms: dict[str, tuple[str, ...]] = {}
    for name, seats in placed.items():
        for k, seat in enumerate(seats):
            row = pieces.setdefault(seat.target, [None] * len(seat.atoms))
            atoms[seat.target] = seat.atoms
            row[seat.position] = (name, k)
    made = {}
    for target, row in pieces.items():
        weight = _assembled(target, row, atoms[target], weights, placed, sizes, source)
        made[target] = _fitting(weight, target, shapes[target], source)
    return made


def _assembled(
    target: str,
    row: Pieces,
    atoms: tuple[str, ...],
    weights: Mapping[str, Weight],
    placed: Mapping[str, tuple[Seat, ...]],
    sizes: Mapping[str, int],
    source: str,
) -> Weight:
    parts: list[Weight | int] = []
    for name, first, last in _runs(row):
        if name is None:
            parts.append(sum(_known(sizes, atom, target, source) for atom in atoms[first : last + 1]))
            continue
        weight, own = weights[name], [seat.atoms[seat.position] for seat in placed[name]]
        k, count = _place(row, first), last - first + 1
        if count == len(own):
            parts.append(weight)
            continue
        bounds = [0]
        for atom in own:
            bounds.append(bounds[-1] + _known(sizes, atom, name, source))
        if bounds[-1] != weight.shape[0]:
            raise CheckpointError(f"{source}: '{name}' has {weight.shape[0]} rows, the model's parts of it {bounds[-1]}.")
        parts.append(cut(weight, bounds[k], bounds[k + count]))
    return replace(join(parts, target), name=target)


def _place(row: Pieces, position: int) -> int:
    piece = row[position]
    assert piece is not None
    return piece[1]


def _runs(row: Pieces) -> list[tuple[str | None, int, int]]:
    """(weight, first, last position) of what comes from one weight in its own order."""
    runs: list[tuple[str | None, int, int]] = []
    for position, piece in enumerate(row):
        if runs and piece is not None and runs[-1][0] == piece[0] and piece[1] == _place(row, position - 1) + 1:
            runs[-1] = (piece[0], runs[-1][1], position)
        else:
            runs.append((piece[0] if piece else None, position, position))
    return runs


def _known(sizes: Mapping[str, int], atom: str, name: str, source: str) -> int:
    if atom not in sizes:
        raise CheckpointError(
            f"{source}: how many rows of '{name}' are its part '{atom}' cannot be told from the sizes at hand."
        )
    return sizes[atom]


def _sizes(
    weights: Mapping[str, Weight], placed: Mapping[str, tuple[Seat, ...]], shapes: Mapping[str, Shape]
) -> dict[str, int]:
    """How many rows each atom has: what the file and the model say of whole weights, and equal parts of fused ones."""
    sums: list[tuple[tuple[str, ...], int]] = []
    for name, seats in placed.items():
        if len(seats) == 1 and seats[0].whole:
            continue
        sums.append((tuple(seat.atoms[seat.position] for seat in seats), weights[name].shape[0]))
        sums += [(seat.atoms, shapes[seat.target][0]) for seat in seats]
    sizes: dict[str, int] = {}
    for alike in (False, True):
        changed = True
        while changed:
            changed = False
            for atoms, total in sums:
                found = _solve(atoms, total, sizes, alike)
                changed |= bool(found)
                sizes |= found
    return sizes


def _solve(atoms: tuple[str, ...], total: int, sizes: Mapping[str, int], alike: bool) -> dict[str, int]:
    """Sizes of the atoms of one sum that follow from those that are known."""
    own = classes(atoms, alike)
    known = {c: sizes[a] for a, c in zip(atoms, own, strict=True) if a in sizes}
    unknown = sorted(set(own) - set(known))
    if len(unknown) == 1:
        left = total - sum(known.get(c, 0) for c in own)
        size, rest = divmod(left, own.count(unknown[0]))
        if size < 1 or rest:
            return {}
        known[unknown[0]] = size
    return {a: known[c] for a, c in zip(atoms, own, strict=True) if c in known and a not in sizes}


def _fitting(weight: Weight, target: str, shape: Shape, source: str) -> Weight:
    """The weight, turned where a model holds it the other way round; its shape has to be the model's."""
    if weight.flipped and weight.shape != tuple(shape) == weight.shape[::-1]:
        out, inward = parse_modes(weight.modes)
        magnitude = None if weight.magnitude is None else weight.magnitude.T
        weight = replace(weight, modes=_written([inward, out]), magnitude=magnitude, turned=True)
    if weight.shape != tuple(shape):
        raise CheckpointError(
            f"{source}: '{target}' is {tuple(shape)} in this model and {weight.shape} in the file; it is of another model."
        )
    return weight
