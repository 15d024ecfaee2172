"""Claims about dW itself over drawn declarations: sums, ranks, and what a network can reach.

Imported only where Hypothesis is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from hypothesis import strategies as st

from superlora_tn.declare.fold import FlatFold, Fold, PhysicalFold
from superlora_tn.declare.parts import CP, Dense, Kronecker, Tucker
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.verification import draws
from superlora_tn.verification.cases import Case, Sized, ratio
from superlora_tn.verification.claims.properties import exact
from superlora_tn.verification.references import textbook as references
from superlora_tn.verification.references.textbook import Array


@dataclass(frozen=True)
class Identity:
    """A claim about dW itself.

    Attributes:
        claim, reference: what is said, and what it is said to be.
        drawn: the cases.
        measure: the error in units of the bound.
    """

    claim: str
    reference: str
    drawn: st.SearchStrategy[Case]
    measure: Callable[[Case], float]

    def cases(self) -> st.SearchStrategy[Case]:
        """The cases."""
        return self.drawn


def loras_add_up(case: Case) -> float:
    """dW of the factors' first k columns plus dW of the rest is dW of all."""
    worst, case = 0.0, case.in_float64()
    assert isinstance(case.spec.network, CP)
    rank = case.spec.network.rank
    k = 1 + case.seed % (rank - 1)
    for sized in case.groups():
        pieces = []
        for own, columns in ((AdapterSpec(CP(k)), np.s_[:, :k]), (AdapterSpec(CP(rank - k)), np.s_[:, k:])):
            [piece] = replace(case, spec=own, shapes=tuple(sized.shapes.items())).groups()
            pieces.append(piece.delta({n: v[columns] for n, v in sized.values.items()}))
        for target, whole in sized.delta(sized.values).items():
            worst = max(worst, ratio(pieces[0][target] + pieces[1][target], whole, 2 * sized.allowed(target, more=2)))
    return worst


def ranks_multiply(case: Case) -> float:
    """rank(W1 (x) W2 ...) = rank(W1) rank(W2) ..., by singular values."""
    assert isinstance(case.spec.network, Kronecker)
    parts = range(1, len(case.spec.network.parts) + 1)
    for sized in case.in_float64().groups():
        low = [sized.values[f"k{k}_factor_out"] @ sized.values[f"k{k}_factor_in"].T for k in parts]
        expected = math.prod(int(np.linalg.matrix_rank(w)) for w in low)
        if any(np.linalg.matrix_rank(d) != expected for d in sized.delta(sized.values).values()):
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


# --- a Tucker of full rank reaches everything -----------------------------------------------------------------------


def tucker_reaches(case: Case) -> float:
    """With orthogonal factors Q_m and the core T x_m Q_m^T, a Tucker of full rank is T, whatever T.

    Of lower rank (`case.other`, the first columns and that corner of the core) it misses T by what was discarded: the
    error is the rest of the core times the Q_m, and, where no element is cut off, as large as that rest.
    """
    assert case.other is not None
    left, worst = case.in_float64(), 0.0
    lower = replace(left, spec=case.other, other=None)
    for full, low in zip(left.groups(), lower.groups(), strict=True):
        worst = max(worst, _reach_error(full, low))
    return worst


def _reach_error(full: Sized, low: Sized) -> float:
    names = [mode.name for mode, _ in full.graph.modes]
    generator = np.random.default_rng(full.case.seed)
    target = np.asarray(generator.standard_normal([mode.size for mode, _ in full.graph.modes]))
    turns = {k: np.linalg.qr(generator.standard_normal((s, s)))[0] for k, s in enumerate(target.shape)}
    core = references.tucker(target, {k: q.T for k, q in turns.items()})
    corner = tuple(slice(r) for r in low.values["core"].shape)
    rest = core.copy()
    rest[corner] = 0.0
    reached = full.delta({"core": core, **{f"factor_{n}": q for n, q in zip(names, turns.values(), strict=True)}})
    first = {f"factor_{n}": q[:, c] for n, q, c in zip(names, turns.values(), corner, strict=True)}
    short = low.delta({"core": core[corner], **first})
    wanted, lost = _cut(full, target), _cut(full, references.tucker(rest, turns))
    allowed = _reach_allowed(full, target, turns)
    worst = max(ratio(reached[t], wanted[t], allowed[t]) for t in wanted)
    worst = max(worst, *(ratio(short[t] + lost[t], wanted[t], 2 * allowed[t]) for t in wanted))
    if isinstance(full.spec.fold, FlatFold):
        return worst
    # The modes are all there, so the error's norm is the discarded core's; a norm of n numbers rounds n + 2 times.
    error = math.sqrt(sum(float(((wanted[t] - short[t]) ** 2).sum()) for t in wanted))
    slack = 2 * math.sqrt(sum(float((a**2).sum()) for a in allowed.values()))
    size = float(np.linalg.norm(rest))
    missed = exact(error > slack or not rest.any())
    return max(worst, missed, ratio(np.array(error), np.array(size), 2 * slack + 2 * (target.size + 2) * full.unit * size))


def _cut(sized: Sized, whole: Array) -> Mapping[str, Array]:
    """The weights that a whole tensor over the fold's modes holds."""
    return references.delta(AdapterSpec(Dense(), sized.spec.fold), sized.shapes, {"weight": whole})


def _reach_allowed(sized: Sized, target: Array, turns: Mapping[int, Array]) -> Mapping[str, Array]:
    """The rounding of both sides, and by how much the Q_m themselves fail to be orthogonal.

    A product with Q_m or its transpose sums d_m numbers, so the core and its way back round 2 (sum d_m + M) times.
    With delta_m >= |Q_m Q_m^T - I|, exact arithmetic gives T up to (prod (1 + delta_m) - 1) |T|.
    """
    back = references.tucker(np.abs(target), {k: np.abs(q.T) for k, q in turns.items()})
    absolute = references.tucker(back, {k: np.abs(q) for k, q in turns.items()})
    more = 2 * (sum(target.shape) + target.ndim)
    defects = [np.linalg.norm(q @ q.T - np.eye(len(q))) + len(q) ** 2 * sized.unit for q in turns.values()]
    off = (reduce(lambda a, d: a * (1 + float(d)), defects, 1.0) - 1) * float(np.linalg.norm(target))
    return {t: (sized.roundings + more) * sized.unit * a + off for t, a in _cut(sized, absolute).items()}


@st.composite
def _full_ranks(draw: st.DrawFn) -> Case:
    """Small weights of one group, a Tucker whose ranks are the sizes of its modes, and one of lower ranks."""
    physical = [PhysicalFold(modes) for modes in ("out in", "layer out in", "type layer in out")]
    folds: list[Fold] = [*physical, PhysicalFold("layer head out in", 2), FlatFold(2), FlatFold(3), FlatFold(4)]
    fold = draw(st.sampled_from(folds))
    small = [shapes for shapes in draws.candidates(1, 1) if sum(o * i for _, (o, i) in shapes) <= 200]
    case = draw(draws.cases(st.just(AdapterSpec(Tucker(1), fold)), small))
    group = case.groups()[0]
    sizes = [mode.size for mode, _ in group.graph.modes]
    lower = tuple(draw(st.integers(1, size)) for size in sizes)
    full, other = (AdapterSpec(Tucker(ranks), fold) for ranks in (tuple(sizes), lower))
    return replace(case, spec=full, shapes=tuple(group.shapes.items()), other=other)


IDENTITIES = (
    Identity("LoRA_r + LoRA_s", "LoRA_{r+s}", draws.cases(st.integers(2, 4).map(lambda r: AdapterSpec(CP(r)))), loras_add_up),
    Identity(
        "rank of a Kronecker product",
        "product of ranks",
        draws.cases(st.lists(st.integers(1, 3).map(CP), min_size=2, max_size=3).map(lambda p: AdapterSpec(Kronecker(*p)))),
        ranks_multiply,
    ),
    Identity(
        "Kronecker, rearranged",
        "rank 1",
        draws.cases(st.sampled_from((-1, 2, 3)).map(lambda f: AdapterSpec(Kronecker(Dense(), Dense(), factor=f)))),
        van_loan,
    ),
    Identity("Tucker of full rank, orthogonal factors", "any tensor", _full_ranks(), tucker_reaches),
)
