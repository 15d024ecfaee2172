"""Which modules of a model are meant: PEFT's matching rules, but an entry that matches nothing raises."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from superlora_tn import layers
from superlora_tn.adapter import Adapter

Targets = str | Sequence[str]


class AttachError(ValueError):
    """A model and an adapter that do not go together; the model is left as it was."""


def near(given: str, names: Sequence[str] | Mapping[str, Any]) -> str:
    """Words that point at names near the given one."""
    ends = list(dict.fromkeys([*(n.rsplit(".", 1)[-1] for n in names), *names]))
    close = difflib.get_close_matches(given, ends, n=4, cutoff=0.4) or ends[:4]
    return f"near names are {', '.join(repr(c) for c in close)}" if close else "the model has no layer to adapt"


def match(model: nn.Module, targets: Targets, exclude: Targets = (), only_layers: Sequence[int] | None = None) -> list[str]:
    """Names of the modules that `targets` names, in the model's order, by PEFT's rules.

    Args:
        model: the model.
        targets: a regular expression for the whole name, ``"all-linear"`` for every linear layer, or a list of
            exact names and of endings behind a dot.
        exclude: the same, to leave out; it goes first.
        only_layers: keep names whose first number is one of these.

    Raises:
        AttachError: an entry that matches nothing, or a module that cannot be adapted.
    """
    known = {name: module for name, module in model.named_modules() if name and not isinstance(module, Adapter)}
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


def _named(targets: Targets, known: Mapping[str, nn.Module], adaptable: list[str]) -> list[str]:
    if targets == "all-linear":
        return [n for n in adaptable if isinstance(known[n], nn.Linear) or type(known[n]).__name__ == "Conv1D"]
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


def check_target(name: str, known: Mapping[str, nn.Module]) -> None:
    """Raise unless the named module can be adapted."""
    if not layers.is_supported(known[name]):
        raise AttachError(
            f"'{name}' is a {type(known[name]).__name__}, which cannot be adapted; "
            f"supported are {', '.join(layers.supported())}. Name the layers inside it."
        )
    parent = known.get(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        raise AttachError(
            f"'{name}' belongs to nn.MultiheadAttention, which uses its weight without calling it, so an adapter there "
            "would be ignored. Leave it out (exclude=['out_proj']), or use an attention with separate projections."
        )
