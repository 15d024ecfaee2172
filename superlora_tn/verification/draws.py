"""Hypothesis strategies: sizes that a declaration fits, scales, dtypes, batches, and the settings of presets and relatives.

Imported only where Hypothesis is there (`engine`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from inspect import signature
from itertools import product
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from superlora_tn.declare.fold import FlatFold, Fold, PhysicalFold, Shape
from superlora_tn.declare.joins import Join, Multiply
from superlora_tn.declare.maps import Fastfood, Projection, Shuffle
from superlora_tn.declare.node_maps import Same
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
    reference_rank,
)
from superlora_tn.network import variants
from superlora_tn.network.catalogue import VARIANTS
from superlora_tn.network.joined import dora
from superlora_tn.network.relatives import kradapter, miss
from superlora_tn.network.spec import AdapterSpec, named_shapes
from superlora_tn.verification.cases import Case
from superlora_tn.verification.references import papers

Shapes = tuple[tuple[str, Shape], ...]
SIZES = (1, 2, 3, 4, 6, 8, 9, 12, 18)
PRIMES = (5, 7, 11, 13)  # beside these, where a split may be cropped
GRIDS = ((1, 1), (2, 1), (2, 2), (3, 1))  # layers x types
ALPHAS = (None, 1.0, 0.5, 3.0, 16.0)
BATCHES = ((2,), (1,), (), (3, 2), (0,))
ENOUGH = 8
KERNELS: tuple[tuple[int, ...], ...] = ((), (3,), (2, 3), (2, 1, 2))  # of a matrix, and by their number of axes


def grid(layers: int, types: int, shape: Shape, experts: bool = False) -> Shapes:
    """`layers` x `types` weights of one shape, named as in a model; or as many experts' of each layer."""
    if experts:
        return tuple((f"model.layer.{k}.mlp.experts.{t}.w1", shape) for k in range(layers) for t in range(types))
    return tuple((f"model.layer.{k}.attention.{'qkv'[t]}_proj", shape) for k in range(layers) for t in range(types))


def mixed(first: Shape, second: Shape) -> Shapes:
    """Weights of two shapes, as a model with grouped queries has them."""
    names = ("model.layer.0.q_proj", "model.layer.0.v_proj", "model.layer.1.q_proj", "model.layer.1.v_proj")
    return tuple(zip(names, (first, second, first, second), strict=True))


def candidates(
    d_out: int, d_in: int, grids: Sequence[tuple[int, int]] = GRIDS, sizes: Sequence[int] = SIZES, experts: bool = False
) -> list[Shapes]:
    """Sets of weights to try, small ones first; sizes are multiples of `d_out` and `d_in`."""
    pairs = [(o * d_out, i * d_in) for o in sizes for i in sizes]
    found = [grid(*g, pair, experts) for pair in pairs for g in grids]
    found += [] if experts else [mixed(a, b) for a, b in zip(pairs[1::5], pairs[3::5], strict=False)]
    return sorted(found, key=lambda shapes: (sum(o * i for _, (o, i) in shapes), len(shapes)))


@lru_cache(maxsize=512)
def layouts(network: Part, fold: Fold, projection: Projection | None, join: Join | None = None) -> tuple[Shapes, ...]:
    """The sets of weights that a declaration fits, the smallest first; wider ones where its ranks need them."""
    spec = AdapterSpec(network, fold, projection, join=join)
    d_out, d_in = declared(network, fold)
    if isinstance(join, Multiply):  # over one side of the weight twice
        d_out, d_in = (1, math.lcm(d_out, d_in)) if join.side == "right" else (math.lcm(d_out, d_in), 1)
    found: list[Shapes] = []
    experts = isinstance(fold, PhysicalFold) and "expert" in fold.modes.split()
    sizes = sorted((*SIZES, *PRIMES)) if is_cropped(network) else SIZES
    for factor in (1, 4, 16, 64):
        grids = GRIDS if factor <= 4 else GRIDS[:1]
        found += [shapes for shapes in candidates(factor * d_out, factor * d_in, grids, sizes, experts) if fits(spec, shapes)]
        if len(found) >= ENOUGH:
            break
    return tuple(found)


def declared(network: Part, fold: Fold) -> tuple[int, int]:
    """What out and in have to be multiples of: heads, a kernel, and the declared sizes of a split mode."""
    if isinstance(fold, FlatFold):
        return 1, 1
    sizes = _multiples(network, fold.modes.split())
    cells = math.prod(fold.kernel or ())
    return sizes["out"] * (fold.heads or 1), sizes["in"] * cells if fold.kernel_modes else math.lcm(sizes["in"], cells)


def with_kernels(spec: AdapterSpec) -> list[AdapterSpec]:
    """The declaration; one that has modes for a kernel and leaves its sizes open, with each of some kernels."""
    fold = spec.fold
    if not isinstance(fold, PhysicalFold) or not fold.kernel_modes or fold.kernel is not None:
        return [spec]
    own = KERNELS if fold.kernel_modes == ("kernel",) else KERNELS[: len(fold.kernel_modes) + 1]
    return [replace(spec, fold=replace(fold, kernel=kernel)) for kernel in own]


def _multiples(part: Part, modes: Sequence[str]) -> dict[str, int]:
    """What each mode has to be a multiple of: the product of a split mode's declared sizes, unless it may be cropped."""
    if isinstance(part, Network) and not part.crop:
        known = part.known
        sides = (math.prod(known.get(i, 1) for i in group) for group in part.mode_groups)
        return dict.fromkeys(modes, 1) | dict(zip(modes, sides, strict=False))
    inner = [_multiples(one, modes) for one in inner_parts(part)]
    if isinstance(part, Kronecker):
        return {mode: 1 if part.crop else math.prod(one[mode] for one in inner) for mode in modes}
    return {mode: math.lcm(*(one[mode] for one in inner)) for mode in modes}


def is_cropped(part: Part) -> bool:
    """Whether a split in a part may be one that does not divide."""
    return (isinstance(part, Kronecker | Network) and part.crop) or any(map(is_cropped, inner_parts(part)))


def fits(spec: AdapterSpec, shapes: Shapes) -> bool:
    """Whether a declaration has sizes on these weights."""
    try:
        spec.lay_out(dict(shapes))
    except SpecError:
        return False
    return True


def draw_layouts(spec: AdapterSpec) -> tuple[Shapes, ...]:
    """The sets of weights of a declaration, whatever its scale."""
    return layouts(spec.network, spec.fold, spec.projection, spec.join)


@st.composite
def cases(draw: st.DrawFn, specs: st.SearchStrategy[AdapterSpec], given: Sequence[Shapes] = ()) -> Case:
    """A case of a drawn spec on drawn weights, or on one of the given sets of weights."""
    spec = draw(specs)
    pool = [shapes for shapes in given if fits(spec, shapes)] if given else draw_layouts(spec)
    shapes = draw(st.sampled_from(pool) if pool else st.nothing())
    seed, dtype = draw(st.integers(0, 2**16)), draw(st.sampled_from(("float64", "float32")))
    return Case(spec, shapes, seed, dtype, draw(st.sampled_from(BATCHES)))


@st.composite
def rescaled(draw: st.DrawFn, spec: AdapterSpec) -> AdapterSpec:
    """The spec as it is, or with another scale."""
    if not draw(st.booleans()):
        return spec
    if isinstance(spec.join, Multiply) and not spec.join.residual:
        return spec  # R itself has no scale
    scaled = replace(spec, alpha=draw(st.sampled_from(ALPHAS)), rslora=False)
    return rooted(scaled, draw(st.booleans()))


def rooted(spec: AdapterSpec, wanted: bool) -> AdapterSpec:
    """The spec with rslora, where it is wanted and there is an alpha and a rank to take the root of."""
    return replace(spec, rslora=True) if wanted and spec.alpha and reference_rank(spec.network) else spec


def named(shapes: Mapping[str, Shape] | Sequence[Shape] | None) -> list[Shapes]:
    """The caller's weights: by name, or as a list taken as one weight a layer."""
    if shapes is None:
        return []
    found = tuple(named_shapes(shapes).items())
    if not found:
        raise SpecError("verify was given no weight; give at least one shape (out, in), or shapes=None to draw them.")
    return [found]


# --- presets --------------------------------------------------------------------------------------------------------

alphas = st.sampled_from(ALPHAS)
rslora = st.sampled_from((False, False, True))
maps: st.SearchStrategy[Projection | None] = st.none() | st.builds(Shuffle, st.integers(0, 99))
maps |= st.builds(Fastfood, st.sampled_from((1.0, 0.5, 0.3)), st.integers(0, 99), st.booleans())
counts = st.integers


@st.composite
def superloras(draw: st.DrawFn) -> AdapterSpec:
    """The whole formula at small settings."""
    order = draw(counts(1, 4))
    splits = draw(counts(1, 2)) if order <= 2 else 1
    groups: int | str = draw(st.just("weight") | counts(1, 3))
    projection = draw(maps)
    spec = variants.superlora(draw(counts(1, 2)), order, groups, splits, projection, draw(alphas))
    assert isinstance(spec.fold, FlatFold) or projection is None
    return rooted(spec, draw(rslora))


@st.composite
def tensloras(draw: st.DrawFn) -> AdapterSpec:
    """TensLoRA over out, in and any of layer, type and head."""
    named = [mode for mode in ("layer", "type", "head") if draw(st.booleans())] or ["layer"]
    heads = draw(st.sampled_from((2, 3))) if "head" in named else None
    return papers.tenslora(draw(counts(1, 3)), " ".join([*named, "out", "in"]), heads, draw(st.booleans()), draw(alphas))


NETWORKS = (  # over two modes: a frozen node, and one tensor in two places
    Network("o i", {"r": 2}, B=Node("o r", init="zeros"), A=Node("r i", init="orthogonal", trainable=False)),
    Network("o i", {"r": 2, "s": 2, "t": 2}, B="o r", G="r s", H=Node("s t", map=Same("G"), trainable=False), A="t i"),
)


@cache
def parts(depth: int, networks: bool) -> st.SearchStrategy[Part]:
    """Parts over any modes, products and sums nested up to a depth; `networks` adds those over two modes."""
    leaves = [st.just(Dense()), *(st.builds(kind, counts(1, 2), over=st.just("cap")) for kind in (CP, Tucker, TensorTrain))]
    leaf = st.one_of(*leaves, *([st.sampled_from(NETWORKS)] if networks else []))
    if depth == 0:
        return leaf
    inner = st.deferred(lambda: parts(depth - 1, networks))
    few = st.lists(inner, min_size=1, max_size=2)
    return st.one_of(leaf, few.map(lambda two: Kronecker(*two)), few.map(lambda two: Hadamard(*two)), added(inner))


@st.composite
def added(draw: st.DrawFn, inner: st.SearchStrategy[Part]) -> Sum:
    """A sum of one to three parts, weighted or not, or with a part's frozen copy."""
    found, numbers = draw(st.lists(inner, min_size=1, max_size=3)), st.sampled_from((1.0, -1.0, 0.5, -2.0))
    if draw(st.integers(0, 3)) == 3 and found.count(found[0]) == 1:
        weights = [draw(numbers) for _ in found]
        return Sum(*found, Frozen(found[0]), weights=[*weights, -weights[0]])
    return Sum(*found, weights=draw(st.none() | st.tuples(*(numbers for _ in found))))


@st.composite
def sums(draw: st.DrawFn) -> AdapterSpec:
    """Sums at any place of a product, on weights alone, together or in a flat fold."""
    folds = ("out in", "member out in", "layer type out in", None)
    modes = draw(st.sampled_from(folds))
    part = draw(added(parts(1, networks=modes == "out in")))
    if draw(st.booleans()):
        part = draw(st.sampled_from((Kronecker, Hadamard)))(part, draw(parts(1, networks=False)))
    fold = PhysicalFold(modes) if modes else FlatFold(draw(counts(2, 3)), draw(st.just("weight") | counts(1, 2)))
    projection = draw(maps) if isinstance(fold, FlatFold) else None
    return _able(rooted(AdapterSpec(part, fold, projection, alpha=draw(alphas)), draw(rslora)))


@st.composite
def crops(draw: st.DrawFn) -> AdapterSpec:
    """Splits that need not divide their mode: Kronecker products and networks, alone, multiplied and added to others."""
    inner = parts(1, networks=False)
    products = st.builds(Kronecker, inner, inner, factor=st.sampled_from((-1, 2, 3)), crop=st.just(True))
    products |= st.builds(Kronecker, inner, inner, inner, crop=st.just(True))
    networks = st.builds(lambda r: miss(r).network, counts(1, 5)) | st.builds(lambda u: kradapter(u).network, counts(2, 4))
    networks |= st.just(Network("(a b) (c d)", {"b": 3, "r": 2}, crop=True, left="a d r", right="b c r"))
    modes = draw(st.sampled_from(("out in", "out in", "in out", "member out in")))
    drawn = products if modes == "member out in" else products | networks
    part = draw(drawn | st.builds(Hadamard, products) | added(drawn | inner))
    return _able(rooted(AdapterSpec(part, PhysicalFold(modes), alpha=draw(alphas)), draw(rslora)))


# Weights of what is drawn from the language: few, as each declaration is met once and would look through all others.
POOL = sorted(
    (grid(*GRIDS[k % 4], shape) for k, shape in enumerate(product((1, 2, 4, 7, 12, 13), (1, 3, 6, 11, 18)))),
    key=lambda shapes: sum(o * i for _, (o, i) in shapes),
)


def _able(spec: AdapterSpec) -> AdapterSpec:
    """A declaration that fits some weights, and of whose every term one node alone can start at zero."""
    assume(any(fits(spec, shapes) for shapes in POOL[::5]))
    return spec


def settings_of(maker: Callable[..., Any]) -> st.SearchStrategy[AdapterSpec]:
    """Small settings of a variant of the catalogue, by the names of its arguments; others stay at their defaults."""
    drawn: dict[str, st.SearchStrategy[Any]] = {"rank": counts(1, 3), "splits": counts(2, 3)}
    drawn |= {"size": st.sampled_from((2, 3, 4)), "count": st.sampled_from((1, 3, 6))}
    drawn |= {"seed": st.sampled_from((0, 777)), "alpha": alphas}
    drawn |= {"factors": counts(1, 2), "vectors": st.just(3), "length": st.just(2), "hybrid": counts(0, 2)}
    taken = {name: drawn[name] for name in signature(maker).parameters if name in drawn}
    return st.builds(maker, **taken)


@st.composite
def with_roots(draw: st.DrawFn, specs: st.SearchStrategy[AdapterSpec]) -> AdapterSpec:
    """Specs, some of them with rslora."""
    return rooted(draw(specs), draw(rslora))


WRITTEN: dict[str, st.SearchStrategy[AdapterSpec]] = {
    "dense": st.builds(variants.dense, alphas),
    "lora": with_roots(st.builds(variants.lora, counts(1, 4), alphas)),
    "loha": with_roots(st.builds(variants.loha, counts(1, 4), alphas)),
    "lokr": with_roots(st.builds(variants.lokr, counts(1, 3), st.sampled_from((-1, 2, 3, 4)), st.booleans(), alphas)),
    "lotr": with_roots(st.builds(variants.lotr, counts(1, 3), alphas)),
    "lonkr": with_roots(st.builds(variants.lonkr, counts(1, 2), counts(2, 4), alphas)),
    "lorta": with_roots(st.builds(variants.lorta, counts(1, 2), counts(3, 5), counts(1, 3), maps, alphas)),
    "superlora": superloras(),
    "vera": st.builds(variants.vera, counts(1, 4), alphas),
    "adalora": st.builds(papers.adalora, counts(1, 4), alphas),
    "fact_tt": st.builds(papers.fact_tt, counts(1, 3), alphas),
    "fact_tk": st.builds(papers.fact_tk, counts(1, 3), counts(1, 2), alphas),
    "tenslora": tensloras(),
}
PRESETS = {name: WRITTEN[name] if name in WRITTEN else settings_of(maker) for name, maker in VARIANTS.items()}
LANGUAGE = {"sum": sums(), "crop": crops()}  # no variants, but what can be declared
PRESETS |= LANGUAGE
PRESETS["dora"] = st.builds(dora, st.one_of(PRESETS["lora"], PRESETS["lokr"], PRESETS["lotr"]), st.booleans())
