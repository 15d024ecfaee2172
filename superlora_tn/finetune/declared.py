"""Declarations as a configuration writes them: settings of a variant, and networks in index notation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from superlora_tn.declare.fold import PhysicalFold
from superlora_tn.declare.maps import PROJECTIONS
from superlora_tn.declare.node_maps import NODE_MAPS
from superlora_tn.declare.parts import Network, Node, SpecError, shown
from superlora_tn.network.spec import AdapterSpec

NOTATION = ("result", "nodes", "sizes", "modes", "crop")
MADE: dict[str, Any] = {kind.__name__: kind for kind in (*PROJECTIONS, *NODE_MAPS)}


def value(data: Any) -> Any:
    """A setting: a list is a tuple, and ``{kind: Fastfood, ratio: 0.5}`` a map with its settings.

    Raises:
        SpecError: no map of that kind, or settings that it does not have or refuses.
    """
    if isinstance(data, list):
        return tuple(map(value, data))
    if not isinstance(data, Mapping):
        return data
    given = {name: value(inner) for name, inner in data.items() if name != "kind"}
    kind = MADE.get(str(data.get("kind")))
    if kind is None:
        raise SpecError(f"{shown(data)} is no map; write its kind and settings, the kind one of {', '.join(MADE)}.")
    try:
        return kind(*given.pop("maps", ()), **given)
    except TypeError as error:
        raise SpecError(f"{data['kind']} was given {shown(given)}: {error}.") from error


def network(data: Mapping[str, Any]) -> AdapterSpec:
    """A network in index notation: ``{result: out in, nodes: {a: out r, b: {indices: r in, init: zeros}}, sizes: {r: 8}}``.

    Raises:
        SpecError: it declares none.
    """
    nodes = {str(name): _node(str(name), own) for name, own in dict(data["nodes"]).items()}
    made = Network(data["result"], data.get("sizes", {}), crop=data.get("crop", False), **nodes)
    return AdapterSpec(made, PhysicalFold(data.get("modes", "out in")))


def _node(name: str, data: Any) -> str | Node:
    if not isinstance(data, Mapping):
        return str(data)
    try:
        return Node(**{key: value(own) for key, own in data.items()})
    except TypeError as error:
        raise SpecError(
            f"node {name} was given {shown(dict(data))}: {error}; it takes indices, init, trainable and map."
        ) from error
