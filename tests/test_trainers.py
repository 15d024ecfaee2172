"""transformers' Trainer: the adapter alone is saved, and what is broken off goes on as if it had not been."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from models import same_state
from optional import library
from torch import Tensor, nn

import superlora_tn as sl

transformers = library("transformers")
library("accelerate")

from superlora_tn.trainers import AdapterCheckpoints, AdapterTrainer, card, from_hub, push_to_hub  # noqa: E402

SPECS = {"lora": sl.lora(2, alpha=4, dropout=0.1), "lotr": sl.lotr(2), "lorta": sl.lorta(2, groups=2)}
STEPS, SAVED = 6, 3


def model() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2))


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 31, (40, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder: Path, **options: Any) -> Any:
    settings = {"per_device_train_batch_size": 4, "max_steps": STEPS, "save_steps": SAVED, "logging_steps": 1, "report_to": []}
    settings |= {"use_cpu": True, "learning_rate": 1e-2, "save_strategy": "steps", "disable_tqdm": True}
    return transformers.TrainingArguments(str(folder), **(settings | options))


def attached(name: str) -> tuple[Any, sl.Tuned]:
    base = model()
    return base, sl.attach(base, SPECS[name], ["q_proj", "v_proj"], seed=0, also=["norm"])


class Killed(Exception):
    """The process ends."""


def killer(step: int) -> Any:
    class Killer(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step == step:
                raise Killed

    return Killer()


def trained(folder: Path, name: str, kill: int | None = None, resume: bool = False) -> tuple[dict[str, Tensor], list[float]]:
    base, _ = attached(name)
    trainer = AdapterTrainer(base, arguments(folder), train_dataset=data(), callbacks=[] if kill is None else [killer(kill)])
    with suppress(Killed):
        trainer.train(resume_from_checkpoint=resume)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {n: p.detach().clone() for n, p in base.named_parameters() if p.requires_grad}, losses


@pytest.mark.parametrize("name", SPECS)
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(name: str, tmp_path: Path) -> None:
    expected, losses = trained(tmp_path / "whole", name)
    trained(tmp_path / "killed", name, kill=SAVED + 1)
    found, again = trained(tmp_path / "killed", name, resume=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert any(n.endswith("norm.weight") for n in found)
    assert again == losses


def test_a_checkpoint_holds_the_adapter_alone(tmp_path: Path) -> None:
    base, tuned = attached("lora")
    AdapterTrainer(base, arguments(tmp_path), train_dataset=data()).train()
    folder = tmp_path / f"checkpoint-{STEPS}"
    names = {file.name for file in folder.iterdir()}
    assert "adapter.json" in names
    assert not names & {"model.safetensors", "pytorch_model.bin", "config.json"}
    other = model()
    loaded = sl.load(other, folder)
    assert all(torch.equal(loaded.delta(t), tuned.delta(t)) for t in tuned.targets)
    tokens = torch.arange(3, 11)[None]
    assert torch.equal(other.eval()(tokens).logits, base.eval()(tokens).logits)
    tuned.detach()
    assert same_state(base.state_dict(), model().state_dict())


def test_several_adapters_have_folders_of_their_own(tmp_path: Path) -> None:
    base = model()
    for name in ("style", "subject"):
        sl.attach(base, sl.lora(2), ["q_proj"], seed=0, name=name)
    trainer = AdapterTrainer(base, arguments(tmp_path), train_dataset=data())
    trainer.train()
    folder = tmp_path / f"checkpoint-{STEPS}"
    assert {file.name for file in folder.iterdir() if file.is_dir()} == {"style", "subject"}
    other = model()
    assert torch.equal(
        sl.load(other, folder / "subject", name="subject").delta("model.layers.0.self_attn.q_proj"),
        sl.tuned(base, "subject").delta("model.layers.0.self_attn.q_proj"),
    )


def test_the_best_is_loaded_at_the_end(tmp_path: Path) -> None:
    base, tuned = attached("lora")
    options = {"eval_strategy": "steps", "eval_steps": SAVED, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = AdapterTrainer(
        base, arguments(tmp_path, learning_rate=3.0, **options), train_dataset=data(), eval_dataset=data()[:8]
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    loaded = sl.load(model(), best)
    assert all(torch.equal(loaded.delta(t), tuned.delta(t)) for t in tuned.targets)


def test_what_no_checkpoint_would_hold_is_not_trained(tmp_path: Path) -> None:
    """A head that trains without `also=`, by one handle or by several; a checkpoint would silently lack it."""
    base = attached("lora")[0]
    sl.attach(base, sl.lora(2), ["o_proj"], name="other", also=["embed_tokens"])
    base.lm_head.requires_grad_(True)
    trainer = AdapterTrainer(base, arguments(tmp_path), train_dataset=data())
    with pytest.raises(
        sl.AttachError, match=r"'lm_head.weight' trains and is saved with no adapter, .* also=\['lm_head.weight'\]"
    ):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    base.lm_head.requires_grad_(False)
    trainer.train()
    assert len(list(tmp_path.glob("checkpoint-*"))) == STEPS // SAVED


def test_a_model_without_an_adapter_is_saved_as_ever(tmp_path: Path) -> None:
    trainer = AdapterTrainer(model(), arguments(tmp_path), train_dataset=data())
    trainer.train()
    assert (tmp_path / f"checkpoint-{STEPS}" / "model.safetensors").exists()


def test_the_best_of_a_model_without_an_adapter_is_loaded_as_ever(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": SAVED, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    base = model()
    trainer = AdapterTrainer(
        base, arguments(tmp_path, learning_rate=3.0, **options), train_dataset=data(), eval_dataset=data()[:8]
    )
    trainer.train()
    best = type(base).from_pretrained(trainer.state.best_model_checkpoint)
    assert same_state(best.state_dict(), base.state_dict())


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    """Tolerance: float32 sums in another order, through 6 steps of AdamW."""
    found = []
    for count, rows in ((1, 4), (2, 2)):
        base = model()
        sl.attach(base, sl.lotr(2), ["q_proj", "v_proj"], seed=0)
        options = {"gradient_accumulation_steps": count, "per_device_train_batch_size": rows, "save_strategy": "no"}
        trainer = AdapterTrainer(base, arguments(tmp_path / str(count), **options), train_dataset=data())
        trainer.train()
        found.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(found[0]) == STEPS
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_another_trainer_takes_the_checkpoints(tmp_path: Path) -> None:
    class Mine(AdapterCheckpoints, transformers.Seq2SeqTrainer):
        pass

    base, _ = attached("lotr")
    settings = arguments(tmp_path).to_dict()
    known = {k: settings[k] for k in ("per_device_train_batch_size", "max_steps", "save_steps", "report_to", "use_cpu")}
    Mine(base, transformers.Seq2SeqTrainingArguments(str(tmp_path), **known), train_dataset=data()).train()
    assert (tmp_path / f"checkpoint-{STEPS}" / "adapter.json").exists()


def test_generation_is_that_of_the_merged_model() -> None:
    base, tuned = attached("lotr")
    with torch.no_grad():
        for node in tuned.parameters():
            node.add_(torch.linspace(-0.3, 0.3, node.numel()).reshape(node.shape))
    merged = copy.deepcopy(base)
    sl.tuned(merged).merge()
    prompt = torch.arange(3, 9)[None]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    with tuned.fixed():
        assert torch.equal(base.eval().generate(prompt, **options), merged.eval().generate(prompt, **options))
    tuned.detach()
    assert not torch.equal(base.generate(prompt, **options), merged.generate(prompt, **options))


def test_an_adapter_goes_to_the_hub_and_back(tmp_path: Path) -> None:
    """By a hub that is a folder."""
    base, tuned = attached("lora")

    def upload(self: Any, *, repo_id: str, folder_path: str, **rest: Any) -> Any:
        import shutil

        shutil.copytree(folder_path, tmp_path / repo_id)
        return mock.Mock(commit_url=f"hub/{repo_id}")

    with (
        mock.patch("huggingface_hub.HfApi.create_repo", autospec=True) as made,
        mock.patch("huggingface_hub.HfApi.upload_folder", upload),
        mock.patch("huggingface_hub.snapshot_download", lambda repo_id, **rest: str(tmp_path / repo_id)),
    ):
        assert push_to_hub(base, "user/name", base_model="org/base", licence="mit") == "hub/user/name"
        assert made.call_args.args[1] == "user/name"
        loaded = from_hub(model(), "user/name")
    assert all(torch.equal(loaded.delta(t), tuned.delta(t)) for t in tuned.targets)
    text = (tmp_path / "user/name" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: superlora_tn\n")
    assert "base_model: org/base\nlicense: mit\n---" in text
    assert text == card(tuned, "org/base", "mit")
    with pytest.raises(sl.AttachError):
        push_to_hub(nn.Linear(2, 2), "user/other")
