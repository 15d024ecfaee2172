"""The steps of a contraction: what each costs on a device, and how it lies in memory.

Costs: a product of sizes m, n, k counts 2 m n k FLOPs. Bytes are the reads and writes of a step at `ITEM` bytes a
number. A price is in seconds on a `Device`, forward plus backward: a step's gradient is one more product of the same
size for each of its operands that is trained (or depends on x).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from superlora_tn.nodes import TOKEN

Indices = tuple[str, ...]
ITEM = 4
# (swapped, flipped): the memory orders tried for a step without tokens, in networks of so many steps.
ORDERS, ORDERED_UP_TO = ((False, False), (True, False), (False, True), (True, True)), 5


@dataclass(frozen=True)
class Device:
    """What a device does at best, to price a plan.

    Args:
        name: for printing.
        flops: FLOP/s of matrix products.
        bandwidth: bytes/s of reads and writes.
        latency: seconds an operation costs beside its arithmetic.
    """

    name: str
    flops: float
    bandwidth: float
    latency: float

    def price(self, flops: float, size: float, operations: float) -> float:
        """Seconds for the given FLOPs, bytes and operations, one after the other."""
        return flops / self.flops + size / self.bandwidth + operations * self.latency


CPU = Device("cpu", 1.5e11, 1.5e10, 4e-6)
GPU = Device("gpu", 6e13, 1e12, 6e-6)
H200 = Device("h200", 3e14, 4e12, 6e-6)
DEVICES: Mapping[str, Device] = {"cpu": CPU, "cuda": H200, "mps": GPU}


@dataclass(frozen=True)
class Step:
    """One pairwise contraction, as views of the two operands.

    The large operand is read as ``[batch, before, contracted, after]``, the small one as ``[batch, new, contracted]``;
    the result is ``[batch, before, new, after]``. With nothing contracted, `result` is their broadcast product.
    Operands are numbered: the plan's inputs first, then one number a step. `permuted` says that the large operand has
    to be copied into another order; `products` counts the result and the gradients.
    """

    large: int
    small: int
    large_indices: Indices
    small_indices: Indices
    batch: Indices
    before: Indices
    contracted: Indices
    after: Indices
    new: Indices
    result: Indices
    permuted: bool
    flops: int
    bytes: int
    products: int

    def price(self, device: Device) -> float:
        """Seconds, forward plus backward: one product for the result and one for each operand with a gradient."""
        return device.price(self.flops, self.bytes, 1) * self.products


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
    swapped: bool = False,
    flipped: bool = False,
) -> Step:
    """One step: the larger operand (or the one with the tokens) keeps its memory order, the smaller one adapts.

    Args:
        ids: the operands' numbers.
        orders: their indices in the order of memory.
        grads: whether each needs a gradient.
        rest: indices needed later: of the operands left and of the output.
        final: the output's order where this is the last step, else empty.
        size: index -> size.
        swapped: let the smaller operand keep its order instead.
        flipped: put the new indices of a product first.
    """
    big = int(_weight(orders[0], size) < _weight(orders[1], size)) ^ swapped
    left, right = orders[big], orders[1 - big]
    batch = tuple(i for i in left if i in right and i in rest)
    contracted = tuple(i for i in left if i in right and i not in rest)
    new = tuple(i for i in right if i not in left)
    if final:
        new = tuple(sorted(new, key=final.index))
    if contracted:
        before, after = _around(left, batch, contracted)
        result = batch + before + new + after
        permuted = batch + before + contracted + after != left
    else:
        before, after = tuple(i for i in left if i not in batch), ()
        result = final or (new + left if flipped else left + new)
        permuted = tuple(i for i in result if i in left) != left
    flops = (2 if contracted else 1) * volume(left + new, size)
    inward, outward = volume(left, size), volume(result, size)
    moved = inward + volume(right, size) + outward
    moved += 2 * inward * permuted + 2 * outward * bool(final and result != final)
    if contracted and right not in (batch + new + contracted, batch + contracted + new):
        moved += 2 * volume(right, size)
    products = 1 + sum(grads)
    return Step(
        ids[big],
        ids[1 - big],
        left,
        right,
        batch,
        before,
        contracted,
        after,
        new,
        result,
        permuted,
        flops,
        moved * ITEM,
        products,
    )


def _weight(indices: Indices, size: Mapping[str, int]) -> tuple[bool, int]:
    return TOKEN in indices, volume(indices, size)


def _around(left: Indices, batch: Indices, contracted: Indices) -> tuple[Indices, Indices]:
    """The free indices before and after the contracted ones; all before (a permutation) where those are torn apart."""
    free = [i for i in left if i not in batch and i not in contracted]
    start = left.index(contracted[0])
    together = left[start : start + len(contracted)] == contracted and left[: len(batch)] == batch
    if not together:
        return tuple(free), ()
    return tuple(i for i in free if left.index(i) < start), tuple(i for i in free if left.index(i) > start)


def best_orders(
    pairs: tuple[tuple[int, int], ...],
    terms: tuple[Indices, ...],
    grads: tuple[bool, ...],
    output: Indices,
    size: Mapping[str, int],
    device: Device,
) -> tuple[Step, ...]:
    """Lay the pairs out, trying each order of each small step where that is few, and keep the cheapest whole."""
    if not pairs:
        return ()
    (a, b), later = pairs[0], pairs[1:]
    made = len(terms)
    ahead = {k for pair in later for k in pair if k < made} - {a, b}
    rest = {i for k in ahead for i in terms[k]} | set(output)
    arguments = ((a, b), (terms[a], terms[b]), (grads[a], grads[b]), rest, output if not later else (), size)
    orders = ORDERS if len(pairs) <= ORDERED_UP_TO and TOKEN not in (*terms[a], *terms[b]) else ORDERS[:1]
    found: list[tuple[Step, ...]] = []
    for swapped, flipped in orders:
        step = lay_out(*arguments, swapped, flipped)
        if all(step.result != other[0].result for other in found):
            found.append(
                (step, *best_orders(later, (*terms, step.result), (*grads, grads[a] or grads[b]), output, size, device))
            )
    return min(found, key=lambda steps: sum(s.price(device) for s in steps))
