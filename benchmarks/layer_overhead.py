"""What does an adapter cost on one linear layer, beside PEFT and LyCORIS? Overhead of a step over the frozen layer's.

A step is forward and backward with a gradient for the input, as inside a model. Overhead = (step with adapter - step
of the frozen layer) / step of the frozen layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor, nn

import superlora_tn as sl

SHAPES = ((768, 1576), (1024, 512), (2048, 256), (4096, 64), (4096, 1024))
RANK = 8


def ours(layer: nn.Module, spec: sl.AdapterSpec, **options: Any) -> nn.Module:
    """The layer with one of our adapters."""
    model = nn.ModuleDict({"layer": layer})
    tuned = sl.attach(model, spec, ["layer"], **options)
    randomise(tuned)
    return model["layer"]


def peft_layer(layer: nn.Module, kind: str, **options: Any) -> nn.Module:
    """The layer with PEFT's adapter."""
    import peft

    config = getattr(peft, f"{kind}Config")(target_modules=["0"], r=RANK, **options)
    model = peft.get_peft_model(nn.Sequential(layer), config)
    randomise(model)
    return model.base_model.model[0]


def lycoris_layer(layer: nn.Module, kind: str, bypass: bool) -> nn.Module:
    """The layer with LyCORIS's adapter."""
    from lycoris.modules import LoConModule, LohaModule, LokrModule

    layer.requires_grad_(False)
    make = {"lora": LoConModule, "lokr": LokrModule, "loha": LohaModule}[kind]
    module = make("layer", layer, lora_dim=RANK, alpha=RANK, bypass_mode=bypass)
    module.apply_to()
    randomise(module)
    layer.adapter = module
    return layer


def randomise(module: nn.Module) -> None:
    """Random trainable values: zeros would make some products cheap."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.02)


def linear(width: int) -> nn.Linear:
    """The layer that is adapted."""
    return nn.Linear(width, width)


def frozen(width: int) -> nn.Module:
    """The layer alone."""
    return linear(width).requires_grad_(False)


def step(layer: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    """One forward and backward."""
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def run() -> None:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        layer(x).backward(gradient)

    return run


def contestants(width: int) -> dict[str, nn.Module]:
    """All layers that are compared at one width."""
    physical = sl.PhysicalFold("layer type head out in", heads=16)
    return {
        "frozen": frozen(width),
        "lora": ours(linear(width), sl.lora(RANK)),
        "lokr": ours(linear(width), sl.lokr(RANK)),
        "loha": ours(linear(width), sl.loha(RANK)),
        "lotr": ours(linear(width), sl.lotr(RANK)),
        "lorta_cp": ours(linear(width), sl.AdapterSpec(sl.CP(RANK), physical)),
        "peft_lora": peft_layer(linear(width), "Lora", lora_alpha=RANK),
        "peft_lokr": peft_layer(linear(width), "LoKr", alpha=RANK),
        "peft_loha": peft_layer(linear(width), "LoHa", alpha=RANK),
        "lycoris_lokr_bypass": lycoris_layer(linear(width), "lokr", True),
    }


def main() -> None:
    """Measure all shapes."""
    args = harness.arguments(__doc__ or "", only="", onednn="on")
    if args.onednn == "off":  # see superlora_tn_backends/products.py
        torch.backends.mkldnn.set_flags(_enabled=False, _allow_tf32=None)
    rows = []
    for width, tokens in SHAPES:
        if args.only and str(width) not in args.only.split(","):
            continue
        x = torch.randn(1, tokens, width, device=args.device, requires_grad=True)
        gradient = torch.randn(1, tokens, width, device=args.device)
        layers = {name: layer.to(args.device) for name, layer in contestants(width).items()}
        runs = {name: step(layer, x, gradient) for name, layer in layers.items()}
        times = harness.interleaved(runs, args.repeats, args.device)
        over = harness.overheads(times, "frozen")
        base = sorted(times["frozen"])[len(times["frozen"]) // 2]
        rows.append({"width": width, "tokens": tokens, "frozen ms": base * 1e3, **over})
    harness.report("layer_overhead" if args.onednn == "on" else "layer_overhead_mkl", args, rows)


if __name__ == "__main__":
    main()
