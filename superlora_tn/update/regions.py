"""How strongly an adapter acts while a checkpointed region is computed again: as it did the first time.

Strengths, and which rows of a batch meet an adapter, belong to a call of the model, and may be others by the time that backward
computes a region of it again. torch keeps the random state and autocast for that, and nothing else of what a region reads. So
what it reads of an adapter is noted under the region that reads it, for as long as torch keeps that, and given back in the same
order of changes: a region that changes strengths itself changes them again.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.utils.checkpoint
from torch import Tensor

_INNERMOST = torch._C._autograd._top_saved_tensors_default_hooks
# torch's record of a region. It has no public name: without it what is computed again acts as it does by then.
_FRAME: Any = getattr(torch.utils.checkpoint, "_CheckpointFrame", ())
# A checkpointed region, as torch keeps it, and which time it is computed again; None the first time.
Region = tuple[Any, Any]


def saved_tensor_hooks() -> Any:
    """The innermost hooks on saved tensors, or None; within a checkpointed region they are the region's own."""
    return _INNERMOST(True)


def region(hooks: Any) -> Region | None:
    """The checkpointed region, not a re-entrant one, whose hooks on saved tensors these are; torch has no public question."""
    pack = hooks[0]
    if isinstance(pack, partial):
        found, run = pack.args if pack.func is _detached else (None, None)
        return None if found is None or found() is None else (found(), run)
    for cell in getattr(inspect.unwrap(pack), "__closure__", None) or ():
        held = cell.cell_contents
        if isinstance(held, _FRAME):
            return held, None
        if isinstance(held, ref) and isinstance(held(), _FRAME):
            return held(), pack
    return None


def _detached(frame: Any, run: Any, tensor: Tensor) -> Tensor:
    return tensor.detach()


def detaching() -> Any:
    """What saves a tensor detached where a region should not see that it is saved, and still tells which region it is in."""
    hooks = saved_tensor_hooks()
    found = None if hooks is None else region(hooks)
    return partial(_detached, None, None) if found is None else partial(_detached, ref(found[0]), found[1])


class Acting:
    """Stands for how the adapters of a handle act between two changes.

    Attributes:
        merged: whether dW is in the weights; then nothing of another time is given back, as W is another one too.
    """

    __slots__ = ("merged",)

    def __init__(self, merged: bool = False) -> None:
        self.merged = merged


class _Notes:
    """What one region read: in which states, one after the other, and what in each; and the states of computing it again."""

    __slots__ = ("again", "read", "run", "states")

    def __init__(self) -> None:
        self.states: list[tuple[Any, ...]] = []
        self.read: dict[Hashable, Any] = {}
        self.run: Any = None
        self.again: list[tuple[Any, ...]] = []


class Regions:
    """What checkpointed regions read of the adapters of one handle."""

    def __init__(self) -> None:
        self._notes: WeakKeyDictionary[Any, _Notes] = WeakKeyDictionary()

    def first(self, who: Hashable, now: Any, *state: Any) -> Any:
        """What stood in the place of `now` when the region was computed for the first time; outside of any, and then, `now`.

        Args:
            who: what it is.
            now: what it is now.
            state: objects of which one is another after every change; the first an `Acting`.
        """
        hooks = saved_tensor_hooks()
        found = None if hooks is None else region(hooks)
        if found is None:
            return now
        frame, run = found
        notes = self._notes.setdefault(frame, _Notes())
        if run is not None and notes.run is not run:
            notes.run, notes.again = run, []
        key = (_place(notes.states if run is None else notes.again, state), who, state[0].merged)
        if run is None:
            notes.read[key] = now
        return notes.read.get(key, now)


def _place(states: list[tuple[Any, ...]], state: tuple[Any, ...]) -> int:
    """Which of the states this is, in the order in which they were met."""
    for k, known in enumerate(states):
        if all(one is other for one, other in zip(known, state, strict=True)):
            return k
    states.append(state)
    return len(states) - 1
