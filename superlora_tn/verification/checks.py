"""Which claims there are about a declaration: properties, and dW, outputs and gradients against each reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from superlora_tn.declare.parts import SpecError
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.verification.cases import DTYPES, Case, NotApplicable, Sized, as_array, has_linear_map, is_linear, ratio
from superlora_tn.verification.claims import joined, life, properties
from superlora_tn.verification.references import papers, peers
from superlora_tn.verification.references import textbook as references
from superlora_tn.verification.references.textbook import Array

Delta = Callable[[dict[str, Array]], Any]
NONE = "-"
REFERENCES = ("formula", "paper", "tensorly", "peft", "lycoris")


@dataclass(frozen=True)
class Check:
    """One claim.

    Attributes:
        claim: the property's name.
        reference: against what; ``-`` for none.
        measure: its error in a case, in units of the bound.
        applies: whether it says anything about a declaration.
        source: the reference as a pasteable expression.
        whole: whether it is about the whole declaration; the others are about its network, whatever becomes of its matrix.
    """

    claim: str
    reference: str
    measure: Callable[[Case], float]
    applies: Callable[[AdapterSpec], bool] = lambda _: True
    source: str = ""
    whole: bool = False


def delta_check(reference: Callable[[Sized], Mapping[str, Array]]) -> Callable[[Case], float]:
    """The error of dW against a reference."""

    def measure(case: Case) -> float:
        worst = 0.0
        for sized in case.groups():
            ours, theirs = sized.delta(sized.values), reference(sized)
            for target in sized.shapes:
                worst = max(worst, ratio(ours[target], np.asarray(theirs[target]), sized.allowed(target)))
        return worst

    return measure


def forward_formula(case: Case) -> float:
    """``out + x dW^T`` with dW by the textbook."""
    import torch

    worst = 0.0
    for sized in case.groups():
        adapter, deltas = sized.adapter(), sized.formula()
        for target in sized.shapes:
            x, out, allowed = properties.forward_case(sized, target)
            tensors = [torch.from_numpy(a).to(DTYPES[case.dtype]) for a in (x, out)]
            worst = max(worst, ratio(as_array(adapter(tensors[0], target, tensors[1])), x @ deltas[target].T, allowed))
    return worst


def gradient_formula(case: Case) -> float:
    """Gradients against the textbook's: dW is linear in a node, so its derivative along E is dW with E in its place.

    Through a map that is not linear it is the imaginary part at a complex step, which truncates nothing.
    """
    if not has_linear_map(case.spec):
        raise NotApplicable
    step = 1.0 if is_linear(case.spec) else 1e-30j
    worst = 0.0
    for sized in case.in_float64().groups():
        generator = np.random.default_rng(case.seed + 5)
        weights = properties.cotangents(sized)
        for name, grad in properties.node_gradients(sized).items():
            direction = properties.normal(generator, grad.shape)
            start = 0.0 if step == 1.0 else sized.values[name]
            moved = sized.formula({**sized.values, name: start + step * direction})
            slopes = {t: s.real if step == 1.0 else s.imag / abs(step) for t, s in moved.items()}
            sizes = sized.magnitude(directions={name: direction})
            size = sum(float((m * np.abs(weights[t])).sum()) for t, m in sizes.items())
            expected = sum(float((s * weights[t]).sum()) for t, s in slopes.items())
            allowed = (sized.roundings + 2 * (sum(w.size for w in weights.values()) + grad.size)) * sized.unit * size
            worst = max(worst, ratio(np.array((grad * direction).sum()), np.array(expected), allowed))
    return worst


def user_delta(function: Delta) -> Callable[[Sized], dict[str, Array]]:
    """A user's function of one group's nodes: dW before the scale, of one weight, or of all stacked or one after another."""

    def reference(sized: Sized) -> dict[str, Array]:
        found = np.asarray(function({n: v.copy() for n, v in sized.values.items()}), dtype=np.float64)
        ends = np.cumsum([o * i for o, i in sized.shapes.values()])
        if found.size != ends[-1]:
            raise ValueError(f"the reference gave the shape {found.shape} for weights {list(sized.shapes.values())}.")
        flat = references.scaling(sized.spec) * found.reshape(-1)
        return {n: flat[end - o * i : end].reshape(o, i) for (n, (o, i)), end in zip(sized.shapes.items(), ends, strict=True)}

    return reference


def paper_delta(sized: Sized) -> dict[str, Array]:
    """dW of each weight by its paper's own formula."""
    scale = references.scaling(sized.spec)
    return {n: scale * w for n, w in papers.delta(sized.spec, sized.shapes, sized.values).items()}


def property_checks() -> list[Check]:
    """The claims that need no reference."""
    return [Check(name, NONE, measure, source=repr(NONE)) for name, measure in properties.PROPERTIES.items()]


def join_check() -> Check:
    """The claim about updates that are not added."""
    return Check(
        "W' = the join's formula", "formula", joined.joins, lambda spec: spec.join is not None, repr("formula"), whole=True
    )


def life_checks() -> list[Check]:
    """The claims about the whole declaration on a model, however it joins."""
    found = [Check(name, NONE, measure, source=repr(NONE), whole=True) for name, measure in life.LIFE.items()]
    return [*found, Check(life.BASED_NODES, NONE, life.based_nodes, life.has_based_nodes, repr(NONE), whole=True)]


def reference_checks(name: str) -> list[Check]:
    """The claims against a named reference."""

    def made(claim: str, measure: Callable[[Case], float], applies: Callable[[AdapterSpec], bool] = lambda _: True) -> Check:
        return Check(claim, name, measure, applies, repr(name))

    if name == "formula":
        return [
            made("dW", delta_check(lambda sized: sized.formula())),
            made("forward", forward_formula),
            made("gradients", gradient_formula),
            made("count", properties.count_by_formula),
        ]
    if name == "paper":
        return [made("dW", delta_check(paper_delta), lambda spec: papers.written_out(spec) is not None)]
    if name == "tensorly":
        return [made("dW", delta_check(peers.tensorly_delta), peers.has_tensorly)]
    if name == "peft":
        return [
            made("dW (get_delta_weight)", delta_check(peers.peft_delta), peers.has_peft),
            made("forward", peers.peft_forward, peers.has_peft),
        ]
    return [
        made("dW (get_weight)", delta_check(peers.lycoris_delta), peers.has_lycoris),
        made("forward (bypass)", peers.lycoris_bypass, peers.has_lycoris),
    ]


def user_check(function: Delta) -> Check:
    """dW against a user's function; the pasted line calls it by its name."""
    name = getattr(function, "__name__", "reference")
    name = name if name.isidentifier() else "reference"  # a lambda has no name to paste
    return Check("dW", name, delta_check(user_delta(function)), source=name)


Against = str | Delta


def as_list(against: Against | Sequence[Against] | None) -> list[Against]:
    """What the caller named, as a list; None names all references.

    Raises:
        SpecError: an unknown reference.
    """
    if against is None:
        return list(REFERENCES)
    named = list(against) if isinstance(against, Sequence) and not isinstance(against, str) else [against]
    for one in named:
        if not callable(one) and one not in (*REFERENCES, NONE):
            raise SpecError(f"there is no reference {one!r}; choose among {', '.join(REFERENCES)}, or give a function.")
    return named


def select(against: Sequence[Against]) -> Iterator[Check]:
    """The claims against what is named."""
    for one in against:
        if isinstance(one, str) and one != NONE:
            yield from reference_checks(one)
        elif not isinstance(one, str):
            yield user_check(one)
