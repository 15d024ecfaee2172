"""Other trainers and pipelines around an adapted model: accelerate, Lightning, TRL, transformers' and diffusers' pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from optional import library
from torch import Tensor, nn

import superlora_tn as sl

EPOCHS = 4


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 8))


def rows() -> Tensor:
    return torch.linspace(-1, 1, 24 * 8).reshape(24, 8).sin()


@pytest.mark.filterwarnings("ignore")  # Lightning warns of its own calls of torch, and of few workers
def test_lightning_goes_on_bit_for_bit_from_the_adapter_alone(tmp_path: Path) -> None:
    """With a shuffled loader and dropout, killed after the second of four epochs."""
    lightning = library("lightning.pytorch")
    from superlora_tn.lightning import AdapterCheckpoint

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.losses = net(), list[float]()
            sl.attach(self.net, sl.lotr(2), ["0", "4"], seed=0, also=["1"])

        def training_step(self, batch: Any, k: int) -> Tensor:
            loss = (self.net(batch[0]) - 1).square().mean()
            self.losses.append(float(loss))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    class Killed(Exception):
        pass

    class Killer(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                raise Killed

    def fit(place: Path, more: list[Any], resume: Path | None = None) -> Any:
        torch.manual_seed(1)
        saver = lightning.callbacks.ModelCheckpoint(place, save_last=True)
        off = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = lightning.Trainer(max_epochs=EPOCHS, callbacks=[AdapterCheckpoint(), saver, *more], **off)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows()), batch_size=8, shuffle=True)
        module = Module()
        trainer.fit(module, loader, ckpt_path=resume)
        return module

    whole = fit(tmp_path / "whole", [])
    with pytest.raises(Killed):
        fit(tmp_path / "killed", [Killer()])
    last = tmp_path / "killed" / "last.ckpt"
    again = fit(tmp_path / "killed", [], last)
    assert again.losses == whole.losses[6:]
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    saved = torch.load(last, weights_only=False)["state_dict"]
    frozen = {"net.0.weight", "net.0.bias", "net.4.weight", "net.4.bias"}
    assert set(saved) == set(whole.state_dict()) - frozen
    older = torch.load(last, weights_only=False) | {"state_dict": whole.state_dict()}  # as it is without the callback
    torch.save(older, tmp_path / "older.ckpt")
    taken = fit(tmp_path, [], tmp_path / "older.ckpt").state_dict()
    assert all(torch.equal(value, taken[name]) for name, value in saved.items())
    del saved["net.1.running_mean"]
    broken = torch.load(last, weights_only=False) | {"state_dict": saved}
    torch.save(broken, tmp_path / "broken.ckpt")
    with pytest.raises(sl.CheckpointError, match=r"the checkpoint lacks 'net.1.running_mean'"):
        fit(tmp_path / "killed", [], tmp_path / "broken.ckpt")

    class Merger(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            sl.tuned(pl_module.net).merge()

    with pytest.raises(sl.CheckpointError, match=r"the adapter 'superlora' is merged: what it learnt is in the base's weights"):
        fit(tmp_path / "merged", [Merger()])
    assert not (tmp_path / "merged" / "last.ckpt").exists()


def test_accelerates_state_of_the_whole_model_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """As accelerate saves it by itself: base, adapter, buffers, optimizer and generators."""
    accelerate = library("accelerate")

    def steps(model: Any, optimizer: Any, accelerator: Any) -> list[float]:
        found = []
        for batch in rows().split(8):
            loss = (model(batch) - 1).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    def begun() -> tuple[Any, Any, Any]:
        accelerator, model = accelerate.Accelerator(cpu=True), net()
        sl.attach(model, sl.lorta(2, groups=2), ["0", "4"], seed=0, also=["1"])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return *accelerator.prepare(model, optimizer), accelerator

    first = begun()
    steps(*first)
    first[2].save_state(tmp_path)
    expected, values = steps(*first), {n: v.clone() for n, v in first[0].state_dict().items()}
    second = begun()
    second[2].load_state(tmp_path)
    assert steps(*second) == expected
    assert all(torch.equal(value, values[name]) for name, value in second[0].state_dict().items())


@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_trl_trains_lora_by_the_plug_in_as_pefts_own(tmp_path: Path) -> None:
    """From the same start. Tolerance: x through the factors in another order, in float32, through 4 steps of AdamW."""
    transformers, peft, datasets, trl = (library(name) for name in ("transformers", "peft", "datasets", "trl"))
    library("accelerate")
    from test_recipes import tokenizer

    from superlora_tn.peft import SuperLoraConfig

    tokens = torch.randint(3, 64, (16, 12), generator=torch.Generator().manual_seed(0))
    targets = ["q_proj", "v_proj"]
    found, starts = [], list[Tensor]()
    for own in (
        peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM"),
        SuperLoraConfig(spec=sl.lora(2, alpha=6), target_modules=targets),
    ):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=64, bos_token_id=1, eos_token_id=2, **sizes)
        settings = {"per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1, "report_to": [], "use_cpu": True}
        settings |= {"bf16": False, "learning_rate": 1e-2, "save_strategy": "no", "gradient_checkpointing": False}
        trainer = trl.SFTTrainer(
            transformers.LlamaForCausalLM(config),
            trl.SFTConfig(str(tmp_path), **settings),
            train_dataset=datasets.Dataset.from_dict({"input_ids": tokens.tolist()}),
            peft_config=own,
            processing_class=tokenizer(),
        )
        thin = [p for n, p in trainer.model.named_parameters() if "lora_A" in n or n.endswith("factor_in")]
        assert len(thin) == 4
        starts = starts or [p.detach().clone() for p in thin]
        with torch.no_grad():
            for p, value in zip(thin, starts, strict=True):
                p.copy_(value if p.shape == value.shape else value.T)  # the other factor starts at zero in both
        trainer.train()
        found.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(found[0]) == 4
    assert found[0][-1] != found[0][0]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
