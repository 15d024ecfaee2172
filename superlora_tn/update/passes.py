"""What the layers of one call of a model share, and for how long: a pass.

A pass is opened when a handle's model is called and closed when that call returns or raises. It is known to the thread it
runs in alone; passes of nested calls lie on one another. What is made in it serves the same pass, in the same grad mode,
for the same parameters. A layer that is called outside of any pass computes alone, with the same result.

Shared tensors are made by `lasting`, which saves nothing where the graph of the layers could see it. So checkpointing finds
the same saved tensors whether a block is computed in a pass or again outside of it, and two losses of one pass may be
differentiated one after the other, as with plain LoRA.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from superlora_tn.update.eager import is_eager

Made = Any  # what a pass keeps: a tensor, or tensors by key
State = tuple[tuple[int, int, int], ...]
PLAIN = (Tensor, nn.Parameter)
Rows = tuple[tuple[int, ...], int]  # which rows of a batch are meant, of how many


def state(nodes: Sequence[Tensor]) -> State:
    """Which tensors these are, where they lie, and how often each was written."""
    return tuple((id(t), t.data_ptr() if type(t) in PLAIN else 0, 0 if t.is_inference() else t._version) for t in nodes)


def _mode() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def saved_tensor_hooks() -> Any:
    """The innermost hooks on saved tensors, or None; within a checkpointed region they are the region's own."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


class Pass:
    """One call of the model, or one backward pass that computes layers again.

    Attributes:
        frame: the Python frame that makes the call; None for a backward pass.
        hooks: the hooks on saved tensors when it was opened.
        kept: what was made without x, by (who, grad mode).
        carried: x through the nodes that siblings share, by who.
        shown: the weights of the module that read them last (see `model.shown`).
        whole: whether every weight's dW is wanted, so that making all at once pays in any case.
    """

    __slots__ = ("carried", "frame", "hooks", "kept", "shown", "whole")

    def __init__(self, frame: FrameType | None, whole: bool = False) -> None:
        self.frame, self.hooks, self.whole = frame, saved_tensor_hooks(), whole
        self.kept: dict[Hashable, tuple[State, Made]] = {}
        self.carried: dict[Hashable, Any] = {}
        self.shown: tuple[Any, dict[str, Any]] = (None, {})

    @property
    def is_running(self) -> bool:
        """Whether the call is under way: an interrupt (Ctrl-C) ends it without a word to any hook."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame is self.frame:
                return True
            frame = frame.f_back
        return self.frame is None

    @property
    def in_its_own_graph(self) -> bool:
        """Whether tensors saved now are kept as those at the pass's beginning: not within a checkpointed region of it."""
        return bool(saved_tensor_hooks() == self.hooks)


class _Stack(threading.local):
    """A thread's passes, the innermost last, and by its number the backward pass that it is in."""

    def __init__(self) -> None:
        self.passes: list[Pass] = []
        self.again: dict[int, Pass] = {}
        self.rows: Rows | None = None


class Passes:
    """The passes of one handle. They belong to their threads: a copy of the handle has none."""

    def __init__(self) -> None:
        self._stack = _Stack()
        self.ddp = False  # whether the last call came from a DDP module without a static graph
        self._fixed: dict[Hashable, tuple[State, Made]] | None = None

    @property
    def rows(self) -> Rows | None:
        """Which rows of a batch meet the adapter in this thread; None for all."""
        return self._stack.rows

    @rows.setter
    def rows(self, rows: Rows | None) -> None:
        self._stack.rows = rows

    def open(self, frame: FrameType) -> None:
        """A call of the model begins, made by this frame."""
        passes = self._stack.passes
        while passes and not passes[-1].is_running:
            passes.pop()
        passes.append(Pass(frame))

    def close(self, frame: FrameType) -> None:
        """The call that this frame made is over, and whatever was opened within it."""
        passes = self._stack.passes
        for k in reversed(range(len(passes))):
            if passes[k].frame is frame:
                del passes[k:]
                return

    def current(self) -> Pass | None:
        """The innermost pass of this thread; in a backward pass that computes checkpointed layers again, that one."""
        passes = self._stack.passes
        while passes:
            if passes[-1].is_running:
                return passes[-1]
            passes.pop()
        task = torch._C._current_graph_task_id()
        if task < 0:
            return None
        if saved_tensor_hooks() is None:
            self._check_ddp()
            return None
        again = self._stack.again
        if task not in again:
            again.clear()
            again[task] = Pass(None)
            # At the end of the backward pass, in whatever thread that is.
            torch.autograd.Variable._execution_engine.queue_callback(again.clear)
        return again[task]

    def _check_ddp(self) -> None:
        """Layers are computed again in backward, by re-entrant checkpointing: gradients of shared nodes come one by one."""
        if self.ddp and torch.is_grad_enabled():
            self.ddp = False
            warnings.warn(
                "layers that share factors run under DistributedDataParallel with re-entrant checkpointing: DDP takes the "
                "first of their gradients for the whole, as with any shared parameter. Checkpoint with use_reentrant=False, "
                "or wrap with static_graph=True.",
                stacklevel=4,
            )

    def kept(self, who: Hashable, nodes: Sequence[Tensor], make: Callable[[], Made]) -> Made | None:
        """What `make` gives, made once in this pass and grad mode for these nodes; None outside of any pass."""
        if not is_eager():
            return None
        key, fixed = (who, _mode()), self._fixed
        if fixed is not None and not torch.is_grad_enabled():
            return self._from(fixed, key, nodes, make)
        found = self.current()
        return None if found is None else self._from(found.kept, key, nodes, make)

    @staticmethod
    def _from(
        store: dict[Hashable, tuple[State, Made]], key: Hashable, nodes: Sequence[Tensor], make: Callable[[], Made]
    ) -> Made:
        now, held = state(nodes), store.get(key)
        if held is None or held[0] != now:
            held = store[key] = (now, make())
        return held[1]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """A pass for the length of a block of code, in which every weight's dW is wanted."""
        passes = self._stack.passes
        passes.append(Pass(sys._getframe(2), whole=True))  # the block's frame; between lies contextlib's
        depth = len(passes)
        try:
            yield
        finally:
            del passes[depth - 1 :]

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Within this block passes without gradients share what they make with one another."""
        before, self._fixed = self._fixed, {}
        try:
            yield
        finally:
            self._fixed = before

    def __deepcopy__(self, memo: Any) -> Passes:
        return Passes()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Passes, ())


def _unseen() -> AbstractContextManager[Any]:
    """Within it, hooks on saved tensors (of a checkpointed region, say) see nothing."""
    if saved_tensor_hooks() is None:
        return nullcontext()
    # Detached, as a tensor that is its own operation's saved result would keep itself alive.
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda tensor: tensor)


class _Lasting(torch.autograd.Function):
    """What `build` makes of the nodes, with a graph of its own that lasts as long as the result's."""

    @staticmethod
    def forward(ctx: Any, build: Callable[[Sequence[Tensor]], Tensor], *nodes: Tensor) -> Tensor:
        ctx.build, ctx.nodes = build, nodes
        wanted = ctx.needs_input_grad[1:]
        with _unseen(), torch.enable_grad():
            views = [n.detach().requires_grad_(want) for n, want in zip(nodes, wanted, strict=True)]
            value = build(views)
        ctx.views = views
        ctx.edge = torch.autograd.graph.get_gradient_edge(value)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[1:]
        again = torch.is_grad_enabled()
        # Views, as a node may depend on another one.
        views = [n.view_as(n) for n in ctx.nodes] if again else ctx.views
        made = ctx.build(views) if again else ctx.edge
        inputs = [v for v, want in zip(views, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(made, inputs, grad, retain_graph=True, create_graph=again))
        return (None, *(next(found) if want else None for want in wanted))


def lasting(build: Callable[[Sequence[Tensor]], Tensor], nodes: Sequence[Tensor]) -> Tensor:
    """``build(nodes)``, whose gradient can be taken more than once and which saves nothing that a checkpoint could count.

    Args:
        build: a differentiable function of the nodes alone.
        nodes: its operands.
    """
    if not is_eager() or not torch.is_grad_enabled() or not any(n.requires_grad for n in nodes):
        return build(nodes)
    result: Tensor = _Lasting.apply(build, *nodes)  # type: ignore[no-untyped-call]
    return result
