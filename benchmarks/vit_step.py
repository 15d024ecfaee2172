"""A whole ViT-B/16 training step (random weights, batch 8, q and v): shared tensor adapters beside PEFT's LoRA and others.

`rebuild` is the written-out baseline of research code: at every projection's call the tensor of all layers is built anew
(as TensLoRA does), then its slice is used. `dense` fine-tunes the same weights. `frozen` trains one bias of the first
block alone, so that its backward pass goes as far; overheads are over it.
"""

from __future__ import annotations

from collections.abc import Callable

import harness
import torch
from layer_overhead import randomise
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTModel

import superlora_tn as sl

TARGETS = ["q_proj", "v_proj"]
RANK, BATCH = 8, 8


def base() -> nn.Module:
    """ViT-B/16 with random weights."""
    torch.manual_seed(0)
    return ViTModel(ViTConfig(), add_pooling_layer=False)


def adapted(spec: sl.AdapterSpec, **options: bool) -> nn.Module:
    """With one of our adapters."""
    model = base()
    randomise(sl.attach(model, spec, TARGETS, **options))
    return model


def peft_lora() -> nn.Module:
    """With PEFT's LoRA."""
    import peft

    model = peft.get_peft_model(base(), peft.LoraConfig(target_modules=TARGETS, r=RANK, lora_alpha=RANK))
    randomise(model)
    return model


def dense() -> nn.Module:
    """Dense fine-tuning of the same weights."""
    model = base().requires_grad_(False)
    for name, module in model.named_modules():
        if name.endswith(tuple(TARGETS)):
            module.weight.requires_grad_(True)
    return model


def frozen() -> nn.Module:
    """Nothing to train but a bias so early that backward goes through all blocks."""
    model = base().requires_grad_(False)
    next(p for n, p in model.named_parameters() if n.endswith("layernorm_before.bias")).requires_grad_(True)
    return model


class Rebuilt(nn.Module):
    """The CP tensor over (layer, type, head, out, in), built whole at every call of every projection."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (12, 2, 12, 64, 768)
        self.factors = nn.ParameterList(nn.Parameter(torch.randn(s, RANK) * 0.02) for s in sizes)

    def delta(self, layer: int, kind: int) -> Tensor:
        """dW of one weight, cut from the whole."""
        whole = torch.einsum("lr,tr,hr,or,ir->lthoi", *self.factors)
        return whole[layer, kind].reshape(768, 768)


def rebuild() -> nn.Module:
    """The rebuilding baseline."""
    model = base().requires_grad_(False)
    shared = Rebuilt()
    layer = -1
    for name, module in model.named_modules():
        if name.endswith(tuple(TARGETS)):
            kind = int(name.endswith("v_proj"))
            layer += kind == 0
            module.register_forward_hook(lambda m, x, y, at=(layer, kind): y + functional.linear(x[0], shared.delta(*at)))
    model.shared = shared
    return model


def step(model: nn.Module, pixels: Tensor) -> Callable[[], None]:
    """Forward and backward of a mean square of the features."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        model(pixel_values=pixels).last_hidden_state.square().mean().backward()

    return run


def main() -> None:
    """Measure all models, interleaved."""
    args = harness.arguments(__doc__ or "", repeats=8)
    physical = sl.PhysicalFold("layer type head out in", heads=12)
    models = {
        "frozen": frozen(),
        "peft_lora": peft_lora(),
        "lora": adapted(sl.lora(RANK)),
        "lotr": adapted(sl.lotr(RANK)),
        "lorta_cp": adapted(sl.AdapterSpec(sl.CP(RANK), physical)),
        "lokr": adapted(sl.lokr(RANK)),
        "dense": dense(),
        "flat_lorta": adapted(sl.lorta(5, 3, 12)),
        "flat_lorta_1_group": adapted(sl.lorta(8, 3, 1)),
        "flat_lorta_recomputed": adapted(sl.lorta(5, 3, 12), recompute=True),
        "rebuild": rebuild(),
    }
    pixels = torch.randn(BATCH, 3, 224, 224, device=args.device)
    runs = {name: step(model.to(args.device), pixels) for name, model in models.items()}
    times = harness.interleaved(runs, args.repeats, args.device, warmup=1)
    middle = {name: sorted(own)[len(own) // 2] for name, own in times.items()}
    rows = [
        {
            "model": name,
            "ms": t * 1e3,
            "over peft_lora": t / middle["peft_lora"],
            "over dense": t / middle["dense"],
            "overhead ms": (t - middle["frozen"]) * 1e3,
        }
        for name, t in middle.items()
    ]
    harness.report("vit_step", args, rows)


if __name__ == "__main__":
    main()
