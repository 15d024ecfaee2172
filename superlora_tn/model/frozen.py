"""Who froze a parameter of the base, and who trains it beside an adapter: one record, whatever handles there are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

FROZEN = "_superlora_frozen"


class Holder:
    """Stands for a handle in the records of the parameters that it froze."""


def freeze(parameter: nn.Parameter, holder: Holder) -> None:
    """Keep a parameter from training until every handle that froze it has thawed it; what trains beside a handle goes on."""
    record: dict[str, Any] = parameter.__dict__.get(FROZEN) or _record(parameter, parameter.requires_grad)
    record["holders"].append(holder)
    _train(parameter, bool(record["trains"]))


def _train(parameter: nn.Parameter, wanted: bool) -> None:
    """Set requires_grad; of what was made in inference mode torch lets it be set there alone."""
    with torch.inference_mode(parameter.is_inference() or torch.is_inference_mode_enabled()):
        parameter.requires_grad_(wanted)


def train(parameter: nn.Parameter, holder: Holder) -> None:
    """Let a parameter train beside the handle that froze it."""
    parameter.__dict__[FROZEN]["trains"].append(holder)
    _train(parameter, True)


def trains_beside(parameter: nn.Parameter) -> bool:
    """Whether a handle trains it already."""
    return bool(parameter.__dict__.get(FROZEN, {}).get("trains"))


def hold_on(frozen: Sequence[tuple[str, nn.Parameter, bool]], holder: Holder, also: Collection[str]) -> None:
    """Let a copied handle hold what it froze, and train what it trained: copies of parameters have no record."""
    for name, parameter, wanted in frozen:
        record: dict[str, Any] = parameter.__dict__.get(FROZEN) or _record(parameter, wanted)
        if holder not in record["holders"]:
            record["holders"].append(holder)
            record["trains"] += [holder] * (name in also)


def thaw(parameter: nn.Parameter, holder: Holder, wanted: bool) -> None:
    """Let go of a parameter; the last to do so gives it back the requires_grad it had.

    Args:
        parameter: what was frozen.
        holder: who froze it.
        wanted: what it was then, for a copy of the parameter, which has no record.
    """
    record: dict[str, Any] | None = parameter.__dict__.get(FROZEN)
    if record is None:
        _train(parameter, wanted)
        return
    left = {who: [other for other in record[who] if other is not holder] for who in ("holders", "trains")}
    if not left["holders"]:
        _train(parameter, record["wanted"])
        delattr(parameter, FROZEN)
        return
    if record["trains"] and not left["trains"]:
        _train(parameter, False)
    record.update(left)


def followed(
    model: nn.Module, frozen: Sequence[tuple[str, nn.Parameter, bool]], hidden: Collection[int]
) -> list[tuple[str, nn.Parameter, bool]]:
    """What a handle froze, as it stands in the model now: what replaced a parameter since takes over its record.

    So do `load_state_dict(assign=True)`, and accelerate.

    Args:
        model, frozen: of the handle.
        hidden: ids of parameters that come back by themselves.
    """
    now, found = dict(model.named_parameters()), []
    for name, parameter, wanted in frozen:
        other = parameter if id(parameter) in hidden else now.get(name, parameter)
        record: dict[str, Any] | None = None if other is parameter else parameter.__dict__.pop(FROZEN, None)
        if record is not None:
            there = other.__dict__.get(FROZEN) or _record(other, record["wanted"])
            for who in ("holders", "trains"):
                there[who] += record[who]
        found.append((name, other, wanted))
    return found


def was_trainable(parameter: nn.Parameter) -> bool:
    """Whether a parameter trained before any handle froze it."""
    record: dict[str, Any] | None = parameter.__dict__.get(FROZEN)
    return parameter.requires_grad if record is None else bool(record["wanted"])


def _record(parameter: nn.Parameter, wanted: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"wanted": wanted, "holders": [], "trains": []}
    setattr(parameter, FROZEN, record)
    return record
