"""The default backend: a plan becomes a straight line of views and matrix products on TensorLy's PyTorch backend.

The line is generated as Python source once a plan (`print(program)` shows it), so that running it costs no loop, no
look-up and no planning, and Dynamo traces it whole. Large operands are only viewed; small ones are permuted.

While training, the line runs inside one autograd function with a generated backward line: one graph node in place of
one an operation, no output-sized temporary, the scale folded into small tensors. Where the update joins a frozen
linear layer (`base`), its gradient for x accumulates into the layer's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce, wraps
from typing import Any, cast

import torch
from tensorly.backend.pytorch_backend import PyTorchBackend
from torch import Tensor

from superlora_tn.contraction.plan import Plan
from superlora_tn.update.eager import as_given, is_differentiated, is_eager
from superlora_tn_backends.products import matmul, weighted_sum
from superlora_tn_backends.writer import backward_source, forward_source, run_source

NAME = "tensorly_torch"
# An instance of our own: TensorLy's global backend is neither read nor set.
TL = PyTorchBackend()
HALVES = frozenset((torch.float16, torch.bfloat16))
COMPLEX = frozenset((torch.complex32, torch.complex64, torch.complex128))


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
        is_matrix: whether it is x (..., in) times one matrix (out, in).
        run: the generated line in differentiable operations, ``(*tensors, out=None, alpha=1.0)``.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.run = _made(run_source(plan), "run")
        self._forward = _made(forward_source(plan), "forward")
        self._backward: dict[tuple[bool, ...], Callable[..., Any]] = {}
        single = plan.route == "apply" and len(plan.inputs) == 2
        self.is_matrix = single and plan.inputs[1] == (*plan.output[1:], *plan.inputs[0][1:])

    def __call__(
        self,
        *tensors: Tensor,
        out: Tensor | None = None,
        alpha: float = 1.0,
        base: Tensor | None = None,
        carried: Carried | None = None,
    ) -> Tensor:
        """Contract; with `out`, the result is added to it.

        Args:
            tensors: the plan's operands.
            out: (..., out); consumed: it may be written to.
            alpha: a factor of the result.
            base: W, when out is the output ``x W^T + b`` of a frozen linear layer and nothing else has used it.
            carried: where the first operand comes from, if `carry` of another program made it of that x.
        """
        with as_given(tensors[0]):
            if _is_fused(tensors):
                return self._eager(tensors, out, alpha, base, carried)
            return self._plain(tensors, out, alpha)

    def _plain(self, tensors: tuple[Tensor, ...], out: Tensor | None, alpha: float) -> Tensor:
        """The line whose gradients are autograd's own; real and complex operands meet by torch's promotion."""
        given = tensors if out is None else (*tensors, out)
        if any(t.is_complex() for t in given):
            common = reduce(torch.promote_types, [t.dtype for t in given])
            tensors, out = tuple(t.to(common) for t in tensors), None if out is None else out.to(common)
        return cast(Tensor, self.run(*tensors, out=out, alpha=alpha))

    def carry(self, x: Tensor, *nodes: Tensor) -> Carried:
        """x through the nodes, for several programs that each take it as their first operand; only where `is_eager`."""
        with as_given(x):
            if not _is_fused((x, *nodes)):
                return Carried(self._plain((x, *nodes), None, 1.0), x)
            if not is_differentiated() or not any(t.requires_grad for t in (x, *nodes)):
                return Carried(cast(Tensor, self.run(x, *nodes)), x)
            box = _Box()
            value = cast(Tensor, _apply(_Carry, self, box, x, *nodes))
            return Carried(value, x, (x, *nodes, *box.take()), box)

    def _eager(
        self, tensors: tuple[Tensor, ...], out: Tensor | None, alpha: float, base: Tensor | None, carried: Carried | None
    ) -> Tensor:
        if not is_differentiated() or not any(t.requires_grad for t in tensors):
            joined = (
                self.run(*tensors, out=out, alpha=alpha) if base is None else self._forward(*tensors, out=out, alpha=alpha)[0]
            )
            return cast(Tensor, joined)
        if base is None:
            result = cast(Tensor, _apply(_Contraction, self, alpha, carried, *tensors))
            return result if out is None else out + result.reshape(out.shape)
        assert out is not None
        return cast(Tensor, _apply(_FusedUpdate, self, alpha, base, out.detach(), carried, carried and carried.x, *tensors))

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


def _is_fused(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the generated backward lines are right: in eager mode, of real operands, since they conjugate nothing."""
    return is_eager() and COMPLEX.isdisjoint([t.dtype for t in tensors])


def _apply(function: Any, *arguments: Any) -> Any:
    return function.apply(*arguments)


def _in_given_dtypes(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    @wraps(backward)
    def run(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        with as_given(grad):
            return backward(ctx, grad)

    return run


class _Box:
    """Through it the gradients of those that took a carried tensor hand its maker what it needs for its own.

    The maker itself saves nothing. So several losses may come back through it one after the other, each with what its own
    layer saved; and what is saved is let go as the layers' gradients come.
    """

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: tuple[Tensor, ...] | None = None

    def put(self, tensors: tuple[Tensor, ...]) -> None:
        """Hand over."""
        self._held = tensors

    def take(self) -> tuple[Tensor, ...]:
        """What was handed over last, once."""
        held, self._held = self._held, None
        if held is None:
            raise RuntimeError("Trying to backward through the graph a second time; keep it by retain_graph=True.")
        return held


@dataclass(frozen=True)
class Carried:
    """x through nodes that several programs have in common.

    Attributes:
        value: the result, the first operand of the programs that follow.
        x: what was carried.
        tensors: what the gradient of the value needs: x, the nodes, intermediates. Whoever takes the value saves them.
        box: where they are handed over in backward; None without gradients.
    """

    value: Tensor
    x: Tensor
    tensors: tuple[Tensor, ...] = ()
    box: _Box | None = None


class _Carry(torch.autograd.Function):
    """The contraction that `Carried` holds."""

    @staticmethod
    def forward(ctx: Any, program: Program, box: _Box, *tensors: Tensor) -> Tensor:
        result, kept = program._forward(*tensors)
        ctx.program, ctx.box, ctx.count = program, box, len(tensors)
        box.put(tuple(kept))
        return result  # type: ignore[no-any-return]

    @staticmethod
    @_in_given_dtypes
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved, wanted = ctx.box.take(), tuple(ctx.needs_input_grad[2:])
        return (None, None, *_gradients(ctx.program, 1.0, saved[: ctx.count], saved[ctx.count :], wanted, grad))


class _Contraction(torch.autograd.Function):
    """The contraction of a plan's operands."""

    @staticmethod
    def forward(ctx: Any, program: Program, alpha: float, carried: Carried | None, *tensors: Tensor) -> Tensor:
        result, kept = program._forward(*tensors, alpha=alpha)
        _save(ctx, program, alpha, carried, tensors, kept)
        return result  # type: ignore[no-any-return]

    @staticmethod
    @_in_given_dtypes
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tensors, kept = _recall(ctx, ctx.saved_tensors, ctx.needs_input_grad[3])
        return (None, None, None, *_gradients(ctx.program, ctx.alpha, tensors, kept, tuple(ctx.needs_input_grad[3:]), grad))


class _FusedUpdate(torch.autograd.Function):
    """A frozen linear layer's output, adopted: the contraction is added in place, and backward covers both.

    The layer's own graph is left behind, so x gets its gradient here alone: ``g W``, added in place to the network's
    where x is the network's first operand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        program: Program,
        alpha: float,
        base: Tensor,
        out: Tensor,
        carried: Carried | None,
        x: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        _, kept = program._forward(*tensors, out=out, alpha=alpha)
        ctx.mark_dirty(out)
        _save(ctx, program, alpha, carried, tensors, kept, base)
        return out

    @staticmethod
    @_in_given_dtypes
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        base, *saved = ctx.saved_tensors
        source, *wanted = ctx.needs_input_grad[5:]
        tensors, kept = _recall(ctx, saved, wanted[0])
        single = ctx.program.is_matrix and ctx.box is None and tensors[1].shape == base.shape
        if single and all(wanted) and base.dtype not in HALVES and not torch.is_grad_enabled():
            # x comes back through W and dW at once: one product in place of two. In the halves their sum would lose dW.
            _, own = _gradients(ctx.program, ctx.alpha, tensors, kept, (False, True), grad)
            whole = torch.add(base, tensors[1], alpha=ctx.alpha)
            return (None, None, None, None, None, None, grad @ whole, own)
        grads = _gradients(ctx.program, ctx.alpha, tensors, kept, tuple(wanted), grad)
        apart = grad @ base if source else None
        if ctx.box is None and wanted[0]:
            # Last, as reading W pushes what the network's gradients read out of the caches.
            grads = (_add_product(grads[0], grad, base), *grads[1:])
        return (None, None, None, None, None, apart, *grads)


def _save(
    ctx: Any,
    program: Program,
    alpha: float,
    carried: Carried | None,
    tensors: tuple[Tensor, ...],
    kept: tuple[Tensor, ...],
    *more: Tensor,
) -> None:
    """Save a contraction's operands and intermediates, behind them what a carried first operand's maker will need."""
    ctx.program, ctx.alpha = program, alpha
    ctx.box = None if carried is None else carried.box
    handed = () if carried is None else carried.tensors
    ctx.counts = len(tensors), len(kept)
    ctx.save_for_backward(*more, *tensors, *kept, *handed)


def _recall(ctx: Any, saved: Sequence[Tensor], first: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The saved operands and intermediates; where the first operand wants its gradient, its maker's tensors go to it.

    `saved` was read once: checkpointing unpacks it for a single reading.
    """
    operands, intermediates = ctx.counts
    end = operands + intermediates
    if ctx.box is not None and first:
        ctx.box.put(tuple(saved[end:]))
    return tuple(saved[:operands]), tuple(saved[operands:end])


def _gradients(
    program: Program,
    alpha: float,
    tensors: tuple[Tensor, ...],
    kept: tuple[Tensor, ...],
    wanted: tuple[bool, ...],
    grad: Tensor,
) -> tuple[Any, ...]:
    """The gradients of a contraction's wanted operands, differentiable where they are to be."""
    if torch.is_grad_enabled():
        return _twice_differentiable(program, alpha, tensors, wanted, grad)
    return program.backward(wanted)(grad, alpha, *tensors, *kept)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total (..., in) += left (..., out) right (out, in), in place where its memory and who asks for it allow."""
    if torch.is_grad_enabled() or not is_eager():  # torch.func would write in place slice by slice
        return total + left @ right
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
