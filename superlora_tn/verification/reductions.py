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

from superlora_tn.fold import FlatFold, PhysicalFold
from superlora_tn.nodes import CP, Dense, Hadamard, Kronecker, TensorTrain, Tucker
from superlora_tn.spec import AdapterSpec
from superlora_tn.variants import dense, loha, lokr, lonkr, lora, lorta, lotr, superlora
from superlora_tn.verification import draws
from superlora_tn.verification.cases import Case, Sized, ratio
from superlora_tn.verification.properties import cotangents, exact, node_gradients, normal
from superlora_tn.verification.references import Array, Values

Carry = Callable[[Values], Values]
Pair = tuple[AdapterSpec, AdapterSpec | Callable[[int], AdapterSpec]]


@dataclass(frozen=True)
class Reduction:
    """``left`` is ``right`` with the values carried over.

    Attributes:
        claim: the left side.
        reference: the right side.
        pair: draws both declarations; the right one may need the number of weights in a group.
        carry: the left's node values -> the right's. A pure renaming or transposition where `same` is true.
        shapes: the weights it is about; all by default.
        same: both have the same parameters: equal counts, and gradients carry over as the values do.
    """

    claim: str
    reference: str
    pair: st.SearchStrategy[Pair]
    carry: Carry
    same: bool = True
    shapes: Sequence[draws.Shapes] = ()

    def cases(self) -> st.SearchStrategy[Case]:
        """Cases whose `other` is the right side."""
        return _pairs(self.pair, self.shapes)

    def measure(self, case: Case) -> float:
        """The error of dW, and of gradients and counts where the parameters are the same, in units of the bound."""
        assert case.other is not None
        left = case.in_float64()
        right, worst = replace(left, spec=case.other, other=None), 0.0
        if self.same and left.spec.count(dict(left.shapes)) != right.spec.count(dict(left.shapes)):
            return math.inf
        for a, b in zip(left.groups(), right.groups(), strict=True):
            carried = dict(self.carry(a.values))
            ours, theirs = a.delta(a.values), b.delta(carried)
            for target in a.shapes:
                worst = max(worst, ratio(ours[target], theirs[target], a.allowed(target) + b.allowed(target, carried)))
            if self.same:
                worst = max(worst, _gradient_error(self.carry, a, b, carried))
        return worst


@st.composite
def _pairs(draw: st.DrawFn, pair: st.SearchStrategy[Pair], shapes: Sequence[draws.Shapes]) -> Case:
    left, right = draw(pair)
    case = draw(draws.cases(st.just(left), shapes))
    members = len(case.groups()[0].shapes)
    other = right if isinstance(right, AdapterSpec) else right(members)
    if not draws.fits(other, case.shapes):
        reject()
    return replace(case, other=other)


def _gradient_error(carry: Carry, a: Sized, b: Sized, carried: Values) -> float:
    """Gradients of one loss along a random direction of each node, the left's carried over as its values are."""
    generator, worst = np.random.default_rng(a.case.seed + 5), 0.0
    ours, theirs = carry(node_gradients(a)), node_gradients(b, carried)
    elements = sum(o * i for o, i in a.shapes.values())
    weights = {t: np.abs(c) for t, c in cotangents(a).items()}
    for name, grad in theirs.items():
        direction = normal(generator, grad.shape)
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


def flat_names(values: Values) -> Values:
    """out and in as m1 and m2: a single weight is read row by row."""
    return {n.replace("_out", "_m1").replace("_in", "_m2"): v for n, v in values.items()}


# --- the identities -------------------------------------------------------------------------------------------------

ranks, alphas = st.integers(1, 3), draws.alphas
PARTS = st.sampled_from((Dense(), CP(1), CP(2), Tucker(1), TensorTrain(1), Hadamard(CP(1), CP(1))))
FOLDS = st.sampled_from((PhysicalFold(), PhysicalFold("layer out in"), FlatFold(3), FlatFold(4), FlatFold(2, 2)))


def both(make: Callable[..., Pair], *arguments: st.SearchStrategy[Any]) -> Any:
    """A strategy of pairs."""
    return st.builds(make, *arguments)


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
        same=False,
    ),
    Reduction(
        "lotr (FacT-TT)",
        "TensorTrain of order 3",
        both(lambda r: (lotr(r), AdapterSpec(TensorTrain(r), PhysicalFold("out member in"))), ranks),
        tucker_to_train,
    ),
    Reduction(
        "lotr",
        "Tucker, member factor = identity",
        both(lambda r: (lotr(r), lambda members: AdapterSpec(Tucker((members, r, r)), PhysicalFold("member out in"))), ranks),
        member_identity,
        same=False,
    ),
    Reduction(
        "loha",
        "lora of rank r^2",
        both(lambda r: (loha(r), lora(r * r)), st.integers(1, 3)),
        khatri_rao,
        same=False,
    ),
    Reduction(
        "flat fold of order 2, no surplus",
        "physical fold",
        both(
            lambda p: (AdapterSpec(p), AdapterSpec(p, FlatFold(2))),
            st.sampled_from((Dense(), CP(1), CP(2), Tucker(2), TensorTrain(2))),
        ),
        flat_names,
        shapes=[draws.grid(1, 1, (side, side)) for side in draws.SIZES],
    ),
)


# --- identities of values -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """A claim about dW itself, over drawn declarations."""

    claim: str
    reference: str
    specs: st.SearchStrategy[AdapterSpec]
    measure: Callable[[Case], float]

    def cases(self) -> st.SearchStrategy[Case]:
        """Cases of the drawn declarations."""
        return draws.cases(self.specs)


def loras_add_up(case: Case) -> float:
    """dW of the factors' first k columns plus dW of the rest is dW of all."""
    worst, case = 0.0, case.in_float64()
    assert isinstance(case.spec.network, CP)
    rank = case.spec.network.rank
    k = 1 + case.seed % (rank - 1)
    for sized in case.groups():
        pieces = []
        for own, columns in ((lora(k), np.s_[:, :k]), (lora(rank - k), np.s_[:, k:])):
            [piece] = replace(case, spec=own, shapes=tuple(sized.shapes.items())).groups()
            pieces.append(piece.delta({n: v[columns] for n, v in sized.values.items()}))
        for target, whole in sized.delta(sized.values).items():
            worst = max(worst, ratio(pieces[0][target] + pieces[1][target], whole, 2 * sized.allowed(target, more=2)))
    return worst


def ranks_multiply(case: Case) -> float:
    """rank(W1 (x) W2) = rank(W1) rank(W2), by singular values."""
    rank = np.linalg.matrix_rank
    for sized in case.in_float64().groups():
        low = [sized.values[f"k{k}_factor_out"] @ sized.values[f"k{k}_factor_in"].T for k in (1, 2)]
        if any(rank(w) != rank(d) for w, d in [(np.kron(*low), d) for d in sized.delta(sized.values).values()]):
            return math.inf
        if any(rank(d) != rank(low[0]) * rank(low[1]) for d in sized.delta(sized.values).values()):
            return math.inf
    return 0.0


def van_loan(case: Case) -> float:
    """A Kronecker product has rank 1 after Van Loan's rearrangement: rows (o1 i1), columns (o2 i2)."""
    for sized in case.in_float64().groups():
        (o1, i1), (o2, i2) = (sized.values[f"k{k}_weight"].shape for k in (1, 2))
        for delta in sized.delta(sized.values).values():
            rearranged = delta.reshape(o1, o2, i1, i2).transpose(0, 2, 1, 3).reshape(o1 * i1, o2 * i2)
            if np.linalg.matrix_rank(rearranged) != 1:
                return math.inf
    return exact(True)


IDENTITIES = (
    Identity("LoRA_r + LoRA_s", "LoRA_{r+s}", st.builds(lora, st.integers(2, 4)), loras_add_up),
    Identity(
        "rank of a Kronecker product",
        "product of ranks",
        st.builds(lambda r, s: AdapterSpec(Kronecker(CP(r), CP(s))), st.integers(1, 3), st.integers(1, 3)),
        ranks_multiply,
    ),
    Identity(
        "Kronecker, rearranged",
        "rank 1",
        st.builds(lambda f: AdapterSpec(Kronecker(Dense(), Dense(), factor=f)), st.sampled_from((-1, 2, 3))),
        van_loan,
    ),
)
