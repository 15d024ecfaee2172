"""What does each variant cost on one linear layer beside PEFT's own layer of it? Overheads over the frozen layer's step.

A step is forward and backward with a gradient for the input, in float32. Both sides hold about the same number of parameters.
Pairs are measured one after the other, the three layers of a pair interleaved.
"""

from __future__ import annotations

from typing import Any

import harness
import torch
from layer_overhead import frozen, linear, ours, randomise, step
from torch import nn

import superlora_tn as sl

WIDTH, TOKENS, RANK = 768, (512, 4096), 8
PAIRS: dict[str, tuple[sl.AdapterSpec, str, dict[str, Any]]] = {
    "lora": (sl.lora(RANK), "Lora", {"r": RANK}),
    "dora": (sl.dora(sl.lora(RANK)), "Lora", {"r": RANK, "use_dora": True}),
    "loha": (sl.loha(RANK), "LoHa", {"r": RANK}),
    "lokr": (sl.lokr(RANK), "LoKr", {"r": RANK}),
    "adalora": (sl.adalora(RANK), "AdaLora", {"init_r": RANK, "target_r": RANK, "total_step": 100}),
    "vera": (sl.vera(RANK), "Vera", {"r": RANK}),
    "gralora": (sl.gralora(RANK, 2), "Gralora", {"r": 2 * RANK, "gralora_k": 2}),
    "miss": (sl.miss(RANK), "Miss", {"r": RANK}),
    "randlora": (sl.randlora(RANK, 96), "RandLora", {"r": RANK}),
    "hira": (sl.hira(RANK), "Hira", {"r": RANK}),
    "delora": (sl.delora(RANK), "Delora", {"r": RANK, "delora_lambda": 15}),
    "psoft": (sl.psoft(RANK), "Psoft", {"r": RANK, "psoft_svd": "full"}),
    "tiny_lora": (sl.tiny_lora(13, 2), "TinyLora", {"r": 2, "u": 13}),
    "uni_lora": (sl.uni_lora(1000, RANK), "UniLora", {"r": RANK, "theta_d_length": 1000}),
    "vb_lora": (sl.vb_lora(RANK, 90, 64), "VBLoRA", {"r": RANK, "num_vectors": 90, "vector_length": 64}),
    "waveft": (sl.waveft(1000), "WaveFT", {"n_frequency": 1000}),
    "fourier_ft": (sl.fourier_ft(1000), "FourierFT", {"n_frequency": 1000}),
    "shira": (sl.shira(12288), "Shira", {"r": RANK}),
    "c3a": (sl.c3a(64), "C3A", {"block_size": 64}),
    "boft": (sl.boft(32, 1), "BOFT", {"boft_block_size": 32, "boft_n_butterfly_factor": 1}),
    "oft": (sl.oft(32), "OFT", {"oft_block_size": 32, "r": 0, "use_cayley_neumann": False}),
    "hra": (sl.hra(RANK), "HRA", {"r": RANK}),
}


def peft_layer(name: str, options: dict[str, Any]) -> nn.Module:
    """The layer with PEFT's adapter."""
    import peft

    config = getattr(peft, f"{name}Config")(target_modules=["0"], **options)
    model = peft.get_peft_model(nn.Sequential(linear(WIDTH)), config)
    randomise(model)
    return model.base_model.model[0]


def main() -> None:
    """Measure all pairs."""
    args = harness.arguments(__doc__ or "", repeats=15, only="")
    rows = []
    for name, (spec, theirs, options) in PAIRS.items():
        if args.only and name not in args.only.split(","):
            continue
        row: dict[str, Any] = {"variant": name}
        layers = {"frozen": frozen(WIDTH), "ours": ours(linear(WIDTH), spec), "peft": peft_layer(theirs, options)}
        for tokens in TOKENS:
            x = torch.randn(1, tokens, WIDTH, device=args.device, requires_grad=True)
            gradient = torch.randn(1, tokens, WIDTH, device=args.device)
            runs = {side: step(layer.to(args.device), x, gradient) for side, layer in layers.items()}
            over = harness.overheads(harness.interleaved(runs, args.repeats, args.device), "frozen")
            row |= {f"{tokens} rows": over["ours"], f"PEFT's, {tokens}": over["peft"]}
        rows.append(row)
    harness.report("variants_against", args, rows)


if __name__ == "__main__":
    main()
