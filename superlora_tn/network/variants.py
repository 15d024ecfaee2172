"""The paper's variants (and a few of its relatives), each a function of a few lines that returns an `AdapterSpec`.

SuperLoRA: Chen et al., arXiv 2403.11887. ``o`` out, ``i`` in, ``m`` which weight, ``r s`` bonds.

Where a weight is so small that a lower rank gives every update already, that rank is taken (``over="cap"``), so that a router
of one output stops no model; counts are lower there than the formulas say, and the scale stays alpha / `rank`. VeRA's rank has
no such bound, as its B and A are fixed.
"""

from __future__ import annotations

from functools import partial
from typing import overload

from superlora_tn.declare.bounds import MAX_ORDER, MAX_PARTS
from superlora_tn.declare.fold import FlatFold, PhysicalFold
from superlora_tn.declare.maps import Projection
from superlora_tn.declare.parts import (
    CP,
    Dense,
    Hadamard,
    Kronecker,
    Network,
    Node,
    Part,
    SpecError,
    Tucker,
    check_count,
)
from superlora_tn.network.budget import Budget
from superlora_tn.network.spec import AdapterSpec


def dense(alpha: float | None = None, rslora: bool = False, dropout: float = 0.0) -> AdapterSpec:
    """Dense fine-tuning: ``dW[o i] = W[o i]``. Count: sum(out * in)."""
    return AdapterSpec(Dense(), alpha=alpha, rslora=rslora, dropout=dropout)


def lora(rank: int, alpha: float | None = None, rslora: bool = False, dropout: float = 0.0) -> AdapterSpec:
    """LoRA: ``dW[o i] = B[o r] A[r i]`` (Hu et al. 2021). Count: r * sum(out + in)."""
    return AdapterSpec(CP(rank, over="cap"), alpha=alpha, rslora=rslora, dropout=dropout)


def loha(rank: int, alpha: float | None = None, rslora: bool = False, dropout: float = 0.0) -> AdapterSpec:
    """LoHa / FedPara: the elementwise product of two LoRAs (Hyeon-Woo et al. 2021). Count: 2 r * sum(out + in)."""
    low = CP(rank, over="cap")
    return AdapterSpec(Hadamard(low, low), alpha=alpha, rslora=rslora, dropout=dropout)


def lokr(
    rank: int,
    factor: int = -1,
    decompose_both: bool = False,
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
) -> AdapterSpec:
    """LoKr: ``dW[(o1 o2) (i1 i2)] = W1[o1 i1] W2[o2 i2]`` (Yeh et al. 2023), W2 of low rank.

    Sizes split by PEFT's rule; a split whose rank is at least half its larger side stays dense, as in PEFT. On a convolution
    `attach` splits its channels, and the kernel stays with the second factor, as in PEFT and LyCORIS.

    Args:
        rank: rank of the decomposed splits.
        factor: the wanted first factor; -1 splits most evenly.
        decompose_both: give both splits low rank (the paper's form).
    """
    low = CP(rank, dense_if_large=True, over="cap")
    network = Kronecker(low if decompose_both else Dense(), low, factor=factor)
    return AdapterSpec(network, alpha=alpha, rslora=rslora, dropout=dropout)


def lotr(rank: int, alpha: float | None = None, rslora: bool = False, dropout: float = 0.0) -> AdapterSpec:
    """LoTR: ``dW[m o i] = U[o r] G[m r s] V[i s]``, U and V shared by all weights of one shape (Bershatsky et al. 2024).

    Count: r (out + in) + members r^2 for each shape.
    """
    network = Tucker(rank, factors="out in", over="cap")
    return AdapterSpec(network, PhysicalFold("member out in"), alpha=alpha, rslora=rslora, dropout=dropout)


def lonkr(rank: int, splits: int = 3, alpha: float | None = None, rslora: bool = False, dropout: float = 0.0) -> AdapterSpec:
    """LoNKr: a Kronecker product of `splits` low-rank matrices (SuperLoRA, table 1). ``lonkr(r, 2)`` is LoKr's paper form."""
    check_count("lonkr", "splits", splits, MAX_PARTS)
    low = CP(rank, dense_if_large=True, over="cap")
    return AdapterSpec(Kronecker(*[low] * splits), alpha=alpha, rslora=rslora, dropout=dropout)


def lorta(
    rank: int,
    order: int = 3,
    groups: int = 1,
    projection: Projection | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
) -> AdapterSpec:
    """LoRTA (the paper's): a Tucker with a full core of r^M over M equal sides d = ceil((rho N / G)^(1 / M)).

    Count: G (r^M + M d r).
    """
    return AdapterSpec(Tucker(rank, over="cap"), FlatFold(order, groups), projection, alpha, dropout, rslora)


def _superlora(
    rank: int,
    order: int,
    groups: int | str,
    splits: int,
    projection: Projection | None,
    alpha: float | None,
    rslora: bool = False,
    dropout: float = 0.0,
) -> AdapterSpec:
    check_count("superlora", "splits", splits, MAX_ORDER)
    low = CP(rank, dense_if_large=splits > 1, over="cap")
    part: Part = Dense() if order == 1 else low if order == 2 else Tucker(rank, over="cap")
    network = Kronecker(*[part] * splits) if splits > 1 else part
    physical = groups == "weight" and order <= 2 and projection is None
    fold = PhysicalFold() if physical else FlatFold(order, groups)
    return AdapterSpec(network, fold, projection, alpha, dropout, rslora)


@overload
def superlora(
    rank: int,
    order: int = 2,
    groups: int | str = 1,
    splits: int = 1,
    projection: Projection | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
) -> AdapterSpec: ...


@overload
def superlora(
    rank: int | None = None,
    order: int | None = 2,
    groups: int | str | None = 1,
    splits: int = 1,
    projection: Projection | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    *,
    ratio: float | None = 1.0,
    budget: int,
) -> Budget: ...


def superlora(
    rank: int | None = None,
    order: int | None = 2,
    groups: int | str | None = 1,
    splits: int = 1,
    projection: Projection | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    *,
    ratio: float | None = 1.0,
    budget: int | None = None,
) -> AdapterSpec | Budget:
    """The whole formula: ``dW_g = F(kron_k(C_gk x_1 A_gk1 ... x_M A_gkM))`` (SuperLoRA, equation 4).

    Args:
        rank: r of every factor.
        order: M. 1 is a plain vector; 2 has the superdiagonal core (LoRA's form); above, a full core of r^M.
        groups: G over all targets, or ``"weight"``.
        splits: K, the number of Kronecker factors.
        projection: F.
        alpha, rslora, dropout: see `AdapterSpec`.
        budget: at most so many parameters: gives a `Budget`, which `attach` (or `choose(shapes)`) turns into the spec
            with the largest count not above it; rank, order, groups and ratio are searched where they are None.
        ratio: with a budget, the projection's rho.
    """
    if budget is not None:
        formula = partial(_superlora, rslora=rslora, dropout=dropout) if rslora or dropout else _superlora
        return Budget(budget, formula, rank, order, groups, splits, ratio, projection, alpha)
    if rank is None or order is None or groups is None or ratio != 1.0:
        raise SpecError(
            f"superlora was given rank={rank}, order={order}, groups={groups}, ratio={ratio}; only with budget=... "
            "may a setting be left free (None), and a ratio be given apart from its projection."
        )
    return _superlora(rank, order, groups, splits, projection, alpha, rslora, dropout)


def vera(rank: int, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """VeRA: ``dW[m o i] = b[m o] B[o r] d[m r] A[r i]``, B and A frozen and shared (Kopiczko et al. 2023).

    Trained: members (out + r) for each shape. Here B and A are shared by weights of one shape.
    """
    network = Network(
        "m o i",
        {"r": rank},
        b=Node("m o", init="zeros"),
        B=Node("o r", init="uniform", trainable=False),
        d=Node("m r", init="normal"),
        A=Node("r i", init="uniform", trainable=False),
    )
    return AdapterSpec(network, PhysicalFold("member out in"), alpha=alpha, dropout=dropout)
