"""A declaration as the Python expression that makes it, so that a failing case is one line to paste."""

from __future__ import annotations

import keyword
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from superlora_tn.declare.maps import Compose
from superlora_tn.declare.parts import Hadamard, Kronecker, Network, Node, Sum


def source(value: Any) -> str:
    """``sl.AdapterSpec(sl.CP(2))`` for that value; fields at their default are left out."""
    if isinstance(value, Network):
        return _network(value)
    if isinstance(value, Kronecker | Hadamard | Sum):
        words = [source(part) for part in value.parts]
        if isinstance(value, Kronecker) and value.factor != -1:
            words.append(f"factor={value.factor}")
        words += ["crop=True"] if isinstance(value, Kronecker) and value.crop else []
        if isinstance(value, Sum) and value.weights is not None:
            words.append(f"weights={value.weights}")
        return f"sl.{type(value).__name__}({', '.join(words)})"
    if isinstance(value, Compose):
        return f"sl.Compose({', '.join(map(source, value.maps))})"
    if is_dataclass(value) and not isinstance(value, type):
        given = [(f.name, getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) != _default(f)]
        return f"sl.{type(value).__name__}({', '.join(f'{name}={source(v)}' for name, v in given)})"
    return repr(value)


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _network(network: Network) -> str:
    words = [repr(network.modes)]
    if network.sizes:
        words.append(repr(dict(network.sizes)))
    unusual = [name for name, _ in network.nodes if keyword.iskeyword(name)]
    words += [f"{name}={_node(node)}" for name, node in network.nodes if name not in unusual]
    if unusual:  # `lambda` is a fair name of a node, but no keyword argument
        words.append(f"**{{{', '.join(f'{n!r}: {_node(node)}' for n, node in network.nodes if n in unusual)}}}")
    words += ["crop=True"] if network.crop else []
    return f"sl.Network({', '.join(words)})"


def _node(node: Node) -> str:
    return repr(node.indices) if node == Node(node.indices) else source(node)
