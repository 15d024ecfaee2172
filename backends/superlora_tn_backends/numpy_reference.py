"""The reference backend: contracts the whole equation at once, in numpy and double precision, and ignores the plan's steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from superlora_tn.contraction.plan import Plan
from superlora_tn.declare.parts import TOKEN

NAME = "numpy_reference"


def _wide(value: Any) -> np.ndarray:
    """In float64, or complex128 where it is complex."""
    array = np.asarray(value)
    return array.astype(np.result_type(array, np.float64), copy=False)


def compile(plan: Plan) -> Callable[..., np.ndarray]:
    """A callable that gives an array; its arguments are those of `superlora_tn.contraction.backend.Backend`."""
    number = {name: k for k, (name, _) in enumerate(plan.sizes)}

    def shape(indices: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(-1 if i == TOKEN else plan.size[i] for i in indices)

    def run(*arrays: Any, out: Any = None, alpha: float = 1.0, base: Any = None, carried: Any = None) -> np.ndarray:
        operands: list[Any] = []
        for array, indices in zip(arrays, plan.inputs, strict=True):
            operands += [_wide(array).reshape(shape(indices)), [number[i] for i in indices]]
        result: np.ndarray = np.einsum(*operands, [number[i] for i in plan.output])
        flat = [-1 if TOKEN in axis else int(np.prod([plan.size[i] for i in axis], dtype=np.int64)) for axis in plan.result]
        result = alpha * result.reshape(flat)
        return result if out is None else _wide(out) + result.reshape(np.shape(out))

    return run
