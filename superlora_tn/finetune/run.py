"""One run: train, evaluate, checkpoint, go on after a kill, report, and write the adapter or the merged model."""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import transformers

from superlora_tn.files.writes import Report
from superlora_tn.finetune.config import Config
from superlora_tn.finetune.job import REPORT, Job, prepare, same_run
from superlora_tn.tools import draw

WHOLE = "whole"  # a file that says that a checkpoint was written to its end
CURVES = "curves.png"


class Progress(transformers.TrainerCallback):  # type: ignore[misc]
    """Lines of progress on stderr, and the mark of a whole checkpoint."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **rest: Any) -> None:
        """Say what was measured."""
        if state.is_world_process_zero and logs:
            shown = ("loss", "eval_loss", "eval_accuracy", "learning_rate", "grad_norm")
            words = [f"{name} {float(logs[name]):.4g}" for name in shown if name in logs]
            if words:
                print(f"step {state.global_step}/{state.max_steps}: {', '.join(words)}", file=sys.stderr, flush=True)

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Mark the checkpoint that was just written."""
        if state.is_world_process_zero:
            Path(args.output_dir, f"checkpoint-{state.global_step}", WHOLE).touch()


def finetune(config: Config) -> dict[str, Any]:
    """Run a configuration to its end; a run that was stopped goes on from its last whole checkpoint.

    Args:
        config: see `read_config`.

    Returns:
        The report, as ``report.json`` holds it.

    Raises:
        ConfigError: data that cannot be learnt from, or a folder that holds a run of another configuration.
    """
    out, start = Path(config.output), time.perf_counter()
    arguments = _arguments(config)
    with arguments.main_process_first():
        same_run(out, config)
    done = _done(out)
    if done.get("format") == config.format:
        return done
    job = _job(config, arguments)
    # What its format cannot say is refused before it is learnt.
    if config.format == "merged":
        job.tuned.check_mergeable()
    elif config.format != "superlora":
        with tempfile.TemporaryDirectory() as folder:
            _write(config, job, Path(folder))
    trainer = _trainer(config, job, arguments)
    last = _last_checkpoint(out)
    _train(trainer, last)
    if not trainer.is_world_process_zero():
        return {}
    history = [row for row in trainer.state.log_history if "train_runtime" not in row]
    report = {
        "config": json.loads(json.dumps(config.identity())),
        "format": config.format,
        "classes": list(job.classes),
        "rows": {"train": len(job.train), "eval": len(job.held)},
        "targets": len(job.tuned.targets),
        "parameters": job.tuned.num_parameters,
        "beside": list(job.also),
        "steps": trainer.state.global_step,
        "stopped_early": trainer.state.global_step < trainer.state.max_steps,
        "best_step": _best_step(trainer.state),
        "history": [{name: _told(value) for name, value in row.items()} for row in history],
        "resumed_from": None if last is None else int(last.name.rpartition("-")[2]),
        "seconds": round(time.perf_counter() - start, 2),
    }
    if any("loss" in row or "eval_loss" in row for row in history):
        report["curves"] = str(_curves(history, out / CURVES))
    report |= job.results(out)
    report["files"] = _write(config, job, out)
    draft = out / f"{REPORT}.draft"
    draft.write_text(json.dumps(report, indent=1, allow_nan=False))
    draft.replace(out / REPORT)
    return report


def _done(out: Path) -> dict[str, Any]:
    """The report of a run that is finished; empty where it cannot be read, or what it says was written is gone."""
    try:
        found: dict[str, Any] = json.loads((out / REPORT).read_text())
        names = [Path(file).name for file in found["files"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}
    return found if all((out / name).exists() or (out / "adapter" / name).exists() for name in names) else {}


def _told(value: Any) -> Any:
    """A measured number as JSON has it: none where it is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _job(config: Config, arguments: Any) -> Job:
    if config.task != "diffusion":
        return prepare(config)
    from superlora_tn.finetune import diffusion  # diffusers is imported where it is asked for

    return diffusion.prepare(config, arguments.device)


def _train(trainer: Any, last: Path | None) -> None:
    """Train to the end; of what was at its end already, take the state and the best values."""
    if last is None:
        trainer.train()
        return
    state = transformers.TrainerState.load_from_json(str(last / "trainer_state.json"))
    control = state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
    if state.global_step < state.max_steps and not control.get("should_training_stop"):
        trainer.train(resume_from_checkpoint=str(last))
        return
    trainer.state = state
    best = last.with_name(f"checkpoint-{state.best_global_step}")
    trainer._load_from_checkpoint(str(best if best.is_dir() else last))


def _arguments(config: Config) -> Any:
    evaluates = bool(config.eval_data or config.eval_share)
    choice = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    return transformers.TrainingArguments(
        config.output,
        max_steps=config.steps or -1,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch,
        per_device_eval_batch_size=config.batch,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.decay,
        max_grad_norm=config.clip,
        logging_steps=config.log,
        save_strategy="steps",
        save_steps=config.every,
        save_total_limit=config.keep,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.every if evaluates else None,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=config.cpu,
        bf16=config.precision == "bfloat16",
        fp16=config.precision == "float16",
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        restore_callback_states_from_checkpoint=True,
        dataloader_pin_memory=False,
        **(choice if evaluates else {}),
    )


def _trainer(config: Config, job: Job, arguments: Any) -> Any:
    callbacks: list[Any] = [Progress()]
    if config.patience:
        callbacks.append(transformers.EarlyStoppingCallback(config.patience))
    if not len(job.held):
        arguments.eval_strategy, arguments.load_best_model_at_end = "no", False
    trainer = job.trainer(
        job.model,
        arguments,
        data_collator=job.collate,
        train_dataset=job.train,
        eval_dataset=job.held if len(job.held) else None,
        callbacks=callbacks,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that was written to its end; what was broken off is removed."""
    found = {int(p.name.rpartition("-")[2]): p for p in out.glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal()}
    for step in [step for step, place in found.items() if not (place / WHOLE).exists()]:
        shutil.rmtree(found.pop(step))
    return found[max(found)] if found else None


def _best_step(state: Any) -> int | None:
    return None if state.best_global_step is None else int(state.best_global_step)


def _curves(history: list[dict[str, float]], path: Path) -> Path:
    """Losses, and accuracies where there are some, over steps."""
    figure, axes = draw.blank(6.0, 3.5)
    for name, words in (("loss", "training loss"), ("eval_loss", "evaluation loss")):
        points = [(row["step"], row[name]) for row in history if name in row and math.isfinite(row[name])]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=words)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    scores = [(row["step"], row["eval_accuracy"]) for row in history if "eval_accuracy" in row]
    if scores:
        other = axes.twinx()
        other.plot(*zip(*scores, strict=True), color="tab:green", linestyle="--", marker=".", label="evaluation accuracy")
        other.set_ylim(0, 1.02)
        other.set_ylabel("accuracy")
        other.legend(loc="lower right")
    axes.legend(loc="upper right")
    return draw.save(figure, path)


def _write(config: Config, job: Job, out: Path) -> list[str]:
    """The result: the adapter in its format, or the merged model; with tokenizer or image processor."""
    if config.format == "merged":
        place = out / "merged"
        job.tuned.bake()
        job.write(place)
        return [str(place)]
    place = out / "adapter"
    place.mkdir(exist_ok=True)
    more = {"prefix": job.prefix} if config.format == "diffusers" else {}
    written: Report = job.tuned.save(place, config.format, **more)  # type: ignore[arg-type]
    return [str(file) for file in written.files]
