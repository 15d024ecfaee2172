"""The model, its adapter and its data, ready for the Trainer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from superlora_tn.finetune.config import Config
from superlora_tn.finetune.data import Images, Rows, block_splits, labelled, read_rows
from superlora_tn.finetune.named import ConfigError, unreachable
from superlora_tn.model.attach import attach
from superlora_tn.model.targets import bind, match, places
from superlora_tn.model.tuned import Tuned
from superlora_tn.trainers import AdapterTrainer

REPORT = "report.json"
CONTENTS = "contents"  # of a run's note
AUTO = {
    "image-classification": transformers.AutoModelForImageClassification,
    "text-classification": transformers.AutoModelForSequenceClassification,
    "causal-lm": transformers.AutoModelForCausalLM,
}


@dataclass(frozen=True)
class Job:
    """What a run trains, and on what.

    Attributes:
        model: with its adapter on it.
        tuned: the handle.
        processor: tokenizer or image processor.
        train, held: rows to train on and to evaluate; `held` may be empty.
        classes: the labels by number.
        also: parameters of the model that train beside the adapter, such as a new head.
    """

    model: Any
    tuned: Tuned
    processor: Any
    train: Any
    held: Any
    classes: Sequence[str]
    also: tuple[str, ...]

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch; texts are filled up to the longest."""
        pads = "input_ids" in rows[0] and not isinstance(rows[0]["input_ids"], torch.Tensor)
        if pads:
            return dict(transformers.DataCollatorWithPadding(self.processor)(list(rows)))
        return dict(transformers.default_data_collator(list(rows)))

    def trainer(self, *args: Any, **options: Any) -> Any:
        """The Trainer of this job."""
        return AdapterTrainer(*args, compute_metrics=_accuracy if self.classes else None, **options)

    def write(self, place: Path) -> None:
        """Write the model whole, with what reads its inputs."""
        self.model.save_pretrained(place)
        self.processor.save_pretrained(place)

    @property
    def prefix(self) -> str | None:
        """In front of the names in diffusers' format; None is the format's own."""
        return None

    def results(self, out: Path) -> dict[str, Any]:
        """What more is made of the trained model, for the report."""
        return {}


def _accuracy(given: Any) -> dict[str, float]:
    scores = given.predictions[0] if isinstance(given.predictions, tuple) else given.predictions
    return {"accuracy": float(np.mean(np.argmax(scores, -1) == given.label_ids))}


def prepare(config: Config) -> Job:
    """Read the data, load the model and attach the adapter; nothing of it depends on what ran before.

    Raises:
        ConfigError: data that cannot be learnt from, or a model that has no tokenizer or image processor.
        AttachError, SpecError: the declaration or the targets do not fit the model.
    """
    rows = read_rows(config)
    processor = _processor(config)
    torch.manual_seed(config.seed)
    model, classes, fresh = _model(config, rows)
    train: Any
    held: Any
    if config.task == "image-classification":
        mode = "L" if getattr(model.config, "num_channels", None) == 1 else "RGB"
        train, held = (Images(own, classes, processor, mode) for own in (rows.train, rows.held))
    elif config.task == "text-classification":
        if processor.pad_token_id is None:
            processor.pad_token = processor.eos_token
        model.config.pad_token_id = processor.pad_token_id
        train, held = (labelled(own, classes, processor, config.length) for own in (rows.train, rows.held))
    else:
        train, held = block_splits(rows, processor, config)
    tuned, beside = adapted(model, config, fresh)
    return Job(model, tuned, processor, train, held, classes, beside)


def adapted(model: Any, config: Config, fresh: Sequence[str]) -> tuple[Tuned, tuple[str, ...]]:
    """Attach the adapter that a configuration declares; returns the handle, and what trains beside it.

    Args:
        model: the base.
        config: targets, declaration and seed.
        fresh: names of parameters that are new and train whole.
    """
    known = places(model)
    heads = {name.rpartition(".")[0] for name in fresh}  # what is new trains as it is, not as its adapter
    targets = config.targets[0] if config.targets == ["all-linear"] else config.targets
    names = [name for name in match(model, targets, config.exclude) if name not in heads]
    bound = [bind(name, known[name]) for name in names]
    spec = config.declared({one.name: one.shape for one in bound}, {one.name: one.kernel for one in bound})
    tuned = attach(model, spec, names, also=[*config.also, *fresh], seed=config.seed)
    beside = tuple(n for n, p in model.named_parameters() if p.requires_grad and not n.startswith(f"{tuned.name}."))
    return tuned, beside


def _processor(config: Config) -> Any:
    try:
        if config.task == "image-classification":
            return transformers.AutoImageProcessor.from_pretrained(config.model, backend="pil")
        return transformers.AutoTokenizer.from_pretrained(config.model)
    except (OSError, ValueError) as error:
        if not Path(config.model).exists():
            raise unreachable("model", config.model, error) from error
        what = "image processor (preprocessor_config.json)" if config.task.startswith("image") else "tokenizer"
        raise ConfigError(f"the model '{config.model}' has no {what} that can be read: {error}") from error


def _model(config: Config, rows: Rows) -> tuple[Any, list[str], list[str]]:
    """The model, the labels by number, and the names of parameters that its files do not have."""
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    classes = rows.classes
    if classes:
        given = transformers.AutoConfig.from_pretrained(config.model)
        own = [given.id2label[k] for k in range(len(given.id2label))] if given.id2label else []
        if set(classes) <= set(own):
            classes = own  # its head knows these labels
        named = {"id2label": dict(enumerate(classes)), "label2id": {name: k for k, name in enumerate(classes)}}
        options |= {"num_labels": len(classes), "ignore_mismatched_sizes": True, **named}
        options["problem_type"] = "single_label_classification"  # the base's config may say that a row has several
    model, facts = AUTO[config.task].from_pretrained(config.model, **options)
    missing = {*facts["missing_keys"], *(entry[0] for entry in facts["mismatched_keys"])}
    return model, classes, [name for name, _ in model.named_parameters() if name in missing]


def same_run(folder: Path, config: Config) -> None:
    """Note the configuration in the folder of a run, or compare it with the one that is there.

    A folder without a checkpoint or a report holds no run yet: one that was refused can be put right and started again.

    Raises:
        ConfigError: the folder holds a run of another configuration, or its data or declaration has changed since.
    """
    note = folder / "config.json"
    now = json.loads(json.dumps(config.identity())) | {CONTENTS: config.contents()}
    before = _noted(note)
    if before == now:
        return
    if not ((folder / REPORT).exists() or any(folder.glob("checkpoint-*"))):
        folder.mkdir(parents=True, exist_ok=True)
        draft = note.with_suffix(".draft")
        draft.write_text(json.dumps(now, indent=1))
        draft.replace(note)
        return
    if before is None:
        raise ConfigError(f"{folder} holds a run, and {note} does not say which; give another output, or remove that folder.")
    # A folder of an earlier release lacks keys that came since.
    before = json.loads(json.dumps({f.name: f.default for f in fields(Config) if f.default is not MISSING})) | before
    then = before.pop(CONTENTS, now[CONTENTS])
    for name, found in now.pop(CONTENTS).items():
        if then.get(name, found) != found:
            raise ConfigError(
                f"{folder} holds a run with {name}: {now[name]}, which has changed since; "
                "give another output, or remove that folder."
            )
    for name in now:
        if before.get(name) != now[name]:
            raise ConfigError(
                f"{folder} holds a run with {name}: {before.get(name)}, and this one has {name}: {now[name]}; "
                "give another output, or remove that folder."
            )


def _noted(note: Path) -> dict[str, Any] | None:
    """What a folder's note says; None where there is none that can be read."""
    with suppress(FileNotFoundError, ValueError):
        found = json.loads(note.read_text())
        return found if isinstance(found, dict) else None
    return None
