"""What does an adapter cost on a convolution, beside PEFT and LyCORIS? Overhead of a step over the frozen layer's.

Shapes of a diffusion model's blocks: channels, width of the square image, kernel. A step is forward and backward with a
gradient for the input.
"""

from __future__ import annotations

import harness
import torch
from layer_overhead import RANK, randomise, step
from torch import nn

import superlora_tn as sl

SHAPES = ((320, 64, 3), (640, 32, 3), (1280, 16, 3), (320, 64, 1))


def convolution(channels: int, kernel: int) -> nn.Conv2d:
    """A layer that keeps the image's size."""
    return nn.Conv2d(channels, channels, kernel, padding=kernel // 2)


def ours(channels: int, kernel: int, spec: sl.AdapterSpec) -> nn.Module:
    """A convolution with one of our adapters."""
    model = nn.ModuleDict({"layer": convolution(channels, kernel)})
    randomise(sl.attach(model, spec, ["layer"]))
    return model["layer"]


def peft_layer(channels: int, kernel: int, kind: str, **options: object) -> nn.Module:
    """A convolution with PEFT's adapter."""
    import peft

    config = getattr(peft, f"{kind}Config")(target_modules=["0"], r=RANK, **options)
    model = peft.get_peft_model(nn.Sequential(convolution(channels, kernel)), config)
    randomise(model)
    return model.base_model.model[0]


def lycoris_layer(channels: int, kernel: int, kind: str, bypass: bool) -> nn.Module:
    """A convolution with LyCORIS's adapter."""
    from lycoris.modules import LoConModule, LokrModule

    layer = convolution(channels, kernel).requires_grad_(False)
    module = {"lora": LoConModule, "lokr": LokrModule}[kind]("layer", layer, lora_dim=RANK, alpha=RANK, bypass_mode=bypass)
    module.apply_to()
    randomise(module)
    layer.adapter = module
    return layer


def main() -> None:
    """Measure all shapes."""
    args = harness.arguments(__doc__ or "", repeats=11)
    rows = []
    for channels, side, kernel in SHAPES:
        x = torch.randn(1, channels, side, side, device=args.device, requires_grad=True)
        gradient = torch.randn(1, channels, side, side, device=args.device)
        layers = {
            "frozen": convolution(channels, kernel).requires_grad_(False),
            "lora": ours(channels, kernel, sl.lora(RANK)),
            "loha": ours(channels, kernel, sl.loha(RANK)),
            "lotr": ours(channels, kernel, sl.lotr(RANK)),
            "lokr": ours(channels, kernel, sl.lokr(RANK)),
            "peft_lora": peft_layer(channels, kernel, "Lora", lora_alpha=RANK),
            "peft_loha": peft_layer(channels, kernel, "LoHa", alpha=RANK),
            "peft_lokr": peft_layer(channels, kernel, "LoKr", alpha=RANK),
            "lycoris_lora": lycoris_layer(channels, kernel, "lora", True),
            "lycoris_lokr_bypass": lycoris_layer(channels, kernel, "lokr", True),
        }
        runs = {n: step(layer.to(args.device), x, gradient) for n, layer in layers.items()}
        times = harness.interleaved(runs, args.repeats, args.device)
        base = sorted(times["frozen"])[len(times["frozen"]) // 2]
        row = {"channels": channels, "side": side, "kernel": kernel, "frozen ms": base * 1e3}
        rows.append({**row, **harness.overheads(times, "frozen")})
    harness.report("convolution", args, rows)


if __name__ == "__main__":
    main()
