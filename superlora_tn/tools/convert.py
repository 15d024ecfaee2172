"""One adapter as another: exactly where the other declaration contains it, else the nearest with its error.

What contains what is found from the networks, not from a list of methods. A network of the same nodes with larger bonds takes
the old values in a corner. Into a network without loops (LoRA, LoKr, LoTR, any Tucker or train, any Kronecker product) dW goes
by singular value decompositions, which lose nothing where the ranks suffice: LoHa of ranks r1 and r2 in LoRA of r1 r2, LoKr in
LoRA of the product of its splits' ranks, LoTR in a LoRA of each weight, a CP in a Tucker, a Tucker in a train, anything in
`Dense`; a sum of LoRAs in a LoRA of its ranks' sum, and any of them in a sum that has such a term. A CP takes in slices of a
summed rank as high as its own, and an elementwise product takes one factor beside ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from superlora_tn.declare.fold import PhysicalFold, Shape
from superlora_tn.declare.joins import Magnitude
from superlora_tn.declare.parts import BASED, SpecError, shown
from superlora_tn.files.own import Entry, tensor_name
from superlora_tn.files.record import magnitude_name
from superlora_tn.network.budget import Budget
from superlora_tn.network.graph import Graph
from superlora_tn.network.kernels import Kernels, is_open, lay_out
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.tools.decompose import Decomposition, FitError, Progress, fit_weights
from superlora_tn.tools.difference import resting
from superlora_tn.tools.fitting import Settings
from superlora_tn.tools.frames import Frame, frame
from superlora_tn.update.based import Read

REMEDY = "load() the adapter on its base, and convert the handle"


def convert(
    source: Entry | Sequence[Entry],
    tensors: Mapping[str, Tensor],
    to: AdapterSpec | Budget,
    *,
    steps: int = 200,
    tolerance: float = 1e-5,
    restarts: int = 3,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    base: Read | None = None,
    remedy: str = REMEDY,
    kernels: Kernels | None = None,
) -> Decomposition:
    """The adapter of another declaration with the same dW, or the nearest.

    Args:
        source: the declaration with its weights' shapes, or several, as `files.own.read` gives them.
        tensors: the nodes, by ``group<k>.<node>``, groups numbered through all declarations.
        to: the other declaration, or a budget that buys one.
        steps, tolerance, restarts, seed, progress: of the fits, where there are any; see `decompose`.
        base: W of a weight, (out, in), for nodes of the other declaration that hold values of it; None where W is not at hand
            but in the adapter's own nodes, which then have to be the same.
        remedy: what to do where W is needed and not at hand.
        kernels: of the weights, where their layers are at hand; else they are what the declarations say of them.

    Returns:
        Nodes and errors: below 1e-10 (`Decomposition.is_exact`) where the other declaration contains this adapter. Of DoRA
            in DoRA the magnitudes stay, and the errors are those of the dW that is added before rows are scaled.

    Raises:
        FitError: nodes that are missing or of another shape, or numbers that are not finite.
        SpecError: the other declaration does not fit the weights' shapes.
    """
    if not isinstance(to, AdapterSpec | Budget):
        raise SpecError(f"convert was given to={shown(to)}; give an AdapterSpec such as superlora_tn.lora(8), or a budget.")
    entries = [source] if isinstance(source, Entry) else list(source)
    norms = _magnitudes(entries, tensors)
    known = Source([replace(e, spec=replace(e.spec, join=None)) for e in entries] if norms else entries, tensors)
    spec = to.choose(known.shapes, {**(kernels or {}), **known.kernels}).spec if isinstance(to, Budget) else to
    kept = bool(norms) and isinstance(spec.join, Magnitude)
    for one in () if kept else (*(entry.spec for entry in entries), spec):
        one.check_added("fits and conversions are")
    own = replace(spec, join=None)
    given = kernels_for(own, [known], kernels)
    start = known.rests(own, given, remedy) if base is None else resting(own, known.shapes, base, given)
    settings = Settings(steps, tolerance, restarts)
    found = fit_weights(known.shapes, known.delta, own, settings, seed, start, progress, known.grown, given)
    found = replace(found, tables=frozenset(name for entry in entries for name in entry.tables))
    if not kept:
        return found
    laid = enumerate(group.members for _, group, _ in lay_out(spec, known.shapes, given))
    beside = {magnitude_name(k): torch.cat([norms[name] for name in members]) for k, members in laid}
    return replace(found, spec=spec, tensors={**found.tensors, **beside})


def _magnitudes(entries: Sequence[Entry], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The magnitudes of each weight's rows, where all declarations have such (DoRA); nothing where one has none."""
    found = dict[str, Tensor]()
    if not all(isinstance(entry.spec.join, Magnitude) for entry in entries):
        return found
    for k, group in enumerate(group for entry in entries for group, _ in entry.spec.lay_out(entry.targets)):
        rows = [group.rows_of(name) for name in group.members]
        name = magnitude_name(k)
        if name not in tensors or tuple(tensors[name].shape) != (sum(rows),):
            raise FitError(f"the adapter has no '{name}' of {sum(rows)} numbers, which its declaration needs.")
        held = tensors[name].detach().to(device="cpu", dtype=torch.float64)
        found |= dict(zip(group.members, torch.split(held, rows), strict=True))
    return found


def kernels_for(spec: AdapterSpec, sources: Sequence[Source], layers: Kernels | None) -> Kernels | None:
    """The kernels that a declaration of these weights takes; None where it has modes for such, and that of one is not known.

    Args:
        spec: the declaration.
        sources: the adapters that they have so far; what these say of kernels goes before.
        layers: their layers' kernels; None where there are no layers.
    """
    known = dict(layers or {})
    for source in sources:
        known |= source.kernels
    needed = isinstance(spec.fold, PhysicalFold) and spec.fold.kernel_modes
    return None if needed and any(source.shapes.keys() - known for source in sources) else known


def _said(spec: AdapterSpec) -> tuple[int, ...] | None:
    """The kernel of a declaration's weights; one that waits for kernels, and was given none, took its weights for matrices."""
    own = spec.fold.kernel if isinstance(spec.fold, PhysicalFold) else None
    return () if own is None and is_open(spec) else own


class Source:
    """An adapter's groups with their nodes in float64, and dW of one group at a time.

    Attributes:
        shapes: of all weights.
        kernels: of those whose declarations tell.
    """

    def __init__(self, entries: Sequence[Entry], tensors: Mapping[str, Tensor]) -> None:
        self.shapes: dict[str, Shape] = {name: shape for entry in entries for name, shape in entry.targets.items()}
        told = [(entry, kernel) for entry in entries if (kernel := _said(entry.spec)) is not None]
        self.kernels = {name: kernel for entry, kernel in told for name in entry.targets}
        self._frames = [
            frame(group, entry.spec, graph) for entry in entries for group, graph in entry.spec.lay_out(entry.targets)
        ]
        self._nodes = [list(_nodes(k, own.graph, tensors)) for k, own in enumerate(self._frames)]
        self._of = {name: k for k, own in enumerate(self._frames) for name in own.members}
        self._built: tuple[int, dict[str, Tensor]] = (-1, {})

    def delta(self, name: str) -> Tensor:
        """dW of a weight."""
        group = self._of[name]
        if self._built[0] != group:
            self._built = (group, self._frames[group].deltas(self._nodes[group]))
        return self._built[1][name]

    def rests(self, spec: AdapterSpec, kernels: Kernels | None, remedy: str) -> dict[str, Tensor]:
        """The adapter's own nodes for those of another declaration that hold the same of the base.

        Raises:
            FitError: one of them is no node of the adapter.
        """
        found = dict[str, Tensor]()
        for k, (_, group, graph) in enumerate(lay_out(spec, self.shapes, kernels)):
            own = self._of[next(iter(group.members))]
            held = dict(zip(self._frames[own].graph.nodes, self._nodes[own], strict=True))
            for node in graph.nodes:
                if node.init not in BASED:
                    continue
                if self._frames[own].group != group or node not in held:
                    raise FitError(
                        f"'{node.name}' holds the base's '{node.init}', which the adapter's nodes do not tell; {remedy}."
                    )
                found[tensor_name(k, node)] = held[node]
        return found

    def grown(self, target: Frame, nodes: list[Tensor]) -> str | None:
        """Write the nodes of a group of these weights with the same nodes and bonds no larger into another group's."""
        k = self._of[target.members[0]]
        source = self._frames[k]
        same_fold = source.group == target.group and source.spec.projection == target.spec.projection
        if not same_fold or not _contains(target.graph, source.graph):
            return None
        if target.terms and source.spec.scale != target.spec.scale:
            return None  # the first node stands in some of the terms only
        if target.spec.projection is not None and not target.spec.projection.linear and source.spec.scale != target.spec.scale:
            return None
        _grow(source, self._nodes[k], target, nodes)
        return "the same network"


def _nodes(group: int, graph: Graph, tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    for node in graph.nodes:
        name = tensor_name(group, node)
        if name not in tensors:
            raise FitError(f"the adapter has no tensor '{name}', which its declaration needs, of shape {node.shape}.")
        if tuple(tensors[name].shape) != node.shape:
            raise FitError(f"the adapter's '{name}' is {tuple(tensors[name].shape)}; its declaration has {node.shape}.")
        yield tensors[name].detach().to(device="cpu", dtype=torch.float64)


def _contains(large: Graph, small: Graph) -> bool:
    """Whether one graph is the other with larger bonds."""
    if large.terms or small.terms:
        return large == small
    if [n.name for n in large.nodes] != [n.name for n in small.nodes] or large.modes != small.modes:
        return False
    opened = {i for _, indices in large.modes for i in indices}
    for ours, theirs in zip(large.nodes, small.nodes, strict=True):
        if len(ours.shape) != len(theirs.shape):
            return False
        for a, b, own, other in zip(ours.shape, theirs.shape, ours.axes, theirs.axes, strict=True):
            # A bond of size 1 carries no index.
            bond = len(own) <= 1 and not opened & {*own, *other} and (own == other or b == 1)
            if (a, own) != (b, other) and not (bond and a >= b):
                return False
    return True


def _grow(source: Frame, old: Sequence[Tensor], target: Frame, nodes: list[Tensor]) -> None:
    """Old values in a corner of the new nodes; what is new along a bond is zero on one node, and as it starts on the others.

    So dW is the same, and the new part trains.
    """
    graph = target.graph
    grown = {
        own[0]: small
        for node, before in zip(graph.nodes, source.graph.nodes, strict=True)
        for own, size, small in zip(node.axes, node.shape, before.shape, strict=True)
        if size > small
    }
    for values, before in zip(nodes, old, strict=True):
        values[tuple(slice(0, s) for s in before.shape)] = before
    for index, small in grown.items():
        holders = [k for k, node in enumerate(graph.nodes) if index in node.indices]
        chosen = max(holders, key=lambda k: (graph.nodes[k].trainable, graph.nodes[k].init == "zeros"))
        axis = graph.nodes[chosen].axes.index((index,))
        nodes[chosen].narrow(axis, small, graph.size[index] - small).zero_()
    first = next(k for k, node in enumerate(graph.nodes) if node.trainable)
    nodes[first] *= source.spec.scale / target.spec.scale
