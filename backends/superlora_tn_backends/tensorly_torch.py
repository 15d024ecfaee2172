"""The default backend: a plan becomes a straight line of views and matrix products on TensorLy's PyTorch backend.

The line is generated as Python source once a plan (`print(program)` shows it), so that running it costs no loop, no
look-up and no planning, and Dynamo traces it whole. Large operands are only viewed; small ones are permuted.

While training, the line runs inside one autograd function with a generated backward line: one graph node in place of
one an operation, no output-sized temporary, the scale folded into small tensors. Where the update joins a frozen
linear layer (`base`), its gradient for x accumulates into the layer's own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, cast

import torch
from tensorly.backend.pytorch_backend import PyTorchBackend
from torch import Tensor

from superlora_tn.contraction.plan import Plan
from superlora_tn.update.eager import is_eager
from superlora_tn_backends.products import matmul, weighted_sum
from superlora_tn_backends.writer import backward_source, forward_source, run_source

NAME = "tensorly_torch"
# An instance of our own: TensorLy's global backend is neither read nor set.
TL = PyTorchBackend()
NOTHING = nullcontext()


def compile(plan: Plan) -> Program:
    """The plan as a `Program`; see `superlora_tn.contraction.backend.Backend`."""
    return Program(plan)


def _made(source: str, name: str) -> Callable[..., Any]:
    scope: dict[str, Any] = {"TL": TL, "torch": torch, "matmul": matmul, "weighted_sum": weighted_sum}
    exec(source, scope)  # the source is made of operand numbers and sizes alone
    return scope[name]  # type: ignore[no-any-return]


class Program:
    """A compiled plan: callable, printable (its source), picklable.

    Attributes:
        plan: what was compiled.
        run: the generated line in differentiable operations, ``(*tensors, out=None, alpha=1.0)``.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.run = _made(run_source(plan), "run")
        self._forward = _made(forward_source(plan), "forward")
        self._backward: dict[tuple[bool, ...], Callable[..., Any]] = {}

    def __call__(
        self,
        *tensors: Tensor,
        out: Tensor | None = None,
        alpha: float = 1.0,
        base: Tensor | None = None,
        through: Tensor | None = None,
    ) -> Tensor:
        """Contract; with `out`, the result is added to it.

        Args:
            tensors: the plan's operands.
            out: (..., out); consumed: it may be written to.
            alpha: a factor of the result.
            base: W, when out is the output ``x W^T + b`` of a frozen linear layer and nothing else has used it.
            through: that x, where it is not the first operand.
        """
        if not is_eager():
            return cast(Tensor, self.run(*tensors, out=out, alpha=alpha))
        with _as_given(tensors[0]):
            return self._eager(tensors, out, alpha, base, through)

    def _eager(
        self, tensors: tuple[Tensor, ...], out: Tensor | None, alpha: float, base: Tensor | None, through: Tensor | None
    ) -> Tensor:
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
            joined = (
                self.run(*tensors, out=out, alpha=alpha) if base is None else self._forward(*tensors, out=out, alpha=alpha)[0]
            )
            return cast(Tensor, joined)
        if base is None:
            result = cast(Tensor, _apply(_Contraction, self, alpha, *tensors))
            return result if out is None else out + result.reshape(out.shape)
        assert out is not None
        return cast(Tensor, _apply(_FusedUpdate, self, alpha, base, out.detach(), through, *tensors))

    def backward(self, wanted: tuple[bool, ...]) -> Callable[..., tuple[Tensor | None, ...]]:
        """The generated backward line for the operands whose gradient is wanted."""
        if wanted not in self._backward:
            self._backward[wanted] = _made(backward_source(self.plan, wanted), "backward")
        return self._backward[wanted]

    def __reduce__(self) -> tuple[Any, ...]:
        return (Program, (self.plan,))

    def __deepcopy__(self, memo: Any) -> Program:
        return self

    def __str__(self) -> str:
        return run_source(self.plan)


def _apply(function: Any, *arguments: Any) -> Any:
    return function.apply(*arguments)


def _as_given(tensor: Tensor) -> AbstractContextManager[Any]:
    """Compute in the dtypes as they are: the caller has cast, and autocast would cast a second time."""
    if not torch._C._is_any_autocast_enabled():  # 0.1 us, where the check below takes 0.7
        return NOTHING
    kind = tensor.device.type
    casting = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if casting else NOTHING


def _in_given_dtypes(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    @wraps(backward)
    def run(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        with _as_given(grad):
            return backward(ctx, grad)

    return run


class _Contraction(torch.autograd.Function):
    """The contraction of a plan's operands."""

    @staticmethod
    def forward(ctx: Any, program: Program, alpha: float, *tensors: Tensor) -> Tensor:
        result, kept = program._forward(*tensors, alpha=alpha)
        ctx.program, ctx.alpha, ctx.count = program, alpha, len(tensors)
        ctx.save_for_backward(*tensors, *kept)
        return result  # type: ignore[no-any-return]

    @staticmethod
    @_in_given_dtypes
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: checkpointing unpacks it for a single reading
        tensors, kept = saved[: ctx.count], saved[ctx.count :]
        wanted = tuple(ctx.needs_input_grad[2:])
        if torch.is_grad_enabled():
            return (None, None, *_twice_differentiable(ctx.program, ctx.alpha, tensors, wanted, grad))
        return (None, None, *ctx.program.backward(wanted)(grad, ctx.alpha, *tensors, *kept))


class _FusedUpdate(torch.autograd.Function):
    """A frozen linear layer's output, adopted: the contraction is added in place, and backward covers both.

    The layer's own graph is left behind, so x gets its gradient here alone: ``g W``, added in place to the network's
    where x is the network's first operand.
    """

    @staticmethod
    def forward(
        ctx: Any, program: Program, alpha: float, base: Tensor, out: Tensor, through: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        _, kept = program._forward(*tensors, out=out, alpha=alpha)
        ctx.mark_dirty(out)
        ctx.program, ctx.alpha, ctx.count = program, alpha, len(tensors)
        ctx.save_for_backward(base, *tensors, *kept)
        ctx.apart = through is not None
        return out

    @staticmethod
    @_in_given_dtypes
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        base, *saved = ctx.saved_tensors
        tensors, kept = tuple(saved[: ctx.count]), saved[ctx.count :]
        source, *wanted = ctx.needs_input_grad[4:]
        again = torch.is_grad_enabled()
        if again:
            grads = _twice_differentiable(ctx.program, ctx.alpha, tensors, tuple(wanted), grad)
        else:
            grads = ctx.program.backward(tuple(wanted))(grad, ctx.alpha, *tensors, *kept)
        apart = None
        if ctx.apart:
            apart = grad @ base if source else None
        elif wanted[0]:
            # Last, as reading W pushes what the network's gradients read out of the caches.
            grads = (grads[0] + grad @ base if again else _add_product(grads[0], grad, base), *grads[1:])
        return (None, None, None, None, apart, *grads)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total (..., in) += left (..., out) right (out, in), in place where its memory allows."""
    if total.ndim == 2:
        return total.addmm_(left, right)
    rows = total.reshape(-1, right.shape[1])
    return rows.addmm_(left.reshape(-1, right.shape[0]), right).view(total.shape)


def _twice_differentiable(
    program: Program, alpha: float, tensors: tuple[Tensor, ...], wanted: tuple[bool, ...], grad: Tensor
) -> tuple[Any, ...]:
    """Gradients that can be differentiated again: the plain line once more, through autograd.

    Of views of the operands, as an operand may depend on another one (x on the nodes, through an earlier layer).
    """
    views = [t.view_as(t) for t in tensors]
    result = program.run(*views, alpha=alpha)
    inputs = [t for t, want in zip(views, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(result, inputs, grad.reshape(result.shape), create_graph=True))
    return tuple(next(found) if want else None for want in wanted)
