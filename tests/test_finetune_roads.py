"""``superlora-tn finetune`` on two processes, broken off and resumed; .csv, every format of the result, hub names."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import launched
from optional import library

import superlora_tn as sl

transformers = library("transformers")
library("accelerate")
library("yaml")
tokenizers = library("tokenizers")
library("matplotlib")

from superlora_tn.finetune.config import Config  # noqa: E402
from superlora_tn.finetune.data import read_rows  # noqa: E402
from superlora_tn.finetune.named import ConfigError  # noqa: E402
from superlora_tn.finetune.run import finetune  # noqa: E402

WORDS = ["[UNK]", "[END]", "good", "bad", "film", "a", "the", "was", "it"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model with its tokenizer, and words to learn."""
    root = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.LlamaConfig(vocab_size=len(WORDS), **sizes, bos_token_id=1, eos_token_id=1)
    transformers.LlamaForCausalLM(config).save_pretrained(root / "llama")
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: k for k, w in enumerate(WORDS)}, unk_token="[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"unk_token": "[UNK]", "eos_token": "[END]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=own, **names).save_pretrained(root / "llama")
    (root / "words.txt").write_text(" ".join("the film was good and it was a bad film" for _ in range(50)))
    return root


def config(base: Path, out: Path, **options: Any) -> Config:
    given: dict[str, Any] = {"model": str(base / "llama"), "data": str(base / "words.txt"), "output": str(out), "length": 8}
    given |= {"targets": ["q_proj", "v_proj"], "steps": 8, "every": 4, "log": 1, "rate": 1e-2, "cpu": True}
    given["eval_share"] = 16 / 56  # 40 rows are left: whole batches, which accelerate does not fill up
    return Config(**({"task": "causal-lm"} | given | options))


SCRIPT = """
import sys
sys.modules["torchvision"] = None
from superlora_tn.finetune import run
from superlora_tn.finetune.config import read_config
class Killed(Exception):
    pass
def kill(self, args, state, control, **rest):
    if state.global_step == 6:
        raise Killed
for path in sys.argv[1:]:
    run.Progress.on_step_end = kill
    try:
        run.finetune(read_config(path, {}))
    except Killed:
        del run.Progress.on_step_end
        run.finetune(read_config(path, {}))
    else:
        raise AssertionError("it ran to its end")
"""


def pictures(folder: Path) -> dict[str, Any]:
    """A tiny denoiser and 56 pictures of one grey each; the options of a run that learns them."""
    diffusers, image = library("diffusers"), library("PIL.Image")
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **sizes, **kinds).save_pretrained(folder / "unet")
    diffusers.DDPMScheduler(num_train_timesteps=50).save_pretrained(folder / "unet" / "scheduler")
    (folder / "pictures").mkdir()
    for k in range(56):
        image.new("L", (8, 8), 4 * k).save(folder / "pictures" / f"{k}.png")
    names = {"model": str(folder / "unet"), "data": str(folder / "pictures")}
    return {"task": "diffusion", "targets": ["to_q", "to_v", "conv_out"], "samples": 2, "sample_steps": 2, **names}


@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform == "win32", reason="gloo is not here")
def test_two_processes_broken_off_and_resumed_are_one_with_the_doubled_batch(base: Path, tmp_path: Path) -> None:
    """With gradient accumulation, a language and a diffusion model. Tolerance: float32 sums in another order, 8 steps long."""
    kinds: dict[str, dict[str, Any]] = {"words": {}, "pictures": pictures(tmp_path)}
    wholes = {name: finetune(config(base, tmp_path / f"{name} whole", batch=4, accumulate=2, **kinds[name])) for name in kinds}
    for name, options in kinds.items():
        own = config(base, tmp_path / name, batch=2, accumulate=2, **options)
        given = {**own.identity(), "output": own.output, "log": 1}
        (tmp_path / f"{name}.yaml").write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in given.items()))
    launched(SCRIPT, tmp_path, *(f"{name}.yaml" for name in kinds))
    for name, whole in wholes.items():
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert (report["resumed_from"], report["steps"]) == (4, 8)
        for measured, count in (("loss", 8), ("eval_loss", 2)):
            pair = [[row[measured] for row in found["history"] if measured in row] for found in (report, whole)]
            assert len(pair[1]) == count
            assert pair[0] == pytest.approx(pair[1], rel=1e-4)
        first, second = (sl.read(tmp_path / place / "adapter").tensors for place in (name, f"{name} whole"))
        assert first.keys() == second.keys()
        for node, value in first.items():
            # AdamW divides by the roots of small numbers: a gradient near 0 may step to either side, 1e-2 at most at first.
            torch.testing.assert_close(value, second[node], rtol=1e-2, atol=1e-3)


def test_the_result_in_every_format_is_the_same_dw(base: Path, tmp_path: Path) -> None:
    """One run, written five times more. Tolerance: a scale put into a factor, in float32."""
    own = finetune(config(base, tmp_path / "out", settings={"rank": 2, "alpha": 3}, steps=4))

    def deltas(place: Path | str) -> dict[str, torch.Tensor]:
        tuned = sl.load(transformers.AutoModelForCausalLM.from_pretrained(base / "llama"), place)
        return {name: tuned.delta(name).detach() for name in tuned.targets}

    expected = deltas(tmp_path / "out" / "adapter")
    assert min(float(delta.abs().max()) for delta in expected.values()) > 1e-3
    for format in ("peft", "lycoris", "kohya", "diffusers", "gguf"):
        if format == "gguf":
            library("gguf")
        report = finetune(config(base, tmp_path / "out", settings={"rank": 2, "alpha": 3}, steps=4, format=format))
        assert report["history"] == own["history"]
        found = deltas(report["files"][0] if format != "peft" else tmp_path / "out" / "adapter")
        assert found.keys() == expected.keys()
        for name, delta in expected.items():
            torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-7)


def test_a_csv_file_is_what_its_rows_say(tmp_path: Path) -> None:
    """With commas, quotes and line breaks in the text, as .jsonl with the same rows."""
    texts = ["a good, long film", 'it was "bad"', "two\nlines", "the film"] * 3
    rows = [{"text": text, "label": ("good", "bad")[k % 2], "other": k} for k, text in enumerate(texts)]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["other", "label", "text"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = [
        read_rows(Config(model="m", task="text-classification", data=str(tmp_path / name)))
        for name in ("rows.csv", "rows.jsonl")
    ]
    assert found[0] == found[1]
    assert [row["text"] for row in found[0].train + found[0].held].count("two\nlines") == 3
    with pytest.raises(ConfigError, match=r"rows.csv:2: there is no column 'words'; there are"):
        read_rows(Config(model="m", task="text-classification", data=str(tmp_path / "rows.csv"), text="words"))


def test_hub_names_without_a_network_say_what_to_do(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, datasets = library("huggingface_hub"), library("datasets")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    said = r"is 'someone/none', which is no file or folder here, and could not be had from the hub: .*'hf download someone/none"
    with pytest.raises(ConfigError, match=f"model {said} --local-dir"):
        finetune(config(base, tmp_path / "out", model="someone/none"))
    with pytest.raises(ConfigError, match=f"data {said} --repo-type dataset --local-dir"):
        finetune(config(base, tmp_path / "other", data="someone/none"))
    library("diffusers")
    place = tmp_path / "pictures"
    place.mkdir()
    library("PIL.Image").new("RGB", (8, 8)).save(place / "0.png")
    with pytest.raises(ConfigError, match=f"model {said} --local-dir"):
        finetune(config(base, tmp_path / "third", task="diffusion", data=str(place), model="someone/none"))
