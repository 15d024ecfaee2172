"""Hypothesis strategies for parts, folds and specs, and the way from the library's node names to the oracle's arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import oracle
import torch
from hypothesis import reject
from hypothesis import strategies as st

from superlora_tn.declare.fold import FlatFold, FlatGroup, Group, PhysicalFold
from superlora_tn.declare.maps import Fastfood, Shuffle
from superlora_tn.declare.parts import (
    CP,
    Dense,
    Frozen,
    Hadamard,
    Kronecker,
    Network,
    Node,
    Part,
    SpecError,
    Sum,
    TensorTrain,
    Tucker,
    inner_parts,
)
from superlora_tn.network.expand import lower_group
from superlora_tn.network.graph import Graph
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.update.base import Adapter, Settings
from superlora_tn.update.make import make_adapter
from superlora_tn.verification.draws import rooted

Array = np.ndarray
Shapes = dict[str, tuple[int, int]]
EPS = 2.0**-53  # float64's unit roundoff

# --- from a part's node names to the dense tensor -------------------------------------------------------------------


def dense_tensor(
    part: Part, modes: Sequence[str], values: Mapping[str, Array], prefix: str = "", absolute: bool = False
) -> Array:
    """The tensor of a part over `modes`, by the oracle, from the node values under their documented names.

    What is cropped is as large as it was before, but where it is added to what is not; absolute: weights without their signs.
    """
    if isinstance(part, Dense) or (isinstance(part, CP) and f"{prefix}weight" in values):
        return values[f"{prefix}weight"]
    if isinstance(part, CP):
        factors = [values[f"{prefix}factor_{m}"] for m in modes]
        return factors[0] if len(modes) == 1 else oracle.cp(factors)
    if isinstance(part, Tucker):
        factored = modes if part.factors is None else part.factors.split()
        factors = {modes.index(m): values[f"{prefix}factor_{m}"] for m in factored}
        return oracle.tucker(values[f"{prefix}core"], factors)
    if isinstance(part, TensorTrain):
        return oracle.tensor_train([values[f"{prefix}core_{m}"] for m in modes])
    if isinstance(part, Kronecker):
        return oracle.kronecker(
            [dense_tensor(p, modes, values, f"{prefix}k{k + 1}_", absolute) for k, p in enumerate(part.parts)]
        )
    if isinstance(part, Hadamard):
        return oracle.hadamard_product(
            [dense_tensor(p, modes, values, f"{prefix}h{k + 1}_", absolute) for k, p in enumerate(part.parts)]
        )
    if isinstance(part, Sum):
        terms = [dense_tensor(p, modes, values, f"{prefix}t{k + 1}_", absolute) for k, p in enumerate(inner_parts(part))]
        place = tuple(slice(min(sizes)) for sizes in zip(*(t.shape for t in terms), strict=True))
        weights = part.weights or (1.0,) * len(terms)
        return sum((abs(w) if absolute else w) * t[place] for w, t in zip(weights, terms, strict=True))
    return oracle.network(part.modes, {n: (node.indices, values[f"{prefix}{n}"]) for n, node in part.nodes})


# --- a sized adapter with random values, and its oracle -------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A spec on weights of given shapes."""

    spec: AdapterSpec
    shapes: Shapes

    def bound(self, **options: object) -> Iterator[Bound]:
        """One adapter a group, float64, filled with random values."""
        for group, graph in self.spec.lay_out(self.shapes):
            yield Bound(self.spec, group, graph, self.shapes, randomised(self.spec, group, graph, **options))


def randomised(spec: AdapterSpec, group: Group, graph: Graph, seed: int = 0, **options: object) -> Adapter:
    """A float64 adapter with every node (the zero one and the frozen ones too) drawn anew."""
    adapter = make_adapter(spec, group, graph, dtype=torch.float64, settings=Settings(**options))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in node_tensors(adapter).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return adapter


def node_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Node name -> tensor, parameters and frozen buffers, in graph order."""
    state = adapter.state_dict(keep_vars=True)
    return {n.name: state[f"node_{n.name}"] for n in adapter.graph.nodes}


@dataclass(frozen=True)
class Bound:
    """One group's adapter beside its oracle."""

    spec: AdapterSpec
    group: Group
    graph: Graph
    shapes: Shapes
    adapter: Adapter

    @property
    def targets(self) -> list[str]:
        return list(self.group.members)

    @cached_property
    def values(self) -> dict[str, Array]:
        return {name: t.detach().numpy().copy() for name, t in node_tensors(self.adapter).items()}

    @cached_property
    def reference(self) -> dict[str, Array]:
        """dW of each target by the oracle."""
        return self.weights(self.values)

    @cached_property
    def magnitude(self) -> dict[str, Array]:
        """The same sums with every term at its absolute value: what rounding errors are relative to."""
        return self.weights({n: np.abs(v) for n, v in self.values.items()}, absolute=True)

    @cached_property
    def roundings(self) -> int:
        """Roundings on the way to one element of dW, in any order of contraction, the oracle's included.

        One element sums `terms` products of all nodes. Contracting pair by pair never rounds more often than
        `terms + nodes` times, since a sum over two indices costs at most the product of their sizes. The scale and
        the map's own factors add a few; Hadamard transforms of p numbers add p at most, each way. Twice, since the
        oracle rounds too.
        """
        terms = 0
        for graph in (term.graph for term in self.graph.networks):
            open_ = {i for _, indices in graph.modes for i in indices}
            terms += math.prod(s for i, s in graph.sizes if i not in open_)
        padded = 2 * (max(self.group.inner, self.group.length) + 8) if isinstance(self.group, FlatGroup) else 0
        return 2 * (terms + len(self.graph.nodes) + 4 + 2 * padded * (self.spec.projection is not None))

    def error(self, target: str) -> Array:
        """The allowed absolute error of each element of dW."""
        return self.roundings * EPS * self.magnitude[target] + np.finfo(np.float64).tiny

    def at(self, values: Mapping[str, Array]) -> Bound:
        """The same oracle with other node values."""
        other = replace(self)
        other.__dict__.update({**self.__dict__, "values": dict(values)})
        return other

    def weights(self, values: Mapping[str, Array], absolute: bool = False) -> dict[str, Array]:
        """dW of each target by the oracle, from node values."""
        scale = abs(self.spec.scale) if absolute else self.spec.scale
        part, fold = self.spec.network, self.spec.fold
        if isinstance(fold, PhysicalFold):
            modes = fold.modes.split()
            tensor = scale * dense_tensor(part, modes, values, absolute=absolute)
            sides = {m.name: m.size for m in self.group.modes}
            tensor = tensor[tuple(slice(sides[mode]) for mode in modes)]
            places = {t: oracle.member_place(modes, t, self.targets) for t in self.targets}
            return {t: oracle.physical_weight(tensor, modes, place) for t, place in places.items()}
        assert isinstance(self.group, FlatGroup)
        sizes = {t: self.shapes[t] for t in self.targets}
        return oracle.flat_weights(self._vectors(values, scale, absolute), sizes)

    def _vectors(self, values: Mapping[str, Array], scale: float, absolute: bool) -> list[Array]:
        """Each group's vector: the tensor flattened, cut, and through F."""
        assert isinstance(self.group, FlatGroup)
        assert isinstance(self.spec.fold, FlatFold)
        count, total = self.group.groups, sum(math.prod(self.shapes[t]) for t in self.targets)
        ratio = self.spec.projection.ratio if self.spec.projection else 1.0
        modes = [f"m{k + 1}" for k in range(self.spec.fold.order)]
        vectors = []
        for g in range(count):
            own = {n: v[g] for n, v in values.items()} if count > 1 else values
            tensor = dense_tensor(self.spec.network, modes, own, absolute=absolute)
            flat = tensor.reshape(-1)[: math.ceil(ratio * total / count - 1e-9)]
            vectors.append(scale * self._mapped(flat, math.ceil(total / count), absolute))
        return vectors

    @cached_property
    def _tables(self) -> dict[str, Array]:
        return {name: t.double().numpy() for name, t in self.adapter.map.named_buffers()}  # type: ignore[union-attr]

    @cached_property
    def _fastfood(self) -> Array:
        total = sum(math.prod(self.shapes[t]) for t in self.targets)
        signs, order, weights = (self._tables[n] for n in ("flips", "order", "weights"))
        return oracle.fastfood_matrix(signs, order.astype(int), weights, math.ceil(total / self.group.groups))  # type: ignore[union-attr]

    def _mapped(self, flat: Array, length: int, absolute: bool) -> Array:
        projection = self.spec.projection
        if projection is None:
            return flat
        tables = self._tables
        if isinstance(projection, Shuffle):
            return flat[tables["order"].astype(int)]
        if absolute:  # every partial sum of H G P H B x is at most this, whatever the order of the transforms
            p = len(tables["order"])
            return np.full(length, np.abs(tables["weights"]).sum() * flat.sum() / math.sqrt(p * len(flat)) + projection.tanh)
        mapped = self._fastfood @ flat
        return np.tanh(mapped) if projection.tanh else mapped


# --- parts ----------------------------------------------------------------------------------------------------------


def ranks(limit: int) -> st.SearchStrategy[int]:
    """Small ranks up to a bound."""
    return st.integers(1, max(1, min(3, limit)))


@st.composite
def cps(draw: st.DrawFn, sizes: Mapping[str, int]) -> CP:
    limit = math.prod(sizes.values()) // max(sizes.values())
    return CP(draw(ranks(limit)), dense_if_large=draw(st.booleans()))


@st.composite
def tuckers(draw: st.DrawFn, sizes: Mapping[str, int]) -> Tucker:
    picked = draw(st.none() | st.sets(st.sampled_from(sorted(sizes)), min_size=1))
    chosen = None if picked is None else [m for m in sizes if m in picked]
    limits = [sizes[m] for m in (sizes if chosen is None else chosen)]
    one = draw(st.booleans())
    rank = draw(ranks(max(limits))) if one else tuple(draw(ranks(limit)) for limit in limits)
    return Tucker(rank, None if chosen is None else " ".join(chosen))


@st.composite
def tensor_trains(draw: st.DrawFn, sizes: Mapping[str, int]) -> TensorTrain:
    each = list(sizes.values())
    limits = [min(math.prod(each[:k]), math.prod(each[k:])) for k in range(1, len(each))]
    if not limits or draw(st.booleans()):
        return TensorTrain(draw(ranks(max(limits, default=1))))
    return TensorTrain(tuple(draw(ranks(limit)) for limit in limits))


@st.composite
def networks(draw: st.DrawFn, sizes: Mapping[str, int]) -> Network:
    """Any network: modes split or not, bonds and hyperindices, open indices on several nodes, frozen and scalar nodes."""
    modes, known, open_ = [], {}, []
    for k, size in enumerate(sizes.values()):
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        first = draw(st.none() | st.sampled_from(divisors))
        names = [f"a{k}"] if first is None else [f"a{k}", f"b{k}"]
        known |= {} if first is None else {f"a{k}": first}
        modes.append(names[0] if first is None else f"({' '.join(names)})")
        open_ += names
    count = draw(st.integers(1, 4))
    places: list[list[str]] = [[] for _ in range(count)]
    node = st.integers(0, count - 1)
    bonds = [f"r{k}" for k in range(draw(st.integers(0, 2)))] if count > 1 else []
    for index, least in [(i, 1) for i in open_] + [(b, 2) for b in bonds]:
        for k in draw(
            st.lists(node, min_size=least, max_size=least + 1, unique=True) if count > least else st.just(range(least))
        ):
            places[k].append(index)
    known |= {b: draw(st.integers(1, 3)) for b in bonds}
    trained = draw(node)
    nodes = {
        f"n{k}": Node(" ".join(draw(st.permutations(indices))), trainable=k == trained or draw(st.booleans()))
        for k, indices in enumerate(places)
    }
    return Network(" ".join(modes), known, **nodes)


@st.composite
def kroneckers(draw: st.DrawFn, sizes: Mapping[str, int], depth: int, summed: bool = False) -> Kronecker:
    """Two parts, evenly or at a factor; each part is drawn for the sizes that it gets."""
    factor = draw(st.sampled_from([-1, 2, 3]))
    pairs = {m: oracle.even_pair(s, factor) for m, s in sizes.items()}
    halves = [{m: pair[k] for m, pair in pairs.items()} for k in (0, 1)]
    return Kronecker(*[draw(parts(half, depth - 1, summed)) for half in halves], factor=factor)


@st.composite
def cropped(draw: st.DrawFn, sizes: Mapping[str, int], depth: int) -> Kronecker:
    """Two parts of sides that need not divide: the first is the root's whole part."""
    pairs = {m: (math.isqrt(s), -(-s // math.isqrt(s))) for m, s in sizes.items()}
    halves = [{m: pair[k] for m, pair in pairs.items()} for k in (0, 1)]
    return Kronecker(*[draw(parts(half, depth - 1, True)) for half in halves], crop=True)


def parts(sizes: Mapping[str, int], depth: int = 2, summed: bool = False) -> st.SearchStrategy[Part]:
    """Any part over modes of the given sizes, nested up to `depth`; with sums in it where `summed`."""
    leaves = [st.just(Dense()), cps(sizes), tuckers(sizes), tensor_trains(sizes), networks(sizes)]
    if depth == 0:
        return st.one_of(*leaves)
    inner = st.deferred(lambda: parts(sizes, depth - 1, summed))
    hadamards = st.lists(inner, min_size=1, max_size=2).map(lambda two: Hadamard(*two))
    products = kroneckers(sizes, depth, summed) | hadamards
    return st.one_of(products, sums(inner)) if summed else st.one_of(*leaves, products)


@st.composite
def sums(draw: st.DrawFn, inner: st.SearchStrategy[Part]) -> Sum:
    """One or two parts, weighted or not, or a part and its frozen copy."""
    two = draw(st.lists(inner, min_size=1, max_size=2))
    if draw(st.booleans()):
        return Sum(two[0], Frozen(two[0]), weights=(1.5, -1.5))
    return Sum(
        *two, weights=draw(st.none() | st.lists(st.sampled_from([1.0, -2.0, 0.5]), min_size=len(two), max_size=len(two)))
    )


# --- folds and specs ------------------------------------------------------------------------------------------------

# Powers of one prime nest in one another, so any two splits of such a mode fit together.
EXTENTS = st.sampled_from([1, 2, 4, 8, 3, 9, 5])
PHYSICAL = ("out in", "in out", "member out in", "layer out in", "out layer in", "layer type out in", "type in layer out")
HEADED = ("head out in", "layer type head out in", "head layer in out type")


def targets(layers: int, types: int, shape: tuple[int, int]) -> Shapes:
    """`layers` x `types` weights of one shape, named as in a model."""
    return {f"model.layer.{k}.attention.{'qkv'[t]}_proj": shape for k in range(layers) for t in range(types)}


@st.composite
def physical_cases(draw: st.DrawFn, depth: int = 2, summed: bool = False) -> Case:
    """A random part on a physical fold; with sums and crops in it where `summed`."""
    heads = draw(st.sampled_from([None, None, 1, 2, 3]))
    fold = PhysicalFold(draw(st.sampled_from(PHYSICAL if heads is None else HEADED)), heads)
    shape = (draw(EXTENTS) * (heads or 1), draw(EXTENTS))
    shapes = targets(draw(st.integers(1, 3)), draw(st.integers(1, 2)), shape)
    return draw(_specs(fold, shapes, None, depth, summed))


@st.composite
def flat_cases(draw: st.DrawFn, depth: int = 1, summed: bool = False) -> Case:
    """A random part on a flat fold of several weights of different shapes, with or without a map."""
    pairs = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=4))
    shapes = {f"layer.{k}.q_proj": pair for k, pair in enumerate(pairs)}
    total = sum(o * i for o, i in pairs)
    order, splits = draw(st.integers(1, 5)), draw(st.integers(1, 2))
    stacked = order == 2 and splits == 1 and draw(st.booleans())
    groups = draw(st.just("weight") | st.integers(1, min(total, 5)))
    multiple = 1 if stacked or splits not in (None, 1) else draw(st.sampled_from([1, 1, 3]))
    fold = FlatFold(order, groups, splits, stacked, multiple)
    maps = st.builds(Fastfood, st.sampled_from([1.0, 0.5, 0.3, 0.07]), st.integers(0, 99), st.booleans())
    projection = draw(st.none() | st.builds(Shuffle, st.integers(0, 99)) | maps)
    return draw(_specs(fold, shapes, projection, depth, summed))


@st.composite
def _specs(draw: st.DrawFn, fold: object, shapes: Shapes, projection: object, depth: int, summed: bool) -> Case:
    """A spec whose part fits the smallest group of the fold."""
    dense = AdapterSpec(Dense(), fold, projection)  # type: ignore[arg-type]
    groups = [group for group, _ in dense.lay_out(shapes)]
    smallest = min(groups, key=lambda g: [m.size for m in g.modes])
    sizes = {m.name: m.size for m in smallest.modes}
    equal = all({m.name: m.size for m in g.modes} == sizes for g in groups)
    # A split or a rank that fits one group's sides need not fit another's, so uneven groups get rank 1 throughout.
    drawn = parts(sizes, depth, summed) if equal else st.sampled_from([Dense(), CP(1), Tucker(1), TensorTrain(1)])
    if summed and isinstance(fold, PhysicalFold):
        drawn = drawn | sums(drawn | cropped(sizes, depth)) | cropped(sizes, depth)
    elif summed and not equal:
        drawn = sums(drawn)
    part = draw(drawn)
    spec = replace(dense, network=part, alpha=draw(st.sampled_from([None, 1.0, 3.0])))
    spec = rooted(spec, draw(st.booleans()))
    for group in groups:
        try:
            lower_group(part, group)
        except SpecError as error:
            # Of a product of sums two may start at zero, or none can.
            assert summed, error
            assert "start at zero" in str(error)
            reject()
    return Case(spec, shapes)


def cases() -> st.SearchStrategy[Case]:
    """Any spec on any weights."""
    return physical_cases() | flat_cases()


# A fixed list beside the random one: each preset and form by name, on weights whose sizes split unevenly.
SHAPES: Shapes = targets(2, 2, (12, 18))
