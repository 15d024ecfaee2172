"""``superlora-tn finetune`` of diffusion models: without a condition, by class, by caption; noise, velocity and flow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optional import library

import superlora_tn as sl

transformers = library("transformers")
library("accelerate")
library("yaml")
library("PIL")
library("matplotlib")
diffusers = library("diffusers")

from superlora_tn.finetune import diffusion, run  # noqa: E402
from superlora_tn.finetune.config import Config  # noqa: E402
from superlora_tn.finetune.denoiser import load  # noqa: E402
from superlora_tn.finetune.named import ConfigError  # noqa: E402

# Of diffusers, not ours: Euler's schedule makes an array of a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}
BLOCKS: dict[str, Any] = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
STEPS: dict[str, Any] = {"num_train_timesteps": 50}
TARGETS = {
    "unet": ["to_q", "to_v", "conv_out"],
    "dit": ["to_q", "to_v"],
    "sd": ["to_q", "to_v", "conv_out"],
    "sdxl": ["to_q", "to_v"],
    "sd3": ["to_q", "to_v", "proj_out"],
}
DATA = {"unet": "alone", "dit": "classes", "sd": "captions", "sdxl": "captions", "sd3": "beside"}


def unet(**options: Any) -> Any:
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(sample_size=8, attention_head_dim=8, **BLOCKS, **kinds, **options)


def vae(**options: Any) -> Any:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(sample_size=16, latent_channels=4, **BLOCKS, **kinds, **options)


def clip(projects: bool = False) -> tuple[Any, Any]:
    """A text encoder that projects or not, and its tokenizer of single letters."""
    letters = [chr(k) for k in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = transformers.CLIPTokenizer(vocab={word: k for k, word in enumerate(words)}, merges=[], model_max_length=20)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "projection_dim": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPTextConfig(vocab_size=len(words), max_position_embeddings=20, **sizes, **ends)
    kind = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
    return kind(config).eval(), tokenizer


def pipeline(kind: str) -> Any:
    if kind == "dit":
        sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2}
        model = diffusers.DiTTransformer2DModel(in_channels=4, out_channels=8, num_embeds_ada_norm=3, **sizes)
        scheduler = diffusers.DDIMScheduler(**STEPS, prediction_type="v_prediction")
        return diffusers.DiTPipeline(model, vae(), scheduler, id2label=dict(enumerate(COLOURS)))
    if kind in ("sd", "sdxl"):
        down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
        kinds: dict[str, Any] = {"down_block_types": down, "up_block_types": up, "attention_head_dim": 8}
        if kind == "sdxl":
            kinds |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
            kinds |= {"projection_class_embeddings_input_dim": 16 + 6 * 8}
        width = 16 if kind == "sd" else 32
        model = diffusers.UNet2DConditionModel(sample_size=8, cross_attention_dim=width, **BLOCKS, **kinds)
        (encoder, tokenizer), scheduler = clip(), diffusers.PNDMScheduler(**STEPS, skip_prk_steps=True, steps_offset=1)
        if kind == "sd":
            parts = (vae(), encoder, tokenizer, model, scheduler, None, None)
            return diffusers.StableDiffusionPipeline(*parts, requires_safety_checker=False)
        second, its = clip(True)
        euler = diffusers.EulerDiscreteScheduler(**STEPS, steps_offset=1)
        return diffusers.StableDiffusionXLPipeline(vae(), encoder, second, tokenizer, its, model, euler)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    model = diffusers.SD3Transformer2DModel(
        in_channels=4,
        out_channels=4,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        **sizes,
    )
    first, second = clip(True), clip(True)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(**STEPS, shift=3.0)
    return diffusers.StableDiffusion3Pipeline(model, flow, vae(shift_factor=0.1), *first, *second, None, None)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random models, and pictures of one colour each: alone, by class, and with captions told in both ways."""
    from PIL import Image

    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    unet().save_pretrained(root / "unet")
    diffusers.DDPMScheduler(**STEPS).save_pretrained(root / "unet" / "scheduler")
    for kind in ("dit", "sd", "sdxl", "sd3"):
        pipeline(kind).save_pretrained(root / kind)
    note = root / "dit" / "model_index.json"  # DiT's published folder names its classes so; diffusers does not save them
    names = {"id2label": dict(enumerate(COLOURS))}
    note.write_text(json.dumps(json.loads(note.read_text()) | names))
    notes = []
    for name, colour in COLOURS.items():
        for n in range(4):
            picture = Image.new("RGB", (20, 24), tuple(c + 3 * n for c in colour))
            for place in (root / "alone", root / "classes" / name, root / "captions", root / "beside"):
                place.mkdir(parents=True, exist_ok=True)
                picture.save(place / f"{name}{n}.png")
            (root / "beside" / f"{name}{n}.txt").write_text(f"a {name} square\n")
            notes.append(f"{name}{n}.png,a {name} square")
    (root / "captions" / "metadata.csv").write_text("\n".join(["file_name,text", *notes]))
    return root


def config(bases: Path, kind: str, out: Path, **options: Any) -> Config:
    given: dict[str, Any] = {"rate": 3e-3, "batch": 4, "steps": 6, "every": 3, "log": 1, "eval_share": 0.25, "cpu": True}
    given |= {"samples": 2, "sample_steps": 3, "settings": {"rank": 2}, "targets": TARGETS[kind]}
    given |= {"model": str(bases / kind), "data": str(bases / DATA[kind]), "output": str(out)}
    return Config(task="diffusion", **(given | options))


CPU = torch.device("cpu")


def losses(report: dict[str, Any]) -> list[float]:
    return [row["loss"] for row in report["history"] if "loss" in row]


def told(base: Any, kind: str, rows: list[Any], names: list[str]) -> dict[str, Any]:
    """What a model is told of rows, straight from diffusers."""
    if kind == "unet":
        return {}
    if kind == "dit":
        return {"class_labels": torch.tensor([list(COLOURS).index(name) for name in names])}
    texts = [f"a {name} square" for name in names]
    whole = {"device": CPU, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if kind == "sd":
        return {"encoder_hidden_states": base.encode_prompt(texts, **whole)[0].double()}
    if kind == "sdxl":
        states, _, pooled, _ = base.encode_prompt(texts, **whole)
        sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * len(texts))
        return {
            "encoder_hidden_states": states.double(),
            "added_cond_kwargs": {"text_embeds": pooled.double(), "time_ids": sizes},
        }
    states, _, pooled, _ = base.encode_prompt(texts, texts, texts, **whole)
    return {"encoder_hidden_states": states.double(), "pooled_projections": pooled.double()}


@pytest.mark.parametrize("kind", TARGETS)
def test_the_losses_are_the_schedules_formulas(kind: str, bases: Path, tmp_path: Path) -> None:
    """With a rate of 0, so that the model stays its base: images, noise and targets written out in float64.

    Tolerance: float32 through a network and a VAE, about 1e-6 of a loss near 1; 1e-4 leaves room for cancellation in v.
    """
    given = config(bases, kind, tmp_path / "out", rate=0.0, steps=1, every=1, batch=9, samples=0)
    report = run.finetune(given)
    job = diffusion.prepare(given, CPU)
    base = None if kind == "unet" else diffusers.DiffusionPipeline.from_pretrained(bases / kind, **absent(kind))
    own = base.components.get("unet") or base.components["transformer"] if base else unet().from_pretrained(bases / kind)
    model = own.double().eval()
    bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 50))
    history = {key: row[key] for row in report["history"] for key in ("loss", "eval_loss") if key in row}
    assert len(job.train.rows) == 9
    for key, data, when in (("loss", job.train, 0), ("eval_loss", job.held, "held")):
        if (kind, key) == ("dit", "loss"):
            continue  # while it trains, DiT leaves out classes by chance
        names = [row["image"].stem[:-1] for row in data.rows]
        shades = [[c + 3 * int(row["image"].stem[-1]) for c in COLOURS[n]] for n, row in zip(names, data.rows, strict=True)]
        side = 8 if kind == "unet" else 16
        clean = (torch.tensor(shades).double() / 127.5 - 1)[:, :, None, None].expand(-1, -1, side, side)
        shape = (3, 8, 8) if kind == "unet" else (4, 8, 8)
        drawn = [diffusion.draws(0, when, k, shape, 50) for k in range(len(names))]
        moment, noise, other = (torch.stack(found) for found in zip(*drawn, strict=True))
        if base:
            with torch.no_grad():
                latents = base.vae.double().encode(clean).latent_dist
            shift = 0.1 if kind == "sd3" else 0.0
            clean = (latents.mean + latents.std * other - shift) * base.vae.config.scaling_factor
        noise = noise.double()
        if kind == "sd3":
            share = (50 - moment.double()) / 50
            sigma = 3 * share / (1 + 2 * share)
            times, s = 50 * sigma, sigma[:, None, None, None]
            noisy, target = (1 - s) * clean + s * noise, noise - clean
        else:
            times, bar = moment, torch.from_numpy(bars)[moment][:, None, None, None]
            noisy = bar.sqrt() * clean + (1 - bar).sqrt() * noise
            target = bar.sqrt() * noise - (1 - bar).sqrt() * clean if kind == "dit" else noise
        with torch.no_grad():
            found = model(noisy, timestep=times, **told(base, kind, data.rows, names)).sample[:, : shape[0]]
        assert history[key] == pytest.approx(float((found - target).square().mean()), rel=1e-4)


def absent(kind: str) -> dict[str, None]:
    return {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3" else {}


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
@torch.no_grad()
def test_samples_are_those_of_the_pipeline(kind: str, bases: Path, tmp_path: Path) -> None:
    """With guidance, from the same noise. Tolerance: float32 in another order of guided steps, images in [0, 1]."""
    job = diffusion.prepare(config(bases, kind, tmp_path), CPU)
    start = torch.randn(2, 4, 8, 8)
    words = ["a red square", "a blue square"]
    known = job.denoiser.captions(words, 16, CPU), job.denoiser.untold(2, 16, CPU)
    found = job.denoiser.sample(start, *known, guidance=4.0, steps=5, seed=0)
    pipe = diffusers.DiffusionPipeline.from_pretrained(bases / kind, **absent(kind))
    pipe.set_progress_bar_config(disable=True)
    begun = start if kind == "sd3" else start.clone()
    expected = pipe(
        words, latents=begun, guidance_scale=4.0, num_inference_steps=5, output_type="pt", height=16, width=16
    ).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["unet", "dit", "sdxl", "sd3"])
def test_it_learns_and_the_merged_pipeline_is_base_and_adapter(kind: str, bases: Path, tmp_path: Path) -> None:
    """Tolerance: a denoiser's output of a few units in float32, with dW added to the weight in place of the output."""
    given = config(bases, kind, tmp_path / "out", steps=12, every=4, rate=3e-2, batch=9)
    report = run.finetune(given)
    evaluated = [row["eval_loss"] for row in report["history"] if "eval_loss" in row]
    assert evaluated[-1] < evaluated[0]
    assert (tmp_path / "out" / "samples.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list((tmp_path / "out").rglob("diffusion_pytorch_model.safetensors"))
    merged = run.finetune(config(bases, kind, tmp_path / "out", steps=12, every=4, rate=3e-2, batch=9, format="merged"))
    assert losses(merged) == losses(report)
    whole = load(config(bases, kind, tmp_path, model=merged["files"][0])).model.eval()
    base = load(given).model.eval()
    sl.load(base, tmp_path / "out" / "adapter")
    shape = (3, 8, 8) if kind == "unet" else (4, 8, 8)
    x, times = torch.randn(2, *shape), torch.tensor([3, 40])
    more = told(load(given).pipeline, kind, [], ["red", "blue"])
    more = {k: v.float() if k != "class_labels" and torch.is_tensor(v) else v for k, v in more.items()}
    if kind == "sdxl":
        more["added_cond_kwargs"] = {k: v.float() for k, v in more["added_cond_kwargs"].items()}
    with torch.no_grad():
        pair = [model(x, timestep=times, **more).sample for model in (base, whole)]
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


def test_diffusers_reads_the_adapter(bases: Path, tmp_path: Path) -> None:
    """Tolerance: a product in another order, in float32."""
    library("peft")
    report = run.finetune(config(bases, "sd", tmp_path / "out", format="diffusers", rate=3e-2))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(bases / "sd")
    x, times, states = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 20, 16)
    ours = load(config(bases, "sd", tmp_path)).model.eval()
    plain = ours(x, times, states).sample
    sl.load(ours, report["files"][0])
    pipe.load_lora_weights(tmp_path / "out" / "adapter")
    with torch.no_grad():
        theirs = pipe.unet.eval()(x, times, states).sample
    torch.testing.assert_close(ours(x, times, states).sample, theirs, rtol=1e-4, atol=1e-5)
    assert (theirs - plain).abs().max() > 1e-3


class Killed(Exception):
    """The process ends."""


@pytest.mark.parametrize("kind", ["dit"])
def test_a_killed_run_goes_on_bit_for_bit(kind: str, bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with a VAE, that leaves out classes by chance while it trains."""
    whole = run.finetune(config(bases, "dit", tmp_path / "whole"))

    def kill(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run.Progress, "on_step_end", kill)
        with pytest.raises(Killed):
            run.finetune(config(bases, "dit", tmp_path / "killed"))
    again = run.finetune(config(bases, "dit", tmp_path / "killed"))
    assert again["resumed_from"] == 3
    assert losses(again) == losses(whole)
    first, second = (sl.read(tmp_path / name / "adapter").tensors for name in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    pictures = [(tmp_path / name / "samples.png").read_bytes() for name in ("whole", "killed")]
    assert pictures[0] == pictures[1]


def test_what_is_drawn_does_not_depend_on_the_batches(bases: Path, tmp_path: Path) -> None:
    """Two batches of 2 a step are one of 4. Tolerance: float32 sums in another order, through 6 steps of AdamW."""
    whole = run.finetune(config(bases, "sd", tmp_path / "whole", eval_share=0, rate=1e-3))
    parts = run.finetune(config(bases, "sd", tmp_path / "parts", eval_share=0, rate=1e-3, batch=2, accumulate=2))
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)


def test_folders_that_cannot_be_learnt_from_are_refused(bases: Path, tmp_path: Path) -> None:
    from PIL import Image

    def refuses(said: str, kind: str = "sd", **options: Any) -> None:
        with pytest.raises(ConfigError, match=said):
            diffusion.prepare(config(bases, kind, tmp_path / "out", **options), CPU)

    refuses(r"told a caption: metadata.jsonl .* there is no 'text' for .*blue", data=str(bases / "alone"))
    refuses(r"told its class: CLASS/NAME.png", "dit", data=str(bases / "alone"))
    refuses(r"size is 15, and this model's VAE makes 2 pixels one", size=15)
    refuses(r"model is '.*alone', which cannot be read: ", model=str(bases / "alone"))
    refuses(r"'.*unet' is told captions; give the folder of its pipeline", model=str(bases / "sd" / "unet"))
    place = tmp_path / "classes"
    for name in ("red", "violet"):
        (place / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(place / name / "0.png")
    refuses(r"the model knows no class 'violet'", "dit", data=str(place))
    (place / "violet").rename(place / "7")
    (place / "red").rename(place / "1")
    refuses(r"the data has a class 7, and the model has 3", "dit", data=str(place))
    (tmp_path / "metadata.csv").write_text("file_name,text\nnone.png,a\n")
    refuses(r"metadata.csv:2: there is no picture .*none.png", data=str(tmp_path))
    edm = tmp_path / "edm"
    unet().save_pretrained(edm)
    refuses(r"has no scheduler/scheduler_config.json", "unet", model=str(edm))
    diffusers.EDMEulerScheduler().save_pretrained(edm)
    refuses(r"has a EDMEulerScheduler with prediction_type epsilon; known are", "unet", model=str(edm))
