"""``superlora-tn show FILE``: what an adapter's file holds, of whichever library, without a model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superlora_tn.declare.fold import Group
from superlora_tn.declare.joins import Multiply
from superlora_tn.files.anatomy import method_of
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.foreign import Parsed
from superlora_tn.files.own import Saved
from superlora_tn.files.read import read
from superlora_tn.files.record import Entry, names_of
from superlora_tn.files.thin import Filled, filled_group, of_weight, thin
from superlora_tn.network.graph import Graph

WIDTH = 40
LINES = 48


@dataclass(frozen=True)
class Shown:
    """One weight of a file.

    Attributes:
        name: as in the file.
        method: lora, loha, lokr, vera, adalora, gralora, full, or "network" for any other.
        ranks: of its bonds.
        scale: of dW.
        shape: (out, in) of dW; 0 where only a model knows it.
        size: numbers that the file holds for it; of those that several weights share, its share.
        norm: of dW (Frobenius), None where it follows from the base model.
        largest: the largest singular value of dW, likewise.
        dora: whether it has DoRA's norms, to which the rows of W + dW are scaled; dW is what is added before that.
        join: how the network joins the weight, where it makes no dW that is added ("W' = N W"); "" where it does.
    """

    name: str
    method: str
    ranks: tuple[int, ...]
    scale: float
    shape: tuple[int, int]
    size: int
    norm: float | None
    largest: float | None
    dora: bool = False
    join: str = ""

    @property
    def needs_base(self) -> str:
        """In words, that dW is known with the base's weights alone; "" where its norm is here."""
        return "" if self.norm is not None else f"  {self.join}{', ' * bool(self.join)}dW needs the base's weights"


@dataclass(frozen=True)
class Contents:
    """All of a file; print it.

    Attributes:
        path: what was asked for.
        origin: who writes such files.
        bytes: the size of its tensors.
        dtypes: of the tensors.
        weights: one for each adapted weight.
        others: names of the parameters beside them.
    """

    path: Path
    origin: str
    bytes: int
    dtypes: tuple[str, ...]
    weights: tuple[Shown, ...]
    others: tuple[str, ...]

    def data(self) -> dict[str, Any]:
        """As plain data."""
        weights = [{**vars(w), "ranks": list(w.ranks), "shape": list(w.shape)} for w in self.weights]
        return {
            "path": str(self.path),
            "origin": self.origin,
            "bytes": self.bytes,
            "dtypes": list(self.dtypes),
            "weights": weights,
            "others": list(self.others),
        }

    def layers(self) -> dict[str, float]:
        """The norm of dW of each layer, all of its weights together: a layer is what a name says before its last number."""
        squares: dict[str, float] = {}
        for weight in self.weights:
            if weight.norm is not None:
                layer = layer_of(weight.name)
                squares[layer] = squares.get(layer, 0.0) + weight.norm**2
        return {layer: math.sqrt(s) for layer, s in squares.items()}

    def __str__(self) -> str:
        numbers = sum(w.size for w in self.weights)
        lines = [
            f"{self.path}: {self.origin}, {len(self.weights)} weights, {numbers:,} numbers ({', '.join(self.dtypes)}), "
            f"{self.bytes:,} bytes"
        ]
        kinds = Counter((w.method + (" (DoRA)" if w.dora else ""), w.ranks, w.scale, w.needs_base) for w in self.weights)
        for (method, ranks, scale, needs_base), count in kinds.most_common(LINES):
            words = " x ".join(map(str, ranks)) or "-"
            lines.append(f"  {count:5} {method:14} rank {words:9} scale {scale:g}{needs_base}")
        lines += [f"  and {len(kinds) - LINES} more kinds"] * (len(kinds) > LINES)
        if self.others:
            lines.append(f"  {len(self.others):5} other parameters, such as {self.others[0]}")
        return "\n".join([*lines, *self._bars()])

    def _bars(self) -> list[str]:
        layers = self.layers()
        if not layers:
            return []
        most, width = max(layers.values()) or 1.0, min(60, max(map(len, layers)))
        shown = list(layers.items())[:LINES]
        lines = ["norm of dW, layer by layer:"]
        lines += [f"  {name[-width:]:{width}} {norm:9.3g} {'#' * round(WIDTH * norm / most)}" for name, norm in shown]
        return lines + [f"  and {len(layers) - LINES} more layers"] * (len(layers) > LINES)


def layer_of(name: str) -> str:
    """What a name says up to its last number that something follows, with dots or underscores.

    >>> layer_of("lora_unet_down_blocks_0_attentions_1_proj_in"), layer_of("encoder.layer.3.attention.q")
    ('lora_unet_down_blocks_0_attentions_1', 'encoder.layer.3')
    """
    found = re.match(r"(.*[._]\d+)[._][^._0-9]", name)
    return found[1] if found else name


def show(path: str | PathLike[str], progress: Any = None) -> Contents:
    """Look into a file.

    Args:
        path: an adapter's file or folder, of this library or another.
        progress: called with (done, all) after each weight.

    Raises:
        CheckpointError: it is no adapter, or damaged.
    """
    found = read(path)
    if isinstance(found, Saved):
        return _own(Path(path), found, progress)
    return _foreign(found, progress)


def _own(path: Path, found: Saved, progress: Any) -> Contents:
    laid = [(entry, *pair) for entry in found.entries for pair in entry.spec.lay_out(entry.targets)]
    shown, count = list[Shown](), sum(len(group.members) for _, group, _ in laid)
    for k, (entry, group, graph) in enumerate(laid):
        for one in _of_group(entry, k, group, graph, found.tensors):
            shown.append(one)
            if progress is not None:
                progress(len(shown), count)
    size = sum(t.numel() * t.itemsize for t in found.tensors.values())
    return Contents(path, "superlora", size, _dtypes(list(found.tensors.values())), tuple(shown), tuple(found.buffers))


def _of_group(entry: Entry, k: int, group: Group, graph: Graph, tensors: Mapping[str, Tensor]) -> Iterator[Shown]:
    """Each weight of a group of this library's."""
    spec, sizes = entry.spec, _sizes(entry, k, group, graph, tensors)
    if isinstance(spec.join, Multiply):
        for name, size in sizes.items():
            yield Shown(name, "network", (), spec.scale, entry.targets[name], size, None, None, join=str(spec.join))
        return
    for one in filled_group(entry, k, group, graph, tensors):
        own = _shown(one)
        method = own.method if one.part is spec.network else "network"  # another part is dW that was built
        yield replace(own, method=method, scale=spec.scale, size=sizes[one.name], dora=spec.join is not None)


def _sizes(entry: Entry, k: int, group: Group, graph: Graph, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Numbers that the file holds for each weight of a group; what several share is shared out by their elements."""
    held = sum(tensors[name].numel() for name in names_of(k, entry.spec, group, graph))
    ends = [0, *accumulate(math.prod(entry.targets[name]) for name in group.members)]
    shares = [held * end // ends[-1] for end in ends]
    return {name: after - before for name, (before, after) in zip(group.members, pairwise(shares), strict=True)}


def _foreign(found: Parsed, progress: Any) -> Contents:
    shown = []
    for k, weight in enumerate(found.weights):
        dora = weight.magnitude is not None
        if weight.late is not None or weight.times_base:
            shape = weight.shape
            shown.append(Shown(weight.name, weight.kind, weight.ranks, weight.scale, shape, weight.size, None, None, dora))
            continue
        one = _shown(of_weight(weight))
        if progress is not None:
            progress(k + 1, len(found.weights))
        shown.append(Shown(**{**vars(one), "method": weight.kind, "size": weight.size, "dora": dora, "ranks": weight.ranks}))
    tensors = [t for w in found.weights for t in w.tensors().values()]
    others = (*found.added, *found.replaced)
    return Contents(found.path, found.origin, found.bytes, _dtypes(tensors), tuple(shown), others)


def _shown(one: Filled) -> Shown:
    method = method_of(one)
    taken = thin(one)
    values = taken.values
    kind, ranks = ("network", ()) if method is None else (method.kind, method.ranks)
    size = sum(node.numel() for node in one.nodes)
    return Shown(one.name, kind, ranks, one.scale, one.shape, size, taken.norm(), float(values.max()))


def _dtypes(tensors: Sequence[torch.Tensor]) -> tuple[str, ...]:
    return tuple(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))


def check_picture(path: str) -> Any:
    """matplotlib's figure, where a picture can be written under this path; for a look before norms are computed.

    Raises:
        CheckpointError: matplotlib is not installed, or writes no such kind of picture.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CheckpointError(f"a picture needs matplotlib: pip install 'superlora_tn[demo]' ({error}).") from error
    if (Path(path).suffix[1:].lower() or "png") not in FigureCanvasAgg.get_supported_filetypes():
        raise CheckpointError(f"a picture cannot be written as '{Path(path).name}': end its name in .png, .svg or .pdf.")
    return Figure


def draw(contents: Contents, path: str) -> str:
    """The norms of dW as a picture, one bar a layer; returns the path.

    Raises:
        CheckpointError: matplotlib is not installed, or writes no such kind of picture.
    """
    layers = contents.layers()
    figure = check_picture(path)(figsize=(7, 1.2 + 0.16 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(list(layers), list(layers.values()), color="#3b6ea5")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xlabel("norm of dW")
    axes.set_title(f"{contents.path.name}: {contents.origin}, {len(contents.weights)} weights", fontsize=9)
    figure.savefig(path, dpi=150)
    return path
