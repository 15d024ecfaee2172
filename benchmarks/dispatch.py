"""What does Python cost on a tiny layer? Batch 4, width 64: our adapter beside the same sums written out in torch."""

from __future__ import annotations

from collections.abc import Callable

import harness
import torch
from layer_overhead import linear, ours, randomise, step
from torch import Tensor, nn

import superlora_tn as sl

WIDTH, BATCH, RANK, LOOPS = 64, 4, 8, 200


class HandLora(nn.Module):
    """LoRA as anyone would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.empty(RANK, WIDTH)), nn.Parameter(torch.empty(WIDTH, RANK))
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, in) -> (batch, out)."""
        return self.base(x) + x @ self.a.T @ self.b.T


class HandLokr(nn.Module):
    """LoKr contracted by hand: x as a matrix (i1, i2), W1 on the left, W2 = W2a W2b on the right."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.w1 = nn.Parameter(torch.empty(8, 8))
        self.w2 = nn.Parameter(torch.empty(8, 8))  # rank 8 is no saving at 8 x 8, so PEFT's rule keeps it dense
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, in) -> (batch, out)."""
        y = self.w1 @ (x.view(-1, 8, 8) @ self.w2.T)
        return self.base(x) + y.reshape(-1, WIDTH)


def repeated(run: Callable[[], None]) -> Callable[[], None]:
    """Many steps as one run, since one is near the clock's resolution."""

    def loop() -> None:
        for _ in range(LOOPS):
            run()

    return loop


def main() -> None:
    """Measure both pairs."""
    args = harness.arguments(__doc__ or "", repeats=20)
    x, gradient = torch.randn(BATCH, WIDTH, requires_grad=True), torch.randn(BATCH, WIDTH)
    rows = []
    for name, spec, hand in (("lora", sl.lora(RANK), HandLora()), ("lokr", sl.lokr(RANK), HandLokr())):
        runs = {"ours": repeated(step(ours(linear(WIDTH), spec), x, gradient)), "hand": repeated(step(hand, x, gradient))}
        times = harness.interleaved(runs, args.repeats)
        middle = {k: sorted(v)[len(v) // 2] / LOOPS * 1e6 for k, v in times.items()}
        rows.append(
            {"variant": name, "ours us": middle["ours"], "hand us": middle["hand"], "ratio": middle["ours"] / middle["hand"]}
        )
    harness.report("dispatch", args, rows)


if __name__ == "__main__":
    main()
