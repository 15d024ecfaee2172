"""How a step's tensors lie: the axes in which they enter and leave an operation, and which are not kept for backward."""

from __future__ import annotations

from superlora_tn.contraction.layout import Indices, Step, volume
from superlora_tn.contraction.plan import Plan
from superlora_tn.declare.parts import TOKEN

Axes = tuple[Indices, ...]
# Intermediates made of nodes alone that hold as many numbers as this are made again in backward, the largest first,
# while that costs no more than this share of a step's price.
AGAIN_FROM, AGAIN_SHARE = 1 << 16, 0.05


def operand_axes(step: Step) -> tuple[Axes, Axes]:
    """The axes in which the large and the small operand enter a matmul (with lifted axes, the large one transposed)."""
    batch = (step.batch,) if step.batch else ()
    if step.lifted:
        return (step.before, step.lifted, step.contracted), (step.new, step.contracted)
    if not step.after:
        return (*batch, step.before, step.contracted), (*batch, step.contracted, step.new)
    middle = (step.before,) if step.before else ()
    # A batch and a middle axis: the small operand is broadcast over the middle.
    spread: Axes = ((),) if batch and middle else ()
    return (*batch, *middle, step.contracted, step.after), (*batch, *spread, step.new, step.contracted)


def grouped(step: Step) -> Axes:
    """The axes of a step's result as its product leaves them."""
    if step.contracted:
        batch = (step.batch,) if step.batch else ()
        if step.lifted:
            return (step.before, step.new, step.lifted)
        if not step.after:
            return (*batch, step.before, step.new)
        return (*batch, *((step.before,) if step.before else ()), step.new, step.after)
    axes: list[Indices] = []
    kind: tuple[bool, bool] | None = None
    for index in step.result:
        own = (index in step.large_indices, index in step.small_indices)
        if own == kind:
            axes[-1] = (*axes[-1], index)
        else:
            axes.append((index,))
        kind = own
    return tuple(axes)


def blocks(held: Indices, wanted: list[str]) -> Axes:
    """The longest runs that stay together in both orders, in the order held."""
    blocks: list[Indices] = []
    for index in held:
        place = wanted.index(index)
        if blocks and place and wanted[place - 1] == blocks[-1][-1]:
            blocks[-1] = (*blocks[-1], index)
        else:
            blocks.append((index,))
    return tuple(blocks)


def made_again(plan: Plan) -> frozenset[int]:
    """Numbers of the intermediates that backward makes again in place of keeping them (see `AGAIN_SHARE`)."""
    count, spent, chosen = len(plan.inputs), 0.0, set[int]()
    # On the apply route the frozen layer's own step is part of the time.
    layer = 6 * volume((*plan.inputs[0], *plan.output[1:]), plan.size) / plan.device.flops if plan.route == "apply" else 0.0
    for k, step in sorted(enumerate(plan.steps[:-1]), key=lambda one: -volume(one[1].result, plan.size)):
        if TOKEN in step.result or volume(step.result, plan.size) < AGAIN_FROM:
            continue
        spent += step.price(plan.device) / step.products
        if spent > AGAIN_SHARE * (plan.price + layer):
            break
        chosen.add(count + k)
    return frozenset(chosen)
