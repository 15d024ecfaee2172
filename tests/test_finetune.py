"""``superlora-tn finetune``: end to end on folders made here; a killed run goes on bit for bit; mistakes are refused early."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from optional import library
from safetensors.torch import load_file, save_file
from shown import ROOT

import superlora_tn as sl
from superlora_tn.cli import main

transformers = library("transformers")
library("accelerate")
library("yaml")
library("PIL")
tokenizers = library("tokenizers")
library("matplotlib")

from superlora_tn.finetune.config import Config, read_config  # noqa: E402
from superlora_tn.finetune.named import ConfigError, digest  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[END]", "good", "bad", "film", "a", "the", "very", "was", "it", "not", "plot", "cast", "and", "end"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def tokenizer(folder: Path) -> None:
    numbers = {word: k for k, word in enumerate(WORDS)}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[END]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=own, **names).save_pretrained(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random models with what reads their inputs, and data to learn."""
    from PIL import Image

    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), **SIZES)).save_pretrained(root / "bert")
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=len(WORDS), **SIZES, bos_token_id=2, eos_token_id=2)
    ).save_pretrained(root / "llama")
    vit = transformers.ViTConfig(image_size=16, patch_size=8, **SIZES)
    transformers.ViTForImageClassification(vit).save_pretrained(root / "vit")
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(root / "vit")
    for name in ("bert", "llama"):
        tokenizer(root / name)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for k in range(40):
        label = ("bad", "good")[k % 2]
        words = [WORDS[int(n)] for n in torch.randint(5, 16, (4,), generator=generator)]
        rows.append({"text": " ".join([label, label, label, words[0]]), "label": label})
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "words.txt").write_text(" ".join("the plot was very good and it was a film" for _ in range(60)))
    for k, colour in enumerate(((200, 30, 30), (30, 30, 200), (30, 200, 30))):
        place = root / "pictures" / f"class{k}"
        place.mkdir(parents=True)
        for n in range(8):
            Image.new("RGB", (20, 20), tuple(c + 3 * n for c in colour)).save(place / f"{n}.png")
    return root


def written(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def lines(bases: Path, kind: str, out: Path) -> str:
    model, data, targets = {
        "image-classification": ("vit", "pictures", "[q_proj, v_proj]"),
        "text-classification": ("bert", "rows.jsonl", "[query, value]"),
        "causal-lm": ("llama", "words.txt", "[q_proj, v_proj]"),
    }[kind]
    common = "rate: 1e-2\nbatch: 4\nsteps: 12\nevery: 4\nlog: 1\nlength: 12\ncpu: true\neval_share: 0.2\n"
    return f"model: {bases / model}\ntask: {kind}\ndata: {bases / data}\ntargets: {targets}\noutput: {out}\n{common}"


def ran(path: str, *flags: str) -> dict[str, Any]:
    from superlora_tn.finetune.command import flags as given
    from superlora_tn.finetune.run import finetune

    return finetune(read_config(path, given(flags)))


def inputs(bases: Path, kind: str) -> dict[str, Any]:
    if kind == "image-classification":
        return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}
    return {"input_ids": torch.tensor([[3, 5, 6, 7], [4, 8, 9, 10]])}


@pytest.mark.parametrize("kind", ["image-classification", "text-classification", "causal-lm"])
def test_a_folder_is_learnt_and_the_adapter_is_the_merged_model(kind: str, bases: Path, tmp_path: Path) -> None:
    """Tolerance: logits of a few units in float32, with dW added to the weight in place of the output."""
    from superlora_tn.finetune.job import AUTO

    path = written(tmp_path, lines(bases, kind, tmp_path / "out"))
    more = ("--settings.rank", "2", "--steps", "24", "--rate", "3e-2", *(["--also", "lm_head"] if kind == "causal-lm" else []))
    report = ran(path, *more)
    losses = [row["loss"] for row in report["history"] if "loss" in row]
    assert len(losses) == report["steps"] == 24
    assert min(losses[-6:]) < 0.9 * losses[0]
    assert (report["targets"], report["parameters"]) == (4, 4 * 2 * (16 + 16))
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert (tmp_path / "out" / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list((tmp_path / "out").rglob("model.safetensors"))
    merged = ran(path, *more, "--format", "merged")
    assert merged["history"] == report["history"]
    base = lines(bases, kind, tmp_path).splitlines()[0].removeprefix("model: ")
    head = {} if kind == "causal-lm" else {"num_labels": len(report["classes"]), "ignore_mismatched_sizes": True}
    model = AUTO[kind].from_pretrained(base, **head).eval()
    sl.load(model, tmp_path / "out" / "adapter")
    whole = AUTO[kind].from_pretrained(merged["files"][0]).eval()
    given = inputs(bases, kind)
    torch.testing.assert_close(model(**given).logits, whole(**given).logits, rtol=1e-4, atol=1e-5)
    if kind != "causal-lm":
        assert list(whole.config.id2label.values()) == report["classes"]
        assert any(name.startswith("classifier") for name in report["beside"])


def test_a_budget_of_a_convolution_is_what_is_attached(bases: Path, tmp_path: Path) -> None:
    """lokr(1) of Conv2d(3, 16, 8): channels 4 x 4 and 1 x 3, so W1 of 4 numbers, and a column of 4 by a row of 3 x 64."""
    from superlora_tn.finetune.job import prepare

    path = written(tmp_path, lines(bases, "image-classification", tmp_path / "out"))
    job = prepare(read_config(path, {"targets": "[projection]", "variant": "lokr", "budget": "300"}))
    assert [entry.spec.fold.kernel for entry in job.tuned.entries] == [(8, 8)]
    assert job.tuned.num_parameters == 4 + 4 + 3 * 64
    with pytest.raises(sl.SpecError, match="smallest possible count, 200"):
        prepare(read_config(path, {"targets": "[projection]", "variant": "lokr", "budget": "130"}))


KILL = """
import os, signal, sys
import superlora_tn.finetune.run as run
from superlora_tn.cli import main
def kill(self, args, state, control, **rest):
    if state.global_step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
run.Progress.on_step_end = kill
main(["finetune", {path!r}])
"""


@pytest.mark.parametrize("kind", ["text-classification", "causal-lm"])
def test_a_killed_run_goes_on_bit_for_bit(kind: str, bases: Path, tmp_path: Path) -> None:
    whole = ran(written(tmp_path, lines(bases, kind, tmp_path / "whole")), "--settings.dropout", "0.2")
    folder = tmp_path / "killed"
    text = lines(bases, kind, folder) + "settings: {dropout: 0.2}\n"
    path = written(tmp_path, text)
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'backends')!r}]\n" + KILL.format(step=6, path=path)
    code = "import sys; sys.modules['torchvision'] = None\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=200, check=False)
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    assert not (folder / "report.json").exists()
    broken = folder / "checkpoint-9"  # a kill while it was being written
    broken.mkdir()
    (broken / "adapter.json").write_text("{")
    again = ran(path)
    assert again["resumed_from"] == 4
    measured = ("loss", "eval_loss", "eval_accuracy", "grad_norm", "step")
    known = [
        [{k: row[k] for k in measured if k in row} for row in run["history"] if "train_runtime" not in row]
        for run in (whole, again)
    ]
    assert known[0] == known[1]
    first, second = (sl.read(tmp_path / name / "adapter") for name in ("whole", "killed"))
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[n], second.tensors[n]) for n in first.tensors)
    assert all(torch.equal(first.buffers[n], second.buffers[n]) for n in first.buffers)


def test_training_stops_early_and_the_best_is_kept(bases: Path, tmp_path: Path) -> None:
    text = lines(bases, "causal-lm", tmp_path / "out").replace("rate: 1e-2", "rate: 30").replace("steps: 12", "steps: 60")
    report = ran(written(tmp_path, text), "--patience", "2", "--every", "2", "--clip=0", "--schedule", "constant")
    evaluated = {row["step"]: row["eval_loss"] for row in report["history"] if "eval_loss" in row}
    assert report["stopped_early"]
    assert report["steps"] < 60
    assert report["best_step"] == min(evaluated, key=lambda step: evaluated[step])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("budget: 900", lambda report: 700 < report["parameters"] <= 900),
        ("variant: superlora\nbudget: 900", lambda report: 0 < report["parameters"] <= 900),
        (
            "variant: lotr\nsettings:\n  rank: 3",
            lambda report: report["parameters"] == 2 * 16 * 3 + 4 * 9,
        ),
        (
            "network: {result: out in, nodes: {a: out r, b: r in}, sizes: {r: 3}}",
            lambda report: report["parameters"] == 4 * 3 * 32,
        ),
        ("variant: fourier_ft\nbudget: 900", lambda report: report["parameters"] == 4 * 225),
        ("variant: lora\nsettings: {rank: 3}\njoin: dora", lambda report: report["parameters"] == 4 * (3 * 32 + 16)),
        ("budget: 900\njoin: dora", lambda report: report["parameters"] == 4 * (6 * 32 + 16)),
        ("variant: oft\nsettings: {size: 4}", lambda report: report["parameters"] == 4 * 4 * 6),
        (
            "network: {result: out in, nodes: {w: {indices: out in, map: {kind: Circulant, size: 4}}}}\njoin: left",
            lambda report: report["parameters"] == 4 * 16 * 16 // 4,
        ),
        (
            "variant: lorta\nsettings: {rank: 2, order: 2, projection: {kind: Fastfood, ratio: 0.5}}",
            lambda report: report["parameters"] == 2 * 2 + 2 * 2 * 23,  # 512 of 1,024 numbers as a square of 23
        ),
    ],
)
def test_budgets_variants_and_notation(change: str, said: Any, bases: Path, tmp_path: Path) -> None:
    text = lines(bases, "causal-lm", tmp_path / "out").replace("steps: 12", "steps: 2")
    assert said(ran(written(tmp_path, f"{text}{change}\n")))


def test_a_sum_is_declared_by_its_file(bases: Path, tmp_path: Path) -> None:
    spec = sl.AdapterSpec(sl.Sum(sl.CP(2), sl.Network("o i", S=sl.Node("o i", map=sl.Selected(10)))))
    (tmp_path / "sum.json").write_text(json.dumps(spec.to_dict()))
    text = lines(bases, "causal-lm", tmp_path / "out").replace("steps: 12", "steps: 2")
    report = ran(written(tmp_path, f"{text}spec: {tmp_path / 'sum.json'}\n"))
    assert report["parameters"] == 4 * (2 * 32 + 10)
    model = transformers.AutoModelForCausalLM.from_pretrained(bases / "llama")
    assert sl.load(model, tmp_path / "out" / "adapter").spec == spec


def test_what_a_format_cannot_say_is_refused_before_it_is_learnt(bases: Path, tmp_path: Path) -> None:
    text = lines(bases, "causal-lm", tmp_path / "out")
    with pytest.raises(sl.CheckpointError, match="formats of other libraries are for nodes that are stored themselves"):
        ran(written(tmp_path, f"{text}variant: c3a\nsettings: {{size: 4}}\nformat: kohya\n"))
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize("format", ["peft", "kohya", "diffusers"])
def test_the_adapter_is_written_in_other_formats(format: str, bases: Path, tmp_path: Path) -> None:
    text = lines(bases, "causal-lm", tmp_path / "out").replace("steps: 12", "steps: 2")
    report = ran(written(tmp_path, f"{text}format: {format}\n"))
    model = transformers.AutoModelForCausalLM.from_pretrained(bases / "llama")
    loaded = sl.load(model, report["files"][0] if format != "peft" else tmp_path / "out" / "adapter")
    assert len(loaded.targets) == 4


MISTAKES = [
    ("varient: lokr", ":14: there is no key 'varient'; did you mean variant"),
    ("variant: lokrr", ":14: variant is 'lokrr'; did you mean "),
    ("settings: {rnk: 3}", ":14: lora has no setting 'rnk'; did you mean rank"),
    ("rate: fast", ":14: 'rate' is given twice; give it once."),
    ("log : true", "'log' is given twice"),
    ("schedule: cosin", ":14: schedule is 'cosin'; did you mean cosine?"),
    ("decay: much", ":14: decay is 'much', and has to be a number."),
    ("accumulate: 0", ":14: accumulate is 0, and has to be at least 1."),
    ("also: 3", ":14: also is 3, and has to be a list of words."),
    ("variant: lokr\nspec: no.json", ":15: spec is in place of a variant; leave out variant."),
    (
        "variant: lokr\nnetwork: {result: out in, nodes: {a: out in}}",
        ":15: network is in place of a variant; leave out variant.",
    ),
    ("network: {result: out in, nods: {a: out in}}", ":14: a network has no 'nods'; did you mean nodes"),
    ("network: {result: out in, nodes: {a: out q}}", ":14: "),
    ("spec: no.json", ":14: spec is 'no.json', which is not there"),
    ("eval_data: ./none.jsonl", ":14: eval_data is './none.jsonl', which is not there"),
    ("budget: 90\nsettings: {rank: 3}", ":14: budget is in place of a rank"),
    ("exclude: [a", "this is no YAML"),
    ("exclude: a\x01", "this is no YAML in UTF-8: special characters are not allowed"),
    ("? [a, b]\n: 3", ":14: a key is a word, such as 'task'; here it is a list or a mapping."),
    ("seed: 4294967296", ":14: seed is 4294967296, and has to be at most 4,294,967,295."),
    ("clip: .inf", ":14: clip is inf, and has to be finite."),
    ("join: doora", ":14: join is 'doora'; did you mean dora"),
    ("variant: oft\njoin: dora", ":15: join 'dora' was given for a declaration that joins otherwise already (W' = W N)"),
    ("variant: superlora\nbudget: 90\njoin: dora", ":16: what a budget of superlora buys is counted as added"),
    ("variant: c3a\nbudget: 90", ":15: c3a has no rank or count that a budget could buy"),
    ("variant: waveft\nbudget: 90\nsettings: {count: 3}", ":15: budget is in place of a count"),
    (
        "network: {result: out in, nodes: {w: {indices: out in, mop: 3}}}",
        ":14: node w was given {'indices': 'out in', 'mop': 3}",
    ),
    ("network: {result: out in, nodes: {w: {indices: out in, map: {kind: Fur}}}}", ":14: {'kind': 'Fur'} is no map; write its"),
    ("settings: {rank: 2, alpha: {kind: Fourier, places: 3}}", ":14: Fourier was given {'places': 3}"),
]


@pytest.mark.parametrize(("line", "said"), MISTAKES)
def test_mistakes_are_refused_with_their_line(
    line: str, said: str, bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, lines(bases, "causal-lm", tmp_path / "out") + line + "\n")
    assert main(["finetune", path]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_refused_with_near_names(bases: Path, tmp_path: Path) -> None:
    text = lines(bases, "causal-lm", tmp_path / "out").replace("words.txt", "word.txt")
    with pytest.raises(ConfigError, match=r"run.yaml:3: data is .*word.txt', which is not there; did you mean .*words.txt"):
        read_config(written(tmp_path, text), {})
    with pytest.raises(ConfigError, match=r"--model: model is .*bort', which is not there; did you mean .*bert"):
        read_config(written(tmp_path, lines(bases, "causal-lm", tmp_path)), {"model": str(bases / "bort")})
    with pytest.raises(ConfigError, match=r"'task' is missing"):
        read_config(written(tmp_path, "model: some/name\ndata: other/name\n"), {})


def test_a_mistyped_place_is_not_asked_of_the_hub(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither near names, nor paths, nor what is there but of another kind."""
    monkeypatch.chdir(bases)
    text = lines(bases, "causal-lm", tmp_path / "out")
    path = written(tmp_path, text)
    said = {
        "model=models/llama": "--model: model is 'models/llama', which is not there.",
        "model=lama/": "model is 'lama/', which is not there; did you mean llama?",
        "model=words.txt": "--model: model is 'words.txt', which is a file; give the folder that save_pretrained wrote.",
        "spec=pictures": "--spec: spec is 'pictures', which is a folder; give a JSON file",
        "model=run.yml": f"did you mean {tmp_path}/run.yaml?",  # beside the configuration
    }
    for flag, answer in said.items():
        assert main(["finetune", path, f"--{flag}"]) == 2
        assert answer in capsys.readouterr().err
    assert read_config(path, {"model": "gpt2", "data": "owner/name"}).model == "gpt2"
    assert not capsys.readouterr().err
    own = written(tmp_path, text.replace(str(bases / "llama"), "lama"))
    assert read_config(own, {"data": "picture"}).model == "lama"  # they may be the hub's
    said_at_once = capsys.readouterr().err
    assert "run.yaml:1: model is 'lama', which is not here; did you mean llama? The hub is asked for it." in said_at_once
    assert "--data: data is 'picture', which is not here; did you mean pictures?" in said_at_once
    read_config(path, {"data": "picture/class0"})
    assert "data is 'picture/class0', which is not here; did you mean pictures/class0?" in capsys.readouterr().err


def test_a_pipeline_is_a_model_of_diffusion_alone(bases: Path, tmp_path: Path) -> None:
    """It has an index of its parts in place of a config.json."""
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    path = written(tmp_path, lines(bases, "causal-lm", tmp_path / "out"))
    words = {"model": str(tmp_path / "pipeline"), "task": "diffusion"}
    assert read_config(path, words).model == words["model"]
    with pytest.raises(ConfigError, match=r"pipeline holds no config\.json; give"):
        read_config(path, {**words, "task": "causal-lm"})


def test_flags_stand_on_either_side_of_the_file(bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, lines(bases, "causal-lm", tmp_path / "out"))
    for words in (["--rate", "0.01", "--steps=0", path, "--epochs", "0"], [path, "--steps", "0", "--epochs=0"]):
        assert main(["finetune", *words]) == 2
        assert "--epochs: steps and epochs are both 0" in capsys.readouterr().err
    for words, said in (
        (["--rate", "0.01"], "no file was given"),
        ([], "no file was given"),
        ([path, "other.yaml"], "'other.yaml' follows no key"),
        (["--rate=1", path, "--rate", "2"], "--rate is given twice"),
        ([path, "--rate"], "--rate has no value"),
    ):
        assert main(["finetune", *words]) == 2
        assert said in capsys.readouterr().err


def test_flags_go_before_the_file(bases: Path, tmp_path: Path) -> None:
    from superlora_tn.finetune.command import flags

    path = written(tmp_path, lines(bases, "causal-lm", tmp_path) + "settings: {rank: 3, alpha: 6}\n")
    config = read_config(path, flags(["--settings.rank", "5", "--rate=1e-4", "--targets", "[q_proj]"]))
    assert (config.settings, config.rate, config.targets) == ({"rank": 5, "alpha": 6}, 1e-4, ["q_proj"])
    for words, said in ((["rate"], "follows no key"), (["--rat"], "did you mean rate"), (["--rate=1", "--rate", "2"], "twice")):
        with pytest.raises(ConfigError, match=said):
            flags(words)
    assert Config(model="m", task="causal-lm", data="d").identity()["rate"] == 1e-3


def test_a_folder_of_another_run_is_left_alone(bases: Path, tmp_path: Path) -> None:
    text = lines(bases, "causal-lm", tmp_path / "out").replace("steps: 12", "steps: 2")
    first = ran(written(tmp_path, text))
    assert ran(written(tmp_path, text)) == first
    with pytest.raises(ConfigError, match=r"holds a run with rate: 0.01, and this one has rate: 0.1"):
        ran(written(tmp_path, text), "--rate", "0.1")


def test_a_run_on_data_that_changed_since_is_refused_also_when_it_is_finished(bases: Path, tmp_path: Path) -> None:
    rows = tmp_path / "words.txt"
    data = re.search(r"^data: (.+)$", text := lines(bases, "causal-lm", tmp_path / "out"), re.M)
    assert data
    rows.write_bytes(Path(data[1]).read_bytes())
    path = written(tmp_path, text.replace(data[1], str(rows)).replace("steps: 12", "steps: 2"))
    first = ran(path)
    rows.write_text(rows.read_text() + " the end")
    with pytest.raises(ConfigError, match=r"holds a run with data: .*words.txt, which has changed since; give another output"):
        ran(path)
    note = json.loads((tmp_path / "out" / "config.json").read_text())
    del note["contents"]  # as earlier releases wrote it
    (tmp_path / "out" / "config.json").write_text(json.dumps(note))
    assert ran(path) == first


def test_a_base_that_was_trained_on_since_is_refused(bases: Path, tmp_path: Path) -> None:
    """Its files have the names and sizes they had."""
    text = lines(bases, "causal-lm", tmp_path / "out").replace("steps: 12", "steps: 2")
    named = re.search(r"^model: (.+)$", text, re.M)
    assert named
    base = tmp_path / "base"
    shutil.copytree(named[1], base)
    path = written(tmp_path, text.replace(named[1], str(base)))
    first = ran(path)
    assert ran(path) == first
    weights = base / "model.safetensors"
    changed = {name: value + 1e-3 for name, value in load_file(weights).items()}
    size = weights.stat().st_size
    save_file(changed, weights, {"format": "pt"})
    assert weights.stat().st_size == size
    with pytest.raises(ConfigError, match=r"holds a run with model: .*base, which has changed since"):
        ran(path)


def test_pictures_that_came_or_went_change_a_folders_digest(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"12")
    out = tmp_path / "runs" / "out"
    found = [digest(tmp_path, out)]
    for name in ("2.png", "1.png"):
        (tmp_path / "cat" / name).write_bytes(b"123")
        found.append(digest(tmp_path, out))
    (tmp_path / "cat").rename(tmp_path / "dog")
    found.append(digest(tmp_path, out))
    assert len(set(found)) == 4
    out.mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    for name in (".hidden", ".git/index", "dog/cache-1.arrow", "runs/out/curves.png"):
        (tmp_path / name).write_bytes(b"1")
        assert digest(tmp_path, out) == found[-1]


def test_a_run_that_was_refused_is_put_right_in_the_same_folder(bases: Path, tmp_path: Path) -> None:
    """By its data, or by its targets; once a checkpoint is there, the folder is the run's."""
    path = written(tmp_path, lines(bases, "text-classification", tmp_path / "out").replace("steps: 12", "steps: 2"))
    with pytest.raises(ConfigError, match=r"there is no column 'words'"):
        ran(path, "--text", "words")
    with pytest.raises(sl.AttachError, match=r"the target 'qury' matches no module"):
        ran(path, "--targets", "[qury]")
    assert ran(path)["steps"] == 2
    with pytest.raises(
        ConfigError, match=r"holds a run with targets: \['query', 'value'\], and this one has targets: \['key'\]"
    ):
        ran(path, "--targets", "[key]")
    (tmp_path / "out" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"holds a run, and .*config.json does not say which"):
        ran(path)


def test_a_merged_model_that_cannot_be_written_is_refused_before_it_is_learnt(bases: Path, tmp_path: Path) -> None:
    """An embedding whose weight is the head's too."""
    tied = transformers.LlamaConfig(vocab_size=len(WORDS), **SIZES, bos_token_id=2, eos_token_id=2, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(tied).save_pretrained(tmp_path / "tied")
    tokenizer(tmp_path / "tied")
    text = lines(bases, "causal-lm", tmp_path / "out").replace(str(bases / "llama"), str(tmp_path / "tied"))
    path = written(tmp_path, text.replace("[q_proj, v_proj]", "[embed_tokens]"))
    with pytest.raises(sl.AttachError, match=r"the weight of 'model.embed_tokens' is shared with 'lm_head.weight'"):
        ran(path, "--format", "merged")
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert ran(path, "--steps", "1")["targets"] == 1


def test_grey_models_and_configs_of_several_labels_a_row(bases: Path, tmp_path: Path) -> None:
    vit = transformers.ViTConfig(image_size=16, patch_size=8, num_channels=1, **SIZES)
    transformers.ViTForImageClassification(vit).save_pretrained(tmp_path / "grey")
    means = {"image_mean": [0.5], "image_std": [0.5]}
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}, **means).save_pretrained(tmp_path / "grey")
    shutil.copytree(bases / "bert", tmp_path / "several")
    config = json.loads((tmp_path / "several" / "config.json").read_text())
    (tmp_path / "several" / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    for kind, name, usual in (("image-classification", "grey", "vit"), ("text-classification", "several", "bert")):
        text = lines(bases, kind, tmp_path / "out" / name).replace(str(bases / usual), str(tmp_path / name))
        assert ran(written(tmp_path, text), "--steps", "1")["steps"] == 1


@pytest.mark.parametrize("damage", ["adapter", "report"])
def test_a_finished_run_whose_result_is_gone_writes_it_again(damage: str, bases: Path, tmp_path: Path) -> None:
    path = written(tmp_path, lines(bases, "causal-lm", tmp_path / "out").replace("steps: 12", "steps: 2"))
    first = ran(path)
    before = sl.read(tmp_path / "out" / "adapter").tensors
    if damage == "adapter":
        shutil.rmtree(tmp_path / "out" / "adapter")
    else:
        (tmp_path / "out" / "report.json").write_text("")
    again = ran(path)
    assert (again["resumed_from"], again["history"], again["files"]) == (2, first["history"], first["files"])
    assert all(torch.equal(value, before[name]) for name, value in sl.read(tmp_path / "out" / "adapter").tensors.items())
    assert ran(path) == again


def test_a_run_that_diverged_is_reported_in_strict_json(
    bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    path = written(tmp_path, lines(bases, "causal-lm", tmp_path / "out").replace("rate: 1e-2", "rate: 3e38"))  # B A overflows
    assert main(["finetune", path, "--steps", "2", "--json"]) == 0
    for text in (capsys.readouterr().out, (tmp_path / "out" / "report.json").read_text()):
        history = json.loads(text, parse_constant=refuse)["history"]
        assert history[-1]["eval_loss"] is None
    assert main(["finetune", path, "--steps", "2"]) == 0
    assert "evaluation: loss not finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"txt": "a", "label": "good"}, r"rows.jsonl:2: there is no column 'text'; did you mean txt"),
        ([1], r"rows.jsonl:2: a row is an object with text and label"),
    ],
)
def test_rows_that_cannot_be_learnt_are_refused(row: Any, said: str, bases: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(r) for r in ({"text": "a", "label": "bad"}, row)))
    text = lines(bases, "text-classification", tmp_path / "out").replace(str(bases / "rows.jsonl"), str(data))
    with pytest.raises(ConfigError, match=said):
        ran(written(tmp_path, text))


def test_a_datasets_folder_is_read(bases: Path, tmp_path: Path) -> None:
    datasets = library("datasets")
    features = datasets.Features({"words": datasets.Value("string"), "mood": datasets.ClassLabel(names=["bad", "good"])})
    rows = datasets.Dataset.from_dict({"words": ["bad film", "good film"] * 8, "mood": [0, 1] * 8}, features=features)
    datasets.DatasetDict({"train": rows, "test": rows.select(range(4))}).save_to_disk(str(tmp_path / "moods"))
    text = lines(bases, "text-classification", tmp_path / "out").replace(str(bases / "rows.jsonl"), str(tmp_path / "moods"))
    report = ran(written(tmp_path, text), "--text", "words", "--label", "mood", "--steps", "2")
    assert report["classes"] == ["bad", "good"]
    assert report["rows"] == {"train": 16, "eval": 4}
