"""Frozen declarations to plain dicts and back, strictly: an unknown kind or field raises, nothing is dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from typing import Any

from superlora_tn.declare.bounds import MAX_DEPTH
from superlora_tn.declare.checks import near
from superlora_tn.declare.fold import FlatFold, PhysicalFold
from superlora_tn.declare.joins import JOINS, Multiply
from superlora_tn.declare.maps import PROJECTIONS, Compose
from superlora_tn.declare.node_maps import NODE_MAPS
from superlora_tn.declare.parts import PARTS, Frozen, Hadamard, Kronecker, Network, Node, SpecError, Sum, shown

_KINDS = (*PARTS, Frozen, Node, PhysicalFold, FlatFold, *PROJECTIONS, *JOINS, *NODE_MAPS)
KINDS: dict[str, type] = {k.__name__: k for k in _KINDS}

# Fields that came after adapters had been saved without them; where they are missing, their defaults say what was meant.
LATER = {
    "FlatFold": frozenset({"multiple"}),
    "PhysicalFold": frozenset({"kernel"}),
    "Node": frozenset({"map"}),
    "Kronecker": frozenset({"crop"}),
    "Network": frozenset({"crop"}),
    "Multiply": frozenset({"scaled"}),
    "Householder": frozenset({"less_one"}),
    "Cayley": frozenset({"less_one", "scaled"}),
    "Softmax": frozenset({"top"}),
    "Normalised": frozenset({"least"}),
    "Fastfood": frozenset({"order", "scaling"}),
    **dict.fromkeys(("CP", "Tucker", "TensorTrain"), frozenset({"over"})),
}


def encode(value: Any) -> Any:
    """A declaration as dicts, lists, strings and numbers (what JSON holds)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Node) and value.map is None:  # so that earlier releases read it too
            del fields["map"]
        if isinstance(value, Kronecker | Network) and not value.crop:
            del fields["crop"]
        if isinstance(value, Multiply) and not value.scaled:
            del fields["scaled"]
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [encode(v) for v in value]
    return value


def decode(data: Any, depth: int = 0) -> Any:
    """The declaration that `encode` wrote.

    Raises:
        SpecError: not something `encode` writes, unknown kinds or fields, or a value its class refuses.
    """
    if depth > 4 * MAX_DEPTH:  # a part is a dict in a list of a dict, at the most in a frozen copy
        raise SpecError(f"the declaration nests deeper than {MAX_DEPTH} levels; it was not written by this library.")
    if isinstance(data, Mapping):
        return _decode_kind(data, depth)
    if isinstance(data, list):
        return tuple(decode(v, depth + 1) for v in data)
    if data is None or isinstance(data, str | int | float | bool):
        return data
    raise SpecError(f"a declaration holds {type(data).__name__}; it may hold dicts, lists, strings, numbers and null.")


def check_fields(what: str, given: Mapping[str, Any], names: Set[str], optional: Set[str]) -> None:
    """Raise for a field that is not known, else for those that are missing.

    Args:
        what: whose fields they are: the beginning of the message.
        given: the fields.
        names: of all that there are.
        optional: those that may be missing.
    """
    unknown, missing = sorted(map(str, set(given) - names)), sorted(names - optional - set(given))
    if unknown:
        raise SpecError(f"{what} has no field {shown(unknown[0])}; {near(unknown[0], missing or sorted(names))}")
    if missing:
        raise SpecError(f"{what} needs the fields {', '.join(sorted(names - optional))}; missing are {', '.join(missing)}.")


def _decode_kind(data: Mapping[str, Any], depth: int) -> Any:
    kind = KINDS.get(str(data.get("kind")))
    if kind is None:
        raise SpecError(f"unknown kind {shown(data.get('kind'))} in a declaration; known kinds are {', '.join(KINDS)}.")
    given = {k: v for k, v in data.items() if k != "kind"}
    names = {f.name for f in dataclasses.fields(kind)}
    check_fields(f"{kind.__name__} in a declaration", given, names, LATER.get(kind.__name__, frozenset()))
    values = {k: decode(v, depth + 1) for k, v in given.items()}
    try:
        if issubclass(kind, Network):
            nodes = dict(values["nodes"])
            if len(nodes) != len(values["nodes"]):
                raise SpecError("a Network in a declaration names a node twice; names are unique.")
            sizes = dict(values["sizes"])
            if len(sizes) != len(values["sizes"]):
                raise SpecError("a Network in a declaration sizes an index twice; say one size.")
            return Network(values["modes"], sizes, crop=values.get("crop", False), **nodes)
        if issubclass(kind, Compose):
            return Compose(*values["maps"])
        if issubclass(kind, Kronecker | Hadamard | Sum):
            return kind(*values.pop("parts"), **values)
        return kind(**values)
    except SpecError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise SpecError(f"{kind.__name__} in a declaration holds values of the wrong type: {error}.") from error
