"""What a backend is, and how one is found by name. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module, metadata
from typing import Any, Protocol

from superlora_tn.contraction.plan import Plan
from superlora_tn.declare.bounds import KEPT_LINES
from superlora_tn.declare.cache import kept

GROUP = "superlora_tn.backends"
# Entry points are empty in a checkout that is not installed, so the backends we ship are known by name too.
BUILT_IN = {
    "tensorly_torch": "superlora_tn_backends.tensorly_torch",
    "numpy_reference": "superlora_tn_backends.numpy_reference",
}
DEFAULT = "tensorly_torch"


class Backend(Protocol):
    """A module with a `NAME` and a `compile`."""

    NAME: str

    def compile(self, plan: Plan) -> Callable[..., Any]:
        """A callable ``(*tensors, out=None, alpha=1.0, base=None, carried=None)`` contracting the plan's operands.

        The first operand of the apply route is x of shape (tokens, in). The result has the plan's output as
        (tokens, out), (out, in) or (members..., modes...), times alpha; with `out` it is added to `out` instead.
        With `base` W, out is the untouched output ``x W^T + b`` of a frozen layer: the backend may write to it, and
        has to give x the gradient of both. Where the callable has a `carry` too, ``carry(x, *nodes)`` contracts x with
        nodes that several plans have in common; `carried` is what it gave, whose `value` is the first operand.
        """
        ...


class BackendError(LookupError):
    """No backend of that name."""


def backends() -> tuple[str, ...]:
    """Names of all backends, ours and installed ones."""
    return tuple(sorted({*BUILT_IN, *(e.name for e in metadata.entry_points(group=GROUP))}))


@lru_cache
def backend(name: str = DEFAULT) -> Backend:
    """Load a backend by name.

    Raises:
        BackendError: there is none of that name.
    """
    for entry in metadata.entry_points(group=GROUP):
        if entry.name == name:
            return entry.load()  # type: ignore[no-any-return]
    if name not in BUILT_IN:
        raise BackendError(f"there is no backend '{name}'; installed backends are {', '.join(backends())}.")
    return import_module(BUILT_IN[name])


@kept(8192, KEPT_LINES, lambda _, plan, *__, **___: len(plan.names))
def compiled(plan: Plan, name: str = DEFAULT) -> Callable[..., Any]:
    """The plan as a callable of the named backend; equal plans compile once."""
    return backend(name).compile(plan)
