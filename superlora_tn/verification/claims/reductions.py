"""Identities between methods: one declaration at some settings is another, with the values carried over.

Each draws a pair of declarations on equal weights, and a map of the first's values to the second's. Imported only
where Hypothesis is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import reject
from hypothesis import strategies as st

from superlora_tn.declare.fold import FlatFold, PhysicalFold
from superlora_tn.declare.parts import CP, Dense, Hadamard, Kronecker, Part, TensorTrain, Tucker
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.variants import dense, loha, lokr, lonkr, lora, lorta, lotr, superlora
from superlora_tn.verification import draws
from superlora_tn.verification.cases import Case, Sized, ratio
from superlora_tn.verification.claims.properties import cotangents, node_gradients, normal
from superlora_tn.verification.references.papers import MEMBERS, adalora, fact_tk, fact_tt
from superlora_tn.verification.references.textbook import Array, Values

Carry = Callable[[Values], Values]
Pair = tuple[AdapterSpec, AdapterSpec | Callable[[int], AdapterSpec], Sequence[draws.Shapes]]


@dataclass(frozen=True)
class Reduction:
    """``left`` is ``right`` with the values carried over.

    Attributes:
        claim: the left side.
        reference: the right side.
        pair: draws both declarations, and the weights they are about (none says all); the right declaration may need
            the number of weights in a group.
        carry: the left's node values -> the right's. A pure renaming or transposition where `same` is true.
        same: both have the same parameters: equal counts, and gradients carry over as the values do.
        held: nodes that only the right has, at fixed values: they count for nothing and their gradients are left out.
    """

    claim: str
    reference: str
    pair: st.SearchStrategy[Pair]
    carry: Carry
    same: bool = True
    held: tuple[str, ...] = ()

    def cases(self) -> st.SearchStrategy[Case]:
        """Cases whose `other` is the right side."""
        return _pairs(self.pair)

    def measure(self, case: Case) -> float:
        """The error of dW, and of gradients and counts where the parameters are the same, in units of the bound."""
        assert case.other is not None
        left = case.in_float64()
        right, worst = replace(left, spec=case.other, other=None), 0.0
        for a, b in zip(left.groups(), right.groups(), strict=True):
            fixed = sum(math.prod(n.shape) for n in b.graph.nodes if n.name in self.held)
            if self.same and a.graph.num_parameters != b.graph.num_parameters - fixed:
                return math.inf
            carried = dict(self.carry(a.values))
            ours, theirs = a.delta(a.values), b.delta(carried)
            for target in a.shapes:
                worst = max(worst, ratio(ours[target], theirs[target], a.allowed(target) + b.allowed(target, carried)))
            if self.same:
                worst = max(worst, _gradient_error(self, a, b, carried))
        return worst


@st.composite
def _pairs(draw: st.DrawFn, pair: st.SearchStrategy[Pair]) -> Case:
    left, right, shapes = draw(pair)
    case = draw(draws.cases(st.just(left), shapes))
    members = len(case.groups()[0].shapes)
    other = right if isinstance(right, AdapterSpec) else right(members)
    if not draws.fits(other, case.shapes):
        reject()
    return replace(case, other=other)


def _gradient_error(one: Reduction, a: Sized, b: Sized, carried: Values) -> float:
    """Gradients of one loss along a random direction of each node, the left's carried over as its values are."""
    generator, worst = np.random.default_rng(a.case.seed + 5), 0.0
    ours, theirs = one.carry(node_gradients(a)), node_gradients(b, carried)
    elements = sum(o * i for o, i in a.shapes.values())
    weights = {t: np.abs(c) for t, c in cotangents(a).items()}
    for name, grad in theirs.items():
        direction = normal(generator, grad.shape)
        if name in one.held:
            continue
        magnitude = b.magnitude({**carried, name: direction})
        size = sum(float((magnitude[t] * w).sum()) for t, w in weights.items())
        allowed = (a.roundings + b.roundings + 4 * (elements + grad.size)) * a.unit * size
        found = (np.array((g * direction).sum()) for g in (ours[name], grad))
        worst = max(worst, ratio(next(found), next(found), allowed))
    return worst


# --- carrying values over -------------------------------------------------------------------------------------------


def same(values: Values) -> Values:
    """The same values under the same names."""
    return values


def unprefixed(prefix: str) -> Carry:
    """Names without a prefix."""
    return lambda values: {n.removeprefix(prefix): v for n, v in values.items()}


def superdiagonal(values: Values) -> Values:
    """CP's factors, and the core that is 1 on its superdiagonal; in front of all, the groups of a flat fold if any."""
    order, (*groups, _, rank) = len(values), next(iter(values.values())).shape
    core = np.zeros((*groups, *(rank,) * order))
    for r in range(rank):
        place: tuple[Any, ...] = (..., *(r,) * order)
        core[place] = 1.0
    return {"core": core, **values}


def tucker_to_train(values: Values) -> Values:
    """LoTR's U, G, V as a train over (out, member, in)."""
    core = values["core"].transpose(1, 0, 2)
    return {"core_out": values["factor_out"], "core_member": core, "core_in": values["factor_in"].T}


def khatri_rao(values: Values) -> Values:
    """``(sum_r b_r a_r) * (sum_s d_s c_s) = sum_rs (b_r * d_s)(a_r * c_s)``."""

    def joined(mode: str) -> Array:
        first, second = values[f"h1_factor_{mode}"], values[f"h2_factor_{mode}"]
        return np.asarray(np.einsum("dr,ds->drs", first, second)).reshape(len(first), -1)

    return {"factor_out": joined("out"), "factor_in": joined("in")}


def member_identity(values: Values) -> Values:
    """LoTR's core as a Tucker whose member factor is the identity."""
    return {**values, "factor_member": np.eye(values["core"].shape[0])}


def cube(values: Values) -> Values:
    """LoTR's nodes as those of the flat fold over (layer, out, in), the layer's factor the identity."""
    named = {"core": values["core"], "factor_m2": values["factor_out"], "factor_m3": values["factor_in"]}
    return {**named, "factor_m1": np.eye(values["core"].shape[0])}


def row_by_row(values: Values) -> Values:
    """out and in as m1 and m2: a single weight is read row by row."""
    return {n.replace("_out", "_m1").replace("_in", "_m2"): v for n, v in values.items()}


def flat_order(values: Values) -> Values:
    """Physical modes in any order as m1 m2 ..: a flat fold reads (layer, type, head, out, in), the last one fastest.

    The permutation: factor m_k is the factor of the k-th mode there is in that order, and the core's axes move alike.
    """
    modes = [n.removeprefix("factor_") for n in values if n != "core"]
    order = [mode for mode in ("layer", "type", "head", "out", "in") if mode in modes]
    moved = {f"factor_m{k + 1}": values[f"factor_{mode}"] for k, mode in enumerate(order)}
    if "core" in values:
        moved["core"] = values["core"].transpose([modes.index(mode) for mode in order])
    return moved


def fact_tt_names(values: Values) -> Values:
    """FacT-TT's nodes as LoTR's."""
    return {"core": values["G"], "factor_out": values["U"], "factor_in": values["V"]}


def fact_tk_names(values: Values) -> Values:
    """FacT-TK's nodes as those of a Tucker over (member, out, in)."""
    return {"core": values["C"], "factor_member": values["P"], "factor_out": values["U"], "factor_in": values["V"]}


def unit_values(values: Values) -> Values:
    """LoRA's factors as AdaLoRA's, with all singular values at 1."""
    return {"P": values["factor_out"], "Q": values["factor_in"].T, "lam": np.ones(values["factor_in"].shape[1])}


# --- the identities -------------------------------------------------------------------------------------------------


def uncapped_lotr(rank: int) -> AdapterSpec:
    """LoTR with the rank as stated on any weight, as index notation has it."""
    return AdapterSpec(Tucker(rank, factors="out in", over="keep"), PhysicalFold("member out in"))


ranks, alphas = st.integers(1, 3), draws.alphas
PARTS = st.sampled_from((Dense(), CP(1), CP(2), Tucker(1), TensorTrain(1), Hadamard(CP(1), CP(1))))
FOLDS = st.sampled_from((PhysicalFold(), PhysicalFold("layer out in"), FlatFold(3), FlatFold(4), FlatFold(2, 2)))
SQUARES = [draws.grid(1, 1, (side, side)) for side in draws.SIZES]
Right = AdapterSpec | Callable[[int], AdapterSpec]


def both(make: Callable[..., tuple[AdapterSpec, Right]], *arguments: st.SearchStrategy[Any], shapes: Any = ()) -> Any:
    """A strategy of pairs about any weights, or about the given ones."""
    return st.builds(lambda *drawn: (*make(*drawn), shapes), *arguments)


@st.composite
def _cubes(draw: st.DrawFn) -> Pair:
    """LoTR, and SuperLoRA's formula at M = 3, G = 1 on as many square layers as they are wide."""
    rank, side = draw(st.integers(1, 3)), draw(st.integers(3, 6))
    return lotr(rank), AdapterSpec(Tucker((side, rank, rank)), FlatFold(3)), [draws.grid(side, 1, (side, side))]


@st.composite
def _no_surplus(draw: st.DrawFn) -> Pair:
    """A physical fold with its modes in any order, and the flat fold of the same order, on weights that fill its sides."""
    named = ["layer", *(mode for mode in ("type", "head") if draw(st.booleans())), "out", "in"]
    order, side = draw(st.permutations(named)), draw(st.integers(2, 3))
    if "head" in order:  # the fold asks for head before out, as out = head x rest
        first, last = sorted((order.index("head"), order.index("out")))
        order[first], order[last] = "head", "out"
    parts: list[Part] = [CP(1), CP(2), Tucker(1), Tucker(2)]
    part = draw(st.sampled_from(parts))
    shape = (side**2 if "head" in order else side, side)
    left = AdapterSpec(part, PhysicalFold(" ".join(order), side if "head" in order else None))
    return left, AdapterSpec(part, FlatFold(len(order))), [draws.grid(side, side if "type" in order else 1, shape)]


REDUCTIONS = (
    Reduction(
        "superlora(M=1, by weight)", "dense", both(lambda a: (superlora(1, 1, "weight", alpha=a), dense(a)), st.none()), same
    ),
    Reduction(
        "superlora(M=2, by weight)",
        "lora",
        both(lambda r, a: (superlora(r, 2, "weight", alpha=a), lora(r, a)), ranks, alphas),
        same,
    ),
    Reduction(
        "superlora(M=2, K=2, by weight)",
        "lokr, both split",
        both(lambda r, a: (superlora(r, 2, "weight", 2, alpha=a), lokr(r, -1, True, a)), ranks, alphas),
        same,
    ),
    Reduction(
        "superlora(M=2, K>2, by weight)",
        "lonkr",
        both(lambda r, k, a: (superlora(r, 2, "weight", k, alpha=a), lonkr(r, k, a)), ranks, st.integers(3, 4), alphas),
        same,
    ),
    Reduction(
        "superlora(M>2, G)",
        "lorta",
        both(
            lambda r, m, g, a: (superlora(r, m, g, alpha=a), lorta(r, m, g, alpha=a)),
            st.integers(1, 2),
            st.integers(3, 5),
            st.integers(1, 4),
            alphas,
        ),
        same,
    ),
    Reduction("lonkr(K=2)", "lokr, both split", both(lambda r, a: (lonkr(r, 2, a), lokr(r, -1, True, a)), ranks, alphas), same),
    Reduction(
        "Kronecker of one part",
        "the part",
        both(lambda p, f: (AdapterSpec(Kronecker(p), f), AdapterSpec(p, f)), PARTS, FOLDS),
        unprefixed("k1_"),
    ),
    Reduction(
        "Hadamard of one part",
        "the part",
        both(lambda p, f: (AdapterSpec(Hadamard(p), f), AdapterSpec(p, f)), PARTS, FOLDS),
        unprefixed("h1_"),
    ),
    Reduction(
        "CP",
        "Tucker, superdiagonal core",
        both(lambda r, f: (AdapterSpec(CP(r), f), AdapterSpec(Tucker(r), f)), ranks, FOLDS),
        superdiagonal,
        held=("core",),
    ),
    Reduction(
        "lotr (FacT-TT)",
        "TensorTrain of order 3",
        both(lambda r: (lotr(r), AdapterSpec(TensorTrain(r, over="cap"), PhysicalFold("out member in"))), ranks),
        tucker_to_train,
    ),
    Reduction(
        "lotr",
        "Tucker, member factor = identity",
        both(lambda r: (lotr(r), lambda members: AdapterSpec(Tucker((members, r, r)), PhysicalFold("member out in"))), ranks),
        member_identity,
        held=("factor_member",),
    ),
    Reduction("lotr", "superlora(M=3, G=1), layer factor = identity", _cubes(), cube, held=("factor_m1",)),
    Reduction("FacT-TT", "lotr", both(lambda r: (fact_tt(r), uncapped_lotr(r)), ranks), fact_tt_names),
    Reduction(
        "FacT-TK",
        "Tucker over member, out, in",
        both(lambda r, k: (fact_tk(r, k), AdapterSpec(Tucker((k, r, r)), MEMBERS)), ranks, ranks),
        fact_tk_names,
    ),
    Reduction(
        "lora",
        "AdaLoRA's form, lam = 1",
        both(lambda r: (AdapterSpec(CP(r, over="keep")), adalora(r)), ranks),
        unit_values,
        held=("lam",),
    ),
    Reduction(
        "loha",
        "lora of rank r^2",
        both(lambda r: (loha(r), AdapterSpec(CP(r * r))), st.integers(1, 3)),
        khatri_rao,
        same=False,
    ),
    Reduction(
        "one square weight, M=2",
        "flat fold, no surplus",
        both(
            lambda p: (AdapterSpec(p), AdapterSpec(p, FlatFold(2))),
            st.sampled_from((Dense(), CP(1), CP(2), Tucker(2), TensorTrain(2))),
            shapes=SQUARES,
        ),
        row_by_row,
    ),
    Reduction("physical fold, modes in any order", "flat fold, no surplus, modes permuted", _no_surplus(), flat_order),
)
