"""A network as a picture: nodes and bonds, what each node is, how dW joins the weight, and what is cut off.

Needs matplotlib (the `demo` extra).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from superlora_tn.declare.fold import FlatGroup, Group, Shape
from superlora_tn.declare.joins import Join, Magnitude, Multiply
from superlora_tn.declare.maps import Compose, Fastfood, Projection, Shuffle
from superlora_tn.declare.node_maps import (
    Cayley,
    Circulant,
    Exponential,
    Fourier,
    Haar,
    Householder,
    Identity,
    NodeMap,
    Normalised,
    Same,
    Selected,
    Softmax,
    Spread,
)
from superlora_tn.declare.nodes import BASED
from superlora_tn.network.graph import Graph, GraphNode, Term
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.tools.draw import INK, OPEN, PAPER, bare, box, save, sheet

CUT = "#b4231f"


@dataclass(frozen=True)
class Style:
    """How a kind of node looks, and what the legend says of it."""

    words: str
    face: str
    edge: str = INK
    shape: str = "round,pad=0.45,rounding_size=0.8"
    line: str = "-"


TRAINED = Style("trained", "#a8d5e2")
ZERO = Style("trained, zero at first", "#f6c85f")
FROZEN = Style("frozen, random", "#c3cfd9")
BASE = Style("of the base W", "#b9dfb4", shape="square,pad=0.45")
FIXED = Style("fixed, nothing stored", PAPER, shape="square,pad=0.45", line=":")
STYLES = (TRAINED, ZERO, FROZEN, BASE, FIXED)

# A mark and a name for each map of a node.
MARKS: dict[type, tuple[str, str]] = {
    Selected: ("\u2234", "scattered"),
    Fourier: ("\u223f", "Fourier"),
    Haar: ("\u2293", "wavelets"),
    Spread: ("\u2192", "spread"),
    Same: ("=", "same as"),
    Circulant: ("\u25a8", "circulant"),
    Cayley: ("\u21bb", "rotation"),
    Exponential: ("\u21bb", "rotation, exp"),
    Householder: ("\u21c4", "reflections"),
    Identity: ("1", "identity"),
    Softmax: ("\u03c3", "softmax"),
    Normalised: ("|\u00b7|", "unit length"),
}
OF_BASE = {
    "base": "W itself",
    "left": "left vectors",
    "singular": "singular values",
    "right": "right vectors",
    "columns": "column norms",
}


def network(spec: AdapterSpec, shapes: Mapping[str, Shape], path: str | Path, title: str = "") -> Path:
    """Draw a declaration's network: a box a node, a line an index, a dot a hyperindex.

    Each kind of node looks its own way, said below; a node's map stands in its box, by a mark and a name. The lines below the
    title say how dW joins the weight W, which is drawn where it multiplies, and what fills dW (see `filling_of`). Cropped modes
    have red legs.

    Args:
        spec: what to draw; the terms of a sum stand side by side, with their signs between.
        shapes: (out, in) by weight name; the network of the first group is drawn.
        path: where the PNG goes.
        title: above the picture; the equation stands below it.
    """
    (group, graph), join = spec.lay_out(shapes)[0], spec.join
    filling = filling_of(group, spec.projection)
    weighed = join.side if isinstance(join, Multiply) else None
    laid = [(term, *_laid_out(term.graph, weighed)) for term in graph.networks]
    # An inch a unit, or the labels of a large network would cover its lines.
    sizes = [np.ptp(spots, axis=0) + 1.8 for _, _, _, spots in laid]
    widths = [max(width, 5.6 / len(laid)) for width, _ in sizes]
    tall = max(3.0, *(height for _, height in sizes))
    head = 0.7 + (0.16 * filling.count("\n") + 0.26) * bool(filling)
    figure = sheet(sum(widths), head + tall + 1.0)
    rows = figure.subfigures(3, 1, height_ratios=[head, tall + 0.5, 0.5])
    _formula(rows[0], head, title, join, filling, len(laid) > 1)
    (grid,) = rows[1].subplots(1, len(laid), squeeze=False, width_ratios=widths)
    for k, (axes, (term, vertices, edges, spots)) in enumerate(zip(grid, laid, strict=True)):
        cropped = _cropped(term)
        _draw_edges(axes, term.graph, edges, spots, vertices, cropped)
        _draw_vertices(axes, term.graph, vertices, spots, cropped)
        words = term.equation() if k else term.equation().removeprefix("+ ")
        axes.set_xlabel(words, color=INK, fontsize=8, wrap=True)
        bare(axes, spots)
        if k or term.weight < 0:
            sign = "+" if term.weight > 0 else "\u2212"
            place = {"xycoords": "axes fraction", "ha": "center", "va": "center", "annotation_clip": False}
            axes.annotate(sign, (0.0, 0.5), fontsize=22, color=INK, **place)
    _legend(rows[2], graph, join)
    return save(figure, path)


def _style(node: GraphNode) -> Style:
    if node.init in BASED:
        return BASE
    if node.map is not None and (node.map.of is not None or isinstance(node.map, Identity)):
        return FIXED
    if not node.trainable or node.copies is not None:
        return FROZEN
    return ZERO if node.starts_at_zero else TRAINED


def _words(node: GraphNode) -> str:
    """A node's name, and below it what it is a function of."""
    if node.init in BASED:
        return f"{node.name}\n{OF_BASE[node.init]}"
    return node.name if node.map is None else f"{node.name}\n{_marked(node.map)}"


def _marked(own: NodeMap) -> str:
    mark, name = MARKS[type(own)]
    if own.of is not None:
        return f"{mark} {name} {own.of}"
    if isinstance(own, Selected | Fourier | Haar | Spread | Householder):
        return f"{mark} {own.count:,} {name}" if isinstance(own, Householder) else f"{mark} {name}, {own.count:,}"
    if isinstance(own, Circulant):
        return f"{mark} {name}, {own.size}"
    if isinstance(own, Cayley) and own.less_one:
        return f"{mark} {name} \u2212 1"
    return f"{mark} {name} of {own.top}" if isinstance(own, Softmax) and own.top is not None else f"{mark} {name}"


def filling_of(group: Group, projection: Projection | None) -> str:
    """How the numbers of a flat fold's network become the dW of its weights, in words; of other folds the modes say it."""
    if not isinstance(group, FlatGroup):
        return ""
    count = f"{group.inner:,} numbers" if group.surplus == 0 else f"the first {group.inner:,} of {group.volume:,} numbers"
    whose = f"of each of {group.groups:,} networks" if group.groups > 1 else "of the network"
    stages = projection.maps if isinstance(projection, Compose) else [projection] if projection is not None else []
    way = "".join(f",\nthen {_stage(stage)}" if k else f",\nthrough {_stage(stage)}" for k, stage in enumerate(stages))
    weights = f"{len(group.members):,} weights, one after another" if len(group.members) > 1 else "the weight"
    return f"{count} {whose}{way},\nare the dW of {weights}" if way else f"{count} {whose}\nare the dW of {weights}"


def _stage(stage: Shuffle | Fastfood) -> str:
    if isinstance(stage, Shuffle):
        return "a fixed shuffle"
    return f"fixed fastfood of \u03c1 = {stage.ratio:g}" + (" and tanh" if stage.tanh else "")


def _formula(figure: Any, height: float, title: str, join: Join | None, filling: str, several: bool) -> None:
    """The title, below it how dW meets W, and what fills dW."""
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(-1, 1)
    axes.set_ylim(0.7 - height, 0.7)  # in inches
    axes.annotate(title, (0, 0.525), fontsize=12, color=INK, ha="center", va="center")
    delta = "dW" if several or join is None or isinstance(join, Magnitude) else "N"
    words = f"W' = W + {delta}"
    if isinstance(join, Magnitude):
        words = "W' = m (W + dW) / |W + dW|, row by row; m trains, |W| at first"
    elif isinstance(join, Multiply):
        factor = f"(1 + {delta})" if join.residual else delta
        product = f"{factor} W" if join.side == "left" else f"W {factor}"
        words = f"W' = s {product}, s scales rows, trains, 1 at first" if join.scaled else f"W' = {product}"
    axes.annotate(words, (0, 0.14), fontsize=9, color=INK, ha="center", va="center")
    axes.annotate(filling, (0, -0.02), fontsize=8, color=INK, ha="center", va="top")


def _legend(figure: Any, graph: Graph, join: Join | None) -> None:
    """The looks that are in the picture, each with its words."""
    used = {_style(node) for node in graph.nodes} | ({BASE} if isinstance(join, Multiply) else set())
    shown = [style for style in STYLES if style in used]
    words = [style.words for style in shown]
    cuts = {f"{mode} cut to {kept} of {size}" for t in graph.networks for mode, kept, size in _kept(t)}
    words += ["; ".join(sorted(cuts))] if cuts else []
    axes = figure.subplots()
    axes.set_axis_off()
    lengths = [0.42 + 0.062 * len(text) for text in words]
    width = max(figure.bbox.width / figure.dpi, sum(lengths))
    axes.set_xlim(0, width)
    axes.set_ylim(0, 1)
    left = (width - sum(lengths)) / 2
    for k, (text, length) in enumerate(zip(words, lengths, strict=True)):
        if k < len(shown):
            _boxed(axes, "  ", (left + 0.1, 0.5), 5, shown[k])
        else:
            axes.plot([left, left + 0.2], [0.5, 0.5], color=CUT, linewidth=2.2)
        axes.annotate(text, (left + 0.27, 0.5), fontsize=7.5, color=INK, ha="left", va="center")
        left += length


def _boxed(axes: Any, text: str, place: Any, size: float, style: Style) -> None:
    own = {"boxstyle": style.shape, "fc": style.face, "ec": style.edge, "ls": style.line}
    axes.annotate(text, place, fontsize=size, color=INK, ha="center", va="center", zorder=3, bbox=own)


def _kept(term: Term) -> list[tuple[str, int, int]]:
    sizes = {mode.name: mode.size for mode, _ in term.graph.modes}
    return [(mode, kept, sizes[mode]) for mode, kept in term.crops]


def _cropped(term: Term) -> set[str]:
    """The open indices of modes that are cut."""
    cut = {mode for mode, _ in term.crops}
    return {i for mode, indices in term.graph.modes if mode.name in cut for i in indices}


def _laid_out(graph: Graph, side: str | None) -> tuple[list[str], list[tuple[int, int, str]], np.ndarray]:
    """Vertices by name (">" before an open index, nothing for a hyperindex), edges with their labels, positions.

    Where the network multiplies the weight from a side, W (named "W=") hangs on the indices that meet it.
    """
    open_indices = [i for _, indices in graph.modes for i in indices]
    met = set(graph.open("in" if side == "left" else "out")) if side else set()
    places: dict[str, list[int]] = {}
    for k, node in enumerate(graph.nodes):
        for index in node.indices:
            places.setdefault(index, []).append(k)
    vertices: list[str] = [n.name for n in graph.nodes]
    edges: list[tuple[int, int, str]] = []
    weight = len(vertices)
    if side:
        vertices += ["W=", f">{'in' if side == 'left' else 'out'} of W"]
        edges.append((weight, weight + 1, vertices[-1][1:]))
    for index, nodes in places.items():
        ends = list(nodes)
        if index in met:
            ends.append(weight)
        elif index in open_indices:
            ends.append(len(vertices))
            vertices.append(f">{index}")
        if len(ends) == 2:
            edges.append((ends[0], ends[1], index))
            continue
        vertices.append("")
        # A leg carries the label of an open hyperindex, one branch that of a bond.
        labelled = 0 if index not in open_indices else len(ends) - 1
        edges += [(end, len(vertices) - 1, index if k == labelled else "") for k, end in enumerate(ends)]
    # Two nodes keep room for the bond's label between them; a leg or a branch of a hyperindex is shorter.
    mapped = {node.name for node in graph.nodes if "\n" in _words(node)}
    lengths = [_length(vertices[a], vertices[b], mapped) for a, b, _ in edges]
    spots = _springs(len(vertices), [(a, b, length) for (a, b, _), length in zip(edges, lengths, strict=True)])
    return vertices, edges, spots


def _length(one: str, other: str, mapped: set[str]) -> float:
    """Of an edge: boxes with two lines are wider."""
    wide = 0.25 * len({one, other} & mapped)
    return (1.8 if all(name and name[0] != ">" for name in (one, other)) else 1.1) + wide


def _springs(count: int, edges: Sequence[tuple[int, int, float]]) -> np.ndarray:
    """Positions (count, 2) by stress majorisation: drawn distances near the lengths (a, b, length) along the edges."""
    far = np.full((count, count), 5.0)  # parts that no edge joins stand this far apart
    np.fill_diagonal(far, 0)
    for a, b, length in edges:
        far[a, b] = far[b, a] = length
    for k in range(count):
        far = np.minimum(far, far[:, k : k + 1] + far[k : k + 1, :])
    starts = [np.random.default_rng(seed).normal(size=(count, 2)) * count / 4 for seed in range(12)]
    found = [_relax(start, far) for start in starts]
    return min(found, key=lambda one: one[1] + _crowded(one[0], edges))[0]


def _crowded(spots: np.ndarray, edges: Sequence[tuple[int, int, float]]) -> int:
    """How many middles of edges, where labels stand, are under a vertex or on one another."""
    middles = np.array([(spots[a] + spots[b]) / 2 for a, b, _ in edges]).reshape(-1, 2)
    gaps = np.linalg.norm(middles[:, None] - spots[None], axis=2)
    apart = np.linalg.norm(middles[:, None] - middles[None], axis=2)[np.triu_indices(len(edges), 1)]
    return int((gaps < 0.45).sum() + (apart < 0.3).sum())


def _relax(spots: np.ndarray, far: np.ndarray) -> tuple[np.ndarray, float]:
    """Move towards the wanted distances; the positions and the stress that is left."""
    weights = 1 / np.maximum(far, 1) ** 2
    np.fill_diagonal(weights, 0)
    total = np.maximum(weights.sum(1), 1e-9)[:, None]
    for _ in range(200):
        gaps = spots[:, None] - spots[None]
        lengths = np.maximum(np.linalg.norm(gaps, axis=2), 1e-9)
        spots = (weights[..., None] * (spots[None] + gaps * (far / lengths)[..., None])).sum(1) / total
    left = np.linalg.norm(spots[:, None] - spots[None], axis=2) - far
    return spots, float((weights * left**2).sum())


def _draw_edges(
    axes: Any,
    graph: Graph,
    edges: Sequence[tuple[int, int, str]],
    spots: np.ndarray,
    vertices: Sequence[str],
    cropped: set[str],
) -> None:
    legs = {b: index for _, b, index in edges if not vertices[b]} | {a: index for a, _, index in edges if not vertices[a]}
    for a, b, index in edges:
        ends = spots[[a, b]]
        is_open = vertices[a].startswith(">") or vertices[b].startswith(">")
        named = index or legs.get(b, "")
        colour = CUT if named in cropped else OPEN if is_open else INK
        axes.plot(*ends.T, color=colour, linewidth=2.2 if named in cropped and is_open else 1.6, zorder=1)
        if index and not is_open:
            box(axes, f"{index}={graph.size[index]}", ends.mean(0), 8, PAPER, "none", "round,pad=0.15")


def _draw_vertices(axes: Any, graph: Graph, vertices: Sequence[str], spots: np.ndarray, cropped: set[str]) -> None:
    for name, (x, y) in zip(vertices, spots, strict=True):
        if not name:
            axes.plot(x, y, "o", color=INK, markersize=5, zorder=2)
        elif name.startswith(">"):
            size = f"={graph.size[name[1:]]}" if name[1:] in graph.size else ""
            box(axes, f"{name[1:]}{size}", (x, y), 9, PAPER, CUT if name[1:] in cropped else OPEN, "round,pad=0.2")
        elif name == "W=":
            _boxed(axes, "W", (x, y), 9, BASE)
        else:
            node = next(n for n in graph.nodes if n.name == name)
            words = _words(node)
            _boxed(axes, words, (x, y), 8 if "\n" in words else 9, _style(node))
