"""What does sharing x between q, k and v save? Overhead of three layers that read one x, named side by side or apart."""

from __future__ import annotations

from collections.abc import Callable

import harness
import torch
from layer_overhead import RANK, SHAPES, linear, peft_layer, randomise
from torch import Tensor, nn

import superlora_tn as sl

SPECS = {
    "lotr": sl.lotr(RANK),
    "lorta_cp": sl.AdapterSpec(sl.CP(RANK), sl.PhysicalFold("type head out in", heads=8)),
    "vera": sl.vera(RANK),
}


def block(width: int, spec: sl.AdapterSpec, shared: bool) -> list[nn.Module]:
    """Three adapted layers; only names that stand side by side are taken to read the same x."""
    parts = {kind: nn.Linear(width, width) for kind in ("q", "k", "v")}
    model = nn.ModuleDict(parts if shared else {kind: nn.Sequential(layer) for kind, layer in parts.items()})
    randomise(sl.attach(model, spec, list(parts) if shared else [f"{kind}.0" for kind in parts]))
    return list(parts.values())


def step(layers: list[nn.Module], x: Tensor, gradient: Tensor) -> Callable[[], None]:
    """Forward and backward of all three, with a gradient for x."""

    def run() -> None:
        x.grad = None
        torch.autograd.backward([layer(x) for layer in layers], [gradient] * len(layers))

    return run


def main() -> None:
    """Measure all shapes."""
    args = harness.arguments(__doc__ or "")
    rows = []
    for width, tokens in SHAPES[:4]:
        x = torch.randn(1, tokens, width, requires_grad=True, device=args.device)
        gradient = torch.randn(1, tokens, width, device=args.device)
        frozen = [nn.Linear(width, width).requires_grad_(False) for _ in range(3)]
        models = {"frozen": frozen, "peft_lora": [peft_layer(linear(width), "Lora", lora_alpha=RANK) for _ in range(3)]}
        for name, spec in SPECS.items():
            models |= {f"{name} apart": block(width, spec, False), f"{name} shared": block(width, spec, True)}
        runs = {name: step([layer.to(args.device) for layer in m], x, gradient) for name, m in models.items()}
        over = harness.overheads(harness.interleaved(runs, args.repeats, args.device), "frozen")
        rows.append({"width": width, "tokens": tokens, **over})
    harness.report("sharing", args, rows)


if __name__ == "__main__":
    main()
