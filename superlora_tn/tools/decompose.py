"""Networks from weights: the adapter of any declaration that is nearest to given weight updates, in the Frobenius norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

from superlora_tn.contraction.plan import table
from superlora_tn.declare.checks import checked_seed
from superlora_tn.declare.fold import Shape, split_name
from superlora_tn.declare.parts import BASED, SpecError, check_count, shown
from superlora_tn.files.own import Entry, marked, tensor_name, write
from superlora_tn.network.budget import Budget, words
from superlora_tn.network.graph import Graph
from superlora_tn.network.kernels import Kernels, apart, count, lay_out
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.tools.fitting import FOUND, Fit, Settings, fit
from superlora_tn.tools.frames import Frame, Load, frame
from superlora_tn.update.initialise import first_values

# Starts in words: where a fit began, and what a network is that needed none.
FROM = {"chance": "a random start", "one factor, the others at one": "one factor of the product"}
SOLVED = {"singular values": "solved by SVD", "singular values of the slices": "solved by SVD of the slices"} | {
    "the same network": "the same network, with its values",
    "nothing wanted": "with nothing to fit",
    "nothing better than zero": "left at zero, as no fit was better",
    "chance": "solved by a random start",
}
Ready = Callable[[Frame, list[Tensor]], str | None]


class FitError(ValueError):
    """Weights that no network can be fitted to."""


@dataclass(frozen=True)
class Progress:
    """How far a decomposition is.

    Attributes:
        group, groups: which network of how many is being fitted, from 1.
        steps: done on it since its last start.
        error: its relative error now.
    """

    group: int
    groups: int
    steps: int
    error: float


@dataclass(frozen=True)
class Decomposition:
    """An adapter made from weights.

    Attributes:
        spec: the declaration.
        shapes: the weights, name -> (out, in).
        tensors: the nodes in graph order, by ``group<k>.<node>`` as files name them, float64.
        errors: of each weight ``||dW - fit|| / ||dW||``, in the Frobenius norm; a weight of zeros has 0, or infinity where
            the fit is not zero.
        error: of all weights together.
        fits: how each network was found; a flat fold has one for each of its groups.
        kernels: the sizes of the kernels of those that are convolutions, where they were known.
        tables: those that are known to be embeddings' tables, (dim, num).
    """

    spec: AdapterSpec
    shapes: Mapping[str, Shape]
    tensors: Mapping[str, Tensor]
    errors: Mapping[str, float]
    error: float
    fits: tuple[Fit, ...]
    kernels: Kernels | None = None
    tables: Collection[str] = ()

    @property
    def is_exact(self) -> bool:
        """Whether nothing is lost but rounding."""
        return self.error < FOUND

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The declaration with its weights, as files have it: once for each kernel, where it leaves that open."""
        parts = apart(self.spec, tuple(self.shapes), self.kernels)
        return marked([Entry(own, {name: self.shapes[name] for name in names}) for own, names in parts], self.tables)

    @property
    def num_parameters(self) -> int:
        """How many numbers train."""
        return count(self.spec, self.shapes, self.kernels)

    def as_type(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The nodes in another dtype; rounding to float32 adds about 1e-7 to the relative error."""
        return {name: tensor.to(dtype) for name, tensor in self.tensors.items()}

    def write(self, folder: str | PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Save as an adapter, which `load` attaches to a model.

        Args:
            folder: made where it does not exist.
            dtype: of the saved nodes.
        """
        write(folder, self.entries, self.as_type(dtype))

    def deltas(self) -> dict[str, Tensor]:
        """dW of each weight from the nodes, (out, in), scale included."""
        return dict(deltas(self.entries, self.tensors))

    def __str__(self) -> str:
        kinds: dict[str, list[float]] = {}
        for name, error in self.errors.items():
            kinds.setdefault(split_name(name)[1], []).append(error)
        rows: list[tuple[str, ...]] = [("weights", "", "least error", "mean", "largest")]
        for kind, errors in kinds.items():
            mean = sum(errors) / len(errors)
            rows.append((f"{len(errors)}", kind, *(f"{value:.3g}" for value in (min(errors), mean, max(errors)))))
        return "\n".join(
            [
                f"{self.num_parameters:,} parameters: {words(self.spec)}",
                *table(rows, "weights error mean largest"),
                f"in all the relative error is {self.error:.3g}; {_how(self.fits)}",
            ]
        )


def _how(fits: Sequence[Fit]) -> str:
    """How networks were found, alike ones together."""
    found: dict[tuple[str, bool], list[int]] = {}
    for one in fits:
        found.setdefault((one.start, one.steps > 0), []).append(one.steps)
    words = []
    for (start, fitted), steps in found.items():
        most = f" (the longest {max(steps)})" if len(steps) > 1 else ""
        behind = f"fitted from {FROM.get(start, start)}, {sum(steps)} steps{most}"
        words.append(f"{len(steps)} {behind if fitted else SOLVED.get(start, f'solved by {start}')}")
    return ", ".join(words)


def decompose(
    weights: Mapping[str, Tensor],
    spec: AdapterSpec | Budget,
    *,
    steps: int = 200,
    tolerance: float = 1e-5,
    restarts: int = 3,
    seed: int = 0,
    start: Mapping[str, Tensor] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Decomposition:
    """The nodes for which a declaration's dW is nearest to given ones: ``min ||dW - scale F(network)||``.

    Networks without loops come from singular value decompositions and are recovered to rounding where the ranks suffice; all
    others, and those with a surplus or a map, from alternating least squares and Gauss-Newton steps, the best of several
    starts; a sum starts from its terms, each fitted to what the others leave, and what is cropped off is not seen. These find a
    nearest network near a start, which need not be the nearest of all. A weight's frozen nodes stay as `seed` draws them, or as
    `start` gives them.

    Args:
        weights: dW by module name, (out, in), any floating dtype; computed with in float64.
        spec: what to fit, or a budget that buys one.
        steps: at most so many from one start.
        tolerance: a fit ends where a step lowers the error by less of itself.
        restarts: starts by chance, for networks without a closed form.
        seed: of these, and of frozen nodes: those of ``attach(model, spec, seed=seed)``.
        start: frozen nodes by ``group<k>.<node>``, of the shape that the declaration gives them.
        progress: is told how far it is.

    Returns:
        Nodes and errors.

    Raises:
        FitError: weights that are no real matrices of finite numbers, or a declaration whose scale is zero.
        SpecError: the declaration does not fit the weights' shapes.
    """
    if not isinstance(spec, AdapterSpec | Budget):
        raise SpecError(
            f"decompose was given spec={shown(spec)}; give an AdapterSpec such as superlora_tn.lora(8), or a budget."
        )
    check_matrices("decompose", weights)
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    settings = Settings(steps, tolerance, restarts)
    return fit_weights(shapes, weights.__getitem__, spec, settings, seed, start, progress)


def check_matrices(owner: str, weights: object) -> None:
    """Raise unless they are matrices by name, with values."""
    if not isinstance(weights, Mapping):
        raise FitError(f"{owner} was given a {type(weights).__name__}; give dW by module name, such as {{'layer': delta}}.")
    for name, weight in weights.items():
        if not isinstance(weight, Tensor) or weight.is_meta:
            what = "without memory, on the meta device" if isinstance(weight, Tensor) else f"as a {type(weight).__name__}"
            raise FitError(f"'{name}' was given {what}; give a tensor with values.")
        if weight.dim() != 2 or not weight.is_floating_point():
            raise FitError(
                f"'{name}' was given as {tuple(weight.shape)} of {weight.dtype}; give a matrix (out, in) of real numbers. "
                "Reshape a convolution's weight to (out, in * kernel)."
            )


@torch.no_grad()
def fit_weights(
    shapes: Mapping[str, Shape],
    load: Load,
    spec: AdapterSpec | Budget,
    settings: Settings,
    seed: int = 0,
    start: Mapping[str, Tensor] | None = None,
    progress: Callable[[Progress], None] | None = None,
    ready: Ready | None = None,
    kernels: Kernels | None = None,
) -> Decomposition:
    """`decompose` for weights that are loaded when their group's turn comes, and again for its error.

    Args:
        shapes: the weights, name -> (out, in).
        load: dW of a weight by name.
        ready: writes a group's nodes where they need no fit, and says how; None where they do. It is given the group's frame
            and its nodes with their first values.
        kernels: of the weights, where they are known; a declaration that leaves its kernel open takes them.
    """
    _check(settings)
    seed = checked_seed("decompose", seed)
    if isinstance(spec, Budget):
        spec = spec.choose(shapes, kernels).spec
    if spec.scale == 0:
        raise FitError(f"the declaration has alpha={spec.alpha}, so its dW is zero whatever its nodes; choose another alpha.")
    frames = [frame(group, own, graph) for own, group, graph in lay_out(spec, shapes, kernels)]
    given = _given(frames, seed, start or {})
    generator = torch.Generator().manual_seed(seed)
    tensors, fits = dict[str, Tensor](), list[Fit]()
    missed, wanted = dict[str, float](), dict[str, float]()
    total, done = sum(len(f.places) for f in frames), 0
    read = _reader(load)
    for k, (own, nodes) in enumerate(zip(frames, given, strict=True)):
        made = None if ready is None else ready(own, nodes)
        fits += [] if made is None else [Fit(made, (), 0)] * len(own.places)
        for number, place in enumerate(own.places if made is None else ()):
            problem = own.problem(number, read)
            tell = None if progress is None else _teller(progress, done + number + 1, total)
            values, how = fit(problem, place.take(nodes, problem.shapes), settings, generator, tell)
            place.put(nodes, values)
            fits.append(how)
        done += len(own.places)
        tensors |= {tensor_name(k, node): tensor for node, tensor in zip(own.graph.nodes, nodes, strict=True)}
        for name, delta in own.deltas(nodes).items():
            weight = read(name)
            missed[name], wanted[name] = float((weight - delta).norm()), float(weight.norm())
    errors = {name: _relative(missed[name], wanted[name]) for name in shapes}
    error = _relative(math.hypot(*missed.values()), math.hypot(*wanted.values()))
    return Decomposition(spec, dict(shapes), tensors, errors, error, tuple(fits), kernels)


def deltas(entries: Sequence[Entry], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """dW of each weight, group by group, from nodes by ``group<k>.<node>``; float64, scale included."""
    laid = [(entry.spec, *own) for entry in entries for own in entry.spec.lay_out(entry.targets)]
    for k, (own, group, graph) in enumerate(laid):
        nodes = [tensors[tensor_name(k, node)].double() for node in graph.nodes]
        with torch.no_grad():
            found = frame(group, own, graph).deltas(nodes)
        yield from found.items()


def _check(settings: Settings) -> None:
    check_count("decompose", "steps", settings.steps, 1 << 20)
    if isinstance(settings.restarts, bool) or not isinstance(settings.restarts, int) or settings.restarts < 0:
        raise SpecError(f"decompose was given restarts={settings.restarts!r}; give a whole number of at least 0.")
    if not isinstance(settings.tolerance, int | float) or not 0 <= settings.tolerance < 1:
        raise SpecError(f"decompose was given tolerance={settings.tolerance!r}; it is a part of the error, from 0 to below 1.")


def _reader(load: Load) -> Load:
    """Weights in float64 on the CPU, checked."""

    def read(name: str) -> Tensor:
        weight = load(name).detach().to(device="cpu", dtype=torch.float64)
        if not bool(torch.isfinite(weight).all()):
            raise FitError(f"'{name}' has numbers that are not finite; no network is nearest to it.")
        return weight

    return read


def _given(frames: list[Frame], seed: int, start: Mapping[str, Tensor]) -> list[list[Tensor]]:
    """The first values of all groups' nodes, with frozen ones from `start`."""
    generator, left, found = torch.Generator().manual_seed(seed), dict(start), []
    for k, own in enumerate(frames):
        nodes = [n.double() for n in first_values(own.graph, own.fan_in, generator)]
        for j, node in enumerate(own.graph.nodes):
            name = tensor_name(k, node)
            if name in left:
                nodes[j] = _started(name, left.pop(name), own.graph, j)
            elif node.init in BASED:
                raise FitError(f"'{name}' holds the base's '{node.init}', which dW does not tell; give it by start=.")
        found.append(nodes)
    if left:
        names = ", ".join(tensor_name(k, n) for k, f in enumerate(frames) for n in f.graph.nodes if not n.trainable)
        raise FitError(f"start names '{next(iter(left))}', which is no node here; frozen ones are {names or 'none'}.")
    return found


def _started(name: str, value: Tensor, graph: Graph, number: int) -> Tensor:
    node = graph.nodes[number]
    if node.trainable:
        raise FitError(f"start gives '{name}', which is trained; only frozen nodes can be given, as the others are fitted.")
    if tuple(value.shape) != node.shape:
        raise FitError(f"start gives '{name}' as {tuple(value.shape)}; the declaration has {node.shape}.")
    return value.detach().to(device="cpu", dtype=torch.float64).clone()


def _teller(progress: Callable[[Progress], None], group: int, groups: int) -> Callable[[int, float], None]:
    return lambda steps, error: progress(Progress(group, groups, steps, error))


def _relative(missed: float, wanted: float) -> float:
    """A relative error; that of nothing is 0 where nothing was made of it."""
    return missed / wanted if wanted > 0 else 0.0 if missed == 0 else math.inf
