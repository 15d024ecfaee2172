"""Relatives of the presets, each a value in index notation: paper, formula, count of trainable numbers, start, reference.

``o`` out, ``i`` in, ``m`` which weight of a shape, ``l`` layer, ``t`` type, ``h`` head, ``r s`` bonds. One node starts at zero,
named behind each formula; counts are for one group of M weights (out, in).
"""

from __future__ import annotations

from superlora_tn.declare.fold import PhysicalFold
from superlora_tn.declare.parts import (
    CP,
    Dense,
    Frozen,
    Hadamard,
    Kronecker,
    Network,
    Node,
    SpecError,
    Sum,
    TensorTrain,
    Tucker,
    check_count,
)
from superlora_tn.network.spec import AdapterSpec

MEMBERS = PhysicalFold("member out in")


def frozen(indices: str) -> Node:
    """A node of fixed random numbers."""
    return Node(indices, init="uniform", trainable=False)


def based(indices: str, what: str) -> Node:
    """A frozen node of the base's weight."""
    return Node(indices, init=what, trainable=False)


def adalora(rank: int, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """AdaLoRA's form: ``dW[o i] = P[o r] lam[r] Q[r i]``, lam zero (Zhang et al. 2023; PEFT's AdaLoRA), whose
    ranks a `RankAllocator` prunes while it trains. Count: r (out + in + 1) a weight.
    """
    return AdapterSpec(Network("o i", {"r": rank}, P="o r", lam=Node("r", init="zeros"), Q="r i"), alpha=alpha, dropout=dropout)


def lora_fa(rank: int, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """LoRA-FA: ``dW[o i] = B[o r] A[r i]``, A frozen, B zero (Zhang et al. 2023, arXiv 2308.03303). Count: r out a weight."""
    return AdapterSpec(Network("o i", {"r": rank}, B=Node("o r", init="zeros"), A=frozen("r i")), alpha=alpha, dropout=dropout)


def krona(factor: int = -1, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """KronA: ``dW[(o1 o2) (i1 i2)] = W1[o1 i1] W2[o2 i2]``, W1 zero (Edalati et al. 2022).

    Count: o1 i1 + o2 i2 a weight, sides split by PEFT's rule.
    """
    return AdapterSpec(Kronecker(Dense(), Dense(), factor=factor), alpha=alpha, dropout=dropout)


def fact_tt(rank: int, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """FacT-TT: ``dW[m o i] = U[o r] G[m r s] V[i s]``, V zero (Jie and Deng 2023). Count: r (out + in) + M r^2."""
    network = Network("m o i", {"r": rank, "s": rank}, U="o r", G="m r s", V=Node("i s", init="zeros"))
    return AdapterSpec(network, MEMBERS, alpha=alpha, dropout=dropout)


def fact_tk(rank: int, member_rank: int = 4, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """FacT-TK: ``dW[m o i] = C[k r s] P[m k] U[o r] V[i s]``, V zero, k of size `member_rank` (Jie and Deng 2023).

    Count: r (out + in) + M k + k r^2.
    """
    sizes = {"k": member_rank, "r": rank, "s": rank}
    network = Network("m o i", sizes, C="k r s", P="m k", U="o r", V=Node("i s", init="zeros"))
    return AdapterSpec(network, MEMBERS, alpha=alpha, dropout=dropout)


def lorta_cp(rank: int, heads: int | None = None, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """LoRTA of Hounie et al. 2024 (arXiv 2410.04060; not the paper's LoRTA): a CP over layer, type, head, out and in.

    ``dW[l t (h o') i] = L[l r] T[t r] H[h r] B[o' r] A[i r]``, B zero. Count: r (L + T + h + out / h + in).
    """
    modes = "layer type out in" if heads is None else "layer type head out in"
    return AdapterSpec(CP(rank), PhysicalFold(modes, heads), alpha=alpha, dropout=dropout)


def cara(rank: int, heads: int = 1, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """CaRA: a CP with weights over all attention weights of a model (Veeramacheneni et al. 2025).

    ``dW[m (h o') i] = lam[r] M[m r] H[h r] B[o' r] A[i r]``, B zero. Count: r (1 + M + h + out / h + in).
    """
    nodes: dict[str, str | Node] = {
        "lam": Node("r", init="ones"),
        "M": "m r",
        "H": "h r",
        "B": Node("o r", init="zeros"),
        "A": "i r",
    }
    return AdapterSpec(
        Network("m h o i", {"r": rank}, **nodes), PhysicalFold("member head out in", heads), alpha=alpha, dropout=dropout
    )


def tenslora(
    rank: int | tuple[int, ...],
    modes: str = "layer type out in",
    heads: int | None = None,
    cp: bool = False,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> AdapterSpec:
    """TensLoRA: a Tucker (its core zero) or CP over out, in and any of layer, type and head (Marmoret et al. 2025).

    Count: the product of the ranks + sum of rank times size over the modes; for CP, rank times the sum of sizes.
    """
    if cp and isinstance(rank, tuple):
        raise SpecError(f"tenslora was given the ranks {rank} for a CP, which has one; give one number.")
    return AdapterSpec(
        CP(rank) if cp and isinstance(rank, int) else Tucker(rank), PhysicalFold(modes, heads), alpha=alpha, dropout=dropout
    )


def metatt(rank: int, heads: int | None = None, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """MetaTT: one tensor train over in, layer, type (4D), head (5D) and out (Lopez-Piqueres et al. 2025), out's core zero.

    Count: r (in + out / h) + r^2 (L + T + h), h left out in 4D.
    """
    modes = "in layer type out" if heads is None else "in layer type head out"
    return AdapterSpec(TensorTrain(rank), PhysicalFold(modes, heads), alpha=alpha, dropout=dropout)


def tt_lora(rank: int, splits: int = 3, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """TT-LoRA: a tensor train over out and in, each split into `splits` sides (Anjum et al. 2024), the last core zero.

    ``dW[(o1 .. ok) (i1 .. ik)] = G1[o1 b1] G2[b1 o2 b2] .. G2k[b ik]``.
    """
    check_count("tt_lora", "splits", splits, 8)
    sides = [f"{mode}{k + 1}" for mode in "oi" for k in range(splits)]
    bonds = ["", *(f"b{k + 1}" for k in range(2 * splits - 1)), ""]
    nodes = {f"G{k + 1}": f"{bonds[k]} {side} {bonds[k + 1]}".strip() for k, side in enumerate(sides)}
    last = Node(nodes.pop(f"G{2 * splits}"), init="zeros")
    modes = f"({' '.join(sides[:splits])}) ({' '.join(sides[splits:])})"
    return AdapterSpec(
        Network(modes, dict.fromkeys(bonds[1:-1], rank), **nodes, **{f"G{2 * splits}": last}), alpha=alpha, dropout=dropout
    )


def loretta(rank: int, bond: int = 4, splits: int = 3, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """LoRETTA_rep: LoRA whose B and A are tensor trains, out and in split into `splits` sides (Yang et al. 2024).

    ``dW = B A``, B[(o1 .. ok) r] and A[r (i1 .. ik)] trains with bonds of size `bond`; B's last core zero.
    """
    check_count("loretta", "splits", splits, 8)
    nodes: dict[str, str | Node] = {}
    for mode in "oi":
        bonds = ["", *(f"{mode}b{k + 1}" for k in range(splits - 1)), "r"]
        for k in range(splits):
            indices = f"{bonds[k]} {mode}{k + 1} {bonds[k + 1]}".strip()
            zero = mode == "o" and k == splits - 1
            nodes[f"{'B' if mode == 'o' else 'A'}{k + 1}"] = Node(indices, init="zeros") if zero else indices
    sizes = {"r": rank, **{f"{mode}b{k + 1}": bond for mode in "oi" for k in range(splits - 1)}}
    sides = {mode: " ".join(f"{mode}{k + 1}" for k in range(splits)) for mode in "oi"}
    return AdapterSpec(Network(f"({sides['o']}) ({sides['i']})", sizes, **nodes), alpha=alpha, dropout=dropout)


def tied_lora(rank: int, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """Tied-LoRA (TL6): ``dW[m o i] = v[m o] B[o r] u[m r] A[r i]``, B and A shared and trained, v zero (Renduchintala et al.
    2023). Count: r (out + in) + M (out + r).
    """
    nodes: dict[str, str | Node] = {"v": Node("m o", init="zeros"), "B": "o r", "u": Node("m r", init="ones"), "A": "r i"}
    return AdapterSpec(Network("m o i", {"r": rank}, **nodes), MEMBERS, alpha=alpha, dropout=dropout)


def share_lora(rank: int, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """ShareLoRA: ``dW[m o i] = B[m o r] A[r i]``, A shared by the weights of a shape, B zero (Song et al. 2024).

    Count: r (M out + in).
    """
    return AdapterSpec(
        Network("m o i", {"r": rank}, B=Node("m o r", init="zeros"), A="r i"), MEMBERS, alpha=alpha, dropout=dropout
    )


def compacter(rank: int, terms: int = 4, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """Compacter's weight form: a sum of Kronecker products, the first factors shared (Karimi Mahabadi et al. 2021).

    ``dW[m (n1 o) (n2 i)] = A[n n1 n2] S[m n o r] T[m n r i]``, n of size `terms` like n1 and n2, S zero.
    Count: terms^3 + M r (out + in).
    """
    nodes: dict[str, str | Node] = {"A": "n n1 n2", "S": Node("m n o r", init="zeros"), "T": "m n r i"}
    sizes = {"n": terms, "n1": terms, "n2": terms, "r": rank}
    return AdapterSpec(Network("m (n1 o) (n2 i)", sizes, **nodes), MEMBERS, alpha=alpha, dropout=dropout)


def gralora(rank: int, blocks: int = 2, hybrid: int = 0, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """GraLoRA: dW in blocks x blocks parts, each a LoRA of its own (Jung et al. 2025; PEFT's GraLoRA).

    ``dW[(a o) (b i)] = B[a b o r] A[a b r i]``, B zero; r is the rank of a part, PEFT's r / k. With `hybrid` (PEFT's
    `hybrid_r`) ``+ H[o h] G[h i]``, H zero. Count: (r k + h) (out + in) a weight. PEFT scales by its alpha / (r k + h), which
    is alpha here.
    """
    nodes: dict[str, str | Node] = {"B": Node("a b o r", init="zeros"), "A": "a b r i"}
    parts = Network("(a o) (b i)", {"a": blocks, "b": blocks, "r": rank}, **nodes)
    beside = [Network("o i", {"h": hybrid}, H=Node("o h", init="zeros"), G="h i")] if hybrid != 0 else []
    return AdapterSpec(Sum(parts, *beside) if beside else parts, alpha=alpha, dropout=dropout)


def kradapter(size: int = -1, side: str = "out", alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """KRAdapter: the columns of dW are Kronecker products (Albert et al. 2025, arXiv 2508.00230, whose code is the reference).

    ``dW[(v u) i] = V[v i] U[u i]``, cropped to out rows, U zero. Count: in (u + v), v u the least that is not below out.

    Args:
        size: of u, at most v; -1 splits most evenly. The reference takes the root of the shorter side, rounded down, which is
            the same on a square weight.
        side: ``"in"`` splits the inputs instead, ``dW[o (v u)] = V[o v] U[o u]``. The reference splits the longer side, and the
            inputs of a square weight.
    """
    if side not in ("out", "in"):
        raise SpecError(f"kradapter was given side={side!r}; choose 'out' or 'in', the one that is split.")
    modes, nodes = ("(v u) i", ("v i", "u i")) if side == "out" else ("o (v u)", ("o v", "o u"))
    network = Network(modes, {"u": size}, crop=True, V=nodes[0], U=Node(nodes[1], init="zeros"))
    return AdapterSpec(network, alpha=alpha, dropout=dropout)


def quan_ta(splits: int | tuple[int, ...] = 3, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """QuanTA: ``dW = T - T0``, T a circuit of gates, one on each pair of axes of x, T0 itself at the start (Chen et al. 2024,
    arXiv 2406.00132, whose code is the reference).

    With three axes ``T[(o1 o2 o3) (i1 i2 i3)] = G12[o1 o2 x1 x2] G13[x1 o3 i1 x3] G23[x2 x3 i2 i3]``: the fastest axes meet
    first. Count: the sum over pairs of axes a, b of (a b)^2 on a square weight.

    Args:
        splits: how many axes in and out have, most evenly; or the sizes of the axes of both, of whose product the surplus is
            cropped.
    """
    sides, count = (splits, len(splits)) if isinstance(splits, tuple) else (None, splits)
    check_count("quan_ta", "splits", count, 6)
    if count == 1:
        raise SpecError("quan_ta was given one axis, and a gate meets two; give 2 at least.")
    axes = range(1, count + 1)
    sizes = dict[str, int | str]() if sides is None else {f"{mode}{a}": sides[a - 1] for mode in "oi" for a in axes}
    now, nodes = {a: f"i{a}" for a in axes}, dict[str, Node]()
    for a, b in ((a, b) for b in reversed(axes) for a in reversed(axes) if a < b):
        after = {a: "o1" if b == 2 else f"x{a}_{b}", b: f"o{b}" if a == 1 else f"x{b}_{a}"}
        nodes[f"G{a}{b}"] = Node(f"{after[a]} {after[b]} {now[a]} {now[b]}", init="square")
        sizes |= {index: f"i{k}" for k, index in after.items() if index[0] == "x"}
        now |= after
    modes = " ".join(f"({' '.join(f'{mode}{a}' for a in axes)})" for mode in "oi")
    gates = Network(modes, sizes, crop=sides is not None, **nodes)
    return AdapterSpec(Sum(gates, Frozen(gates), weights=(1, -1)), alpha=alpha, dropout=dropout)


def miss(rank: int, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """MiSS: a thin matrix repeated over in: ``dW[o (k r)] = D[o r]``, D zero (Kang and Yin 2025; PEFT's MiSS), the last
    repetition cropped where in is no multiple of the rank. Count: r out a weight.
    """
    nodes = {"D": Node("o r", init="zeros"), "repeat": Node("k", init="ones", trainable=False)}
    return AdapterSpec(Network("o (k r)", {"r": rank}, crop=True, **nodes), alpha=alpha, dropout=dropout)


def tera(rank: int, splits: int = 2, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """TeRA's form: a Tucker over out and in, each split into `splits` sides, of which only scales of its bonds train (Gu et al.
    2025, arXiv 2509.03234).

    ``dW[m (o1 .. ok) (i1 .. ik)] = G[r1 .. r2k] U1[o1 r1] d1[m r1] .. U2k[ik r2k] d2k[m r2k]``, G and the U frozen, random and
    shared, the first d zero, the others ones. Count: 2 M k r.
    """
    check_count("tera", "splits", splits, 4)
    sides = [f"{mode}{k + 1}" for mode in "oi" for k in range(splits)]
    bonds = [f"r{k + 1}" for k in range(2 * splits)]
    nodes = {"G": frozen(" ".join(bonds))}
    for k, (side, bond) in enumerate(zip(sides, bonds, strict=True)):
        nodes |= {f"U{k + 1}": frozen(f"{side} {bond}"), f"d{k + 1}": Node(f"m {bond}", init="ones" if k else "zeros")}
    modes = f"m ({' '.join(sides[:splits])}) ({' '.join(sides[splits:])})"
    return AdapterSpec(Network(modes, dict.fromkeys(bonds, rank), **nodes), MEMBERS, alpha=alpha, dropout=dropout)


def randlora(rank: int, bases: int = 4, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """RandLoRA: a sum of scaled random bases, of full rank in all (Albert et al. 2025).

    ``dW[m o i] = B[n o r] lam[m n r] A[r i] gam[m n i]``, B and A frozen and shared, lam zero. Count: M n (r + in).
    """
    nodes = {
        "B": frozen("n o r"),
        "lam": Node("m n r", init="zeros"),
        "A": frozen("r i"),
        "gam": Node("m n i", init="ones"),
    }
    return AdapterSpec(Network("m o i", {"n": bases, "r": rank}, **nodes), MEMBERS, alpha=alpha, dropout=dropout)


def abba(rank: int, second: int | None = None, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """ABBA's form: the elementwise product of two LoRAs, of ranks that may differ, the second at zero (Singhal et al. 2025,
    whose start from the weight's SVD is `decompose`'s). Count: (r1 + r2) (out + in) a weight.
    """
    return AdapterSpec(Hadamard(CP(rank), CP(rank if second is None else second)), alpha=alpha, dropout=dropout)


def hira(rank: int, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """HiRA: ``dW[o i] = W[o i] B[o r] A[r i]``, W the base's weight, B zero (Huang et al. 2025; PEFT's HiRA, without scale).

    Count: r (out + in) a weight. W is kept as a frozen copy, so the adapter takes the memory of the weights once more.
    """
    nodes = {"W": based("o i", "base"), "B": Node("o r", init="zeros"), "A": Node("r i")}
    return AdapterSpec(Network("o i", {"r": rank}, **nodes), alpha=alpha, dropout=dropout)


def lora_xs(rank: int, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """LoRA-XS: ``dW[o i] = U[o r] S[r] R[r s] V[s i]``, U, S and V of the weight's SVD, R zero (Balazy et al. 2024, arXiv
    2405.17604). Count: r^2 a weight.
    """
    nodes = {"U": based("o r", "left"), "S": based("r", "singular"), "R": Node("r s", init="zeros"), "V": based("s i", "right")}
    return AdapterSpec(Network("o i", {"r": rank, "s": rank}, **nodes), alpha=alpha, dropout=dropout)


def svft(rank: int, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """SVFT's plain form: ``dW[o i] = U[o r] m[r] V[r i]``, U and V of the weight's SVD, m zero (Lingam et al. 2024, arXiv
    2405.19597, which takes all min(out, in) vectors). Count: r a weight.
    """
    nodes = {"U": based("o r", "left"), "m": Node("r", init="zeros"), "V": based("r i", "right")}
    return AdapterSpec(Network("o i", {"r": rank}, **nodes), alpha=alpha, dropout=dropout)


RELATIVES = {
    "adalora": adalora,
    "lora_fa": lora_fa,
    "krona": krona,
    "fact_tt": fact_tt,
    "fact_tk": fact_tk,
    "lorta_cp": lorta_cp,
    "cara": cara,
    "tenslora": tenslora,
    "metatt": metatt,
    "tt_lora": tt_lora,
    "loretta": loretta,
    "tied_lora": tied_lora,
    "share_lora": share_lora,
    "compacter": compacter,
    "gralora": gralora,
    "kradapter": kradapter,
    "quan_ta": quan_ta,
    "miss": miss,
    "randlora": randlora,
    "tera": tera,
    "abba": abba,
    "hira": hira,
    "lora_xs": lora_xs,
    "svft": svft,
}
