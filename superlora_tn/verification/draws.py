"""Hypothesis strategies: sizes that a declaration fits, scales, dtypes, batches, and the settings of presets and relatives.

Imported only where Hypothesis is there (`engine`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from inspect import signature
from typing import Any

from hypothesis import strategies as st

from superlora_tn.declare.fold import FlatFold, Fold, Shape
from superlora_tn.declare.joins import Join, Multiply
from superlora_tn.declare.maps import Fastfood, Projection, Shuffle
from superlora_tn.declare.parts import Network, Part, SpecError
from superlora_tn.network import variants
from superlora_tn.network.catalogue import VARIANTS
from superlora_tn.network.joined import dora
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.verification.cases import Case
from superlora_tn.verification.references import papers

Shapes = tuple[tuple[str, Shape], ...]
SIZES = (1, 2, 3, 4, 6, 8, 9, 12, 18)
GRIDS = ((1, 1), (2, 1), (2, 2), (3, 1))  # layers x types
ALPHAS = (None, 1.0, 0.5, 3.0, 16.0)
BATCHES = ((2,), (1,), (), (3, 2), (0,))
ENOUGH = 8


def grid(layers: int, types: int, shape: Shape) -> Shapes:
    """`layers` x `types` weights of one shape, named as in a model."""
    return tuple((f"model.layer.{k}.attention.{'qkv'[t]}_proj", shape) for k in range(layers) for t in range(types))


def mixed(first: Shape, second: Shape) -> Shapes:
    """Weights of two shapes, as a model with grouped queries has them."""
    names = ("model.layer.0.q_proj", "model.layer.0.v_proj", "model.layer.1.q_proj", "model.layer.1.v_proj")
    return tuple(zip(names, (first, second, first, second), strict=True))


def candidates(d_out: int, d_in: int, grids: Sequence[tuple[int, int]] = GRIDS) -> list[Shapes]:
    """Sets of weights to try, small ones first; sizes are multiples of `d_out` and `d_in`."""
    pairs = [(o * d_out, i * d_in) for o in SIZES for i in SIZES]
    found = [grid(*g, pair) for pair in pairs for g in grids]
    found += [mixed(a, b) for a, b in zip(pairs[1::5], pairs[3::5], strict=False)]
    return sorted(found, key=lambda shapes: (sum(o * i for _, (o, i) in shapes), len(shapes)))


@lru_cache(maxsize=512)
def layouts(network: Part, fold: Fold, projection: Projection | None, join: Join | None = None) -> tuple[Shapes, ...]:
    """The sets of weights that a declaration fits, the smallest first; wider ones where its ranks need them."""
    spec = AdapterSpec(network, fold, projection, join=join)
    d_out, d_in = declared(network, fold)
    if isinstance(join, Multiply):  # over one side of the weight twice
        d_out, d_in = (1, math.lcm(d_out, d_in)) if join.side == "right" else (math.lcm(d_out, d_in), 1)
    found: list[Shapes] = []
    for factor in (1, 4, 16, 64):
        grids = GRIDS if factor <= 4 else GRIDS[:1]
        found += [shapes for shapes in candidates(factor * d_out, factor * d_in, grids) if fits(spec, shapes)]
        if len(found) >= ENOUGH:
            break
    return tuple(found)


def declared(network: Part, fold: Fold) -> tuple[int, int]:
    """What out and in have to be multiples of: heads, and the declared sizes of a split mode."""
    if isinstance(fold, FlatFold):
        return 1, 1
    known = network.known if isinstance(network, Network) else {}
    groups = network.mode_groups if isinstance(network, Network) else ()
    sizes = dict(zip(fold.modes.split(), (math.prod(known.get(i, 1) for i in g) for g in groups), strict=False))
    return sizes.get("out", 1) * (fold.heads or 1), sizes.get("in", 1)


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
    return replace(spec, alpha=draw(st.sampled_from(ALPHAS)), rslora=draw(st.booleans()))


def named(shapes: Mapping[str, Shape] | Sequence[Shape] | None) -> list[Shapes]:
    """The caller's weights: by name, or as a list taken as one weight a layer."""
    if not shapes:
        return []
    if isinstance(shapes, Mapping):
        return [tuple(shapes.items())]
    return [tuple((f"layer.{k}.weight", (int(o), int(i))) for k, (o, i) in enumerate(shapes))]


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
    spec = variants.superlora(draw(counts(1, 2)), order, groups, splits, projection, draw(alphas), draw(rslora))
    assert isinstance(spec.fold, FlatFold) or projection is None
    return spec


@st.composite
def tensloras(draw: st.DrawFn) -> AdapterSpec:
    """TensLoRA over out, in and any of layer, type and head."""
    named = [mode for mode in ("layer", "type", "head") if draw(st.booleans())] or ["layer"]
    heads = draw(st.sampled_from((2, 3))) if "head" in named else None
    return papers.tenslora(draw(counts(1, 3)), " ".join([*named, "out", "in"]), heads, draw(st.booleans()), draw(alphas))


def settings_of(maker: Callable[..., Any]) -> st.SearchStrategy[AdapterSpec]:
    """Small settings of a variant of the catalogue, by the names of its arguments; others stay at their defaults."""
    drawn: dict[str, st.SearchStrategy[Any]] = {"rank": counts(1, 3), "splits": counts(2, 3)}
    drawn |= {"size": st.sampled_from((2, 3, 4)), "count": st.sampled_from((1, 3, 6))}
    drawn |= {"seed": st.sampled_from((0, 777)), "alpha": alphas, "rslora": rslora}
    drawn |= {"factors": counts(1, 2), "vectors": st.just(3), "length": st.just(2)}
    taken = {name: drawn[name] for name in signature(maker).parameters if name in drawn}
    return st.builds(maker, **taken)


WRITTEN: dict[str, st.SearchStrategy[AdapterSpec]] = {
    "dense": st.builds(variants.dense, alphas, rslora),
    "lora": st.builds(variants.lora, counts(1, 4), alphas, rslora),
    "loha": st.builds(variants.loha, counts(1, 4), alphas, rslora),
    "lokr": st.builds(variants.lokr, counts(1, 3), st.sampled_from((-1, 2, 3, 4)), st.booleans(), alphas, rslora),
    "lotr": st.builds(variants.lotr, counts(1, 3), alphas, rslora),
    "lonkr": st.builds(variants.lonkr, counts(1, 2), counts(2, 4), alphas, rslora),
    "lorta": st.builds(variants.lorta, counts(1, 2), counts(3, 5), counts(1, 3), maps, alphas, rslora),
    "superlora": superloras(),
    "vera": st.builds(variants.vera, counts(1, 4), alphas),
    "adalora": st.builds(papers.adalora, counts(1, 4), alphas),
    "fact_tt": st.builds(papers.fact_tt, counts(1, 3), alphas),
    "fact_tk": st.builds(papers.fact_tk, counts(1, 3), counts(1, 2), alphas),
    "tenslora": tensloras(),
}
PRESETS = {name: WRITTEN[name] if name in WRITTEN else settings_of(maker) for name, maker in VARIANTS.items()}
PRESETS["dora"] = st.builds(dora, st.one_of(PRESETS["lora"], PRESETS["lokr"], PRESETS["lotr"]), st.booleans())
