"""Which parameters of the base train beside an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from superlora_tn.model.targets import AttachError, near
from superlora_tn.model.tuned import Tuned


def also_trained(model: nn.Module, also: Sequence[str]) -> tuple[str, ...]:
    """Full names of the parameters that the entries of `attach(also=)` mean, in the model's order.

    Args:
        model: the model.
        also: names of modules or their endings behind a dot, or patterns of parameters' names with ``*``.

    Raises:
        AttachError: an entry that matches nothing, or is no name.
    """
    if isinstance(also, str):
        raise AttachError(f"attach was given also={also!r}; give a list, such as also=['classifier', '*.bias'].")
    handles = [f"{name}." for name, module in model.named_modules() if isinstance(module, Tuned)]
    names = [name for name, _ in model.named_parameters() if not name.startswith(tuple(handles))]
    found = set[str]()
    for entry in also:
        if not isinstance(entry, str):
            raise AttachError(
                f"also holds {entry!r}; it takes names, such as 'classifier' or '*.bias'. Rows of a layer are a target: "
                "targets=[Rows(...)] with a declaration such as dense()."
            )
        own = [name for name in names if _means(entry, name)]
        if not own:
            raise AttachError(f"also names '{entry}', which matches no parameter of the model; {near(entry, names)}.")
        found.update(own)
    return tuple(name for name in names if name in found)


def _means(entry: str, parameter: str) -> bool:
    if "*" in entry or "?" in entry:
        return fnmatchcase(parameter, entry)
    return f".{entry}." in f".{parameter}."
