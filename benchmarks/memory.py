"""How much more memory does a training step peak at than the frozen layer's, beside PEFT's LoRA?

Counted by torch's profiler of allocations, so exact: the highest sum of live bytes within a step, less that of the
frozen layer, gradients of the parameters included.
"""

from __future__ import annotations

import harness
import torch
from layer_overhead import SHAPES, contestants, step
from torch import Tensor, nn


def peak(layer: nn.Module, x: Tensor, gradient: Tensor) -> int:
    """The highest sum of live bytes within one step, counted from a state without gradients."""
    run = step(layer, x, gradient)
    run()
    # What the step would free at its start was not seen being allocated, and would count as negative.
    x.grad = None
    layer.zero_grad(set_to_none=True)
    return harness.highest_live(run)


def main() -> None:
    """Measure all shapes."""
    args = harness.arguments(__doc__ or "")
    rows = []
    for width, tokens in SHAPES:
        x = torch.randn(1, tokens, width, requires_grad=True)
        gradient = torch.randn(1, tokens, width)
        peaks = {name: peak(layer, x, gradient) for name, layer in contestants(width).items()}
        frozen = peaks.pop("frozen")
        rows.append(
            {"width": width, "tokens": tokens, "frozen MB": frozen / 1e6, **{n: (p - frozen) / 1e6 for n, p in peaks.items()}}
        )
    harness.report("memory", args, rows)


if __name__ == "__main__":
    main()
