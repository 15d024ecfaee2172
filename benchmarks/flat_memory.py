"""How much memory does a flat fold's training step peak at on ViT-B, beside dense fine-tuning of the same weights?

Live bytes above the model's own weights, at the highest within a step (forward, backward, AdamW), the optimizer's
state included; exact, from torch's record of allocations.
"""

from __future__ import annotations

import harness
import torch
from torch import nn
from vit_step import BATCH, adapted, dense

import superlora_tn as sl


def peak(model: nn.Module) -> tuple[int, int]:
    """(highest live bytes within the second step, bytes of the optimizer's state)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    pixels = torch.randn(BATCH, 3, 224, 224)

    def run() -> None:
        model(pixel_values=pixels).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    run()
    highest = harness.highest_live(run)
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    return highest, state


def main() -> None:
    """Measure dense fine-tuning and flat folds."""
    args = harness.arguments(__doc__ or "")
    rows = []
    for name, model in (
        ("dense", dense()),
        ("lorta r=5 M=3 G=12", adapted(sl.lorta(5, 3, 12))),
        ("lorta r=8 M=3 G=1", adapted(sl.lorta(8, 3, 1))),
        ("lorta r=5 M=3 G=12, recomputed", adapted(sl.lorta(5, 3, 12), recompute=True)),
        ("lorta r=8 M=3 G=1, recomputed", adapted(sl.lorta(8, 3, 1), recompute=True)),
        ("lotr r=8", adapted(sl.lotr(8))),
    ):
        step, state = peak(model)
        rows.append({"model": name, "step MB": step / 1e6, "optimizer MB": state / 1e6, "together MB": (step + state) / 1e6})
    harness.report("flat_memory", args, rows)


if __name__ == "__main__":
    main()
