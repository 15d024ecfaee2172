"""Results that are kept, as `functools.lru_cache` keeps them, and bounded by how much they hold, not by their number alone."""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import update_wrapper
from threading import Lock
from typing import Generic, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def forked() -> Lock:
    """A lock for as long as the process runs; a fork waits for it, or what another thread had locked would stay so."""
    lock = Lock()
    if sys.platform != "win32":
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock


class Info(NamedTuple):
    """What `functools.lru_cache` tells of itself, and the weight of what is kept."""

    hits: int
    misses: int
    maxsize: int
    currsize: int
    weight: int


class Kept(Generic[P, R]):
    """A function whose results are kept, the least recently used one let go first.

    Args:
        make: the function, of hashable arguments.
        most: results that are kept at most.
        heaviest: their weight together at most; a result of more is not kept at all.
        weigh: the weight of a result, from it and the arguments.
    """

    def __init__(self, make: Callable[P, R], most: int, heaviest: int, weigh: Callable[..., int]) -> None:
        self.make, self.most, self.heaviest, self.weigh = make, most, heaviest, weigh
        self._kept: OrderedDict[Hashable, tuple[R, int]] = OrderedDict()
        self._lock = forked()
        self._hits = self._misses = self._weight = 0
        update_wrapper(self, make)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The result for these arguments: the kept one, or a new one."""
        key: Hashable = (args, tuple(sorted(kwargs.items()))) if kwargs else args
        try:
            with self._lock:
                found = self._kept.get(key)
                if found is not None:
                    self._hits += 1
                    self._kept.move_to_end(key)
                    return found[0]
        except TypeError:  # an argument without a hash: the function says what is wrong with it, or takes it as it is
            return self.make(*args, **kwargs)
        # Outside of the lock: it may take long, and may ask for other results of the same function.
        result = self.make(*args, **kwargs)
        return self._keep(key, result, self.weigh(result, *args, **kwargs))

    def _keep(self, key: Hashable, result: R, weight: int) -> R:
        with self._lock:
            self._misses += 1
            if weight > self.heaviest:
                return result
            known = self._kept.setdefault(key, (result, weight))
            if known[0] is result:
                self._weight += weight
            while len(self._kept) > self.most or self._weight > self.heaviest:
                _, (_, oldest) = self._kept.popitem(last=False)
                self._weight -= oldest
            return known[0]

    def cache_info(self) -> Info:
        """How often a result was there, and what is kept now."""
        with self._lock:
            return Info(self._hits, self._misses, self.most, len(self._kept), self._weight)

    def cache_clear(self) -> None:
        """Let everything go."""
        with self._lock:
            self._kept.clear()
            self._hits = self._misses = self._weight = 0

    def __reduce__(self) -> str:
        return self.make.__qualname__  # pickled by its name, as functions are


def kept(most: int, heaviest: int, weigh: Callable[..., int]) -> Callable[[Callable[P, R]], Kept[P, R]]:
    """Keep a function's results, see `Kept`."""
    return lambda make: Kept(make, most, heaviest, weigh)
