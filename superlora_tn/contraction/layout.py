"""What is to be contracted, and the steps of it: what each costs on a device, and how it lies in memory.

Costs: a product of sizes m, n, k counts 2 m n k FLOPs. Bytes are the reads and writes of a step at `ITEM` bytes a
number. A price is in seconds on a `Device`, forward plus backward: a step's gradient is one more product of the same
size for each of its operands that is trained (or depends on x).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from superlora_tn.contraction.profile import ITEM, Device
from superlora_tn.declare.parts import TOKEN

Indices = tuple[str, ...]


# The forms of a step that are tried, of so many steps before the end together; see `lay_out`.
FORMS, ORDERED_UP_TO = ("keep", "swap", "flip", "swap flip", "behind", "lift", "copy"), 5


@dataclass(frozen=True)
class Equation:
    """What is to be contracted, sized and in order.

    Attributes:
        names: operand names.
        inputs: the indices of each operand. An index is on two operands at least, or in the result.
        shapes: the stored shape of each; None for x, whose leading axes are free.
        trained: whether each wants a gradient.
        result: the indices of the result, one tuple an axis.
        sizes: (index, size).
    """

    names: tuple[str, ...]
    inputs: tuple[Indices, ...]
    shapes: tuple[tuple[int, ...] | None, ...]
    trained: tuple[bool, ...]
    result: tuple[Indices, ...]
    sizes: tuple[tuple[str, int], ...]

    def fed(self, source: Indices, tokens: int) -> Equation:
        """The same with x (tokens, source) in front."""
        return Equation(
            ("x", *self.names),
            ((TOKEN, *source), *self.inputs),
            (None, *self.shapes),
            (True, *self.trained),
            self.result,
            (*self.sizes, (TOKEN, tokens)),
        )


@dataclass(frozen=True)
class Step:
    """One pairwise contraction, as views of the two operands.

    The large operand is read as ``[batch, before, contracted, after]``, the small one as ``[batch, new, contracted]``;
    the result is ``[batch, before, new, after]``. With `lifted` indices the large operand is read as
    ``[batch, before, lifted, contracted]`` and the result is ``[batch, before, new, lifted]``. With nothing contracted,
    `result` is the operands' broadcast product. Operands are numbered: the plan's inputs first, then one number a
    step. `permuted` says that the large operand has to be copied into another order; `items` counts the products of a
    batched product, `row` is the length of the result's contiguous axis; `copies` are those into another order, each
    as (bytes, length of the pieces that stay whole); `turned` is the bytes of the copy that brings the smaller operand's
    gradient into its order; `products` counts the result and the gradients.
    """

    large: int
    small: int
    large_indices: Indices
    small_indices: Indices
    batch: Indices
    before: Indices
    contracted: Indices
    after: Indices
    lifted: Indices
    new: Indices
    result: Indices
    permuted: bool
    flops: int
    bytes: int
    items: int
    row: int
    copies: tuple[tuple[int, int], ...]
    turned: int
    products: int

    def least(self, device: Device) -> float:
        """What the same step costs at least, in whatever order its tensors lie: no copies, full speed."""
        moved = self.bytes - sum(count for count, _ in self.copies)
        return (self.flops / device.flops + moved / device.bandwidth + device.latency) * self.products

    def price(self, device: Device) -> float:
        """Seconds, forward plus backward: one product for the result and one for each operand with a gradient."""
        full = min(1.0, self.row / device.width)
        speed, rate = (full, 1.0) if self.contracted else (1.0, full)
        # Copies of single numbers took four times as long as of whole rows (benchmarks/route_ranking.py).
        most = min(4.0, device.width)
        torn = sum(count * (min(most, max(1.0, device.width / run)) - 1) for count, run in self.copies)
        once = self.flops / (device.flops * speed) + self.bytes / (device.bandwidth * rate) + torn / device.bandwidth
        return (once + self.items * device.item + device.latency) * self.products + self.turned * most / device.bandwidth


def volume(indices: Sequence[str], size: Mapping[str, int]) -> int:
    """How many numbers a tensor with these indices holds."""
    return math.prod(size[i] for i in indices)


def lay_out(
    ids: tuple[int, int],
    orders: tuple[Indices, Indices],
    grads: tuple[bool, bool],
    rest: set[str],
    final: Indices,
    size: Mapping[str, int],
    form: str = "keep",
) -> Step | None:
    """One step: the larger operand (or the one with the tokens) keeps its memory order, the smaller one adapts.

    Args:
        ids: the operands' numbers.
        orders: their indices in the order of memory.
        grads: whether each needs a gradient.
        rest: indices needed later: of the operands left and of the output.
        final: the output's order where this is the last step, else empty.
        size: index -> size.
        form: ``"keep"`` as said; ``"swap"`` lets the smaller operand keep its order; ``"flip"`` puts the new indices of
            an elementwise product first, ``"behind"`` those of both operands last; ``"lift"`` sets new indices before the
            free ones behind the tokens, one product a token; ``"copy"`` permutes an intermediate so that one matrix
            product does, where they would stand between.

    Returns:
        The step, or None where it has no such form.
    """
    big = int(_weight(orders[0], size) < _weight(orders[1], size)) ^ ("swap" in form)
    left, right = orders[big], orders[1 - big]
    if TOKEN in right and TOKEN not in left:
        return None
    batch = tuple(i for i in left if i in right and i in rest)
    contracted = tuple(i for i in left if i in right and i not in rest)
    new = tuple(i for i in right if i not in left)
    new = tuple(sorted(new, key=final.index)) if final else new
    if not contracted:
        if form in ("lift", "copy"):
            return None
        before, after, lifted = tuple(i for i in left if i not in batch), Indices(), Indices()
        if form == "behind" and (TOKEN in left or not (batch and new and before)):
            return None
        result = final or (before + new + batch if form == "behind" else new + left if "flip" in form else left + new)
    else:
        spread = _spread(left, batch, contracted, form, ids[big])
        if spread is None or "flip" in form or form == "behind":
            return None
        before, after, lifted = spread
        result = batch + before + new + lifted + after
    return _priced(ids, big, grads, (left, right), (batch, before, contracted, after, lifted, new), result, final, size)


def _spread(
    left: Indices, batch: Indices, contracted: Indices, form: str, operand: int
) -> tuple[Indices, Indices, Indices] | None:
    """The large operand's free indices as (before, after, lifted); all before where the contracted ones are torn apart."""
    free = tuple(i for i in left if i not in batch and i not in contracted)
    start = left.index(contracted[0])
    together = left[start : start + len(contracted)] == contracted and left[: len(batch)] == batch
    before = tuple(i for i in free if left.index(i) < start)
    after = tuple(i for i in free if left.index(i) > start)
    if form == "lift":
        fits = together and not after and not batch and before[:1] == (TOKEN,) and len(before) > 1
        return ((TOKEN,), (), before[1:]) if fits else None
    if form == "copy":
        # x itself is never permuted: that costs more than the product it serves.
        fits = bool(together and before and after) and not (operand == 0 and TOKEN in left)
        return (before + after, (), ()) if fits else None
    return (before, after, ()) if together else (free, (), ())


def _priced(
    ids: tuple[int, int],
    big: int,
    grads: tuple[bool, bool],
    operands: tuple[Indices, Indices],
    parts: tuple[Indices, Indices, Indices, Indices, Indices, Indices],
    result: Indices,
    final: Indices,
    size: Mapping[str, int],
) -> Step:
    """The step with its FLOPs and its bytes, copies into another order included."""
    left, right = operands
    batch, before, contracted, after, lifted, new = parts
    inward, outward = volume(left, size), volume(result, size)
    # Each operand in the order it is read, and the result in the one wanted.
    read = batch + before + lifted + contracted + after if contracted else tuple(i for i in result if i in left)
    small = (batch + new + contracted, batch + contracted + new) if contracted else (tuple(i for i in result if i in right),)
    orders = ((left, read), *(((right, small[0]),) if right not in small else ()), (result, final or result))
    copies = tuple((2 * volume(a, size) * ITEM, volume(_tail(a, b), size)) for a, b in orders if a != b)
    moved = ITEM * (inward + volume(right, size) + outward) + sum(count for count, _ in copies)
    # The smaller operand's gradient comes with its shorter side first.
    sides = sorted((new, contracted), key=lambda side: volume(side, size)) if contracted else [()]
    turned = 2 * volume(right, size) * ITEM if grads[1 - big] and right[len(batch) :][: len(sides[0])] != sides[0] else 0
    flops = (2 if contracted else 1) * volume(left + new, size)
    items = volume(batch, size) * (volume(before, size) if lifted or (before and after) else 1) if contracted else 0
    row = volume((lifted or after or new) if contracted else _last_run(result, left, right), size)
    return Step(
        ids[big], ids[1 - big], left, right, batch, before, contracted, after, lifted, new, result,
        left != read, flops, moved, items if items > 1 else 0, row, copies, turned, 1 + sum(grads),
    )  # fmt: skip


def _tail(one: Indices, other: Indices) -> Indices:
    """The last indices, as far as they are the same."""
    same = next((k for k, (a, b) in enumerate(zip(reversed(one), reversed(other), strict=True)) if a != b), len(one))
    return one[len(one) - same :]


def _last_run(result: Indices, left: Indices, right: Indices) -> Indices:
    """The last indices of an elementwise product that are all on one operand, or all on both."""
    kinds = [(i in left, i in right) for i in result]
    return tuple(i for k, i in enumerate(result) if set(kinds[k:]) == {kinds[-1]})


def _weight(indices: Indices, size: Mapping[str, int]) -> tuple[bool, int]:
    return TOKEN in indices, volume(indices, size)


def best_orders(
    pairs: Sequence[tuple[int, int]],
    terms: Sequence[Indices],
    grads: Sequence[bool],
    output: Indices,
    size: Mapping[str, int],
    device: Device,
) -> tuple[Step, ...]:
    """Lay the pairs out, trying each order of the last steps, and keep the cheapest whole.

    Args:
        pairs: what is contracted, first to last; results are numbered behind the operands.
        terms: the indices of each operand.
        grads: whether each wants a gradient.
        output: the order of the result.
        size: index -> size.
        device: to price for.
    """
    held, wants, steps = list(terms), list(grads), list[Step]()
    uses = Counter(i for indices in (*held, output) for i in indices)
    for k, (a, b) in enumerate(pairs):
        uses.subtract((*held[a], *held[b]))
        rest = {i for i in (*held[a], *held[b]) if uses[i]}
        final = output if k == len(pairs) - 1 else ()
        step = lay_out((a, b), (held[a], held[b]), (wants[a], wants[b]), rest, final, size)
        assert step is not None  # "keep" is a form of any step
        steps.append(step)
        held.append(step.result)
        wants.append(wants[a] or wants[b])
        uses.update(step.result)
    early = max(len(pairs) - ORDERED_UP_TO, 0)
    known, wanted = tuple(held[: len(terms) + early]), tuple(wants[: len(terms) + early])
    least = [step.least(device) for step in steps[early:]]
    return (*steps[:early], *_best(tuple(pairs[early:]), known, wanted, output, size, device, tuple(least)))


def _best(
    pairs: tuple[tuple[int, int], ...],
    terms: tuple[Indices, ...],
    grads: tuple[bool, ...],
    output: Indices,
    size: Mapping[str, int],
    device: Device,
    least: tuple[float, ...],
) -> tuple[Step, ...]:
    """The cheapest whole over all orders of each step, the first where several are; `least` is what each costs at least."""
    if not pairs:
        return ()
    (a, b), later = pairs[0], pairs[1:]
    made = len(terms)
    ahead = {k for pair in later for k in pair if k < made} - {a, b}
    rest = {i for k in ahead for i in terms[k]} | set(output)
    arguments = ((a, b), (terms[a], terms[b]), (grads[a], grads[b]), rest, output if not later else (), size)
    best, price, seen = tuple[Step, ...](), math.inf, set[Indices]()
    for form in FORMS:
        step = lay_out(*arguments, form)
        if step is None or step.result in seen:
            continue
        seen.add(step.result)
        # Summed in the order of the whole, so that it is no more than the whole in rounding either.
        if sum((step.price(device), *least[1:])) >= price:
            continue
        behind = _best(later, (*terms, step.result), (*grads, grads[a] or grads[b]), output, size, device, least[1:])
        found = sum(s.price(device) for s in (step, *behind))
        if found < price:
            best, price = (step, *behind), found
    return best
