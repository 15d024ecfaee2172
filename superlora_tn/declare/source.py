"""A declaration as the Python expression that makes it: what it prints, and what is pasted from an error or a certificate."""

from __future__ import annotations

import keyword
from collections.abc import Collection
from dataclasses import MISSING, fields, is_dataclass
from typing import Any


def source(value: Any, package: str = "", unsaid: Collection[tuple[str, Any]] = ()) -> str:
    """``AdapterSpec(network=CP(rank=2))`` for that value; fields at their default are left out.

    Args:
        value: a declaration, or a part of one.
        package: in front of each name, such as ``"sl."``.
        unsaid: further settings, by name and value, that are left out.
    """
    if not is_dataclass(value) or isinstance(value, type):
        return repr(value)

    def write(inner: Any) -> str:
        return source(inner, package, unsaid)

    given = {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != _default(f)}
    given = {name: setting for name, setting in given.items() if (name, setting) not in unsaid}
    words: list[str] = []
    if isinstance(value, Several):
        words += map(write, given.pop(fields(value)[0].name))
    if isinstance(value, Notation):
        words += _notation(given, write)
    words += [f"{name}={write(setting)}" for name, setting in given.items()]
    return f"{package}{type(value).__name__}({', '.join(words)})"


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _notation(given: dict[str, Any], write: Any) -> list[str]:
    """The modes, sizes and nodes of a network; they are taken out of what was given."""
    sizes, nodes = given.pop("sizes"), given.pop("nodes")
    words = [repr(given.pop("modes")), *([repr(dict(sizes))] if sizes else [])]
    short = {name: repr(node.indices) if _is_plain(node) else write(node) for name, node in nodes}
    if any(map(keyword.iskeyword, short)):  # `lambda` is a fair name of a node, but no keyword argument
        return [*words, f"**{{{', '.join(f'{name!r}: {node}' for name, node in short.items())}}}"]
    return [*words, *(f"{name}={node}" for name, node in short.items())]


def _is_plain(node: Any) -> bool:
    return all(getattr(node, f.name) == f.default for f in fields(node) if f.name != "indices")


class Several:
    """A frozen value whose first field is given as so many arguments."""

    def __repr__(self) -> str:
        return source(self)


class Notation:
    """A network, whose nodes are given as keywords."""

    def __repr__(self) -> str:
        return source(self)
