"""Which way of contracting LoHa is cheapest? The planner's against two others, as overhead over the frozen layer.

`planned` joins the factors of each side (r^2 terms) and goes through them like LoRA; `build dW` is the delta route;
`one pair at a time` never joins: for each r, x * A1_r goes through A2, B2 and B1_r; `by MKL` is the planned one with
oneDNN switched off (see superlora_tn_backends/products.py). The floors count what the planned one cannot do without:
FLOPs at the rate of the frozen layer's own products, and bytes at the rate of a copy, one after the other.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import harness
import torch
from layer_overhead import SHAPES, frozen, linear, ours, peft_layer, randomise, step
from torch import Tensor, nn

import superlora_tn as sl
from superlora_tn.tools.measure import fastest

RANK = 8


class OnePair(nn.Module):
    """LoHa without joined factors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = frozen(width)
        self.a1, self.a2 = (nn.Parameter(torch.empty(RANK, width)) for _ in range(2))
        self.b1, self.b2 = (nn.Parameter(torch.empty(width, RANK)) for _ in range(2))
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self.base(x)
        for r in range(RANK):
            y = y + ((x * self.a1[r]) @ self.a2.T @ self.b2.T) * self.b1[:, r]
        return y


def built(width: int) -> nn.Module:
    """The delta route, forced."""
    model = nn.ModuleDict({"layer": nn.Linear(width, width)})
    randomise(sl.attach(model, sl.loha(RANK), ["layer"], route="delta"))
    return model["layer"]


def by_mkl(run: Callable[[], None]) -> Callable[[], None]:
    """A run without oneDNN."""

    def without() -> None:
        with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
            run()

    return without


def floors(width: int, tokens: int, frozen_seconds: float) -> dict[str, float]:
    """Least overheads as fractions of the frozen layer's step: by FLOPs, and with the bytes of large tensors.

    Bytes: x and the gradient are read twice, the output and x's gradient are read and written; each joined factor is
    written and read twice, its gradient is written and read twice.
    """
    flops = 6 * 2 * tokens * width * RANK**2 / (4 * tokens * width * width)
    large, joined = tokens * width, width * RANK**2
    large_copy = torch.empty(1 << 24)
    source = torch.randn(1 << 24)
    rate = 2 * 4 * source.numel() / fastest(lambda: large_copy.copy_(source), torch.device("cpu"))
    moved = 4 * (8 * large + 2 * 4 * joined + 2 * 3 * joined)
    return {"floor by FLOPs": flops, "floor by FLOPs and bytes": flops + moved / rate / frozen_seconds}


def main() -> None:
    """Measure all shapes."""
    args = harness.arguments(__doc__ or "", repeats=21)
    rows = []
    for width, tokens in SHAPES:
        x, gradient = torch.randn(1, tokens, width, requires_grad=True), torch.randn(1, tokens, width)
        layers = {
            "frozen": frozen(width),
            "planned": ours(linear(width), sl.loha(RANK)),
            "build dW": built(width),
            "one pair at a time": OnePair(width),
            "peft_lora": peft_layer(linear(width), "Lora", lora_alpha=RANK),
        }
        runs = {n: step(layer, x, gradient) for n, layer in layers.items()}
        times = harness.interleaved({**runs, "by MKL": by_mkl(runs["planned"])}, args.repeats)
        over = harness.overheads(times, "frozen")
        floor = floors(width, tokens, statistics.median(times["frozen"]))
        rows.append({"width": width, "tokens": tokens, **over, **floor})
    harness.report("loha_designs", args, rows)


if __name__ == "__main__":
    main()
