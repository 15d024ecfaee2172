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
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes

from superlora_tn.update.eager import is_differentiated, is_eager
from superlora_tn.update.regions import Acting, Regions, detaching, saved_tensor_hooks

T = TypeVar("T")
Made = Any  # what a pass keeps: a tensor, or tensors by key
State = tuple[tuple[int, int, int], ...]
# In which state of which tensors something was made (they are held: another could get the id of one that is gone), and it.
Store = dict[Hashable, tuple[tuple[State, tuple[Tensor, ...]], Made]]
PLAIN = (Tensor, nn.Parameter)
Rows = tuple[tuple[int, ...], int]  # which rows of a batch are meant, of how many


def state(nodes: Sequence[Tensor]) -> State | None:
    """Which tensors these are, where they lie, and how often each was written; None where nothing counts the latter."""
    if any(t.is_inference() for t in nodes):
        return None
    return tuple((id(t), t.data_ptr() if type(t) in PLAIN else 0, t._version) for t in nodes)


def _mode() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


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
        self.kept: Store = {}
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
        return self.frame is not None and bool(saved_tensor_hooks() == self.hooks)


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
        self._fixed: Store | None = None
        self._fixing, self._lock = 0, threading.Lock()
        self._regions, self._acting = Regions(), Acting()

    def changed(self, merged: bool) -> None:
        """The handle's adapters act otherwise from now on."""
        self._acting = Acting(merged)

    def first(self, who: Hashable, now: T) -> T:
        """`now`, or what it was when the checkpointed region that is computed again was computed first; see `Regions.first`."""
        if is_compiling() or saved_tensor_hooks() is None:
            return now
        found: T = self._regions.first(who, now, self._acting, self._stack.rows)
        return found

    @property
    def rows(self) -> Rows | None:
        """Which rows of a batch meet the adapter in this thread; None for all."""
        return self.first("rows", self._stack.rows)

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
        if self.ddp and is_differentiated():
            self.ddp = False
            warnings.warn(
                "layers that share factors run under DistributedDataParallel with re-entrant checkpointing: DDP takes the "
                "first of their gradients for the whole, as with any shared parameter. Checkpoint with use_reentrant=False, "
                "or wrap with static_graph=True.",
                stacklevel=4,
            )

    def kept(self, who: Hashable, nodes: Sequence[Tensor], make: Callable[[], Made]) -> Made | None:
        """What `make` gives, made once in this pass and grad mode for these nodes; None outside of any pass."""
        if not is_eager() or (now := state(nodes)) is None:
            return None
        store = self._fixed
        if store is None or is_differentiated():
            found = self.current()
            if found is None:
                return None
            store = found.kept
        key = (who, _mode())
        held = store.get(key)
        if held is None or held[0][0] != now:
            with unseen():
                held = store[key] = ((now, tuple(nodes)), make())
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
        with self._lock:  # blocks of several threads, or coroutines, may overlap
            self._fixing += 1
            self._fixed = {} if self._fixed is None else self._fixed
        try:
            yield
        finally:
            with self._lock:
                self._fixing -= 1
                self._fixed = self._fixed if self._fixing else None

    def __deepcopy__(self, memo: Any) -> Passes:
        return Passes()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Passes, ())


def unseen() -> AbstractContextManager[Any]:
    """Within it, a checkpointed region sees neither the tensors that are saved nor the operations that run.

    What is shared may be made in a region the first time and not when the region runs again, or the other way round.
    """
    return _NOTHING if saved_tensor_hooks() is None else _unseen()


_NOTHING = nullcontext()


@contextmanager
def _unseen() -> Iterator[None]:
    # Detached, as a tensor that is its own operation's saved result would keep itself alive.
    kept = torch.autograd.graph.saved_tensors_hooks(detaching(), lambda tensor: tensor)
    # Selective checkpointing counts operations by a dispatch mode.
    modes = _disable_current_modes() if torch._C._len_torch_dispatch_stack() else _NOTHING
    with kept, modes:
        yield


class _Lasting(torch.autograd.Function):
    """What `build` makes of the nodes, with a graph of its own.

    That graph goes with the first backward pass that does not retain the graph, as a loss may be kept for long after it. A
    later one, of another loss of the same pass, builds it again.
    """

    @staticmethod
    def forward(ctx: Any, build: Callable[[Sequence[Tensor]], Tensor], *nodes: Tensor) -> Tensor:
        ctx.build, ctx.nodes, ctx.state = build, nodes, state(nodes)
        ctx.views, value = _apart(ctx)
        ctx.edge = torch.autograd.graph.get_gradient_edge(value)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        wanted, again = ctx.needs_input_grad[1:], torch.is_grad_enabled()
        made: Any = ctx.edge
        if again or made is None:
            if state(ctx.nodes) != ctx.state:
                raise RuntimeError(
                    "the adapter's parameters were modified by an inplace operation (an optimizer's step?) between a call of "
                    "the model and this backward pass through it; take all gradients first."
                )
            views, made = _connected(ctx) if again or not is_eager() else _apart(ctx)  # torch.func makes no leaves
        else:
            views = ctx.views
        inputs = [v for v, want in zip(views, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(made, inputs, grad, retain_graph=True, create_graph=again))
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.edge = ctx.views = None
        return (None, *(next(found) if want else None for want in wanted))


def _apart(ctx: Any) -> tuple[list[Tensor], Tensor]:
    """Leaves that lie where the nodes do, and what is built of them."""
    with unseen(), torch.enable_grad():
        views = [n.detach().requires_grad_(want) for n, want in zip(ctx.nodes, ctx.needs_input_grad[1:], strict=True)]
        return views, ctx.build(views)


def _connected(ctx: Any) -> tuple[list[Tensor], Tensor]:
    """Views of the nodes, as one may depend on another, and what is built of them: a gradient that can be differentiated."""
    with torch.enable_grad():
        views = [n.view_as(n) for n in ctx.nodes]
        return views, ctx.build(views)


def lasting(build: Callable[[Sequence[Tensor]], Tensor], nodes: Sequence[Tensor]) -> Tensor:
    """``build(nodes)``, whose gradient can be taken more than once and which saves nothing that a checkpoint could count.

    Args:
        build: a differentiable function of the nodes alone.
        nodes: its operands.
    """
    if not is_eager():
        return build(nodes)
    if not is_differentiated() or not any(n.requires_grad for n in nodes):
        with unseen():
            return build(nodes)
    result: Tensor = _Lasting.apply(build, *nodes)  # type: ignore[no-untyped-call]
    return result
