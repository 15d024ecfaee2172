"""What a handle does to the weights that it adapts, all of them together: put back, check, leave."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from superlora_tn.declare.joins import Magnitude
from superlora_tn.declare.parts import BASED
from superlora_tn.model.shown import blocks_of, hide
from superlora_tn.model.targets import AttachError, Target
from superlora_tn.model.weights import Weight, delist, weight_of
from superlora_tn.update.base import Adapter, Member
from superlora_tn.update.joined import joined

Members = Mapping[str, Member]


def put_back(weights: Mapping[str, Weight], members: Members) -> None:
    """Take a handle's dW out of all weights that hold it; other handles' stays."""
    with torch.no_grad():
        for name, weight in weights.items():
            if weight.base is not None and (members[name] in weight.merged or not weight.merged):
                weight.restore({m: _built(m) for m in weight.merged if m is not members[name]})


def _built(member: Member) -> Tensor:
    """dW of another handle's member, as its own merge builds it, bit for bit."""
    with member.adapter.passes.opened():
        return member.current()


def change(member: Member, targets: Mapping[str, Target]) -> Tensor:
    """What an adapter adds to a weight in all, (out, in): dW, and of other joins W' - W.

    Raises:
        AttachError: it is found from W, which holds the adapter now.
    """
    if member.adapter.spec.join is None:
        return member.current()
    target = targets[member.name]
    if weight_of(target).merged:
        raise AttachError(f"W' - W of '{target.name}' is found from W, which holds the adapter now; unmerge() first.")
    weight = target.weight()
    return joined(member, weight, member.current()) - weight


def check_resettable(adapters: Iterable[Adapter], weights: Mapping[str, Weight]) -> None:
    """Raise where first values are found from a W that holds an adapter now."""
    for adapter in adapters:
        normed = isinstance(adapter.spec.join, Magnitude)
        if not normed and all(node.init not in BASED for node in adapter.graph.nodes):
            continue
        name = next((name for name in adapter.members if weights[name].merged), None)
        if name is not None:
            what = "magnitudes start at the norms of W's rows" if normed else "frozen nodes hold values of W"
            raise AttachError(f"{what}, and the weight of '{name}' holds a merged adapter now; unmerge() first.")


def check_switched_on(name: str | None, enabled: bool) -> None:
    """Raise where merging an adapter would bring back what `use` switched off."""
    if not enabled:
        raise AttachError(
            f"the adapter '{name}' is switched off, so merging it would change what the model computes; switch it on first, "
            f"by sl.use(model, '{name}')."
        )


def check_bakeable(weights: Mapping[str, Weight], members: Members) -> None:
    """Raise where another adapter is merged into a weight, which could then not be told apart."""
    for name, weight in weights.items():
        if any(member is not members[name] for member in weight.merged):
            raise AttachError(f"another adapter is merged into '{name}' too; unmerge() or bake() that one first.")


def check_finite(name: str, weight: Weight, delta: Tensor) -> None:
    """Raise where a merged weight is not finite, and say whether dW is to blame."""
    merged = weight.kind.read(weight.layer)
    if not torch.isfinite(merged).all():
        what = "the merged weight" if torch.isfinite(delta).all() else "dW"
        raise AttachError(
            f"{what} of '{name}' holds NaN or infinity; nothing was merged. Look at the training"
            + (f", or merge into a wider dtype than {merged.dtype}." if what != "dW" else ".")
        )


def check_unchanged(weights: Mapping[str, Weight]) -> None:
    """Raise where somebody wrote to a weight while it was merged."""
    changed = next((name for name, weight in weights.items() if weight.is_changed), None)
    if changed is not None:
        raise AttachError(
            f"the weight of '{changed}' was changed while dW was merged into it (another base loaded, or trained?); "
            "unmerging would throw that away. unmerge(force=True) does, and bake() keeps the weights as they are now."
        )


def leave(targets: Mapping[str, Target], members: Members) -> None:
    """Take a handle's members off its weights, and what shows their dW."""
    for name, target in targets.items():
        for side in target.sides:
            for block in blocks_of(side.layer):
                if block.member is members[name]:
                    hide(side.layer, block)
        delist(target, members[name])


def forget_compiled() -> None:
    """Compile anew at the next call whatever was compiled.

    Dynamo does not look for hooks that changed; and a model that was compiled from outside, by itself or within a function
    that calls it, does not know of it.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
