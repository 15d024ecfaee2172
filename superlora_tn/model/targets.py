"""Which modules of a model are meant: PEFT's matching rules, but an entry that matches nothing raises."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from superlora_tn.model import kinds as layers
from superlora_tn.model.kinds import PARTS, Layer, Projection
from superlora_tn.update.base import Adapter

Targets = str | Sequence[str]


class AttachError(ValueError):
    """A model and an adapter that do not go together; the model is left as it was."""


def near(given: str, names: Sequence[str] | Mapping[str, Any]) -> str:
    """Words that point at names near the given one."""
    ends = list(dict.fromkeys([*(n.rsplit(".", 1)[-1] for n in names), *names]))
    close = difflib.get_close_matches(given, ends, n=4, cutoff=0.4) or ends[:4]
    return f"near names are {', '.join(repr(c) for c in close)}" if close else "the model has no layer to adapt"


def named_layers(model: nn.Module) -> dict[str, Layer]:
    """The modules of a model by name, and behind each `nn.MultiheadAttention` its projections."""
    known: dict[str, Layer] = {}
    for name, module in model.named_modules():
        if name and not isinstance(module, Adapter):
            known.setdefault(name, module)
        if isinstance(module, nn.MultiheadAttention):
            for part in PARTS:
                known[f"{name}.{part}".lstrip(".")] = Projection(module, part)
    return known


def match(model: nn.Module, targets: Targets, exclude: Targets = (), only_layers: Sequence[int] | None = None) -> list[str]:
    """Names of the modules that `targets` names, in the model's order, by PEFT's rules.

    The projections of an `nn.MultiheadAttention` named ``attn`` are ``attn.q_proj``, ``attn.k_proj``, ``attn.v_proj`` and
    ``attn.out_proj``.

    Args:
        model: the model.
        targets: a regular expression for the whole name, ``"all-linear"`` for every module that is a linear layer (of an
            `nn.MultiheadAttention` its out_proj alone), or a list of exact names and of endings behind a dot.
        exclude: the same, to leave out; it goes first.
        only_layers: keep names whose first number is one of these.

    Raises:
        AttachError: an entry that matches nothing, or a module that cannot be adapted.
    """
    known = named_layers(model)
    adaptable = [name for name, module in known.items() if layers.is_supported(module)]
    out = set(_named(exclude, known, adaptable)) if exclude else set()
    found = [name for name in _named(targets, known, adaptable) if name not in out]
    if only_layers is not None:
        found = [n for n in found if (number := re.search(r"\.(\d+)\.", f".{n}.")) and int(number[1]) in only_layers]
    if not found:
        raise AttachError(f"targets={targets!r} leaves no layer to adapt (exclude={exclude!r}, only_layers={only_layers!r}).")
    for name in found:
        check_target(name, known)
    return found


def _named(targets: Targets, known: Mapping[str, Layer], adaptable: list[str]) -> list[str]:
    if targets == "all-linear":
        return [n for n in adaptable if _is_linear(known[n])]
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise AttachError(
                f"targets={targets!r} is not a regular expression ({error}); a list matches by ending."
            ) from error
        found = [n for n in known if pattern.fullmatch(n)]
        if not found:
            raise AttachError(f"targets={targets!r} matches no module's whole name; {near(targets, adaptable)}.")
        return found
    found = []
    for entry in targets:
        own = [n for n in known if n == entry or n.endswith(f".{entry}")]
        if not own:
            raise AttachError(f"the target '{entry}' matches no module; {near(entry, adaptable)}.")
        found += own
    return [n for n in known if n in set(found)]


def _is_linear(layer: Layer) -> bool:
    if isinstance(layer, Projection):
        return layer.part == "out_proj"
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def check_target(name: str, known: Mapping[str, Layer]) -> None:
    """Raise unless the named layer can be adapted."""
    layer = known[name]
    if not layers.is_supported(layer):
        inside = f"its {', '.join(PARTS)}" if isinstance(layer, nn.MultiheadAttention) else "the layers inside it"
        raise AttachError(
            f"'{name}' is a {type(layer).__name__}, which cannot be adapted; "
            f"supported are {', '.join(layers.supported())}. Name {inside}."
        )
    if not isinstance(layer, Projection):
        return
    if layer.is_computed:
        raise AttachError(
            f"the weight of '{name}' is computed from others (weight_norm, parametrize), and nn.MultiheadAttention would "
            "not see an adapter there; bake that in first."
        )
    if type(layer.attention).forward is not nn.MultiheadAttention.forward:
        raise AttachError(
            f"'{name}' belongs to a {type(layer.attention).__name__}, which has a forward of its own, so an adapter there "
            "might be ignored. Leave it out (exclude=), or use nn.MultiheadAttention."
        )


def check_mergeable(model: nn.Module, targets: Mapping[str, Layer]) -> None:
    """Raise where writing to a weight would not do what it says.

    A weight that another module uses too would change there; one that is computed anew would lose the change.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(_memory(parameter), []).append(f"{name}.{own}".lstrip("."))
    for name, layer in targets.items():
        stored = layers.stored(layer, name)
        if stored is None:
            raise AttachError(f"the weight of '{name}' is computed from others (weight_norm, parametrize); bake that in first.")
        shared = [other for own, parameter in stored.items() for other in owners[_memory(parameter)] if other != own]
        if shared:
            raise AttachError(f"the weight of '{name}' is shared with '{shared[0]}', which merging would change too.")


def _memory(parameter: Tensor) -> int:
    """What tells parameters apart that share memory; the meta device has none."""
    return parameter.untyped_storage().data_ptr() or id(parameter)
