"""Relatives of the presets as declarations, and their papers' formulas written out in numpy, one weight at a time.

The formulas share nothing with `references`, which reads any declaration: they are the printed sums over ranks. They
give dW before the scale.

| method | formula | source |
|---|---|---|
| AdaLoRA's form | dW = P diag(lam) Q | Zhang et al. 2023, equation 1 |
| VeRA | dW_m = diag(b_m) B diag(d_m) A | Kopiczko et al. 2023, equation 2 |
| LoTR, FacT-TT | dW_m[o i] = sum_rs U[o r] G_m[r s] V[i s] | Bershatsky et al. 2024; Jie and Deng 2023 |
| FacT-TK | dW_m[o i] = sum_krs C[k r s] P[m k] U[o r] V[i s] | Jie and Deng 2023 |
| TensLoRA, Tucker | dW_lt[(h o) i] = sum G[..] L[l ..] T[t ..] H[h ..] O[o ..] I[i ..] | Marmoret et al. 2025 |
| TensLoRA, CP | dW_lt[(h o) i] = sum_r L[l r] T[t r] H[h r] O[o r] I[i r] | Marmoret et al. 2025 |

TensLoRA takes any of layer, type and head beside out and in ("depth", "qkv", "att"). Heads are the slow part of out, as
attention reads them; TensLoRA's research code joins them as the fast part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from superlora_tn.declare.fold import PhysicalFold, Shape
from superlora_tn.declare.parts import CP, Network, Node, Part, Tucker
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.variants import vera
from superlora_tn.verification.references.textbook import Array, Values, layer_and_type

Place = Mapping[str, int]  # mode -> which layer, type or member a weight is
Formula = Callable[[Values, Place], Array]
MEMBERS = PhysicalFold("member out in")


def adalora(rank: int, alpha: float | None = None) -> AdapterSpec:
    """AdaLoRA's form: ``dW[o i] = P[o r] lam[r] Q[r i]``. Count: r * sum(out + in + 1)."""
    return AdapterSpec(Network("o i", {"r": rank}, P="o r", lam=Node("r", init="zeros"), Q="r i"), alpha=alpha)


def fact_tt(rank: int, alpha: float | None = None) -> AdapterSpec:
    """FacT-TT: ``dW[m o i] = U[o r] G[m r s] V[i s]``, V zero at the start. Count: r (out + in) + members r^2."""
    network = Network("m o i", {"r": rank, "s": rank}, U="o r", G="m r s", V=Node("i s", init="zeros"))
    return AdapterSpec(network, MEMBERS, alpha=alpha)


def fact_tk(rank: int, member_rank: int, alpha: float | None = None) -> AdapterSpec:
    """FacT-TK: ``dW[m o i] = C[k r s] P[m k] U[o r] V[i s]``, V zero at the start; k has `member_rank`.

    Count: r (out + in) + members k + k r^2.
    """
    sizes = {"k": member_rank, "r": rank, "s": rank}
    network = Network("m o i", sizes, C="k r s", P="m k", U="o r", V=Node("i s", init="zeros"))
    return AdapterSpec(network, MEMBERS, alpha=alpha)


def tenslora(
    rank: int, modes: str = "layer type out in", heads: int | None = None, cp: bool = False, alpha: float | None = None
) -> AdapterSpec:
    """TensLoRA: a Tucker (or CP) over out, in and any of layer, type and head, `heads` of them."""
    return AdapterSpec(CP(rank) if cp else Tucker(rank), PhysicalFold(modes, heads), alpha=alpha)


def delta(spec: AdapterSpec, shapes: Mapping[str, Shape], values: Values) -> dict[str, Array]:
    """dW of each weight of one group by its paper's formula, before the scale.

    Raises:
        ValueError: no formula is written out for the declaration.
    """
    formula = written_out(spec)
    if formula is None:
        raise ValueError(f"no paper's formula is written out for {spec}.")
    return {name: formula(values, place_of(name, list(shapes))) for name in shapes}


def place_of(name: str, names: Sequence[str]) -> Place:
    """Which layer, type and member a weight is, each counted in the order of the names."""
    layers, types = (list(dict.fromkeys(layer_and_type(n)[k] for n in names)) for k in (0, 1))
    layer, kind = layer_and_type(name)
    return {"layer": layers.index(layer), "type": types.index(kind), "member": names.index(name)}


def written_out(spec: AdapterSpec) -> Formula | None:
    """The paper's formula of a declaration, None where none is written out."""
    part, fold = spec.network, spec.fold
    if not isinstance(fold, PhysicalFold):
        return None
    for declared, formula in ((adalora(1), _adalora), (vera(1), _vera), (fact_tt(1), _fact_tt), (fact_tk(1, 1), _fact_tk)):
        if fold == declared.fold and same_nodes(part, declared.network):
            return formula
    if fold == MEMBERS and isinstance(part, Tucker) and part.factors == "out in":
        return _lotr
    modes = fold.modes.split()
    if len(modes) > 2 and modes[-2:] == ["out", "in"] and not {"member", "expert"} & set(modes):
        if isinstance(part, Tucker) and part.factors is None:
            return partial(_tenslora_tucker, modes)
        if isinstance(part, CP) and not part.dense_if_large:
            return partial(_tenslora_cp, modes)
    return None


def same_nodes(part: Part, other: Part) -> bool:
    """Whether two networks are one but for their ranks."""
    return isinstance(part, Network) and isinstance(other, Network) and (part.modes, part.nodes) == (other.modes, other.nodes)


def _adalora(v: Values, _: Place) -> Array:
    return np.asarray(v["P"] @ np.diag(v["lam"]) @ v["Q"])


def _vera(v: Values, at: Place) -> Array:
    return np.asarray(np.diag(v["b"][at["member"]]) @ v["B"] @ np.diag(v["d"][at["member"]]) @ v["A"])


def _fact_tt(v: Values, at: Place) -> Array:
    return np.asarray(v["U"] @ v["G"][at["member"]] @ v["V"].T)


def _lotr(v: Values, at: Place) -> Array:
    return np.asarray(v["factor_out"] @ v["core"][at["member"]] @ v["factor_in"].T)


def _fact_tk(v: Values, at: Place) -> Array:
    result = np.zeros((len(v["U"]), len(v["V"])))
    for k, r, s in np.ndindex(*v["C"].shape):
        result += v["C"][k, r, s] * v["P"][at["member"], k] * np.outer(v["U"][:, r], v["V"][:, s])
    return result


def _tenslora_tucker(modes: Sequence[str], v: Values, at: Place) -> Array:
    """One rank-one matrix for each element of the core."""
    return sum(
        (v["core"][ranks] * _rank_one(modes, v, at, ranks) for ranks in np.ndindex(*v["core"].shape)),
        start=np.zeros(()),
    )


def _tenslora_cp(modes: Sequence[str], v: Values, at: Place) -> Array:
    """One rank-one matrix for each column that the factors share."""
    return sum((_rank_one(modes, v, at, [r] * len(modes)) for r in range(v["factor_in"].shape[1])), start=np.zeros(()))


def _rank_one(modes: Sequence[str], v: Values, at: Place, ranks: Sequence[int]) -> Array:
    """The factors' columns at these ranks: a number for the weight's layer and type, times (head (x) out) in^T."""
    column = {mode: v[f"factor_{mode}"][:, r] for mode, r in zip(modes, ranks, strict=True)}
    out = np.kron(column["head"], column["out"]) if "head" in column else column["out"]
    number = np.prod([column[mode][at[mode]] for mode in modes if mode in ("layer", "type")])
    return np.asarray(number * np.outer(out, column["in"]))
