"""The default backend: a plan becomes a straight line of views and matrix products on TensorLy's PyTorch backend.

The line is generated as Python source once a plan (`print(program)` shows it), so that running it costs no loop, no
look-up and no planning, and Dynamo traces it whole. Large operands are only viewed; small ones are permuted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tensorly.backend.pytorch_backend import PyTorchBackend

from superlora_tn.plan import Plan
from superlora_tn.steps import TOKEN, Indices, Step

NAME = "tensorly_torch"
# An instance of our own: TensorLy's global backend is neither read nor set.
TL = PyTorchBackend()
Axes = tuple[Indices, ...]


def compile(plan: Plan) -> Program:
    """The plan as a `Program`; see `superlora_tn.execute.Backend`."""
    return Program(plan)


class Program:
    """A compiled plan: callable, printable (its source), picklable.

    Attributes:
        plan: what was compiled.
        source: the generated line.
        run: the generated function ``(*tensors, out=None, alpha=1.0)``.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.source = _Writer(plan).source()
        scope: dict[str, Any] = {"TL": TL, "torch": torch}
        exec(self.source, scope)  # the source is made of operand numbers and sizes alone
        self.run: Callable[..., torch.Tensor] = scope["run"]

    def __call__(self, *tensors: torch.Tensor, out: torch.Tensor | None = None, alpha: float = 1.0) -> torch.Tensor:
        return self.run(*tensors, out=out, alpha=alpha)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Program, (self.plan,))

    def __deepcopy__(self, memo: Any) -> Program:
        return self

    def __str__(self) -> str:
        return self.source


class _Writer:
    """Writes the source of one plan; operand k is called ``v{k}``."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.lines: list[str] = []
        self.order: list[Indices] = list(plan.inputs)
        self.shape: list[tuple[int, ...] | None] = list(plan.shapes)

    def source(self) -> str:
        arguments = ", ".join(f"v{k}" for k in range(len(self.plan.inputs)))
        for step in self.plan.steps[:-1]:
            self._keep(step, self._product(step))
        self._finish()
        return "\n".join([f"def run({arguments}, out=None, alpha=1.0):", *(f"    {line}" for line in self.lines), ""])

    def _keep(self, step: Step, expression: str) -> None:
        self.lines.append(f"v{len(self.order)} = {expression}")
        self.order.append(step.result)
        self.shape.append(self._sizes(_grouped(step)))

    def _finish(self) -> None:
        """The last step: adds to `out` where it is given, folding alpha in."""
        steps, axes = self.plan.steps, self.plan.result
        sizes = self._text(self._sizes(axes))
        last = len(self.order) - 1
        if steps and steps[-1].contracted and steps[-1].result == self.plan.output:
            self._accumulate(steps[-1], sizes)
            scaled = min((steps[-1].small, steps[-1].large), key=lambda k: TOKEN in self.order[k])
            self.lines.append(f"v{scaled} = v{scaled} if alpha == 1.0 else v{scaled} * alpha")
            self.lines.append(f"return TL.reshape({self._product(steps[-1])}, {sizes})")
            return
        if steps:
            self._keep(steps[-1], self._product(steps[-1]))
            last += 1
        self.lines.append(f"v{last} = {self._view(last, axes)}")
        self.lines.append(f"v{last} = v{last} if alpha == 1.0 else v{last} * alpha")
        self.lines.append(f"return v{last} if out is None else out + TL.reshape(v{last}, out.shape)")

    def _accumulate(self, step: Step, sizes: str) -> None:
        left, right = self._pair(step)
        call = "torch.addmm" if left[1] == 2 and right[1] == 2 else ""
        self.lines.append("if out is not None:")
        if call:
            shape = self._text(self._sizes(tuple(a for a in _grouped(step) if a)))
            self.lines.append(
                f"    return TL.reshape(torch.addmm(TL.reshape(out, {shape}), {left[0]}, {right[0]}, alpha=alpha), out.shape)"
            )
        else:
            self.lines.append(f"    return torch.add(out, TL.reshape({self._product(step)}, out.shape), alpha=alpha)")

    def _product(self, step: Step) -> str:
        if not step.contracted:
            return self._elementwise(step)
        left, right = self._pair(step)
        return f"TL.matmul({left[0]}, {right[0]})"

    def _pair(self, step: Step) -> tuple[tuple[str, int], tuple[str, int]]:
        """The two operands of a matmul as (expression, number of axes), in the order the result's memory wants."""
        batch = (step.batch,) if step.batch else ()
        if not step.after:
            large, small = (*batch, step.before, step.contracted), (*batch, step.contracted, step.new)
            return (self._view(step.large, large), len(large)), (self._view(step.small, small), len(small))
        middle = (step.before,) if step.before else ()
        large = (*batch, *middle, step.contracted, step.after)
        small = (*batch, *(((),) if batch and middle else ()), step.new, step.contracted)
        return (self._view(step.small, small), len(small)), (self._view(step.large, large), len(large))

    def _elementwise(self, step: Step) -> str:
        large, small = [], []
        for axis in _grouped(step):
            large.append(axis if axis and axis[0] in step.large_indices else ())
            small.append(axis if axis and axis[0] in step.small_indices else ())
        return f"{self._view(step.large, tuple(large))} * {self._view(step.small, tuple(small))}"

    def _view(self, k: int, axes: Axes) -> str:
        """Operand k with the given axes: reshaped, and permuted only where its memory order differs."""
        wanted = [i for axis in axes for i in axis]
        held, text, shape = list(self.order[k]), f"v{k}", self.shape[k]
        if held != wanted:
            blocks = _blocks(held, wanted)
            sizes = self._sizes(tuple(blocks))
            if sizes != shape:
                text = f"TL.reshape({text}, {self._text(sizes)})"
            permutation = sorted(range(len(blocks)), key=lambda b: wanted.index(blocks[b][0]))
            text = f"TL.transpose({text}, {permutation})"
            shape = tuple(sizes[b] for b in permutation)
        sizes = self._sizes(axes)
        return text if sizes == shape else f"TL.reshape({text}, {self._text(sizes)})"

    def _sizes(self, axes: Axes) -> tuple[int, ...]:
        return tuple(-1 if TOKEN in axis else math.prod(self.plan.size[i] for i in axis) for axis in axes)

    @staticmethod
    def _text(sizes: tuple[int, ...]) -> str:
        return f"({', '.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"


def _grouped(step: Step) -> Axes:
    """The axes of a step's result as its product leaves them."""
    if step.contracted:
        batch = (step.batch,) if step.batch else ()
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


def _blocks(held: list[str], wanted: list[str]) -> list[Indices]:
    """The longest runs that stay together in both orders, in the order held."""
    blocks: list[Indices] = []
    for index in held:
        place = wanted.index(index)
        if blocks and place and wanted[place - 1] == blocks[-1][-1]:
            blocks[-1] = (*blocks[-1], index)
        else:
            blocks.append((index,))
    return blocks
