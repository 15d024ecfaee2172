"""A stack of matrices, W + dW, that is not built where the code that reads it multiplies by it.

Experts are kept as one parameter (which, out, in), and a token meets a few of them. What reading such a parameter gives
stands for the tensor W + dW: a product by it is the product by W and x through the network of the expert that it meets, a
choice of experts is a choice, and any other function of torch gets the tensor itself, built for it. It has no memory of its
own, so that code which reads memory past torch cannot take W for W + dW.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from superlora_tn.model.kinds import LayerError
from superlora_tn.update.base import Member
from superlora_tn.update.together import thin

# The adapters' members of each matrix.
Members = Sequence[Sequence[Member]]
T: Any = Tensor  # whose properties are read from the class
# What is the same of the stand-in and of the tensor it stands for.
ALIKE = frozenset(
    [
        *(T.shape.__get__, T.dtype.__get__, T.device.__get__, T.ndim.__get__, T.layout.__get__, T.requires_grad.__get__),
        *(T.is_cuda.__get__, T.is_cpu.__get__, T.is_meta.__get__, T.size, T.dim, T.numel, T.__len__, T.is_floating_point),
        *(torch.is_floating_point, torch.numel, T.register_hook),
    ]
)
MATRICES = T.mT.__get__  # the one that turns the matrices of a stack without being told axes
ALIGNED = 16  # bytes that the rows of what a grouped product takes are a multiple of
PAST = "past torch's functions (by an extension or an autograd function); attach with at='weight', which builds W + dW."


class Stack(Tensor):
    """Stands for W + dW of a stack (which, out, in), of chosen ones of it, or of one matrix; see `Stack.of`."""

    _plain: Tensor  # W, looked at as the stand-in is
    _whole: Callable[[], Tensor]  # W + dW, likewise
    _members: Members  # of all matrices of the stack
    _slot: int | None  # which matrix, of one
    _chosen: Tensor | None  # which matrices, where some were chosen
    _turned: bool  # whether the last two axes are (in, out)
    _trains: bool  # whether it requires a gradient

    @classmethod
    def of(
        cls,
        base: Tensor,
        whole: Callable[[], Tensor],
        members: Members,
        turned: bool,
        slot: int | None = None,
        chosen: Tensor | None = None,
        trains: bool | None = None,
    ) -> Stack:
        """What stands for `whole()`.

        Args:
            base: W as it is looked at.
            whole: gives W + dW, looked at so.
            members: for each matrix of the stack, the adapters' that are active.
            turned: whether the last two axes are (in, out).
            slot: which matrix, of one.
            chosen: which matrices (chosen,), of some.
            trains: whether it requires a gradient; None asks the adapters.
        """
        if trains is None:
            trained = base.requires_grad or any(t.requires_grad for own in members for m in own for t in m.adapter.parameters())
            trains = torch.is_grad_enabled() and trained
        made: Any = T._make_wrapper_subclass(
            cls, base.shape, strides=base.stride(), dtype=base.dtype, device=base.device, requires_grad=trains
        )
        made._plain, made._whole, made._members = base, whole, members
        made._turned, made._slot, made._chosen, made._trains = turned, slot, chosen, trains
        if trains:
            made.register_hook(_refuse)
        return cast(Stack, made)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Products and views by the networks; all else by the tensor itself."""
        kwargs = kwargs or {}
        if func in ALIKE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        own, found = OWN.get(func), NotImplemented
        if own is not None and (placed := own.placed(args, kwargs)) is not None:
            found = own.run(func, *placed)
        return func(*_built(args), **_built(kwargs)) if found is NotImplemented else found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Reached past torch's functions alone."""
        raise LayerError(f"a stack of adapted weights was read by {func}, {PAST}")


def _refuse(gradient: Tensor) -> None:
    raise LayerError(f"a stack of adapted weights was differentiated {PAST}")


def _built(given: Any) -> Any:
    """Arguments with the tensors themselves in the place of what stands for them."""
    if isinstance(given, Stack):
        return given._whole()
    if isinstance(given, tuple | list):
        return type(given)(map(_built, given)) if type(given) in (tuple, list) else given
    return {k: _built(v) for k, v in given.items()} if type(given) is dict else given


def _viewed(stack: Stack, look: Callable[[Tensor], Tensor], turned: bool, slot: int | None, chosen: Tensor | None) -> Stack:
    whole = stack._whole
    return Stack.of(look(stack._plain), lambda: look(whole()), stack._members, turned, slot, chosen, stack._trains)


def _item(func: Any, stack: Any, index: Any) -> Any:
    """One matrix, or some."""
    if not isinstance(stack, Stack) or stack._plain.ndim != 3 or stack._chosen is not None or isinstance(index, bool):
        return NotImplemented
    if isinstance(index, Tensor):
        if index.dtype not in (torch.int64, torch.int32) or index.ndim > 1:
            return NotImplemented
        if index.ndim == 1:
            return _viewed(stack, lambda t: t[index], stack._turned, None, index)
        index = int(index)
    if not isinstance(index, int) or not -len(stack._members) <= index < len(stack._members):
        return NotImplemented
    return _viewed(stack, lambda t: t[index], stack._turned, index % len(stack._members), stack._chosen)


def _turn(func: Any, stack: Any, *dims: Any) -> Any:
    """The last two axes changed for one another."""
    if not isinstance(stack, Stack):
        return NotImplemented
    if stack._plain.ndim > 2 and not dims and func != MATRICES:
        return NotImplemented
    if dims and {d % stack._plain.ndim for d in dims} != {stack._plain.ndim - 2, stack._plain.ndim - 1}:
        return NotImplemented
    return _viewed(stack, lambda t: t.mT, not stack._turned, stack._slot, stack._chosen)


def _linear(func: Any, x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    """x through one matrix (out, in)."""
    if isinstance(x, Stack) or not isinstance(weight, Stack) or weight._slot is None or weight._turned:
        return NotImplemented
    return _updated(weight, x, func(x, weight._plain, bias))


def _updated(weight: Stack, x: Tensor, y: Tensor) -> Tensor:
    for member in weight._members[weight._slot or 0]:
        y = member.update(x, y)
    return y


def _product(func: Any, left: Any, right: Any) -> Any:
    """x by one matrix (in, out), or its blocks by each of a stack; or each of a stack (out, in) by blocks of columns."""
    if isinstance(left, Stack) and isinstance(right, Stack):
        return NotImplemented
    if isinstance(left, Stack):
        fits = not left._turned and left._slot is None and right.ndim == 3
        halves = _thin(left, right.shape[-1]) if fits else None
        if halves is None:
            return NotImplemented
        y = func(left._plain, right)
        right = right.to(y.dtype)
        return sum(((outer.to(y.dtype) @ (inner.to(y.dtype) @ right)) for outer, inner in halves), y)
    if right._slot is not None:
        return _updated(right, left, func(left, right._plain)) if right._turned and left.ndim > 1 else NotImplemented
    halves = _thin(right, left.shape[1]) if right._turned and left.ndim == 3 else None
    if halves is None:
        return NotImplemented
    y = func(left, right._plain)
    left = left.to(y.dtype)
    return sum(((left @ inner.mT.to(y.dtype)) @ outer.mT.to(y.dtype) for outer, inner in halves), y)


def _grouped(func: Any, x: Any, stack: Any, offs: Tensor | None = None, *more: Any) -> Any:
    """Runs of the rows of x, each by its matrix (in, out)."""
    if (
        any(value is not None for value in more)
        or isinstance(x, Stack)
        or x.ndim != 2
        or not stack._turned
        or (stack._slot, stack._chosen) != (None, None)
    ):
        return NotImplemented
    halves = _thin(stack, -(-len(x) // len(stack._members)))
    if halves is None:
        return NotImplemented
    y = func(x, stack._plain, offs=offs)
    for outer, inner in halves:
        spare = -inner.shape[-2] % (ALIGNED // y.element_size())
        outer, inner = functional.pad(outer, (0, spare)).to(y.dtype), functional.pad(inner, (0, 0, 0, spare)).to(y.dtype)
        thin = x @ inner.mT if inner.ndim == 2 else func(x, inner.mT, offs=offs)
        y = y + (thin @ outer.mT if outer.ndim == 2 else func(thin, outer.mT, offs=offs))
    return y


def _thin(stack: Stack, rows: int) -> list[tuple[Tensor, Tensor]] | None:
    """(outer, inner) of each adapter, of the matrices that are chosen; None where it has no such, or dW itself is cheaper."""
    if len({len(own) for own in stack._members}) > 1:  # an adapter on some of the matrices
        return None
    found: list[tuple[Tensor, Tensor]] = []
    for members in zip(*stack._members, strict=True):
        made = thin(members, rows)
        if made is None:
            return None
        chosen = stack._chosen
        pick = [half if chosen is None or half.ndim == 2 else half[chosen] for half in (made.outer, made.inner)]
        found.append((pick[0], pick[1]))
    return found


@dataclass(frozen=True)
class _Own:
    """What a function of torch does with a stand-in.

    Attributes:
        run: gives its result, or `NotImplemented`; called with the function and its arguments by their places.
        names: of its arguments, in order, as torch has them.
        least: how many of them have to be given.
    """

    run: Callable[..., Any]
    names: tuple[str, ...]
    least: int

    def placed(self, args: Sequence[Any], named: Mapping[str, Any]) -> list[Any] | None:
        """The arguments by their places, whichever way they were given; None where they are others than `run` knows of."""
        left = {name: value for name, value in named.items() if value is not None}  # None is all these arguments' default
        found = list(args)
        for name in self.names[len(found) :]:
            if name not in left:
                break
            found.append(left.pop(name))
        return None if left or not self.least <= len(found) <= len(self.names) else found


_TURNS = _Own(_turn, ("input", "dim0", "dim1"), 1)
_PRODUCTS = _Own(_product, ("input", "mat2"), 2)
OWN: dict[Any, _Own] = {
    Tensor.__getitem__: _Own(_item, ("self", "index"), 2),
    functional.linear: _Own(_linear, ("input", "weight", "bias"), 2),
    torch._grouped_mm: _Own(_grouped, ("input", "mat2", "offs", "bias", "out_dtype"), 2),
    **dict.fromkeys((torch.transpose, T.transpose, MATRICES, T.T.__get__, T.t, torch.t), _TURNS),
    **dict.fromkeys((torch.bmm, Tensor.bmm, torch.mm, Tensor.mm), _PRODUCTS),
    **dict.fromkeys((torch.matmul, Tensor.matmul), _Own(_product, ("input", "other"), 2)),
}
