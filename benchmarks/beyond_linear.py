"""What do adapters cost on an embedding, on blocks of a fused weight, on stacked experts, two on one weight, eight by the
rows of a batch, and DoRA? Beside PEFT.

Overhead of a step (forward and backward) over the frozen one's, all in one process, interleaved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import harness
import torch
from layer_overhead import RANK, randomise
from torch import Tensor, nn

import superlora_tn as sl

Contestants = Mapping[str, Callable[[], Any]]


class Named(nn.Module):
    """One layer under a name."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        """The layers, one after another."""
        for layer in self.layers.values():
            x = layer(x)
        return x


class Experts(nn.Module):
    """Experts kept as one parameter (which, in, out); every one of them meets its own rows."""

    def __init__(self, count: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = count, True
        self.up = nn.Parameter(torch.randn(count, d_in, d_out) / d_in**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x (which, rows, in) -> (which, rows, out)."""
        return torch.bmm(x, self.up)


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward of a sum of squares."""
    anchor = torch.zeros((), requires_grad=True)  # so that the frozen model has a backward pass too

    def run() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        if x.is_floating_point():
            x.grad = None
        (model(x) + anchor).square().sum().backward()

    return run


def attached(model: nn.Module, *adapters: tuple[Any, list[str]]) -> nn.Module:
    """With our adapters, each under a name."""
    for k, (spec, targets) in enumerate(adapters):
        randomise(sl.attach(model, spec, targets, name=f"a{k}"))
    return model


def peft(model: nn.Module, count: int = 1, **options: Any) -> nn.Module:
    """With PEFT's LoRAs, all active."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, **options)
    found = peft.get_peft_model(model, config, adapter_name="a0")
    for k in range(1, count):
        found.add_adapter(f"a{k}", config)
    found.base_model.set_adapter([f"a{k}" for k in range(count)])
    randomise(found)
    return found


def embedding(device: str) -> Contestants:
    """An embedding alone."""
    make = lambda: Named(tokens=nn.Embedding(32000, 768)).to(device)  # noqa: E731
    x = torch.randint(32000, (2048,), device=device)
    models = {
        "frozen": make().requires_grad_(False),
        "ours": attached(make(), (sl.lora(RANK), ["tokens"])),
        "peft_lora": peft(make(), target_modules=["tokens"]),
    }
    return {name: step(model.to(device), x) for name, model in models.items()}


def blocks(device: str) -> Contestants:
    """q and v of a fused qkv."""
    make = lambda: Named(qkv=nn.Linear(768, 3 * 768)).to(device)  # noqa: E731
    x = torch.randn(1576, 768, device=device, requires_grad=True)
    rows = sl.Rows("qkv", ("q", "k", "v"), use=("q", "v"))
    models = {
        "frozen": make().requires_grad_(False),
        "ours": attached(make(), (sl.lora(RANK), [rows])),
        "peft_lora": peft(make(), target_modules=["qkv"]),
    }
    return {name: step(model.to(device), x) for name, model in models.items()}


def experts(device: str) -> Contestants:
    """Experts in one parameter."""
    make = lambda: Named(experts=Experts(8, 256, 512)).to(device)  # noqa: E731
    x = torch.randn(8, 128, 256, device=device, requires_grad=True)
    models = {
        "frozen": make().requires_grad_(False),
        "ours": attached(make(), (sl.lora(RANK), ["experts.up"])),
        "ours, shared": attached(make(), (sl.AdapterSpec(sl.CP(RANK), sl.PhysicalFold("expert out in")), ["experts.up"])),
        "peft_lora": peft(make(), target_parameters=["experts.up"], target_modules=[]),
    }
    return {name: step(model.to(device), x) for name, model in models.items()}


def two(device: str) -> Contestants:
    """Two adapters at once."""
    make = lambda: Named(layer=nn.Linear(768, 768)).to(device)  # noqa: E731
    x = torch.randn(1576, 768, device=device, requires_grad=True)
    spec = (sl.lora(RANK), ["layer"])
    models = {
        "frozen": make().requires_grad_(False),
        "ours": attached(make(), spec, spec),
        "peft_lora": peft(make(), 2, target_modules=["layer"]),
    }
    return {name: step(model.to(device), x) for name, model in models.items()}


def by_rows(device: str) -> Contestants:
    """Eight adapters, each for some of 32 rows of 16 tokens; forward alone, as PEFT has it for that only."""
    names = [f"a{k % 8}" for k in range(32)]
    x = torch.randn(32, 16, 768, device=device)
    make = lambda: Named(layer=nn.Linear(768, 768)).to(device).eval()  # noqa: E731
    frozen, ours = make(), attached(make(), *[(sl.lora(RANK), ["layer"])] * 8)
    theirs = peft(make(), 8, target_modules=["layer"]).eval()

    def forward(model: nn.Module, **more: Any) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                model(x, **more)

        return run

    def own() -> None:
        with torch.no_grad(), sl.rows(ours, names):
            ours(x)

    return {"frozen": forward(frozen), "ours": own, "peft_lora": forward(theirs, adapter_names=names)}


def dora(device: str) -> Contestants:
    """Magnitudes beside LoRA; PEFT's builds dW for their norms."""
    make = lambda: Named(layer=nn.Linear(768, 768)).to(device)  # noqa: E731
    x = torch.randn(1576, 768, device=device, requires_grad=True)
    models = {
        "frozen": make().requires_grad_(False),
        "ours": attached(make(), (sl.dora(sl.lora(RANK)), ["layer"])),
        "peft_lora": peft(make(), target_modules=["layer"], use_dora=True),
    }
    return {name: step(model.to(device), x) for name, model in models.items()}


def main() -> None:
    """Measure all."""
    args = harness.arguments(__doc__ or "")
    rows = []
    for kind in (embedding, blocks, experts, two, by_rows, dora):
        times = harness.interleaved(kind(args.device), args.repeats, args.device)
        base = sorted(times["frozen"])[len(times["frozen"]) // 2]
        over = harness.overheads(times, "frozen")
        keys = ("ours", "ours, shared", "peft_lora")
        rows.append({"on": kind.__name__, "frozen ms": base * 1e3, **{k: over.get(k, "-") for k in keys}})
    harness.report("beyond_linear", args, rows)


if __name__ == "__main__":
    main()
