"""diffusers for `tried_formats`, and other trainers' names, which diffusers converts: a small U-Net and a small Flux."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from formats_of_others import LORA, Given, Library, quietly, shuffle
from safetensors.torch import save_file
from torch import Tensor, nn


def unet() -> nn.Module:
    """A small U-Net of Stable Diffusion's kind."""
    import diffusers

    torch.manual_seed(0)
    with quietly():
        made: nn.Module = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            norm_num_groups=4,
            attention_head_dim=4,
        )
    return made.eval().double()


def _wave(*shape: int) -> Tensor:
    size = torch.Size(shape)
    return torch.linspace(-1, 1, size.numel(), dtype=torch.float64).mul(40).sin().reshape(size)


def call_unet(model: nn.Module) -> Tensor:
    """Its output for one input."""
    with torch.no_grad():
        out: Tensor = model(_wave(1, 4, 8, 8), torch.tensor([3]), _wave(1, 5, 16)).sample
    return out


UNET_LINEAR = [f"mid_block.attentions.0.transformer_blocks.0.attn{k}.{n}" for k in (1, 2) for n in ("to_q", "to_k", "to_out.0")]
UNET_CONVOLUTIONS = ["conv_in", "mid_block.resnets.0.conv1", "down_blocks.1.resnets.0.conv_shortcut"]


def _diffusers(**settings: Any) -> Callable[[Path], Given]:
    def write(folder: Path) -> Given:
        import peft

        model: Any = unet().float()
        with quietly():
            model.add_adapter(peft.LoraConfig(target_modules=UNET_LINEAR + UNET_CONVOLUTIONS, **LORA, **settings))
            shuffle([(n, p) for n, p in model.named_parameters() if p.requires_grad])
            model.save_lora_adapter(str(folder))
            return Given(folder, lambda: call_unet(model.eval().double()), unet, call_unet)

    return write


def _diffusers_reads(folder: Path, model: nn.Module) -> Tensor:
    own: Any = model.float()
    with quietly():
        own.load_lora_adapter(str(folder), prefix="unet", weight_name="pytorch_lora_weights.safetensors")
        return call_unet(own.eval().double())


DIFFUSERS = Library(
    "diffusers",
    "diffusers",
    "diffusers",
    {"LoRA": _diffusers(), "rsLoRA": _diffusers(use_rslora=True), "DoRA": _diffusers(use_dora=True)},
    _diffusers_reads,
    unet,
    call_unet,
    UNET_LINEAR,
    UNET_CONVOLUTIONS,
    {"prefix": "unet"},
)

# --- names of other trainers, on Flux ---------------------------------------------------------------------------------


def flux() -> nn.Module:
    """A small Flux."""
    import diffusers

    torch.manual_seed(0)
    with quietly():
        made: nn.Module = diffusers.FluxTransformer2DModel(
            in_channels=4,
            num_layers=2,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4),
        )
    return made.eval().double()


def call_flux(model: nn.Module) -> Tensor:
    """Its output for one input."""
    with torch.no_grad():
        out: Tensor = model(
            hidden_states=_wave(1, 4, 4),
            encoder_hidden_states=_wave(1, 3, 8),
            pooled_projections=_wave(1, 8),
            timestep=torch.tensor([0.5], dtype=torch.float64),
            img_ids=torch.zeros(4, 3, dtype=torch.float64),
            txt_ids=torch.zeros(3, 3, dtype=torch.float64),
        ).sample
    return out


def _named_file(
    layers: Mapping[str, tuple[int, int]], down: str, up: str, alpha: bool, **words: str
) -> Callable[[Path], Given]:
    """A LoRA file under a trainer's names, and what diffusers' pipeline makes of it."""

    def write(folder: Path) -> Given:
        import diffusers

        generator, tensors = torch.Generator().manual_seed(1), {}
        for name, (rows, columns) in layers.items():
            tensors[f"{name}.{down}"] = 0.3 * torch.randn(4, columns, generator=generator)
            tensors[f"{name}.{up}"] = 0.3 * torch.randn(rows, 4, generator=generator)
            if alpha:
                tensors[f"{name}.alpha"] = torch.tensor(2.0)
        save_file(tensors, folder / "x.safetensors", metadata=words or None)
        model = flux().float()
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        with quietly():
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
            pipeline = diffusers.FluxPipeline(scheduler=scheduler, transformer=model, **parts)
            pipeline.load_lora_weights(str(folder), weight_name="x.safetensors")
            return Given(folder / "x.safetensors", lambda: call_flux(model.eval().double()), flux, call_flux)

    return write


def _bfl(pattern: str) -> dict[str, tuple[int, int]]:
    """Layers of two double blocks and a single one."""
    double = {"img_attn.qkv": (48, 16), "txt_attn.qkv": (48, 16), "img_attn.proj": (16, 16), "txt_mlp.0": (64, 16)}
    found = {f"double_blocks.{k}.{name}": size for k in range(2) for name, size in double.items()}
    found["single_blocks.0.linear2"] = (16, 80)
    return {pattern.format(n.replace(".", "_") if "_{}" in pattern else n): size for n, size in found.items()}


_OWN = {"attn.to_q": (16, 16), "attn.add_k_proj": (16, 16), "attn.to_out.0": (16, 16), "ff.net.0.proj": (64, 16)}
_DIFFUSERS = {f"transformer.transformer_blocks.{k}.{n}": s for k in range(2) for n, s in _OWN.items()}
_XLABS = {
    f"double_blocks.{k}.processor.{n}": s for k in range(2) for n, s in {"qkv_lora1": (48, 16), "proj_lora2": (16, 16)}.items()
}
# diffusers' conversion of these names knows attention alone.
_ONETRAINER = {
    f"lora_transformer_{n.removeprefix('transformer.').replace('.', '_')}": s for n, s in _DIFFUSERS.items() if "attn" in n
}
NAMES = {
    "kohya's Flux (`lora_unet_double_blocks_0_img_attn_qkv`)": _named_file(
        _bfl("lora_unet_{}"), "lora_down.weight", "lora_up.weight", True
    ),
    "BFL's Flux (`diffusion_model.double_blocks.0.img_attn.qkv`)": _named_file(
        _bfl("diffusion_model.{}"), "lora_down.weight", "lora_up.weight", True
    ),
    "XLabs (`double_blocks.0.processor.qkv_lora1`)": _named_file(_XLABS, "down.weight", "up.weight", False),
    "OneTrainer (`lora_transformer_transformer_blocks_0_attn_to_q`)": _named_file(
        _ONETRAINER, "lora_down.weight", "lora_up.weight", True
    ),
    "ai-toolkit (`transformer.transformer_blocks.0.attn.to_q`)": _named_file(
        _DIFFUSERS, "lora_A.weight", "lora_B.weight", False, software='{"name": "ai-toolkit"}'
    ),
}
