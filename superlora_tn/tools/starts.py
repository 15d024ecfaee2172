"""Where a fit starts from: a closed form where the network has one, a nearby closed form where it nearly has, chance else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from superlora_tn.contraction.layout import Equation, Indices, volume
from superlora_tn.tools.als import Fitting, conjugate_gradients, environments
from superlora_tn.tools.closed_forms import closed_form, unabsorbed
from superlora_tn.tools.environment import contraction
from superlora_tn.tools.problem import Mapped, Matrix, Picked, Posed, Problem, Whole, open_indices
from superlora_tn.tools.singular import leading

Start = tuple[str, list[Tensor]]

INVERSE, INVERSE_TOLERANCE = 400, 1e-14  # conjugate gradients back through a map
MAX_SLICES = 512  # singular value decompositions of one start
EXACT = 1e-10  # of a start that needs no stirring
MAX_LIFTED = 1 << 24  # numbers of the product of all free nodes: 128 MB
STIR = 0.05  # what is added to a node that a start leaves at zero, or no step would ever move it


def starts(problem: Problem, given: Sequence[Tensor], restarts: int, generator: torch.Generator) -> Iterator[Start]:
    """Starts of a fit with their names, the most promising first.

    Args:
        problem: what is wanted.
        given: nodes with one axis an index, of which the frozen ones are kept.
        restarts: how many starts by chance follow where there is no closed form.
        generator: of these.
    """
    tensor, trained = preimage(problem), problem.equation.trained
    if len(problem.free) == 1:
        yield "least squares", [torch.zeros_like(n) if free else n for n, free in zip(given, trained, strict=True)]
        return
    near: Iterator[Start]
    if all(trained):
        found = _closed(problem, tensor)
        if found is not None:
            yield "singular values", found
            return
        near = chain(_slices(problem.equation, tensor), _factors(problem.equation, tensor, generator))
    else:
        found = _lifted(problem, given)
        near = iter(() if found is None else [("product of the free nodes", found)])
    none = True
    for start in near:
        none = False
        yield start
    for _ in range(max(restarts, none)):
        yield "chance", _chance(problem, given, tensor, generator)


def preimage(problem: Posed) -> Tensor:
    """A network's tensor with the elements that are wanted, as nearly as the map allows, and zero where none is seen."""
    unfolding, zero = problem.unfolding, torch.zeros(problem.shape, dtype=torch.float64)
    if isinstance(unfolding, Matrix):
        return unfolding.back(problem.wanted)
    right = unfolding.pull(zero, problem.wanted)
    if not isinstance(unfolding, Mapped):
        return right

    def through(tensor: Tensor) -> Tensor:
        return unfolding.pull(zero, unfolding.push(zero, tensor))

    return conjugate_gradients(through, right, lambda x: x, INVERSE, INVERSE_TOLERANCE)


def _closed(problem: Problem, tensor: Tensor) -> list[Tensor] | None:
    """The closed form of what is seen: where values of the slowest index are cut off, of the others alone."""
    if isinstance(problem.unfolding, Whole | Mapped | Matrix) or problem.unfolding.isometric:
        return closed_form(problem.equation, tensor)
    assert isinstance(problem.unfolding, Picked)
    seen = problem.unfolding.pull(tensor, torch.ones_like(problem.wanted))
    whole = seen.reshape(seen.shape[0], -1).all(dim=1).nonzero()[:, 0]
    if not len(whole):
        return closed_form(problem.equation, tensor)
    slowest = problem.open[0]
    sizes = tuple((i, len(whole) if i == slowest else s) for i, s in problem.equation.sizes)
    nodes = closed_form(replace(problem.equation, sizes=sizes), tensor[whole])
    if nodes is None:
        return None
    full = [tensor.new_zeros(shape) for shape in problem.shapes]
    for own, node, term in zip(full, nodes, problem.equation.inputs, strict=True):
        if slowest in term:
            own.index_copy_(term.index(slowest), whole, node)
        else:
            own.copy_(node)
    return full


def _lifted(problem: Problem, given: Sequence[Tensor]) -> list[Tensor] | None:
    """Least squares for the product of all free nodes, in which the network is linear, and the free nodes from that."""
    equation, free = problem.equation, problem.free
    others = [k for k in range(len(given)) if k not in free]
    outside = {i for k in others for i in equation.inputs[k]} | set(problem.open)
    held = tuple(i for i in dict.fromkeys(i for k in free for i in equation.inputs[k]) if i in outside)
    if volume(held, dict(equation.sizes)) > MAX_LIFTED:
        return None
    one = replace(
        equation,
        names=("product", *(equation.names[k] for k in others)),
        inputs=(held, *(equation.inputs[k] for k in others)),
        shapes=(),
        trained=(True, *(False for _ in others)),
    )
    lifted = Problem(one, problem.unfolding, problem.wanted)
    fitting = Fitting(
        lifted, environments(one), [torch.zeros(lifted.shapes[0], dtype=torch.float64), *(given[k] for k in others)]
    )
    fitting.sweep()
    nodes = closed_form(_part(equation, free, held), fitting.nodes[0])
    if nodes is None:
        return None
    found = list(given)
    for k, node in zip(free, nodes, strict=True):
        found[k] = node
    return found


def _part(equation: Equation, nodes: Sequence[int], result: Indices) -> Equation:
    """Some nodes of a network, with their own result."""
    return replace(
        equation,
        names=tuple(equation.names[k] for k in nodes),
        inputs=tuple(equation.inputs[k] for k in nodes),
        shapes=(),
        trained=tuple(equation.trained[k] for k in nodes),
        result=tuple((i,) for i in result),
    )


def _slices(equation: Equation, tensor: Tensor) -> Iterator[Start]:
    """Of a CP: the largest singular triples of the slices by its two longest modes, the others marking the slice.

    Nothing is lost where the slices' ranks sum up to the CP's at most, as where it takes in a LoRA of each weight.
    """
    size, left, opened = dict(equation.sizes), unabsorbed(equation), open_indices(equation)
    own = {k: tuple(i for i in equation.inputs[k] if i in opened) for k in left}
    bonds = {tuple(i for i in equation.inputs[k] if i not in opened) for k in left}
    if len(left) < 3 or len(bonds) != 1 or len(bond := bonds.pop()) != 1 or sum(map(len, own.values())) != len(opened):
        return
    p, q = sorted(left, key=lambda k: volume(own[k], size))[-2:]
    others = [k for k in left if k not in (p, q)]
    order = [i for k in (*others, p, q) for i in own[k]]
    cells, rank = math.prod(volume(own[k], size) for k in others), size[bond[0]]
    if cells > MAX_SLICES:
        return
    slices = tensor.permute([opened.index(i) for i in order]).reshape(cells, volume(own[p], size), volume(own[q], size))
    u, s, v = (torch.stack(x) for x in zip(*(leading(one, rank) for one in slices), strict=True))
    kept = s.reshape(-1).argsort(descending=True, stable=True)[:rank]
    places = torch.unravel_index(kept // rank, [volume(own[k], size) for k in others])
    found = [tensor.new_ones([size[i] for i in term]) for term in equation.inputs]
    columns = {p: (u * s[:, None]).mT.reshape(-1, u.shape[1])[kept].mT, q: v.mT.reshape(-1, v.shape[1])[kept].mT}
    for k, place in zip(others, places, strict=True):
        columns[k] = torch.nn.functional.one_hot(place, volume(own[k], size)).mT.to(tensor.dtype)
    for k, column in columns.items():
        node = column.reshape([size[i] for i in (*own[k], bond[0])])
        found[k] = node.permute([(*own[k], bond[0]).index(i) for i in equation.inputs[k]])
    yield "singular values of the slices", found


def _factors(equation: Equation, tensor: Tensor, generator: torch.Generator) -> Iterator[Start]:
    """Of an elementwise product: one factor in closed form and the others at one.

    Where that is not all there is to find, a little of chance in all nodes lets the others move.
    """
    opened = open_indices(equation)
    groups = _bound_together(equation)
    for chosen in groups if len(groups) > 1 else ():
        found: dict[int, Tensor] = {}
        for group in groups:
            own = tuple(i for i in opened if any(i in equation.inputs[k] for k in group))
            if group == chosen and own != opened:
                break
            wanted = tensor if group == chosen else tensor.new_ones([dict(equation.sizes)[i] for i in own])
            part = _part(equation, group, own)
            nodes = closed_form(part, wanted) or next((made for _, made in _slices(part, wanted)), None)
            if nodes is None:
                break
            found |= dict(zip(group, nodes, strict=True))
        if len(found) == len(equation.inputs):
            made = [found[k] for k in range(len(found))]
            missed = (contraction(equation.inputs, opened, dict(equation.sizes))(*made) - tensor).norm()
            exact = float(missed) < EXACT * float(tensor.norm())
            yield "one factor, the others at one", made if exact else [_stirred(n, generator) for n in made]


def _bound_together(equation: Equation) -> list[tuple[int, ...]]:
    """The nodes in groups that share bonds, whatever open indices they share."""
    opened, left, groups = set(open_indices(equation)), list(range(len(equation.inputs))), []
    while left:
        found, ahead = [left[0]], [left[0]]
        while ahead:
            touched = set(equation.inputs[ahead.pop()]) - opened
            more = [k for k in left if k not in found and touched & set(equation.inputs[k])]
            found, ahead = found + more, ahead + more
        groups.append(tuple(sorted(found)))
        left = [k for k in left if k not in found]
    return groups


def _stirred(node: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(node.shape, dtype=node.dtype, generator=generator)
    return node + noise * (STIR * float(node.norm()) / math.sqrt(node.numel()))


def _chance(problem: Problem, given: Sequence[Tensor], tensor: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Normal numbers in the free nodes, at the size of what is wanted."""
    nodes = [
        torch.randn(n.shape, dtype=torch.float64, generator=generator) if free else n
        for n, free in zip(given, problem.equation.trained, strict=True)
    ]
    size = float(problem.value(*nodes).norm())
    factor = (float(tensor.norm()) / size) ** (1 / len(problem.free)) if size > 0 else 1.0
    return [n * factor if free else n for n, free in zip(nodes, problem.equation.trained, strict=True)]
