"""Lightning with adapters: checkpoints hold what trains, not the base's frozen weights, and training goes on from them.

    trainer = lightning.pytorch.Trainer(callbacks=[AdapterCheckpoint()], ...)

Needs lightning 2.2 or newer; nothing else of this library imports it.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from superlora_tn.files.errors import CheckpointError
from superlora_tn.model.several import handles


class AdapterCheckpoint(Callback):  # type: ignore[misc]
    """Leaves the base's frozen weights out of a LightningModule's checkpoints, and is strict about the rest.

    Kept are the adapters, what trains beside them, and all buffers; beside them stands the state of torch's generators, so that
    a run that goes on from the end of an epoch draws what it would have drawn. A module without an adapter is saved as ever.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let Lightning load a part of the module; `on_load_checkpoint` checks that it is the right part."""
        if handles(pl_module):
            pl_module.strict_loading = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what is not the base's.

        Raises:
            CheckpointError: an adapter is merged, so that it is in the base's weights alone, which are left out.
        """
        merged = next((name for name, handle in handles(pl_module).items() if handle.merged), None)
        if merged is not None:
            raise CheckpointError(
                f"the adapter '{merged}' is merged: what it learnt is in the base's weights, which a checkpoint leaves out; "
                "unmerge() it before one is saved."
            )
        frozen = _frozen(pl_module)
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name not in frozen}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare a checkpoint's names with the module's.

        Raises:
            CheckpointError: it lacks a value, or has one that the module does not have.
        """
        known, found = set(pl_module.state_dict()), set(checkpoint["state_dict"])
        # The base's weights may be there, where the checkpoint is older than this callback, or another callback put them back.
        for words, names in (("lacks", known - _frozen(pl_module) - found), ("has no place for", found - known)):
            if names and handles(pl_module):
                which = "the checkpoint" if words == "lacks" else "the module, as it is attached now,"
                raise CheckpointError(f"{which} {words} '{min(names)}'; attach the adapter that was trained, then load.")

    def state_dict(self) -> dict[str, Any]:
        """The state of torch's generators."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on drawing where the checkpoint was written; Lightning's loader draws its order soon after."""
        torch.set_rng_state(state_dict["cpu"])
        if state_dict["cuda"]:
            torch.cuda.set_rng_state_all(state_dict["cuda"])


def _frozen(module: LightningModule) -> set[str]:
    """Names of the base's frozen parameters; none where there is no adapter."""
    found = handles(module)
    own = {id(parameter) for handle in found.values() for parameter in handle.parameters()}
    named = module.named_parameters(remove_duplicate=False)
    return {name for name, p in named if found and not p.requires_grad and id(p) not in own}
