"""Products of two matrices, not differentiable, by oneDNN where torch's own BLAS leaves half of the processor idle.

torch multiplies float32 matrices with Intel's MKL, which takes its AVX2 kernels on other makers' processors. oneDNN,
which torch carries too, takes AVX-512 wherever it is: twice the FLOP/s on an AMD EPYC (benchmarks/loha_designs.py).
Which one is taken hangs on the processor and the sizes alone, so that a program gives the same bits in each run; torch's
own switch, ``torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)``, turns it off.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from superlora_tn.update.eager import is_eager

PLAIN = (Tensor, nn.Parameter)
# oneDNN's call costs more, and more again where caches are cold. So from this many multiply-adds on, where two of the
# three sizes are this large, and where it does not copy a long left side into rows for few columns. Of matrices with gaps
# it makes loops a hundred times as slow.
WORTH, NARROW, LONG = 1 << 23, 64, 32
# `weighted_sum` adds up to so many rows one by one, where they are so long.
FEW, ROW = 16, 512


@lru_cache(maxsize=1)
def _onednn() -> Callable[..., Tensor] | None:
    """oneDNN's ``x (m, k), w (n, k) -> x w^T``, where it is the faster one; torch.compile lowers products to it too."""
    processor: Any = getattr(torch.cpu, "get_capabilities", dict)()
    wide = processor.get("avx512_f", False) and "Intel" not in processor.get("cpu_name", "Intel")
    if not (wide and torch._C.has_mkl):
        return None
    try:
        linear = torch.ops.mkldnn._linear_pointwise.default
        with torch.inference_mode(False), torch.no_grad():
            one = torch.ones(1, 1, dtype=torch.float32, device="cpu")
            linear(one, one, None, "none", [], "")
        torch._C._len_torch_dispatch_stack()
    except (AttributeError, RuntimeError, TypeError):  # another release of torch
        return None
    return cast(Callable[..., Tensor], linear)


def _chosen(a: Tensor, b: Tensor) -> Callable[..., Tensor] | None:
    """oneDNN for plain float32 matrices that are worth it. A mode that watches operations sees the usual ones.

    And so does a level of forward-mode differentiation, in which a gradient may have a tangent that oneDNN would drop.
    """
    (m, k), n = a.shape, b.shape[1]
    if (
        m * k * n < WORTH
        or sorted((m, k, n))[1] < NARROW
        or not (a.is_contiguous() or (a.t().is_contiguous() and k <= LONG * n))
        or not (b.is_contiguous() or b.t().is_contiguous())
        or a.dtype is not torch.float32
        or a.device.type != "cpu"
        or type(a) not in PLAIN
        or type(b) not in PLAIN
        or not torch.backends.mkldnn.enabled
        or not is_eager()
        or torch._C._len_torch_dispatch_stack()
    ):
        return None
    return _onednn()  # asked last: it finds out by trying once, which has to be outside of modes


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) times b (k, n)."""
    linear = _chosen(a, b)
    return torch.matmul(a, b) if linear is None else linear(a, b.t(), None, "none", [], "")


def weighted_sum(a: Tensor, weights: Tensor, axis: int) -> Tensor:
    """The sum over an axis of a times weights, which broadcasts; not the last axis.

    Few long rows are added up one by one, with no temporary of a's size.
    """
    if not 0 < a.shape[axis] <= FEW or a.shape[-1] < ROW:
        return torch.sum(a * weights, axis)
    parts, factors = a.unbind(axis), weights.unbind(axis)
    total = parts[0] * factors[0]
    for part, factor in zip(parts[1:], factors[1:], strict=True):
        total.addcmul_(part, factor)
    return total
