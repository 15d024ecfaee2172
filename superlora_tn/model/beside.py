"""Which parameters of the base train beside an adapter."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from torch import nn

from superlora_tn.model.targets import AttachError, near
from superlora_tn.model.tuned import Tuned


def also_trained(model: nn.Module, also: Sequence[str]) -> tuple[str, ...]:
    """Full names of the parameters that the entries of `attach(also=)` mean, in the model's order.

    A parameter that several modules share (a head tied to an embedding) is meant by each of its names, and is here once, under
    the first of them, as in `named_parameters`.

    Args:
        model: the model.
        also: names of modules or their endings behind a dot, or patterns of parameters' names with ``*``.

    Raises:
        AttachError: an entry that matches nothing, or is no name.
    """
    if isinstance(also, str) or not isinstance(also, Collection):
        raise AttachError(f"attach was given also={also!r}; give a list, such as also=['classifier', '*.bias'].")
    handles = tuple(f"{n}." for n, module in model.named_modules(remove_duplicate=False) if isinstance(module, Tuned))
    names: dict[str, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.startswith(handles):
            names[name] = id(parameter)
    found = set[int]()
    for entry in also:
        if not isinstance(entry, str):
            raise AttachError(
                f"also holds {entry!r}; it takes names, such as 'classifier' or '*.bias'. Rows of a layer are a target: "
                "targets=[Rows(...)] with a declaration such as dense()."
            )
        own = [name for name in names if _means(entry, name)]
        if not own:
            raise AttachError(f"also names '{entry}', which matches no parameter of the model; {near(entry, names)}.")
        found.update(names[name] for name in own)
    first = {which: name for name, which in reversed(names.items())}
    return tuple(name for name, which in names.items() if which in found and first[which] == name)


def _means(entry: str, parameter: str) -> bool:
    if "*" in entry or "?" in entry:
        return fnmatchcase(parameter, entry)
    return f".{entry}." in f".{parameter}."
