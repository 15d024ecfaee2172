"""Which models can be adapted, and what works on them? Every cell is tried: writes docs/models_tried.md from what happened.

``python benchmarks/tried_models.py [NAME ...]``. Models are small and random, built from their libraries' configurations. On
each, every declaration is attached to all linear layers (or to what is named beside the model), and then: its outputs are those
of the merged model, every node gets a gradient, unmerging and detaching give back every bit, a saved adapter gives the same
outputs on a copy, and a copy of the model carries its own. A cell that is not so has the library's words below the table.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor, nn

import superlora_tn as sl

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models_tried.md"
SPECS = {
    "lora": lambda: sl.lora(2, alpha=4),
    "loha": lambda: sl.loha(2),
    "lokr": lambda: sl.lokr(2),
    "lotr": lambda: sl.lotr(2),
    "vera": lambda: sl.vera(4),
    "lorta": lambda: sl.lorta(2, groups=4),
}
OPERATIONS = ("attach", "as merged", "gradients", "bits back", "files", "copies")
# What the configurations of transformers call their sizes; each takes those that it knows.
SMALL = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embed_dim": 16,
    "dim": 32,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "n_inner": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "d_kv": 8,
    "hidden_dim": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "image_size": 32,
    "patch_size": 8,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "embedding_size": 32,
    "state_size": 8,
    "rotary_dim": 4,
    "num_mel_bins": 16,
    "window_size": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "sliding_window": 16,
    "global_attn_every_n_layers": 1,
    "local_attention": 16,
    "num_labels": 3,
    "attention_types": [[["global"], 2]],
}
OWN: dict[str, dict[str, Any]] = {
    "SwinModel": {"depths": [1, 1], "num_heads": [2, 4], "patch_size": 4},
    "Swinv2Model": {"depths": [1, 1], "num_heads": [2, 4], "patch_size": 4},
    "SegformerModel": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2]},
    "ConvNextModel": {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 16, 16], "patch_size": 4},
    "ResNetModel": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "embedding_size": 8},
    "GPTNeoForCausalLM": {"hidden_size": 32},
    "MptForCausalLM": {"n_heads": 4},
    "WhisperModel": {"max_source_positions": 32},
    "Wav2Vec2Model": {"num_feat_extract_layers": 2},
    "HubertModel": {"num_feat_extract_layers": 2},
}
TEXT = (
    *(
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
    ),
    *("PhiForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel", "GPTNeoForCausalLM", "GPTNeoXForCausalLM", "GPTJForCausalLM"),
    *(
        "BloomForCausalLM",
        "FalconForCausalLM",
        "OPTForCausalLM",
        "MptForCausalLM",
        "StableLmForCausalLM",
        "Starcoder2ForCausalLM",
    ),
    *("CohereForCausalLM", "OlmoForCausalLM", "MambaForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM"),
    *("BertForSequenceClassification", "RobertaModel", "ElectraModel", "DistilBertModel", "AlbertModel", "DebertaV2Model"),
    *("MPNetModel", "ModernBertModel", "T5Model", "BartModel"),
)
IMAGES = (
    *("ViTModel", "DeiTModel", "BeitModel", "Dinov2Model", "SwinModel", "Swinv2Model", "ConvNextModel", "ResNetModel"),
    *("SegformerModel", "CLIPVisionModel", "SiglipVisionModel", "ViTMAEModel"),
)
SOUND = ("Wav2Vec2Model", "HubertModel", "WhisperModel")
CONVOLUTIONS: dict[str, str | list[str]] = {"ConvNextModel": ["dwconv", "pwconv1", "pwconv2"], "ResNetModel": ["convolution"]}


@dataclass(frozen=True)
class Tried:
    """A model to try.

    Attributes:
        name: its class.
        library: where it is from.
        make: builds it.
        call: calls it with fixed inputs and gives one tensor.
        targets: which weights.
    """

    name: str
    library: str
    make: Callable[[], nn.Module]
    call: Callable[[nn.Module], Tensor]
    targets: str | list[str] = "all-linear"


def given(output: Any) -> Tensor:
    """All floating tensors of what a model gives, as one vector."""
    if isinstance(output, Tensor):
        return output.flatten()
    values = output.values() if isinstance(output, dict) else output
    return torch.cat([v.flatten() for v in values if isinstance(v, Tensor) and v.is_floating_point()])


def _transformers() -> Iterator[Tried]:
    import transformers

    ids = torch.arange(24).reshape(2, 12) % 60 + 3
    image, sound = (
        torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32),
        torch.linspace(0, 9, 800).sin().reshape(2, 400),
    )

    def made(name: str) -> nn.Module:
        kind = getattr(transformers, name)
        known = kind.config_class().to_dict()
        listed = {k for k in known if isinstance(known[k], list | tuple)}
        sizes = {k: v for k, v in SMALL.items() if k in known or k in kind.config_class.attribute_map}
        sizes = {k: v for k, v in sizes.items() if isinstance(v, list | tuple) == (k in listed)}
        own = OWN.get(name, {})
        sizes = {k: v for k, v in sizes.items() if kind.config_class.attribute_map.get(k) not in own}
        torch.manual_seed(0)
        model = kind(kind.config_class(**{**sizes, **own})).eval()
        if "experts" in "".join(n for n, _ in model.named_modules()):
            model.set_experts_implementation("eager")  # grouped products are not there in double precision
        return model

    def called(model: nn.Module, name: str) -> Tensor:
        torch.manual_seed(0)  # masked auto-encoders draw their masks
        if name in IMAGES:
            return given(model(pixel_values=image))
        if name == "WhisperModel":
            return given(
                model(input_features=torch.linspace(0, 5, 2 * 16 * 64).sin().reshape(2, 16, 64), decoder_input_ids=ids)
            )
        if name in SOUND:
            return given(model(input_values=sound))
        more = {"decoder_input_ids": ids} if name in ("T5Model", "BartModel") else {}
        return given(model(input_ids=ids, **more))

    for name in (*TEXT, *IMAGES, *SOUND):
        targets: str | list[str] = CONVOLUTIONS.get(name, "all-linear")
        yield Tried(name, "transformers", lambda n=name: made(n), lambda m, n=name: called(m, n), targets)


def _diffusers() -> Iterator[Tried]:
    import diffusers

    image, steps = torch.linspace(-1, 1, 2 * 4 * 16 * 16).sin().reshape(2, 4, 16, 16), torch.tensor([3, 7])
    text = torch.linspace(-1, 1, 2 * 5 * 16).cos().reshape(2, 5, 16)
    unet = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }

    def seeded(make: Callable[[], nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    call = lambda m: given(m(image, steps, text))  # noqa: E731
    make = lambda: seeded(lambda: diffusers.UNet2DConditionModel(**unet))  # noqa: E731
    yield Tried("UNet2DConditionModel, linear layers", "diffusers", make, call)
    yield Tried("UNet2DConditionModel, convolutions", "diffusers", make, call, ["conv1", "conv2", "conv_shortcut"])
    dit = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "num_layers": 2,
        "sample_size": 16,
        "patch_size": 4,
        "norm_num_groups": 4,
        "cross_attention_dim": None,
        "num_embeds_ada_norm": 20,
    }
    yield Tried(
        "DiTTransformer2DModel",
        "diffusers",
        lambda: seeded(lambda: diffusers.DiTTransformer2DModel(**{k: v for k, v in dit.items() if k != "cross_attention_dim"})),
        lambda m: given(m(image, timestep=steps, class_labels=torch.tensor([1, 2]))),
    )
    sd3 = {
        "sample_size": 16,
        "patch_size": 4,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 8,
        "out_channels": 4,
        "pos_embed_max_size": 8,
    }
    yield Tried(
        "SD3Transformer2DModel",
        "diffusers",
        lambda: seeded(lambda: diffusers.SD3Transformer2DModel(**sd3)),
        lambda m: given(m(image, text, torch.ones(2, 8), steps)),
    )
    vae = {"block_out_channels": (16, 32), "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    yield Tried(
        "AutoencoderKL, convolutions",
        "diffusers",
        lambda: seeded(lambda: diffusers.AutoencoderKL(**vae, **blocks)),
        lambda m: given(m(image[:, :3])),
        ["conv1", "conv2"],
    )


def _torch() -> Iterator[Tried]:
    x = torch.linspace(-1, 1, 2 * 5 * 16).sin().reshape(2, 5, 16)

    def made(make: Callable[[], nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    layer = lambda: nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.0)  # noqa: E731
    yield Tried("TransformerEncoder", "torch", lambda: made(lambda: nn.TransformerEncoder(layer(), 2)), lambda m: m(x))
    yield Tried(
        "MultiheadAttention, all projections",
        "torch",
        lambda: made(lambda: nn.ModuleDict({"attn": nn.MultiheadAttention(16, 4, batch_first=True)})),
        lambda m: m["attn"](x, x, x)[0],
        ["q_proj", "k_proj", "v_proj", "out_proj"],
    )
    yield Tried(
        "Sequential", "torch", lambda: made(lambda: nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))), lambda m: m(x)
    )
    convolutions = lambda: nn.Sequential(nn.Conv1d(5, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3, groups=2))  # noqa: E731
    yield Tried("Sequential, Conv1d", "torch", lambda: made(convolutions), lambda m: m(x), ["0", "2"])
    transposed = lambda: nn.Sequential(nn.ConvTranspose1d(5, 8, 3, stride=2), nn.ReLU(), nn.Conv1d(8, 4, 3))  # noqa: E731
    yield Tried("Sequential, ConvTranspose1d", "torch", lambda: made(transposed), lambda m: m(x), ["0", "2"])
    numbers = torch.arange(10).reshape(2, 5)
    table = lambda: nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 4))  # noqa: E731
    yield Tried("Sequential, Embedding", "torch", lambda: made(table), lambda m: m(numbers), ["0", "1"])
    lstm = lambda: nn.ModuleDict({"rnn": nn.LSTM(16, 8, batch_first=True)})  # noqa: E731
    yield Tried("LSTM", "torch", lambda: made(lstm), lambda m: m["rnn"](x)[0], ["rnn.weight_ih_l0", "rnn.weight_hh_l0"])


LIBRARIES: dict[str, Callable[[], Iterator[Tried]]] = {"torch": _torch, "transformers": _transformers, "diffusers": _diffusers}


def models(libraries: list[str] | None = None) -> Iterator[Tried]:
    """All models of the libraries that are installed."""
    for name in libraries or LIBRARIES:
        try:
            found = list(LIBRARIES[name]())
        except ImportError:
            continue
        yield from found


def cell(tried: Tried, spec: Callable[[], sl.AdapterSpec]) -> dict[str, str]:
    """What each operation gave: "ok", "differs by ...", or the words of an error."""
    found = dict.fromkeys(OPERATIONS, "not reached")
    model = tried.make().double()
    torch.set_default_dtype(torch.float64)
    try:
        return _cell(tried, spec, model, found)
    finally:
        torch.set_default_dtype(torch.float32)


def _doubled(tried: Tried, model: nn.Module) -> Tensor:
    """The model's output in double precision, whatever the inputs were made in."""

    def widened(module: nn.Module, args: Any, kwargs: Any) -> Any:
        wide = lambda v: v.double() if isinstance(v, Tensor) and v.dtype == torch.float32 else v  # noqa: E731
        return tuple(map(wide, args)), {k: wide(v) for k, v in kwargs.items()}

    handles = [
        m.register_forward_pre_hook(widened, with_kwargs=True)
        for m in ([model] if not isinstance(model, nn.ModuleDict) else model.children())
    ]
    try:
        return tried.call(model)
    finally:
        for handle in handles:
            handle.remove()


def _idle(tried: Tried, base: nn.Module) -> set[str]:
    """Names of modules whose weight gets no gradient in the base itself."""
    model = copy.deepcopy(base).requires_grad_()
    _doubled(tried, model).square().mean().backward()
    found = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    return {n.removesuffix(".weight") for n in found}


def _cell(tried: Tried, spec: Callable[[], sl.AdapterSpec], model: nn.Module, found: dict[str, str]) -> dict[str, str]:
    before, base = {k: v.clone() for k, v in model.state_dict().items()}, copy.deepcopy(model)
    now = "attach"
    try:
        tuned = sl.attach(model, spec(), tried.targets, dtype=torch.float64, seed=0)
        found[now] = f"{len(tuned.targets)} weights"
        with torch.no_grad():
            for k, node in enumerate(tuned.parameters()):
                node.add_(0.1 * torch.linspace(1, 3 + k, node.numel(), dtype=node.dtype).sin().reshape(node.shape))
        now = "as merged"
        with torch.no_grad():
            adapted = _doubled(tried, model)
            tuned.merge()
            merged = _doubled(tried, model)
            tuned.unmerge()
        error = float((adapted - merged).abs().max() / merged.abs().max())
        # Two orders of the same sums, in float64, through all layers.
        found[now] = "ok" if error < 1e-9 else f"differs by {error:.1g}"
        now = "gradients"
        _doubled(tried, model).square().mean().backward()
        missing = {id(p) for p in tuned.parameters() if p.grad is None or not p.grad.any()}
        if missing:  # an expert that got no token, the last block's text stream: the base's own weight has no effect there
            idle = _idle(tried, base)
            missing -= {id(p) for a in tuned.adapters if idle.issuperset(a.group.members) for p in a.parameters()}
        found[now] = "ok" if not missing else f"none at {len(missing)} of {sum(1 for _ in tuned.parameters())} nodes"
        now = "files"
        with tempfile.TemporaryDirectory() as folder:
            tuned.save(folder)
            sl.load(base, folder)
            with torch.no_grad():
                found[now] = "ok" if torch.equal(_doubled(tried, base), adapted) else "differs"
        now = "copies"
        with torch.no_grad():
            found[now] = "ok" if torch.equal(_doubled(tried, copy.deepcopy(model)), adapted) else "differs"
        now = "bits back"
        tuned.detach()
        after = model.state_dict()
        same = after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
        found[now] = "ok" if same else "differs"
    except Exception as error:
        found[now] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return found


def page(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """The rows as a page: one line a model, notes for all that is not simply right."""
    lines = [
        "# Models that were tried",
        "",
        "Written by `python benchmarks/tried_models.py`. "
        + " ".join((__doc__ or "").split("\n\n")[1].split("NAME ...]``. ")[1].split()),
        "",
        f"{len({r['model'] for r in rows})} models, torch {machine['torch']}, {machine['date']}.",
        "",
        "| library | model | weights | " + " | ".join(SPECS) + " |",
        "|---|---|---|" + "---|" * len(SPECS),
    ]
    notes: dict[str, int] = {}
    for name in dict.fromkeys(r["model"] for r in rows):
        own = {r["variant"]: r for r in rows if r["model"] == name}
        cells = []
        for variant in SPECS:
            bad = [f"{op}: {own[variant][op]}" for op in OPERATIONS[1:] if own[variant][op] != "ok"]
            bad = bad if own[variant]["attach"].endswith("weights") else [f"attach: {own[variant]['attach']}"]
            cells.append("all right" if not bad else ", ".join(f"[{notes.setdefault(b, len(notes) + 1)}]" for b in bad[:2]))
        counts = {r["attach"].split()[0] for r in own.values() if r["attach"].endswith("weights")}
        lines.append(f"| {own['lora']['library']} | {name} | {', '.join(sorted(counts)) or '-'} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {text}" for text, number in notes.items())] if notes else []
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try all models, or the named ones, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models to try (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    from superlora_tn.tools.measure import machine

    rows = []
    for tried in models():
        if args.names and tried.name not in args.names:
            continue
        for variant, spec in SPECS.items():
            row = {"library": tried.library, "model": tried.name, "variant": variant, **cell(tried, spec)}
            rows.append(row)
            wrong = {op: row[op] for op in OPERATIONS[1:] if row[op] != "ok"}
            print(tried.name, variant, row["attach"], wrong or "ok", flush=True)
    if not args.names:
        facts = machine("cpu")
        (harness.RESULTS / "models.json").write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
        PAGE.write_text(page(rows, facts))


if __name__ == "__main__":
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
    main()
