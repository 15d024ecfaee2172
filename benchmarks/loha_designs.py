"""Which way of contracting LoHa is cheapest? The planner's against two others, as overhead over the frozen layer.

`planned` joins the factors of each side (r^2 terms) and goes through them like LoRA; `build dW` is the delta route;
`one pair at a time` never joins: for each r, x * A1_r goes through A2, B2 and B1_r.
"""

from __future__ import annotations

import harness
import torch
from layer_overhead import SHAPES, frozen, ours, peft_layer, randomise, step
from torch import Tensor, nn

import superlora_tn as sl

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


def main() -> None:
    """Measure all shapes but the largest."""
    args = harness.arguments(__doc__ or "", repeats=11)
    rows = []
    for width, tokens in SHAPES[:-1]:
        x, gradient = torch.randn(1, tokens, width, requires_grad=True), torch.randn(1, tokens, width)
        layers = {
            "frozen": frozen(width),
            "planned": ours(width, sl.loha(RANK)),
            "build dW": built(width),
            "one pair at a time": OnePair(width),
            "peft_lora": peft_layer(width, "Lora", lora_alpha=RANK),
        }
        times = harness.interleaved({n: step(layer, x, gradient) for n, layer in layers.items()}, args.repeats)
        over = harness.overheads(times, "frozen")
        flops = 6 * 2 * tokens * width * RANK**2 / (2 * 2 * tokens * width * width)
        rows.append({"width": width, "tokens": tokens, **over, "floor by FLOPs": flops})
    harness.report("loha_designs", args, rows)


if __name__ == "__main__":
    main()
