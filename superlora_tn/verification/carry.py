"""The documented map from our nodes to PEFT's and LyCORIS's parameters, for one weight. Pure numpy.

| ours | PEFT | LyCORIS |
|---|---|---|
| lora: factor_out (o r), factor_in (i r) | lora_B = factor_out, lora_A = factor_in^T | lora_up, lora_down alike |
| loha: h1_*, h2_* | hada_w1_a = h1_factor_out, hada_w1_b = h1_factor_in^T; w2 of h2 | the same |
| lokr: k1_weight or k1_factor_* | lokr_w1, or lokr_w1_a = k1_factor_out with lokr_w1_b = k1_factor_in^T; w2 of k2 | the same |
| vera: b (m o), d (m r), B, A | vera_lambda_b = b[m], vera_lambda_d = d[m], vera_B, vera_A | - |

Both peers scale by alpha / r (alpha / sqrt(r) with rsLoRA), as we do. Where our alpha is None the scale is 1, which is
their alpha = r (or sqrt(r)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from superlora_tn.fold import PhysicalFold
from superlora_tn.nodes import CP, Dense, Hadamard, Kronecker, Network
from superlora_tn.spec import AdapterSpec
from superlora_tn.variants import vera
from superlora_tn.verification.references import Array, Values

Kind = Literal["lora", "loha", "lokr", "vera"]
PLAIN = PhysicalFold()


@dataclass(frozen=True)
class Carried:
    """One weight's adapter as a peer holds it.

    Attributes:
        kind: the peer's method.
        rank, alpha, rslora: its scale.
        settings: further settings of LoKr, as both peers name them in meaning: factor, decompose_both.
        tensors: the parameters by PEFT's names.
    """

    kind: Kind
    rank: int
    alpha: float
    rslora: bool
    settings: dict[str, Any]
    tensors: dict[str, Array]


def kind_of(spec: AdapterSpec) -> Kind | None:
    """The peers' method that a declaration is, None for one that they do not have."""
    part = spec.network
    if isinstance(part, Network):
        return "vera" if part == _vera_part(part) and spec.fold == vera(1).fold and spec.scale == 1 else None
    if spec.fold != PLAIN:
        return None
    if isinstance(part, CP) and not part.dense_if_large:
        return "lora"
    if isinstance(part, Hadamard) and len(part.parts) == 2 and part.parts[0] == part.parts[1]:
        return "loha" if isinstance(part.parts[0], CP) and not part.parts[0].dense_if_large else None
    if isinstance(part, Kronecker) and len(part.parts) == 2 and isinstance(part.parts[1], CP):
        first, second = part.parts[0], part.parts[1]
        return "lokr" if second.dense_if_large and first in (second, Dense()) else None
    return None


def _vera_part(part: Network) -> Network | None:
    rank = dict(part.sizes).get("r")
    made = vera(rank).network if rank else None
    return made if isinstance(made, Network) else None


def to_peft(spec: AdapterSpec, nodes: Values, member: int = 0) -> Carried:
    """Carry one weight's parameters over.

    Args:
        spec: a declaration for which `kind_of` is not None.
        nodes: the group's node values under our names.
        member: which weight of the group (VeRA's b and d).

    Raises:
        ValueError: the peers have no such method.
    """
    kind = kind_of(spec)
    if kind is None:
        raise ValueError(f"PEFT has no method for {spec}; it has lora, loha, lokr and vera on single weights.")
    rank, settings = _rank(spec), {}
    if kind == "vera":
        tensors = {
            "vera_lambda_b": nodes["b"][member],
            "vera_lambda_d": nodes["d"][member],
            "vera_B": nodes["B"],
            "vera_A": nodes["A"],
        }
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
    return Carried(kind, rank, alpha, own, settings, tensors)


def _rank(spec: AdapterSpec) -> int:
    part = spec.network
    if isinstance(part, Network):
        return dict(part.sizes)["r"]
    inner = part.parts[1] if isinstance(part, Kronecker | Hadamard) else part
    assert isinstance(inner, CP)
    return inner.rank


def _pair(nodes: Values, prefix: str, name: str) -> dict[str, Array]:
    """A split that stayed dense, or its two factors."""
    if f"{prefix}weight" in nodes:
        return {name: nodes[f"{prefix}weight"]}
    return {f"{name}_a": nodes[f"{prefix}factor_out"], f"{name}_b": nodes[f"{prefix}factor_in"].T}
