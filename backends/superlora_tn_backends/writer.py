"""Writes a plan as Python source: a straight line of views and matrix products, and its gradient.

Operand k is called ``v{k}`` and its gradient ``g{k}``. Each variable's memory order and shape are tracked, so that a
view is written only where the next operation needs another shape, and a permutation only where the order differs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from superlora_tn.contraction.layout import Indices, Step, volume
from superlora_tn.contraction.plan import Plan
from superlora_tn.declare.parts import TOKEN
from superlora_tn_backends.layout import Axes, blocks, grouped, made_again, operand_axes

# Products with fewer columns (or rows of the result) than this are worth another memory order.
THIN = 32
# A product of so many multiply-adds, at the number of tokens planned for, goes through `products`.
LARGE = 1 << 17


@dataclass(frozen=True)
class Variable:
    """A tensor in the source: its expression, its indices in the order of memory, its shape (None if not known)."""

    text: str
    order: Indices
    shape: tuple[int, ...] | None


def run_source(plan: Plan) -> str:
    """``run(*tensors, out=None, alpha=1.0)``: differentiable operations that write to nothing they are given."""
    return _Writer(plan).run()


def forward_source(plan: Plan) -> str:
    """``forward(*tensors, out=None, alpha=1.0) -> (result, kept)``: adds to `out` in place, keeps what `backward` is given."""
    return _Writer(plan).forward()


def backward_source(plan: Plan, wanted: tuple[bool, ...]) -> str:
    """``backward(grad, alpha, *tensors, *kept)``: a gradient for each wanted operand."""
    return _Writer(plan).backward(wanted)


class _Writer:
    """The source of one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.differentiable = plan, False
        self.lines: list[str] = []
        count = len(plan.inputs)
        self.values = [Variable(f"v{k}", plan.inputs[k], plan.shapes[k]) for k in range(count)]
        for k, step in enumerate(plan.steps):
            self.values.append(Variable(f"v{count + k}", step.result, self.sizes(grouped(step))))
        self.again, self.recalled = made_again(plan), list[str]()
        self.ordered: dict[tuple[str, Indices], str] = {}
        self.kept = [f"v{count + k}" for k in range(len(plan.steps) - 1) if count + k not in self.again]

    def function(self, name: str, arguments: list[str]) -> str:
        """All lines as one function."""
        return "\n".join([f"def {name}({', '.join(arguments)}):", *(f"    {line}" for line in self.lines), ""])

    def _operands(self) -> list[str]:
        return [f"v{k}" for k in range(len(self.plan.inputs))]

    def run(self) -> str:
        """See `run_source`."""
        self.differentiable = True
        self._early_steps()
        self._finish("return TL.reshape(torch.addmm({out}, {left}, {right}, alpha=alpha), out.shape)")
        self.lines.append("return result if out is None else out + TL.reshape(result, out.shape)")
        return self.function("run", [*self._operands(), "out=None", "alpha=1.0"])

    def forward(self) -> str:
        """See `forward_source`."""
        self._early_steps()
        self.kept += self.ordered.values()
        kept = "".join(f"{name}, " for name in self.kept)
        self._finish(f"{{out}}.addmm_({{left}}, {{right}}, alpha=alpha)\nreturn out, ({kept})")
        self.lines.append(f"return (result if out is None else out.add_(TL.reshape(result, out.shape))), ({kept})")
        return self.function("forward", [*self._operands(), "out=None", "alpha=1.0"])

    def _early_steps(self) -> None:
        for k, step in enumerate(self.plan.steps[:-1], start=len(self.plan.inputs)):
            if k not in self.again:
                self._recall(step.large, step.small)
                self.lines.append(f"v{k} = {self.product(step)}")
                self._forget()
        if self.plan.steps:
            self._recall(self.plan.steps[-1].large, self.plan.steps[-1].small)

    def _finish(self, join: str) -> None:
        """The last step as `result`, times alpha; where `out` is given and it is a plain matmul, `join` adds it at once."""
        steps, axes = self.plan.steps, self.plan.result
        final = self.values[-1]
        if not steps or not steps[-1].contracted or steps[-1].result != self.plan.output:
            if steps:
                self.lines.append(f"{final.text} = {self.product(steps[-1])}")
            self.lines.append(f"result = {self.view(final, axes)}")
            self.lines.append("result = result if alpha == 1.0 else result * alpha")
            return
        step = steps[-1]
        left, right = self.pair(step)
        if left[1] == right[1] == 2:
            out = f"TL.reshape(out, {_text(self.sizes(grouped(step)))})"
            self.lines.append("if out is not None:")
            self.lines += [f"    {line}" for line in join.format(out=out, left=left[0], right=right[0]).split("\n")]
        scaled = step.large if TOKEN in step.small_indices else step.small
        before = self.values[scaled]
        self.lines.append(f"scaled = {before.text} if alpha == 1.0 else {before.text} * alpha")
        self.values[scaled] = replace(before, text="scaled")
        self.lines.append(f"result = TL.reshape({self.product(step)}, {_text(self.sizes(axes))})")
        self.values[scaled] = before

    def product(self, step: Step) -> str:
        """The expression of a step's result."""
        if not step.contracted:
            large, small = self.broadcast(step)
            return f"{large} * {small}"
        left, right = self.pair(step)
        return self._times(left[0], right[0], step)

    def _times(self, left: str, right: str, step: Step) -> str:
        """A matrix product of a step: its result or a gradient."""
        return f"{'matmul' if self._is_large(step) else 'TL.matmul'}({left}, {right})"

    def _is_large(self, step: Step) -> bool:
        """Whether `products` may have a faster way: on a CPU, for one product that autograd does not have to see."""
        single = not step.batch and not step.lifted and not (step.before and step.after)
        terms = volume((*step.large_indices, *step.new), self.plan.size)
        return not self.differentiable and single and terms >= LARGE and self.plan.device.width > 1

    def pair(self, step: Step) -> tuple[tuple[str, int], tuple[str, int]]:
        """The two operands of a matmul as (expression, number of axes), in the order the result's memory wants."""
        large, small = operand_axes(step)
        mark = ".mT" if step.lifted else ""
        first = (f"{self.view(self.values[step.large], large)}{mark}", len(large))
        second = (self.view(self.values[step.small], small), len(small))
        if step.after or step.lifted:
            return second, first
        return first, (self._thin(second[0], step, step.contracted, step.new), len(small))

    def _thin(self, text: str, step: Step, rows: Indices, columns: Indices) -> str:
        """The small operand as the right side (rows, columns) of a product, its columns contiguous where that pays.

        With few columns the product reads a matrix of contiguous columns twice as fast: about 0.2 ns less for each
        element of the left side (measured on a CPU with MKL), against 0.8 ns an element and 2 us for the copy.
        """
        tall, thin = (math.prod(self.plan.size[i] for i in s) for s in (rows, columns))
        contiguous = self.values[step.small].order == step.batch + columns + rows
        large = math.prod(self.plan.size[i] for i in step.before)
        gain = 0.2 * large * tall - 0.8 * tall * thin - 2000
        if contiguous or thin >= THIN or tall <= thin or gain <= 0 or self.plan.device.width == 1:
            return text
        return f"{text}.mT.contiguous().mT"

    def broadcast(self, step: Step) -> tuple[str, str]:
        """The two operands of an elementwise product, with axes of 1 where they lack an index."""
        axes = grouped(step)
        large = tuple(a if a and a[0] in step.large_indices else () for a in axes)
        small = tuple(a if a and a[0] in step.small_indices else () for a in axes)
        return self._spread(step.large, large, step), self._spread(step.small, small, step)

    def _spread(self, operand: int, axes: Axes, step: Step) -> str:
        """An operand with axes of 1, in the order of the product's memory where it is read many times."""
        value = self.values[operand]
        order = tuple(i for axis in axes for i in axis)
        many = volume(step.result, self.plan.size) >= 4 * volume(order, self.plan.size)
        if value.order == order or not many or TOKEN in order or self.differentiable:
            return self.view(value, axes)
        return self.view(Variable(self._ordered(value, order), order, self.sizes(tuple((i,) for i in order))), axes)

    def _ordered(self, value: Variable, order: Indices) -> str:
        """The name of a copy in this order, made once in a function."""
        key = (value.text, order)
        if key not in self.ordered:
            self.ordered[key] = f"o{len(self.ordered)}"
            self.lines.append(f"{self.ordered[key]} = {self.view(value, tuple((i,) for i in order))}.contiguous()")
        return self.ordered[key]

    def backward(self, wanted: tuple[bool, ...]) -> str:
        """See `backward_source`."""
        ahead = _Writer(self.plan)
        ahead.forward()
        self.kept, self.ordered = ahead.kept, {key: name for key, name in ahead.ordered.items() if name in ahead.kept}
        count, steps = len(self.plan.inputs), self.plan.steps
        needs = [*wanted]
        for step in steps:
            needs.append(needs[step.large] or needs[step.small])
        shape = tuple(self.sizes(self.plan.result))
        folded = bool(steps and steps[-1].contracted)
        if not folded:
            self.lines.append("grad = grad if alpha == 1.0 else grad * alpha")
        self.lines.append(f"grad = TL.reshape(grad, {_text(shape)})")
        grads = {count + len(steps) - 1: Variable("grad", self.plan.output, shape)}
        ready = [(False, -len(steps) + 1)] if steps and needs[count + len(steps) - 1] else []
        while ready:
            # What hangs on nodes alone goes first, so that its large gradients go before the next ones come; then the last.
            k = -heappop(ready)[1]
            self._step_back(steps[k], grads.pop(count + k), grads, needs, folded and k == len(steps) - 1)
            for j in (steps[k].large, steps[k].small):
                if j >= count and needs[j]:
                    heappush(ready, (TOKEN in steps[j - count].result, count - j))
        self._return_grads(grads, wanted)
        return self.function("backward", ["grad", "alpha", *self._operands(), *self.kept])

    def _recall(self, *operands: int) -> None:
        """Make intermediates that are not kept, where they are needed."""
        for operand in operands:
            name = f"v{operand}"
            if operand in self.again and name not in self.recalled:
                step = self.plan.steps[operand - len(self.plan.inputs)]
                self._recall(step.large, step.small)
                self.lines.append(f"{name} = {self.product(step)}")
                self.recalled.append(name)

    def _forget(self, *more: str) -> None:
        """Free what was recalled, and other temporary tensors."""
        names = [*self.recalled, *more]
        self.recalled.clear()
        self.lines += [f"del {', '.join(names)}"] if names else []

    def _return_grads(self, grads: dict[int, Variable], wanted: tuple[bool, ...]) -> None:
        results = []
        for k, want in enumerate(wanted):
            if not want:
                results.append("None")
            else:
                results.append(f"TL.reshape({self.view(grads[k], tuple((i,) for i in self.plan.inputs[k]))}, v{k}.shape)")
        self.lines.append(f"return ({', '.join(results)},)")

    def _step_back(self, step: Step, grad: Variable, grads: dict[int, Variable], needs: list[bool], alpha: bool) -> None:
        """The gradients of one step's operands from that of its result."""
        used = [name for name in (grad.text,) if name != "grad"]
        result = self.view(grad, grouped(step))
        if not result.isidentifier():
            name = f"r{step.large}_{step.small}"
            self.lines.append(f"{name} = {result}")
            used.append(result := name)
        if not step.contracted:
            self._recall(*(j for j, other in ((step.large, step.small), (step.small, step.large)) if needs[other]))
            self._product_back(step, result, grads, needs)
        else:
            self._matmul_back(step, result, used, grads, needs, alpha)
        self._forget(*used)

    def _matmul_back(
        self, step: Step, result: str, used: list[str], grads: dict[int, Variable], needs: list[bool], alpha: bool
    ) -> None:
        """A matrix product's gradients; names of further temporary tensors join `used`."""
        if step.lifted:
            # One copy into the order without lifting serves both gradients as plain products.
            step = replace(step, before=step.before + step.lifted, lifted=())
            name = f"c{step.large}_{step.small}"
            self.lines.append(f"{name} = TL.reshape({result}.mT, {_text(self.sizes(grouped(step)))})")
            used.append(result := name)
        large_axes, small_axes = operand_axes(step)
        if needs[step.large]:
            self._recall(step.small)
            small = self.view(self.values[step.small], small_axes)
            # alpha goes where the fewest numbers are.
            late = alpha and volume(step.small_indices, self.plan.size) > volume(step.large_indices, self.plan.size)
            small = f"({small} if alpha == 1.0 else {small} * alpha)" if alpha and not late else small
            back = f"{small}.mT"
            sides = (back, result) if step.after else (result, self._thin(back, step, step.new, step.contracted))
            self._large_grad(step, sides, large_axes, grads, late)
            self._forget()
        if needs[step.small]:
            self._recall(step.large)
            text, axes = self._small_grad(step, result, large_axes)
            text = f"{text} if alpha == 1.0 else ({text}).mul_(alpha)" if alpha else text
            self.lines.append(f"g{step.small} = {text}")
            order = tuple(i for axis in axes for i in axis)
            grads[step.small] = Variable(f"g{step.small}", order, self.sizes(axes))

    def _large_grad(self, step: Step, sides: tuple[str, str], axes: Axes, grads: dict[int, Variable], alpha: bool) -> None:
        order = tuple(i for axis in axes for i in axis)
        whole = self._times(*sides, step)
        whole = f"({whole} if alpha == 1.0 else {whole}.mul_(alpha))" if alpha else whole
        self.lines.append(f"g{step.large} = {whole}")
        grads[step.large] = Variable(f"g{step.large}", order, self.sizes(axes))

    def _small_grad(self, step: Step, result: str, large_axes: Axes) -> tuple[str, Axes]:
        """The small operand's gradient, as it is stored, or with a thin axis first: few rows are up to four times as fast."""
        batch = (step.batch,) if step.batch else ()
        large = self.view(self.values[step.large], large_axes)
        new, contracted = self.sizes((step.new, step.contracted))
        new_first = new <= contracted
        if min(new, contracted) >= THIN and not self._is_large(step):
            new_first = self.values[step.small].order == step.batch + step.new + step.contracted
        if not step.after:
            # result (b, P, N), large (b, P, K)
            if new_first:
                return self._times(f"{result}.mT", large, step), (*batch, step.new, step.contracted)
            return self._times(f"{large}.mT", result, step), (*batch, step.contracted, step.new)
        if not step.before:
            # result (b, N, Q), large (b, K, Q)
            if new_first:
                return self._times(result, f"{large}.mT", step), (*batch, step.new, step.contracted)
            return self._times(large, f"{result}.mT", step), (*batch, step.contracted, step.new)
        return self._summed_grad(step, result, large, batch)

    def _summed_grad(self, step: Step, result: str, large: str, batch: Axes) -> tuple[str, Axes]:
        """The small operand's gradient summed over `before`: result (b, P, N, Q), large (b, P, K, Q).

        Either one product for each of P, then their sum, or one product after both are permuted: whichever moves
        fewer numbers.
        """
        new, contracted, after = (math.prod(self.plan.size[i] for i in s) for s in (step.new, step.contracted, step.after))
        first = len(batch)
        if batch or new * contracted <= (new + contracted) * after:
            return f"TL.sum(TL.matmul({result}, {large}.mT), {first})", (*batch, step.new, step.contracted)
        left = f"TL.reshape(TL.transpose({result}, [1, 0, 2]), ({new}, -1))"
        right = f"TL.reshape(TL.transpose({large}, [1, 0, 2]), ({contracted}, -1))"
        return f"TL.matmul({left}, {right}.mT)", (step.new, step.contracted)

    def _product_back(self, step: Step, result: str, grads: dict[int, Variable], needs: list[bool]) -> None:
        """An elementwise product's gradients: times the other operand, summed over the axes the operand lacks."""
        axes = grouped(step)
        kinds = [(a[0] in step.large_indices, a[0] in step.small_indices) for a in axes if a]
        outer = len(axes) == len(kinds) == 3 and kinds[0] == (True, True) and set(kinds[1:]) == {(True, False), (False, True)}
        broadcast = dict(zip((step.large, step.small), self.broadcast(step), strict=True))
        for operand, other, own in (
            (step.large, step.small, step.large_indices),
            (step.small, step.large, step.small_indices),
        ):
            if not needs[operand]:
                continue
            lacking = [k for k, axis in enumerate(axes) if axis and axis[0] not in own]
            held = tuple(axis for k, axis in enumerate(axes) if k not in lacking)
            shape: tuple[int, ...] | None = self.sizes(held)
            if outer:
                # An outer product for each of the first axis: small matrix products, and no temporary of that size.
                factor, last = self.view(self.values[other], (axes[0], axes[lacking[0]])), lacking == [2]
                text = f"TL.matmul({result}, {factor}[:, :, None])" if last else f"TL.matmul({factor}[:, None, :], {result})"
                shape = None  # an axis of 1 is left
            elif len(lacking) == 1 and lacking[0] < len(axes) - 1:
                text = f"weighted_sum({result}, {broadcast[other]}, {lacking[0]})"
            else:
                text = f"{result} * {broadcast[other]}"
                text = f"TL.sum({text}, {lacking})" if lacking else text
            self.lines.append(f"g{operand} = {text}")
            grads[operand] = Variable(f"g{operand}", tuple(i for a in held for i in a), shape)

    def view(self, variable: Variable, axes: Axes) -> str:
        """A variable with the given axes: reshaped, and permuted only where its memory order differs."""
        wanted = [i for axis in axes for i in axis]
        text, shape = variable.text, variable.shape
        if list(variable.order) != wanted:
            runs = blocks(variable.order, wanted)
            sizes = self.sizes(runs)
            if sizes != shape:
                text = f"TL.reshape({text}, {_text(sizes)})"
            permutation = sorted(range(len(runs)), key=lambda b: wanted.index(runs[b][0]))
            text = f"TL.transpose({text}, {permutation})"
            shape = tuple(sizes[b] for b in permutation)
        sizes = self.sizes(axes)
        return text if sizes == shape else f"TL.reshape({text}, {_text(sizes)})"

    def sizes(self, axes: Axes) -> tuple[int, ...]:
        """The extent of each axis, -1 for the one with the tokens."""
        return tuple(-1 if TOKEN in axis else math.prod(self.plan.size[i] for i in axis) for axis in axes)


def _text(sizes: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"
