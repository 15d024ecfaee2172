"""Textbook formulas in numpy, read from a declaration without the library's graph, plan or backends.

A part is turned into its whole tensor by the formula of its paper (`TEXTBOOK`, or another set of functions such as
TensorLy's), a fold cuts the tensor into weights, and an explicit matrix stands for a fixed map. All in float64.
The only things shared with the code under test are the declarations, the documented names of nodes, and the seeded
tables of a fixed map, which are data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import numpy as np

from superlora_tn.declare.fold import FlatFold, PhysicalFold, Shape
from superlora_tn.declare.maps import Compose, Fastfood, Shuffle
from superlora_tn.declare.parts import (
    CP,
    Base,
    Dense,
    Hadamard,
    Kronecker,
    Network,
    Part,
    Sum,
    TensorTrain,
    Tucker,
    inner_parts,
)
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.update.fixed_maps import gaussians, permutation, signs

Array = np.ndarray[Any, Any]
Values = Mapping[str, Array]
KERNEL = ("kernel", "kd", "kh", "kw")


@dataclass(frozen=True)
class Formulas:
    """How tensors come from their factors.

    Attributes:
        cp: factors (d_m, r) -> tensor.
        tucker: core, factors by mode (d_m, r_m) -> tensor.
        train: cores -> tensor; the first and last have no outer bond.
        kronecker: tensors of equal order -> their mode-wise Kronecker product, the first slowest.
    """

    cp: Callable[[Sequence[Array]], Array]
    tucker: Callable[[Array, Mapping[int, Array]], Array]
    train: Callable[[Sequence[Array]], Array]
    kronecker: Callable[[Sequence[Array]], Array]


def cp(factors: Sequence[Array]) -> Array:
    """``sum_r a_1r o ... o a_Mr``; for two modes ``B A`` (Hu et al. 2021), with ``A = factors[1].T``."""
    if len(factors) == 2:
        return np.asarray(factors[0] @ factors[1].T)
    terms = [reduce(np.multiply.outer, [f[:, r] for f in factors]) for r in range(factors[0].shape[1])]
    return np.sum(terms, axis=0)  # type: ignore[no-any-return]


def tucker(core: Array, factors: Mapping[int, Array]) -> Array:
    """``C x_1 A_1 ... x_M A_M``, one mode after another; modes without a factor stay as the core has them."""
    for mode, factor in factors.items():
        core = np.moveaxis(np.tensordot(factor, core, axes=(1, mode)), 0, mode)
    return core


def train(cores: Sequence[Array]) -> Array:
    """``T[i1..iM] = G_1[i1] ... G_M[iM]``, a product of matrices for each element (Oseledets 2011)."""
    if len(cores) == 1:
        return cores[0]
    inner = [cores[0][None], *cores[1:-1], cores[-1][..., None]]
    result = np.empty([c.shape[1] for c in inner], dtype=np.result_type(*inner))
    for place in np.ndindex(*result.shape):
        result[place] = reduce(np.matmul, [c[:, i, :] for c, i in zip(inner, place, strict=True)])[0, 0]
    return result


def kronecker(parts: Sequence[Array]) -> Array:
    """``W1 (x) W2 ...`` (Yeh et al. 2023), mode by mode."""
    return reduce(np.kron, parts)


TEXTBOOK = Formulas(cp, tucker, train, kronecker)


def tensor(
    part: Part,
    modes: Sequence[str],
    values: Values,
    formulas: Formulas = TEXTBOOK,
    prefix: str = "",
    absolute: bool = False,
) -> Array:
    """The whole tensor of a part over `modes`, from its nodes' values under their documented names.

    A part whose sides do not divide a mode is as large as their product; what is above the mode is cut where the part is added
    to another, or in the end (`delta`). With `absolute` the weights of sums are taken without their signs.
    """

    def own(name: str) -> Array:
        return values[f"{prefix}{name}"]

    if isinstance(part, Dense) or (isinstance(part, CP) and f"{prefix}weight" in values):
        return own("weight")
    if isinstance(part, Base):
        return own("base")
    if isinstance(part, CP):
        factors = [own(f"factor_{m}") for m in modes]
        return factors[0] if len(modes) == 1 else formulas.cp(factors)
    if isinstance(part, Tucker):
        factored = modes if part.factors is None else part.factors.split()
        return formulas.tucker(own("core"), {modes.index(m): own(f"factor_{m}") for m in factored})
    if isinstance(part, TensorTrain):
        return formulas.train([own(f"core_{m}") for m in modes])
    if isinstance(part, Network):
        return network(part, {name: own(name) for name, _ in part.nodes})
    mark = "k" if isinstance(part, Kronecker) else "t" if isinstance(part, Sum) else "h"
    parts = inner_parts(part)
    inner = []
    for k, own_part in enumerate(parts):  # of a Kronecker product the last has the kernel
        held = [m for m in modes if m not in KERNEL or k == len(parts) - 1 or not isinstance(part, Kronecker)]
        found = tensor(own_part, held, values, formulas, f"{prefix}{mark}{k + 1}_", absolute)
        inner.append(np.expand_dims(found, [place for place, m in enumerate(modes) if m not in held]))
    if isinstance(part, Sum):
        weights = part.weights or (1.0,) * len(inner)
        common = tuple(slice(min(sides)) for sides in zip(*(one.shape for one in inner), strict=True))
        terms = [(abs(weight) if absolute else weight) * one[common] for weight, one in zip(weights, inner, strict=True)]
        return cast(Array, sum(terms))
    if isinstance(part, Hadamard):  # (B1 A1) * (B2 A2), Hyeon-Woo et al. 2021
        return reduce(np.multiply, inner)
    return formulas.kronecker(inner) if len(inner) > 1 else inner[0]


def network(part: Network, values: Values) -> Array:
    """Any network in index notation: one sum over all indices at once, then split modes are joined."""
    number: dict[str, int] = {}
    size: dict[str, int] = {}
    operands: list[Any] = []
    for name, node in part.nodes:
        size |= dict(zip(node.index_names, values[name].shape, strict=True))
        operands += [values[name], [number.setdefault(i, len(number)) for i in node.index_names]]
    result: Array = np.einsum(*operands, [number[i] for group in part.mode_groups for i in group])
    return result.reshape([math.prod(size[i] for i in group) for group in part.mode_groups])


def delta(
    spec: AdapterSpec,
    shapes: Mapping[str, Shape],
    values: Values,
    formulas: Formulas = TEXTBOOK,
    absolute: bool = False,
) -> dict[str, Array]:
    """dW of each weight of one group, scale included.

    Args:
        spec: the declaration.
        shapes: (out, in) of the group's weights by name, in order.
        values: the nodes' values; with more than one flat group their first axis is the group.
        formulas: how tensors come from their factors.
        absolute: bound the sums' terms by their absolute values; `values` are absolute then.
    """
    scale = abs(scaling(spec)) if absolute else scaling(spec)
    if isinstance(spec.fold, FlatFold):
        return _flat(spec, spec.fold, shapes, values, formulas, scale, absolute)
    whole = scale * tensor(spec.network, spec.fold.modes.split(), values, formulas, absolute=absolute)
    whole = whole[tuple(slice(size) for size in mode_sizes(spec.fold, shapes).values())]
    return {name: physical_weight(whole, spec.fold, name, list(shapes)) for name in shapes}


def mode_sizes(fold: PhysicalFold, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """The modes of a group of weights with their sizes, in the fold's order."""
    (d_out, d_in), modes = next(iter(shapes.values())), fold.modes.split()
    heads, kernel = fold.heads or 1, fold.kernel or ()
    cells = math.prod(kernel)
    channels = d_in // cells if set(modes) & set(KERNEL) else d_in
    sizes = {"out": d_out // heads, "head": heads, "in": channels, "kernel": cells}
    sizes |= dict(zip(("kw", "kh", "kd"), (*reversed(kernel), 1, 1, 1), strict=False))
    sizes |= {mode: len(set(words)) for mode, words in numbered(fold, list(shapes)).items()}
    return {mode: sizes[mode] for mode in modes}


def numbered(fold: PhysicalFold, names: Sequence[str]) -> dict[str, list[str]]:
    """What each weight is on each mode that numbers weights, and on those that a fold may lack."""
    rest = [expert_apart(name) for name in names] if "expert" in fold.modes.split() else [(name, "") for name in names]
    layers, types = zip(*(layer_and_type(name) for name, _ in rest), strict=True)
    return {"layer": [*layers], "type": [*types], "expert": [number for _, number in rest], "member": [*names]}


def expert_apart(name: str) -> tuple[str, str]:
    """A weight's name without its expert's number: the first behind ``experts``, else the last word."""
    words = name.split(".")
    start = max((k for k, word in enumerate(words) if word == "experts"), default=len(words) - 2)
    place = next(k for k in range(start + 1, len(words)) if words[k].isdigit())
    return ".".join(words[:place] + words[place + 1 :]), words[place]


def scaling(spec: AdapterSpec) -> float:
    """alpha / r (Hu et al. 2021) or alpha / sqrt(r) (Kalajdzievski 2023), r the largest rank declared; 1 without alpha."""
    if spec.alpha is None:
        return 1.0
    rank = max(_ranks(spec.network), default=1)
    return spec.alpha / (math.sqrt(rank) if spec.rslora else rank)


def _ranks(part: Part) -> list[int]:
    """All ranks that a part declares."""
    if isinstance(part, Kronecker | Hadamard | Sum):
        return [rank for inner in inner_parts(part) for rank in _ranks(inner)]
    if isinstance(part, Dense | Base | Network):
        return []
    return list(part.rank) if isinstance(part.rank, tuple) else [part.rank]


def layer_and_type(name: str) -> tuple[str, str]:
    """A module's name cut behind the last number that has a word after it."""
    found = re.match(r"^((?:.*\.)?\d+)\.(.+)$", name)
    return (found[1], found[2]) if found else ("", name)


def physical_weight(whole: Array, fold: PhysicalFold, name: str, names: Sequence[str]) -> Array:
    """One member's (out, in): pick its place on the member modes, order (head, out, in, kernel), join both sides."""
    modes, words = fold.modes.split(), numbered(fold, names)
    own = names.index(name)
    place = {k: list(dict.fromkeys(words[m])).index(words[m][own]) for k, m in enumerate(modes) if m in words}
    left = [m for k, m in enumerate(modes) if k not in place]
    picked = whole[tuple(place.get(k, slice(None)) for k in range(whole.ndim))]
    ordered = picked.transpose([left.index(m) for m in ("head", "out", "in", *KERNEL) if m in left])
    return ordered.reshape(math.prod(ordered.shape[: 1 + ("head" in left)]), -1)


def _flat(
    spec: AdapterSpec,
    fold: FlatFold,
    shapes: Mapping[str, Shape],
    values: Values,
    formulas: Formulas,
    scale: float,
    absolute: bool,
) -> dict[str, Array]:
    """The paper's fold: every group's tensor as a vector, cut, mapped, all one after another, sliced by weight."""
    total = sum(o * i for o, i in shapes.values())
    count = 1 if fold.groups == "weight" else int(fold.groups)
    runs = [len(run) for run in np.array_split(np.arange(total), count)]
    ratio = spec.projection.ratio if spec.projection else 1.0
    inner = math.ceil(round(ratio * total / count, 9))  # in decimals, as 0.07 * 100 counts 7
    modes = [f"m{k + 1}" for k in range(fold.order)]
    pieces = []
    for g, run in enumerate(runs):
        own = {name: v[g] for name, v in values.items()} if count > 1 else values
        vector = tensor(spec.network, modes, own, formulas, absolute=absolute).reshape(-1)[:inner]
        pieces.append(scale * mapped(spec, vector, runs[0], absolute)[:run])
    whole, ends = np.concatenate(pieces), np.cumsum([o * i for o, i in shapes.values()])
    return {n: whole[end - o * i : end].reshape(o, i) for (n, (o, i)), end in zip(shapes.items(), ends, strict=True)}


def mapped(spec: AdapterSpec, vector: Array, length: int, absolute: bool = False) -> Array:
    """F of a vector, every factor an explicit matrix, cut to `length`; or what no partial sum of it exceeds."""
    projection = spec.projection
    stages = projection.maps if isinstance(projection, Compose) else () if projection is None else (projection,)
    for k, stage in enumerate(stages):
        rest = math.prod(m.ratio for m in stages[k + 1 :])
        end = length if k == len(stages) - 1 else max(len(vector), math.ceil(round(rest * length, 9)))
        if isinstance(stage, Shuffle):
            vector = np.asarray(vector[permutation(stage.seed, len(vector)).numpy()])
        else:
            vector = _fastfood(stage, vector, end, absolute)
    return vector


def _fastfood(stage: Fastfood, vector: Array, length: int, absolute: bool) -> Array:
    """The factors one after another on the padded vector, of p elements; `absolute` takes every entry for positive."""
    n, p = len(vector), 1 << (max(len(vector), length) - 1).bit_length()
    h = np.array([[1.0 if absolute else 1.0 - 2.0 * ((j & k).bit_count() % 2) for k in range(p)] for j in range(p)])
    y = np.concatenate([vector, np.zeros(p - n)])
    for k, factor in enumerate(stage.order):
        again = stage.order[:k].count(factor)
        mark = f" {again + 1}" if again else ""
        if factor == "B" and not absolute:
            y = signs(stage.seed, p, f"signs{mark}").double().numpy() * y
        elif factor == "P":
            y = y[permutation(stage.seed, p, f"permutation{mark}").numpy()]
        elif factor == "G":
            weights = gaussians(stage.seed, p, f"gaussians{mark}").double().numpy()
            y = (np.abs(weights) if absolute else weights) * y
        elif factor == "H":
            y = h @ y
    transforms = stage.order.count("H")
    sums = n * p ** (transforms - 1) if stage.scaling == "variance" and transforms else 1
    scale = p ** (transforms / 2) if stage.scaling == "orthonormal" else math.sqrt(sums)
    result = y[:length] / scale
    if stage.tanh:
        return np.asarray(result + 1.0 if absolute else np.tanh(result))
    return np.asarray(result)
