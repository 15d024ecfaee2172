"""The documented map between our nodes and PEFT's and LyCORIS's parameters, both ways. Pure numpy.

| ours | PEFT | LyCORIS |
|---|---|---|
| lora: factor_out (o r), factor_in (i r) | lora_B = factor_out, lora_A = factor_in^T | lora_up, lora_down alike |
| adalora: P (o r), lam (r), Q (r i) | lora_B = P, lora_E = lam as a column, lora_A = Q | - |
| loha: h1_*, h2_* | hada_w1_a = h1_factor_out, hada_w1_b = h1_factor_in^T; w2 of h2 | the same |
| lokr: k1_weight or k1_factor_* | lokr_w1, or lokr_w1_a = k1_factor_out with lokr_w1_b = k1_factor_in^T; w2 of k2 | the same |
| vera: b (m o), d (m r), B, A | vera_lambda_b = b[m], vera_lambda_d = d[m], vera_B, vera_A | - |

Both peers scale by alpha / r (alpha / sqrt(r) with rsLoRA), as we do. Where our alpha is None the scale is 1, which is
their alpha = r (or sqrt(r)). A network in index notation has no rank of its own, so AdaLoRA's form is scaled by alpha
alone. On weights so small that a preset takes a lower rank, the peers keep theirs; what they have there comes back as
``over="keep"``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from superlora_tn.declare.fold import PhysicalFold
from superlora_tn.declare.parts import CP, Dense, Hadamard, Kronecker, Network, Part
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.variants import loha, lokr, lora, vera
from superlora_tn.verification.references.papers import adalora, same_nodes
from superlora_tn.verification.references.textbook import Array, Values

Kind = Literal["lora", "adalora", "loha", "lokr", "vera"]
PLAIN = PhysicalFold()


@dataclass(frozen=True)
class Carried:
    """One weight's adapter as a peer holds it.

    Attributes:
        kind: the peer's method.
        rank, alpha, rslora: its scale, alpha / rank or alpha / sqrt(rank).
        tensors: the parameters by PEFT's names.
        settings: further settings of LoKr, as both peers name them in meaning: factor, decompose_both.
    """

    kind: Kind
    rank: int
    alpha: float
    rslora: bool
    tensors: dict[str, Array]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """What dW is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def is_capped(self) -> bool:
        """Whether the weight's factors have fewer columns than the rank, which the peers keep on any weight."""
        return any(len(t) < self.rank for n, t in self.tensors.items() if n == "lora_A" or n.endswith("_b"))


def kind_of(spec: AdapterSpec) -> Kind | None:
    """The peers' method that a declaration is, None for one that they do not have."""
    part = spec.network
    if same_nodes(part, vera(1).network):
        return "vera" if spec.fold == vera(1).fold and spec.scale == 1 else None
    if spec.fold != PLAIN:
        return None
    if isinstance(part, Network):
        return "adalora" if same_nodes(part, adalora(1).network) else None
    if isinstance(part, CP) and not part.dense_if_large:
        return "lora"
    if isinstance(part, Hadamard) and len(part.parts) == 2 and part.parts[0] == part.parts[1]:
        return "loha" if isinstance(part.parts[0], CP) and not part.parts[0].dense_if_large else None
    if isinstance(part, Kronecker) and len(part.parts) == 2 and isinstance(part.parts[1], CP):
        first, second = part.parts[0], part.parts[1]
        return "lokr" if second.dense_if_large and first in (second, Dense()) else None
    return None


def to_peft(spec: AdapterSpec, nodes: Values, member: int = 0) -> Carried:
    """Carry one weight's parameters over to the peers; `from_peft` brings them back, bit for bit.

    Args:
        spec: a declaration for which `kind_of` is not None.
        nodes: the group's node values under our names.
        member: which weight of the group (VeRA's b and d).

    Raises:
        ValueError: the peers have no such method.
    """
    kind = kind_of(spec)
    if kind is None:
        raise ValueError(f"PEFT has no method for {spec}; it has lora, adalora, loha, lokr and vera.")
    rank, settings = _rank(spec.network), {}
    if kind == "vera":
        tensors = {
            "vera_lambda_b": nodes["b"][member],
            "vera_lambda_d": nodes["d"][member],
            "vera_B": nodes["B"],
            "vera_A": nodes["A"],
        }
    elif kind == "adalora":
        tensors = {"lora_A": nodes["Q"], "lora_B": nodes["P"], "lora_E": nodes["lam"][:, None]}
    elif kind == "lora":
        tensors = {"lora_A": nodes["factor_in"].T, "lora_B": nodes["factor_out"]}
    elif kind == "loha":
        tensors = {**_pair(nodes, "h1_", "hada_w1"), **_pair(nodes, "h2_", "hada_w2")}
    else:
        assert isinstance(spec.network, Kronecker)
        settings = {"factor": spec.network.factor, "decompose_both": spec.network.parts[0] != Dense()}
        tensors = {**_pair(nodes, "k1_", "lokr_w1"), **_pair(nodes, "k2_", "lokr_w2")}
    # PEFT's LoKr and LoHa know no rsLoRA; there alpha carries the whole scale.
    own = spec.rslora and kind == "lora"
    root = math.sqrt(rank) if own else rank
    alpha = spec.alpha if own and spec.alpha is not None else spec.scale * root
    return Carried(kind, rank, alpha, own, tensors, settings)


def from_peft(*carried: Carried) -> tuple[AdapterSpec, dict[str, Array]]:
    """Bring parameters back from the peers: the declaration, and the values of its nodes under our names.

    Args:
        carried: one weight; for VeRA all weights of a group in order, which share B and A.

    Raises:
        ValueError: several weights that share no network, or no weight.
    """
    first = carried[0] if carried else None
    if first is None or (len(carried) > 1 and not all(_shares(first, other) for other in carried[1:])):
        raise ValueError(f"from_peft was given {len(carried)} weights; give one, or several VeRA weights with equal B and A.")
    tensors, rank, alpha = first.tensors, first.rank, first.alpha
    if first.kind == "vera":
        stacked = {n: np.stack([c.tensors[f"vera_lambda_{n}"] for c in carried]) for n in ("b", "d")}
        return vera(rank), {**stacked, "B": tensors["vera_B"], "A": tensors["vera_A"]}
    if first.kind == "adalora":
        return adalora(rank, first.scale), {"P": tensors["lora_B"], "lam": tensors["lora_E"][:, 0], "Q": tensors["lora_A"]}
    if first.kind == "lora":
        spec = _as_stated(lora(rank, alpha, rslora=first.rslora), first)
        return spec, {"factor_out": tensors["lora_B"], "factor_in": tensors["lora_A"].T}
    if first.kind == "loha":
        return _as_stated(loha(rank, alpha), first), {
            **_unpair(tensors, "hada_w1", "h1_"),
            **_unpair(tensors, "hada_w2", "h2_"),
        }
    spec = _as_stated(lokr(rank, first.settings["factor"], first.settings["decompose_both"], alpha), first)
    return spec, {**_unpair(tensors, "lokr_w1", "k1_"), **_unpair(tensors, "lokr_w2", "k2_")}


def _as_stated(spec: AdapterSpec, carried: Carried) -> AdapterSpec:
    """The declaration, with its ranks kept where the peer has more columns than a preset would take."""
    pairs = [("lora_B", "lora_A"), *((f"{n[:-1]}a", n) for n in carried.tensors if n.endswith("_b"))]
    held = [(carried.tensors[a], carried.tensors[b]) for a, b in pairs if b in carried.tensors]
    if all(len(b) <= min(len(a), b.shape[1]) for a, b in held):
        return spec
    return replace(spec, network=_keeping(spec.network))


def _keeping(part: Part) -> Part:
    """A part whose ranks are kept on any weight."""
    if isinstance(part, Hadamard):
        return Hadamard(*map(_keeping, part.parts))
    if isinstance(part, Kronecker):
        return Kronecker(*map(_keeping, part.parts), factor=part.factor)
    return replace(part, over="keep") if isinstance(part, CP) else part


def _shares(one: Carried, other: Carried) -> bool:
    """Whether two weights are members of one VeRA."""
    names = ("vera_B", "vera_A")
    same = (one.kind, one.rank) == (other.kind, other.rank) == ("vera", one.rank)
    return same and all(np.array_equal(one.tensors[n], other.tensors[n]) for n in names)


def _rank(part: Part) -> int:
    if isinstance(part, Network):
        return part.known["r"]
    inner = part.parts[1] if isinstance(part, Kronecker | Hadamard) else part
    assert isinstance(inner, CP)
    return inner.rank


def _pair(nodes: Values, prefix: str, name: str) -> dict[str, Array]:
    """A split that stayed dense, or its two factors."""
    if f"{prefix}weight" in nodes:
        return {name: nodes[f"{prefix}weight"]}
    return {f"{name}_a": nodes[f"{prefix}factor_out"], f"{name}_b": nodes[f"{prefix}factor_in"].T}


def _unpair(tensors: Values, name: str, prefix: str) -> dict[str, Array]:
    """`_pair`, back."""
    if name in tensors:
        return {f"{prefix}weight": tensors[name]}
    return {f"{prefix}factor_out": tensors[f"{name}_a"], f"{prefix}factor_in": tensors[f"{name}_b"].T}
