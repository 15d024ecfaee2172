"""What does sharing x between q, k and v save? Overhead of three layers that read one x, named side by side or apart."""

from __future__ import annotations

from collections.abc import Callable

import harness
import torch
from layer_overhead import RANK, SHAPES, frozen, linear, peft_layer, randomise
from torch import Tensor, nn

import superlora_tn as sl

KINDS = ("q", "k", "v")
SPECS = {
    "lotr": sl.lotr(RANK),
    "lorta_cp": sl.AdapterSpec(sl.CP(RANK), sl.PhysicalFold("type head out in", heads=8)),
    "vera": sl.vera(RANK),
}


class Projections(nn.ModuleDict):
    """Layers that read one x."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """x (..., in) -> their outputs, each (..., out)."""
        return [self[kind](x) for kind in KINDS]


def projections(make: Callable[[int], nn.Module], width: int) -> Projections:
    """q, k and v."""
    return Projections({kind: make(width) for kind in KINDS})


def block(width: int, spec: sl.AdapterSpec, shared: bool) -> Projections:
    """Three adapted layers; only names that stand side by side are taken to read the same x."""
    model = projections(linear if shared else lambda width: nn.Sequential(linear(width)), width)
    randomise(sl.attach(model, spec, [kind if shared else f"{kind}.0" for kind in KINDS]))
    return model


def step(model: Projections, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    """Forward and backward of all three, with a gradient for x."""

    def run() -> None:
        x.grad = None
        torch.autograd.backward(model(x), [gradient] * 3)

    return run


def main() -> None:
    """Measure all shapes."""
    args = harness.arguments(__doc__ or "")
    rows = []
    for width, tokens in SHAPES[:4]:
        x = torch.randn(1, tokens, width, requires_grad=True, device=args.device)
        gradient = torch.randn(1, tokens, width, device=args.device)
        models = {
            "frozen": projections(frozen, width),
            "peft_lora": projections(lambda width: peft_layer(linear(width), "Lora", lora_alpha=RANK), width),
        }
        for name, spec in SPECS.items():
            models |= {f"{name} apart": block(width, spec, False), f"{name} shared": block(width, spec, True)}
        runs = {name: step(m.to(args.device), x, gradient) for name, m in models.items()}
        over = harness.overheads(harness.interleaved(runs, args.repeats, args.device), "frozen")
        rows.append({"width": width, "tokens": tokens, **over})
    harness.report("sharing", args, rows)


if __name__ == "__main__":
    main()
