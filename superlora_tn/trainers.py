"""transformers' Trainer with adapters: checkpoints hold the adapter alone, and training goes on from them bit for bit.

    from superlora_tn.trainers import AdapterTrainer            # transformers.Trainer
    class Mine(AdapterCheckpoints, transformers.Seq2SeqTrainer): ...   # or any trainer that comes from it

Needs transformers (extra ``demo``); nothing else of this library imports it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from superlora_tn.model.attach import load
from superlora_tn.model.attach import tuned as handle_of
from superlora_tn.model.several import handles
from superlora_tn.model.targets import AttachError
from superlora_tn.model.tuned import Tuned

ARGUMENTS = "training_args.bin"


class AdapterCheckpoints:
    """Mixed into a Trainer in front of it, for a model with adapters on it.

    `save_model` and every checkpoint write the adapter (and what trains beside it) in place of the model; of several adapters
    each into a folder of its name. `train(resume_from_checkpoint=...)` and `load_best_model_at_end` read them back, strictly.
    A model without an adapter is saved as ever.
    """

    model: Any
    args: Any
    processing_class: Any
    state: Any
    accelerator: Any

    def _adapters(self) -> Mapping[str, Tuned]:
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return handles(model)

    def train(self, *args: Any, **options: Any) -> Any:
        """Train, as the Trainer does.

        Raises:
            AttachError: something trains that no adapter saves, so that a checkpoint would lack it.
        """
        found = self._adapters()
        saved = {id(p) for handle in found.values() for p in (*handle.parameters(), *handle._base.training().values())}
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        lost = next((name for name, p in model.named_parameters() if p.requires_grad and id(p) not in saved), None)
        if found and lost is not None:
            raise AttachError(
                f"'{lost}' trains and is saved with no adapter, so no checkpoint would hold it; attach the adapter to the "
                f"whole model with also=['{lost}'], or freeze it."
            )
        return super().train(*args, **options)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        found = self._adapters()
        if not found:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        for name, handle in found.items():
            handle.save(_place(folder, name, len(found)))
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / ARGUMENTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        found = self._adapters()
        if not found:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        for name, handle in found.items():
            handle.replace(_place(Path(resume_from_checkpoint), name, len(found)))

    def _load_best_model(self) -> None:
        if not self._adapters():
            super()._load_best_model()  # type: ignore[misc]
            return
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _place(folder: Path, name: str, count: int) -> Path:
    return folder if count == 1 else folder / name


class AdapterTrainer(AdapterCheckpoints, Trainer):  # type: ignore[misc]
    """transformers' Trainer with `AdapterCheckpoints`; its arguments are the Trainer's."""


def card(tuned: Tuned, base_model: str = "", licence: str = "") -> str:
    """A model card for an adapter, with the hub's header: what it declares, its parameters and how to load it.

    Args:
        tuned: the handle.
        base_model: the base's name on the hub, or its folder.
        licence: the hub's word for it, such as ``"apache-2.0"``.
    """
    head = ["---", "library_name: superlora_tn", "tags: [adapter, superlora_tn]"]
    head += [f"base_model: {base_model}"] if base_model else []
    head += [f"license: {licence}"] if licence else []
    body = [
        "# An adapter by superlora_tn",
        "",
        "```",
        str(tuned),
        "```",
        "",
        "```python",
        "import superlora_tn as sl",
        "",
        'tuned = sl.load(model, "FOLDER")  # strict: the base has to be the one it was trained on',
        "```",
    ]
    return "\n".join([*head, "---", "", *body]) + "\n"


def push_to_hub(tuned: Tuned | nn.Module, repo_id: str, base_model: str = "", licence: str = "", **options: Any) -> str:
    """Save an adapter with its card and upload both; returns the commit's address.

    Args:
        tuned: the handle, or a model that carries one adapter.
        repo_id: ``user/name``; made where it does not exist.
        base_model, licence: for the card.
        options: of `HfApi.upload_folder` (`token`, `commit_message`, ...); `private` is for a new repository.

    Raises:
        AttachError: the model carries no adapter.
    """
    from huggingface_hub import HfApi

    handle = tuned if isinstance(tuned, Tuned) else handle_of(tuned)
    api, private = HfApi(token=options.pop("token", None)), options.pop("private", None)
    with tempfile.TemporaryDirectory() as folder:
        handle.save(folder)
        Path(folder, "README.md").write_text(card(handle, base_model, licence))
        api.create_repo(repo_id, exist_ok=True, private=private)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options).commit_url)


def from_hub(model: nn.Module, repo_id: str, revision: str | None = None, cache: str | Path | None = None) -> Tuned:
    """Download an adapter and attach it, strictly.

    Args:
        model: the base it was trained on.
        repo_id: ``user/name``, or a local folder.
        revision: a branch, tag or commit.
        cache: where downloads are kept.
    """
    from huggingface_hub import snapshot_download

    folder = repo_id if Path(repo_id).is_dir() else snapshot_download(repo_id, revision=revision, cache_dir=cache)
    return load(model, folder)
