"""Several adapters as one: their weighted sum exactly, or its nearest of a declaration, or a merge that settles conflicts.

The sum of networks of one structure is such a network, its bonds the sums of theirs (`network.sums`): LoRA of ranks 4 and 8 is
LoRA of rank 12. Adapters of different structures, or on different weights, are summed weight by weight as thin factors, which
are exact for any network. All else makes dW of each weight and fits a declaration to it, with the error it reports.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from superlora_tn.declare.checks import checked_seed
from superlora_tn.declare.fold import Shape
from superlora_tn.declare.parts import CP, SpecError, check_number, check_rank, reference_rank, shown
from superlora_tn.declare.rows import Span
from superlora_tn.files.foreign import Fitted
from superlora_tn.files.own import CheckpointError, Entry, Saved, marked, tensor_name, write
from superlora_tn.files.read import read
from superlora_tn.files.thin import Filled, filled, thin
from superlora_tn.model.attach import load
from superlora_tn.model.kernels import kernels_in
from superlora_tn.model.saved import read_for
from superlora_tn.model.several import handles
from superlora_tn.model.targets import AttachError, near
from superlora_tn.model.tuned import Tuned
from superlora_tn.network.kernels import Kernels, is_open
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.sums import blocks, summed
from superlora_tn.network.variants import dense, lora
from superlora_tn.tools.convert import Source, kernels_for
from superlora_tn.tools.decompose import deltas, fit_weights
from superlora_tn.tools.fitting import Settings
from superlora_tn.tools.merges import MERGES, Merge, total

How = Literal["cat", "svd", "linear", "ties", "dare", "dare_ties", "magnitude"]
On = Literal["delta", "nodes"]


@dataclass(frozen=True)
class Combined:
    """Several adapters as one; print it.

    Attributes:
        entries: the declarations with their weights.
        tensors: the nodes, float64, by ``group<k>.<node>``.
        errors: of each weight ``||dW - wanted|| / ||wanted||`` in the Frobenius norm; rounding alone where it is exact.
    """

    entries: tuple[Entry, ...]
    tensors: Mapping[str, Tensor]
    errors: Mapping[str, float]

    @property
    def error(self) -> float:
        """The largest."""
        return max(self.errors.values())

    def deltas(self) -> dict[str, Tensor]:
        """dW of each weight, (out, in), scale included."""
        return dict(deltas(self.entries, self.tensors))

    def write(self, folder: str | PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Save as an adapter.

        Args:
            folder: made where it does not exist.
            dtype: of the saved nodes.
        """
        write(folder, self.entries, {name: tensor.to(dtype).contiguous() for name, tensor in self.tensors.items()})

    def attach(self, model: nn.Module, name: str = "combined", dtype: torch.dtype = torch.float32) -> Tuned:
        """Attach to a model, as `load` does; the adapters it was made from stay as they are, so `use` it alone.

        Args:
            model: their base.
            name: of the handle.
            dtype: of the nodes.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.write(folder, dtype)
            return load(model, folder, name=name)

    def __str__(self) -> str:
        kinds = ", ".join(f"{len(e.targets)} x {e.spec.network}" for e in self.entries)
        return f"{len(self.errors)} weights ({kinds}), largest relative error {self.error:.2e}"


def combine(
    weights: Mapping[str, float] | Mapping[str | PathLike[str], float],
    how: How = "cat",
    *,
    model: nn.Module | None = None,
    to: AdapterSpec | None = None,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    on: On = "delta",
) -> Combined:
    """Several adapters as one new adapter; strengths set by `use` do not count, and weights that one lacks get the others'.

    Args:
        weights: of each adapter: by its name on `model`, or by its folder or file, of this library or another (see
            `docs/files.md`).
        how: ``"cat"`` is the weighted sum, exactly. The others make dW of each weight and fit `to`: ``"svd"`` the weighted sum,
            ``"magnitude"`` with the smallest numbers of each adapter's dW dropped, ``"dare"`` with random ones dropped and the
            rest scaled up (Yu et al. 2023, arXiv 2311.03099), ``"ties"`` with the smallest dropped and of the rest the mean of
            those of the winning sign (Yadav et al. 2023, arXiv 2306.01708), ``"dare_ties"`` likewise with random ones dropped.
            These are PEFT's ``svd``, ``magnitude_prune_svd``, ``dare_linear_svd``, ``ties_svd`` and ``dare_ties_svd``.
            ``"linear"`` adds nodes, and is for ``on="nodes"``.
        model: that carries the adapters, or that the files are for. Without it, files are taken by the names in them, and those
            that follow from a base (kohya's names, DoRA, VeRA) are refused.
        to: the new declaration; None takes LoRA of `rank`.
        rank: None takes the largest of the adapters' own.
        density: the part of dW's numbers that is kept, above 0 up to 1; of ``"cat"`` and ``"svd"`` nothing is dropped.
        seed: of what is dropped by chance.
        on: ``"nodes"`` merges each node by itself in place of dW, for adapters of one declaration, as PEFT's ``linear``,
            ``ties``, ``dare_linear`` and others do with B and A. It is cheap, but no approximation of the weighted sum, from
            which the errors are then.

    Returns:
        Something to write, or to attach under a name.

    Raises:
        AttachError: a name that the model does not carry, or weights of one name and different shapes.
        CheckpointError: a file that is no adapter, does not fit, needs the model, or has parameters that train beside.
        SpecError: a setting out of its range, or a declaration that does not fit.
    """
    _check(weights, how, on, to, rank, density)
    seed = checked_seed("combine", seed)
    parts = [_Part(_saved(name, model), float(weight)) for name, weight in weights.items()]
    shapes, rows = _targets(parts)
    if how == "cat":
        entries, tensors = _stacked(parts) or _thin(parts, shapes)
    elif on == "nodes":
        entries, tensors = _merged(parts, MERGES[how], density, torch.Generator().manual_seed(seed))
    else:
        spec = lora(_rank(parts, rank)) if to is None else to
        entries, tensors = (Entry(spec, shapes),), {}
    order = {name: k for k, name in enumerate(shapes)}

    def wanted(name: str) -> Tensor:
        """dW of a weight; it is wanted by the fit and again for its error, so what is drawn for it is its own."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + order[name]) % (1 << 64))
        own = [part for part in parts if name in part.source.shapes]
        given, factors = [part.source.delta(name) for part in own], [part.weight for part in own]
        merge = MERGES.get(how, total) if on == "delta" else total
        return merge(given, factors, density, generator)

    if not tensors:
        spec, settings = entries[0].spec, Settings(200, 1e-5, 3)
        made = fit_weights(shapes, wanted, spec, settings, seed, kernels=_kernels(spec, parts, rows, model))
        entries, tensors = made.entries, dict(made.tensors)
    placed = [Entry(e.spec, e.targets, {n: s for n, s in rows.items() if n in e.targets}) for e in entries]
    errors = {name: _relative(delta, wanted(name)) for name, delta in deltas(placed, tensors)}
    return Combined(marked(placed, {name for part in parts for name in part.saved.tables}), tensors, errors)


def _check(weights: Mapping[Any, float], how: How, on: On, to: AdapterSpec | None, rank: int | None, density: float) -> None:
    """Raise for settings out of their range, or that say nothing beside others."""
    sized = to is not None or rank is not None
    if (how != "cat" and how not in MERGES) or on not in ("delta", "nodes"):
        raise SpecError(
            f"combine was given how={how!r}, on={on!r}; choose of cat, {', '.join(MERGES)}, and of 'delta', 'nodes'."
        )
    if on == "nodes" and (how in ("cat", "svd") or sized):
        raise SpecError(f"combine(how={how!r}, on='nodes') merges nodes as they are, by linear, ties, dare and the like alone.")
    if on == "delta" and how == "linear":
        raise SpecError("combine(how='linear') adds nodes; say on='nodes', or take how='cat' or 'svd' for sums of dW.")
    if not weights or not isinstance(weights, Mapping):
        raise SpecError(f"combine was given {shown(weights)}; give weights by name, such as {{'style': 0.7, 'subject': 0.3}}.")
    for name, weight in weights.items():
        check_number("combine", f"weight of '{name}'", weight)
    check_number("combine", "density", density)
    if not 0 < density <= 1:
        raise SpecError(f"combine was given density={density}; it is above 0 and at most 1.")
    if not isinstance(to, AdapterSpec | None):
        raise SpecError(f"combine was given to={shown(to)}; give a declaration such as superlora_tn.lokr(8), or rank=.")
    if to is not None and rank is not None:
        raise SpecError(f"combine was given to= and rank={rank!r}; a declaration has ranks of its own, so give one of them.")
    if how == "cat" and sized:
        raise SpecError("combine(how='cat') is exact, of the ranks that takes; for other ranks choose how='svd'.")


def _kernels(spec: AdapterSpec, parts: Sequence[_Part], rows: Mapping[str, Span], model: nn.Module | None) -> Kernels | None:
    """The kernels that a declaration takes: what the adapters say of them, and else the model."""
    names = {name for part in parts for name in part.source.shapes}
    layers = None if model is None or not is_open(spec) else kernels_in(model, names, None, rows)
    return kernels_for(spec, [part.source for part in parts], layers)


class _Part:
    """One of the adapters, with its weight."""

    def __init__(self, saved: Saved, weight: float) -> None:
        self.saved, self.weight = saved, weight
        self.source = Source(saved.entries, saved.tensors)

    def thin(self) -> Iterable[Filled]:
        """Each weight's network, its nodes in float64."""
        return filled(self.saved.entries, {name: tensor.double().cpu() for name, tensor in self.saved.tensors.items()})


def _saved(name: str | PathLike[str], model: nn.Module | None) -> Saved:
    known = {} if model is None else handles(model)
    if isinstance(name, str) and name in known:
        saved = known[name]._saved()
    elif model is None:
        found = read(name)
        saved = found if isinstance(found, Saved) else _plain(found.plain())
    elif not Path(name).exists():
        raise AttachError(f"the model carries no adapter named '{name}', and no file is there; {near(str(name), list(known))}.")
    else:
        saved = read_for(model, name, joined=False)
    if saved.buffers:
        raise CheckpointError(
            f"'{name}' has parameters or buffers of the base beside it ({next(iter(saved.buffers))}), whose sum means nothing; "
            "combine adapters that have none."
        )
    return saved


def _plain(fitted: Fitted) -> Saved:
    return Saved(fitted.entries, fitted.tensors, {**fitted.added, **fitted.replaced})


def _targets(parts: Sequence[_Part]) -> tuple[dict[str, Shape], dict[str, Span]]:
    """The shapes of all weights, and the rows of those that are blocks."""
    shapes, rows = dict[str, Shape](), dict[str, Span]()
    for part in parts:
        for name, shape in part.source.shapes.items():
            span = part.saved.rows.get(name)
            if name in shapes and (shapes[name], rows.get(name)) != (shape, span):
                raise AttachError(f"'{name}' is {shapes[name]} in one adapter and {shape} in another; they are of two bases.")
            shapes[name] = shape
            if span is not None:
                rows[name] = span
    return shapes, rows


def _stacked(parts: Sequence[_Part]) -> tuple[tuple[Entry, ...], dict[str, Tensor]] | None:
    """The sum as a network of the adapters' own structure; None where they differ, or it has no such sum."""
    first = parts[0].saved.entries
    alike = all([e.targets for e in part.saved.entries] == [e.targets for e in first] for part in parts)
    if not alike:
        return None
    try:
        specs = [summed([part.saved.entries[k].spec for part in parts]) for k in range(len(first))]
        laid = [_laid(part.saved) for part in parts]
        tensors: dict[str, Tensor] = {}
        k = 0
        for number, spec in enumerate(specs):
            factors = [part.weight * part.saved.entries[number].spec.scale / spec.scale for part in parts]
            for group, graph in spec.lay_out(first[number].targets):
                values = [own[number][tuple(group.members)] for own in laid]
                places = blocks(graph, [[tuple(v.shape) for v in own] for own in values])
                for j, node in enumerate(graph.nodes):
                    whole = torch.zeros(node.shape, dtype=torch.float64)
                    for factor, own, place in zip(factors, values, places, strict=True):
                        whole[place[j]] += own[j] * (factor if j == 0 else 1.0)
                    tensors[tensor_name(k, node)] = whole
                k += 1
    except (SpecError, ZeroDivisionError, KeyError):  # a KeyError: they number their weights in different orders
        return None
    return tuple(Entry(spec, own.targets) for spec, own in zip(specs, first, strict=True)), tensors


def _laid(saved: Saved) -> list[dict[tuple[str, ...], list[Tensor]]]:
    """Of each declaration, the nodes of every group in float64, by its weights: files have them in orders of their own."""
    found, k = [], 0
    for entry in saved.entries:
        own = {}
        for group, graph in entry.spec.lay_out(entry.targets):
            own[tuple(group.members)] = [saved.tensors[tensor_name(k, node)].double().cpu() for node in graph.nodes]
            k += 1
        found.append(own)
    return found


def _merged(
    parts: Sequence[_Part], merge: Merge, density: float, generator: torch.Generator
) -> tuple[tuple[Entry, ...], dict[str, Tensor]]:
    """Each node merged by itself; an adapter's factor is shared by its trained nodes, its sign with the last of them."""
    first = parts[0].saved.entries
    plain = [[(replace(e.spec, alpha=None, rslora=False), e.targets) for e in part.saved.entries] for part in parts]
    if any(own != plain[0] for own in plain):
        raise SpecError("on='nodes' merges adapters of one declaration on the same weights; these differ. Merge on='delta'.")
    laid = [_laid(part.saved) for part in parts]
    if any([set(one) for one in own] != [set(one) for one in laid[0]] for own in laid):
        raise SpecError("on='nodes' merges adapters that number their weights in one order; these differ. Merge on='delta'.")
    tensors: dict[str, Tensor] = {}
    k = 0
    for number, (spec, targets) in enumerate(plain[0]):
        scales = [part.weight * part.saved.entries[number].spec.scale for part in parts]
        for group, graph in spec.lay_out(targets):
            trained = [j for j, node in enumerate(graph.nodes) if node.trainable]
            for j, node in enumerate(graph.nodes):
                name = tensor_name(k, node)
                given = [own[number][tuple(group.members)][j] for own in laid]
                roots = [abs(s) ** (1 / len(trained)) * (math.copysign(1, s) if j == trained[-1] else 1.0) for s in scales]
                if j not in trained and not all(torch.equal(one, given[0]) for one in given):
                    raise SpecError(f"the frozen node '{name}' differs between the adapters; merge on='delta'.")
                tensors[name] = merge(given, roots, density, generator) if j in trained else given[0]
            k += 1
    return tuple(Entry(spec, own.targets) for (spec, _), own in zip(plain[0], first, strict=True)), tensors


def _thin(parts: Sequence[_Part], shapes: Mapping[str, Shape]) -> tuple[tuple[Entry, ...], dict[str, Tensor]]:
    """The sum as LoRA, of each weight's own rank; dense where that is no larger."""
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in shapes}
    for part in parts:
        for own in part.thin():
            up, down = thin(own).exact()
            pairs[own.name].append((part.weight * own.scale * up, down))
    made: dict[AdapterSpec, dict[str, list[Tensor]]] = {}
    for name, own_pairs in pairs.items():
        up, down = torch.cat([u for u, _ in own_pairs], 1), torch.cat([d for _, d in own_pairs], 0)
        d_out, d_in = shapes[name]
        if up.shape[1] * (d_out + d_in) >= d_out * d_in:
            made.setdefault(dense(), {})[name] = [up @ down]
        else:
            made.setdefault(AdapterSpec(CP(up.shape[1], over="keep")), {})[name] = [up, down.T]
    entries = tuple(Entry(spec, {name: shapes[name] for name in own}) for spec, own in made.items())
    tensors: dict[str, Tensor] = {}
    k = 0
    for entry in entries:
        for group, graph in entry.spec.lay_out(entry.targets):
            values = made[entry.spec][next(iter(group.members))]
            tensors |= {tensor_name(k, n): v.reshape(n.shape) for n, v in zip(graph.nodes, values, strict=True)}
            k += 1
    return entries, tensors


def _rank(parts: Sequence[_Part], rank: int | None) -> int:
    """The rank of the new LoRA."""
    if rank is not None:
        check_rank("combine", rank)
        return rank
    found = [reference_rank(entry.spec.network) for part in parts for entry in part.saved.entries]
    known = [r for r in found if r is not None]
    if not known:
        raise SpecError("combine was given adapters without a declared rank; say rank=..., or to=a declaration.")
    return max(known)


def _relative(found: Tensor, wanted: Tensor) -> float:
    missed, norm = float((found - wanted).norm()), float(wanted.norm())
    return missed / norm if norm else 0.0 if not missed else math.inf
