"""What does an adapter cost on a convolution, beside PEFT and LyCORIS? Overhead of a step over the frozen layer's.

Shapes of a diffusion model's blocks: channels, width of the square image, kernel. A step is forward and backward with a
gradient for the input.
"""

from __future__ import annotations

import harness
import torch
from layer_overhead import RANK, lycoris_layer, ours, peft_layer, step
from torch import nn

import superlora_tn as sl

SHAPES = ((320, 64, 3), (640, 32, 3), (1280, 16, 3), (320, 64, 1))


def convolution(channels: int, kernel: int) -> nn.Conv2d:
    """A layer that keeps the image's size."""
    return nn.Conv2d(channels, channels, kernel, padding=kernel // 2)


def main() -> None:
    """Measure all shapes."""
    args = harness.arguments(__doc__ or "", repeats=11)
    rows = []
    for channels, side, kernel in SHAPES:
        x = torch.randn(1, channels, side, side, device=args.device, requires_grad=True)
        gradient = torch.randn(1, channels, side, side, device=args.device)
        layers = {
            "frozen": convolution(channels, kernel).requires_grad_(False),
            "lora": ours(convolution(channels, kernel), sl.lora(RANK)),
            "loha": ours(convolution(channels, kernel), sl.loha(RANK)),
            "lotr": ours(convolution(channels, kernel), sl.lotr(RANK)),
            "lokr": ours(convolution(channels, kernel), sl.lokr(RANK)),
            "conv_lokr": ours(convolution(channels, kernel), sl.conv_lokr(RANK)),
            "conv_lokr tucker": ours(convolution(channels, kernel), sl.conv_lokr(RANK, tucker=True)),
            "peft_lora": peft_layer(convolution(channels, kernel), "Lora", lora_alpha=RANK),
            "peft_loha": peft_layer(convolution(channels, kernel), "LoHa", alpha=RANK),
            "peft_lokr": peft_layer(convolution(channels, kernel), "LoKr", alpha=RANK),
            "lycoris_lora": lycoris_layer(convolution(channels, kernel), "lora", True),
            "lycoris_lokr_bypass": lycoris_layer(convolution(channels, kernel), "lokr", True),
        }
        runs = {n: step(layer.to(args.device), x, gradient) for n, layer in layers.items()}
        times = harness.interleaved(runs, args.repeats, args.device)
        base = sorted(times["frozen"])[len(times["frozen"]) // 2]
        row = {"channels": channels, "side": side, "kernel": kernel, "frozen ms": base * 1e3}
        rows.append({**row, **harness.overheads(times, "frozen")})
    harness.report("convolution", args, rows)


if __name__ == "__main__":
    main()
