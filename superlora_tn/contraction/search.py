"""The contraction path: opt_einsum on a price of our own. This is the only importer of opt_einsum but `plan`, which prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import opt_einsum as oe

from superlora_tn.contraction.layout import FORMS, Equation, Indices, Step, best_orders, lay_out, volume
from superlora_tn.contraction.profile import ITEM, Device

# dp with outer products looks at 3^n pairs: 50 ms at 8 operands; without them chains stay cheap far longer.
OUTER_UP_TO, EXACT_UP_TO = 8, 14


class PlanError(ValueError):
    """No plan for what was asked."""


Optimizer = str | Callable[..., Any]


def steps_of(
    equation: Equation, size: Mapping[str, int], device: Device, optimize: Optimizer, memory_limit: int | None
) -> tuple[Step, ...]:
    """Search a path, then the cheapest memory order of its intermediates."""
    inputs, output = equation.inputs, tuple(i for axis in equation.result for i in axis)
    terms, trained = list(inputs), list(equation.trained)
    pairs, alive = list[tuple[int, int]](), list(range(len(inputs)))
    # A tensor of one number joins the smallest other one at once; dp would multiply it onto the final result.
    for scalar in [k for k in alive if not inputs[k]]:
        if scalar in alive and len(alive) > 1:
            alive.remove(scalar)
            other = min(alive, key=lambda k: (not terms[k], volume(terms[k], size)))
            alive.remove(other)
            pairs.append((other, scalar))
            terms.append(terms[other])
            trained.append(trained[other] or trained[scalar])
            alive.append(len(terms) - 1)
    if len(alive) > 1:
        path = _search([terms[k] for k in alive], output, size, [trained[k] for k in alive], device, optimize, memory_limit)
        for a, b in path:
            pair = (alive[a], alive[b])
            pairs.append(pair)
            alive = [k for k in alive if k not in pair]
            alive.append(len(inputs) + len(pairs) - 1)
    return best_orders(tuple(pairs), inputs, equation.trained, output, size, device)


def _search(
    terms: list[Indices],
    output: Indices,
    size: Mapping[str, int],
    grads: list[bool],
    device: Device,
    optimize: Optimizer,
    memory_limit: int | None,
) -> list[tuple[int, int]]:
    """The pairs to contract, as positions in a shrinking list."""
    if optimize == "dp":
        optimize = "auto"
        if len(terms) <= EXACT_UP_TO:
            price = _our_price(terms, output, size, grads, device, memory_limit)
            optimize = oe.DynamicProgramming(price, cost_cap=False, search_outer=len(terms) <= OUTER_UP_TO)
    symbol = {name: oe.get_symbol(k) for k, name in enumerate(size)}
    if callable(optimize):
        # Called with what all of them take: some of cotengra's have no place for opt_einsum's memory limit.
        sizes = {symbol[name]: extent for name, extent in size.items()}
        path = optimize([frozenset(symbol[i] for i in t) for t in terms], frozenset(symbol[i] for i in output), sizes)
    else:
        text = ",".join("".join(symbol[i] for i in t) for t in terms) + "->" + "".join(symbol[i] for i in output)
        path, _ = oe.contract_path(text, *(tuple(size[i] for i in t) for t in terms), shapes=True, optimize=optimize)
    for pair in path:
        if len(pair) != 2:
            raise PlanError(f"the optimizer {optimize!r} contracts {len(pair)} tensors in one step; it must go pair by pair.")
    return [(int(a), int(b)) for a, b in path]


def _our_price(
    terms: list[Indices],
    output: Indices,
    size: Mapping[str, int],
    grads: list[bool],
    device: Device,
    memory_limit: int | None,
) -> Callable[..., None]:
    """opt_einsum's hook for a cost of our own: seconds of a step as it will be laid out, with its gradients.

    opt_einsum names a set of tensors by a bitmap; `held` remembers the memory order of each set's best contraction,
    so that a path that tears a large tensor's axes apart pays for the permutation. An intermediate above the memory
    limit is priced out of reach rather than refused: refusing all makes opt_einsum's search go on for ever.
    """
    held = {1 << k: (term, grad) for k, (term, grad) in enumerate(zip(terms, grads, strict=True))}
    whole = (1 << len(terms)) - 1

    def compare(*given: Any) -> None:  # called by opt_einsum, with its names for these
        cost1, cost2, union, _size, _cap, s1, s2, found, graph, _all, inputs, shared, _limit, path1, path2 = given
        both = s1 | s2
        outside = [k for k in range(len(terms)) if not both >> k & 1]
        rest = {i for k in outside for i in terms[k]} | set(output)
        (left, left_grad), (right, right_grad) = held[s1], held[s2]
        arguments = ((0, 1), (left, right), (left_grad, right_grad), rest, output if both == whole else (), size)
        steps = [found_step for form in FORMS if (found_step := lay_out(*arguments, form)) is not None]
        step = min(steps, key=lambda one: one.price(device))
        seconds = step.price(device)
        if memory_limit is not None and both != whole and volume(step.result, size) * ITEM > memory_limit:
            seconds += 1e30
        cost = cost1 + cost2 + seconds
        if both not in found or cost < found[both][1]:
            in_graph = {i for k in outside if graph >> k & 1 for i in inputs[k]}
            found[both] = (union - (shared - in_graph), cost, (path1, path2))
            held[both] = (step.result, left_grad or right_grad)

    return compare
