"""One concrete case: a spec on weights of given sizes with seeded values, and the rounding bound of its results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from superlora_tn.contraction.plan import Route
from superlora_tn.declare.fold import FlatGroup, Group, Shape
from superlora_tn.declare.joins import Multiply
from superlora_tn.declare.parts import BASED, Hadamard, Kronecker, Network, Part, Sum, inner_parts
from superlora_tn.declare.source import source
from superlora_tn.network.graph import Graph
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.update.base import Adapter, Settings
from superlora_tn.update.make import make_adapter
from superlora_tn.verification.references import mapped
from superlora_tn.verification.references import textbook as references
from superlora_tn.verification.references.textbook import Array, Values

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24}  # half the distance from 1 to the next number
DTYPES = {"float64": torch.float64, "float32": torch.float32}


class NotApplicable(Exception):
    """The property says nothing about this case; another is drawn."""


def is_linear(spec: AdapterSpec) -> bool:
    """Whether dW is linear in what is stored of each node: all but a map with tanh, rotations and the like, and sums."""
    return is_affine(spec) and not _is_sum(spec.network)


def is_affine(spec: AdapterSpec) -> bool:
    """Whether dW is affine in what is stored of each node, as a sum is whose other terms stay."""
    return has_linear_map(spec) and _has_linear_nodes(spec.network)


def has_linear_map(spec: AdapterSpec) -> bool:
    """Whether the fold's fixed map, where there is one, is linear."""
    return spec.projection is None or spec.projection.linear


def _is_sum(part: Part) -> bool:
    return isinstance(part, Sum) or (isinstance(part, Kronecker | Hadamard) and any(map(_is_sum, inner_parts(part))))


def _has_linear_nodes(part: Part) -> bool:
    if isinstance(part, Kronecker | Hadamard | Sum):
        return all(map(_has_linear_nodes, inner_parts(part)))
    return not isinstance(part, Network) or all(
        node.map is None or (isinstance(node.map, mapped.LINEAR) and node.map.of is None) for _, node in part.nodes
    )


@dataclass(frozen=True)
class Case:
    """A spec on weights, with all that decides its numbers.

    Attributes:
        shapes: (name, (out, in)) of each weight.
        seed: of the nodes' values and of the activations.
        dtype: ``float64`` or ``float32``, of the code under test; references compute in float64.
        batch: shape of the activation before its last axis.
        other: the declaration that this one is compared with, for a reduction.
    """

    spec: AdapterSpec
    shapes: tuple[tuple[str, Shape], ...]
    seed: int = 0
    dtype: str = "float64"
    batch: tuple[int, ...] = (2,)
    other: AdapterSpec | None = None

    def groups(self) -> list[Sized]:
        """The groups of weights that share a network, each with its values."""
        return [Sized(self, group, graph) for group, graph in self.spec.lay_out(dict(self.shapes))]

    def in_float64(self) -> Case:
        """The same case in double precision."""
        return replace(self, dtype="float64")

    def in_order_of(self, model: nn.Module) -> Case:
        """The same case with its weights in a model's order, in which they are numbered where it is adapted."""
        known = dict(self.shapes)
        return replace(self, shapes=tuple((name, known[name]) for name, _ in model.named_modules() if name in known))

    def of_network(self) -> Case:
        """The network alone, over the sides that its join gives it, as an update that is added where it can be one.

        A network that is R itself, and so cannot start at zero, keeps its join.
        """
        join = self.spec.join
        if not isinstance(join, Multiply):
            return replace(self, spec=replace(self.spec, join=None))
        shapes = tuple((name, join.sides(shape)) for name, shape in self.shapes)
        alone = None if join.residual else replace(join, scaled=False)
        return replace(self, spec=replace(self.spec, join=alone), shapes=shapes)

    def activation(self, d_in: int) -> Array:
        """A seeded activation of shape (*batch, in), exact in the case's dtype."""
        drawn = np.random.default_rng(self.seed + 1).standard_normal((*self.batch, d_in))
        return drawn.astype(self.dtype).astype(np.float64)

    def line(self, claim: str, reference: str) -> str:
        """The call of `check` that repeats this case, to paste."""
        words = [source(self.spec, "sl."), repr(dict(self.shapes)), repr(claim), reference, f"seed={self.seed}"]
        words += [f"dtype={self.dtype!r}", f"batch={self.batch!r}"]
        words += [f"other={source(self.other, 'sl.')}"] if self.other else []
        return f"import superlora_tn as sl; from superlora_tn.verification import check; check({', '.join(words)})"


@dataclass(frozen=True)
class Sized:
    """One group of a case."""

    case: Case
    group: Group
    graph: Graph

    @property
    def spec(self) -> AdapterSpec:
        """The declaration."""
        return self.case.spec

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """(out, in) of the group's weights, in order."""
        known = dict(self.case.shapes)
        return {name: known[name] for name in self.group.members}

    @cached_property
    def values(self) -> dict[str, Array]:
        """Seeded normal values of what is stored of every node, zero and frozen ones too, exact in the case's dtype."""
        generator = np.random.default_rng(self.case.seed)
        drawn = {n.name: np.asarray(generator.standard_normal(n.stored)) for n in self.graph.nodes}
        return {name: v.astype(self.case.dtype).astype(np.float64) for name, v in drawn.items()}

    def fresh(self, route: Route | None = None) -> Adapter:
        """An adapter with its own first values, in float64."""
        generator = torch.Generator().manual_seed(self.case.seed)
        made = make_adapter(
            self.spec, self.group, self.graph, torch.float64, generator=generator, settings=Settings(route=route)
        )
        return made.eval()  # dropout is no part of the formula

    def adapter(self, route: Route | None = None, values: Values | None = None) -> Adapter:
        """An adapter that holds the case's values (or others), in the case's dtype."""
        made = self.fresh(route)
        fill(made, self.values if values is None else values)
        return made.to(DTYPES[self.case.dtype])

    def delta(self, values: Values) -> dict[str, Array]:
        """dW of each weight by the code under test, with other values."""
        adapter = self.adapter(values=values)
        return {t: as_array(adapter.delta(t)) for t in self.shapes}

    def nodes(self, values: Values | None = None) -> dict[str, Array]:
        """The nodes from what is stored of them, by the definitions of their maps."""
        given = self.values if values is None else values
        return {
            n.name: given[n.name] if n.map is None else mapped.node(n.map, given[n.map.of or n.name], n.shape)
            for n in self.graph.nodes
        }

    def sizes(self, values: Values | None = None, directions: Values | None = None) -> dict[str, Array]:
        """What the nodes' rounding errors are relative to; of those with a direction, of the derivative along it."""
        given, found = self.values if values is None else values, {}
        for node in self.graph.nodes:
            source = (node.map.of if node.map is not None else None) or node.name
            own, along = given[source], (directions or {}).get(source)
            if node.map is None:
                found[node.name] = np.abs(own if along is None else along)
            elif along is None:
                found[node.name] = mapped.size(node.map, own, node.shape)
            else:
                found[node.name] = mapped.slope(node.map, own, along, node.shape)
            if along is not None and any(n.map is not None and n.map.of == source for n in self.graph.nodes):
                found[node.name] = found[node.name] + self.sizes(given)[node.name]  # of a product that holds it twice
        return found

    def formula(self, values: Values | None = None) -> dict[str, Array]:
        """dW of each weight by the textbook."""
        return references.delta(self.spec, self.shapes, self.nodes(values))

    def magnitude(self, values: Values | None = None, directions: Values | None = None) -> dict[str, Array]:
        """The same sums with each term at its absolute value: what rounding errors are relative to."""
        return references.delta(self.spec, self.shapes, self.sizes(values, directions), absolute=True)

    @cached_property
    def terms(self) -> int:
        """Products that are summed into one element of dW: the sizes of all indices that are summed over, of all terms."""
        found = 0
        for term in self.graph.networks:
            open_ = {i for _, indices in term.graph.modes for i in indices}
            found += math.prod(s for i, s in term.graph.sizes if i not in open_)
        return found

    @cached_property
    def roundings(self) -> int:
        """Roundings on the way to one element of dW, whatever the order of contraction.

        Contracting pair by pair sums at most `terms` numbers in all and multiplies once a node, and once by the weight of each
        term of a sum; the scale and the casts of values are 4 more, and each of two Hadamard transforms of p numbers adds p at
        most; so does a map that makes a matrix of p rows or columns, for its sums, its solver's and those of its derivative.
        Twice, since the other side rounds too.
        """
        transforms = sum(4 * (sum(n.shape[-2:]) + 8) for n in self.graph.nodes if n.map is not None)
        if self.spec.projection is not None and isinstance(self.group, FlatGroup):
            transforms += 4 * (max(self.group.inner, self.group.length) + 8)
        return 2 * (self.terms + len(self.graph.nodes) + len(self.graph.terms) + 4 + transforms)

    @property
    def unit(self) -> float:
        """The unit roundoff of the case's dtype."""
        return UNIT[self.case.dtype]

    def allowed(self, target: str, values: Values | None = None, more: int = 0) -> Array:
        """The bound of each element of dW: roundings x unit roundoff x sum of absolute values."""
        return (self.roundings + more) * self.unit * self.magnitude(values)[target]


def fill(adapter: Adapter, values: Values, based: bool = True) -> None:
    """Write values into what is stored of an adapter's nodes; without `based`, not into those that the base's weights fill."""
    with torch.no_grad():
        for node, tensor in zip(adapter.graph.nodes, adapter.stored(), strict=True):
            if node.init in BASED and not based:
                continue
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(values[node.name])).reshape(tensor.shape))


def as_array(value: Tensor | Array) -> Array:
    """A tensor as a float64 array of its own: a merge writes into what it came from."""
    return value.detach().cpu().double().numpy().copy() if isinstance(value, Tensor) else np.asarray(value, dtype=np.float64)


def ratio(got: Array, expected: Array, allowed: Array | float) -> float:
    """The largest error in units of what is allowed; infinite for a NaN, a wrong shape, or any error where none is."""
    if got.shape != expected.shape:
        return math.inf
    error = np.abs(got - expected)
    if not error.size or not error.any():
        return 0.0
    if not np.isfinite(error).all():
        return math.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.where(error > 0, error / allowed, 0.0)
    return float(parts.max())


def linear_model(shapes: Mapping[str, Shape], dtype: torch.dtype, seed: int) -> nn.Module:
    """A model with one seeded `nn.Linear` a name."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Module()
    for name, shape in shapes.items():
        parent, words = model, name.split(".")
        for word in words[:-1]:
            if word not in dict(parent.named_children()):
                parent.add_module(word, nn.Module())
            parent = parent.get_submodule(word)
        parent.add_module(words[-1], linear(torch.randn(shape, generator=generator, dtype=torch.float64), dtype))
    return model


def linear(weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    """A bias-free layer with a given (out, in) weight; torch's global random state is left alone."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=dtype)
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return layer
