"""Variants with nodes that are functions of what is stored: spectra, rotations, reflections, unit vectors, mixtures."""

from __future__ import annotations

from dataclasses import replace

from superlora_tn.declare.joins import Multiply
from superlora_tn.declare.node_maps import (
    Cayley,
    Circulant,
    Fourier,
    Haar,
    Householder,
    Identity,
    Normalised,
    Same,
    Selected,
    Softmax,
    Spread,
)
from superlora_tn.declare.parts import Network, Node, SpecError, check_count, check_number, check_rank
from superlora_tn.network.relatives import MEMBERS, based
from superlora_tn.network.spec import AdapterSpec

TURNED = Multiply("right", residual=False)


def fourier_ft(count: int = 1000, seed: int = 777, alpha: float | None = 150.0, dropout: float = 0.0) -> AdapterSpec:
    """FourierFT: ``dW = Re IDFT2(S)``, S trained at `count` random places, zero elsewhere (Gao et al. 2024; PEFT's FourierFT).

    S starts at zero, in PEFT at random numbers unless `init_weights`. Count: `count` a weight.

    Args:
        count: how many coefficients.
        seed: of their places, PEFT's `random_loc_seed`.
        alpha: the scale, PEFT's `scaling`.
    """
    return AdapterSpec(Network("o i", S=Node("o i", map=Fourier(count, seed))), alpha=alpha, dropout=dropout)


def shira(count: int = 1000, seed: int = 0, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """SHiRA with its random mask: ``dW = S``, trained at `count` random places, zero elsewhere (Bhardwaj et al. 2024).

    S starts at zero. Count: `count` a weight. PEFT's SHiRA draws other places.
    """
    return AdapterSpec(Network("o i", S=Node("o i", map=Selected(count, seed))), alpha=alpha, dropout=dropout)


def c3a(size: int = 64, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """C3A: dW of circulant blocks, which start at zero (Chen et al. 2024; PEFT's C3A with `block_size`).

    Count: out in / size a weight; `size` divides both sides.
    """
    return AdapterSpec(Network("o i", w=Node("o i", map=Circulant(size))), alpha=alpha, dropout=dropout)


def oft(size: int = 32, dropout: float = 0.0) -> AdapterSpec:
    """OFT: ``W' = W R``, R of rotations of `size` inputs each, Cayley's transform of skew matrices that start at zero.

    Qiu et al. 2023, equal to PEFT's OFT with `use_cayley_neumann=False`. Count: in (size - 1) / 2 a weight; `size` divides in.
    """
    check_count("oft", "size", size, 1 << 20)
    if size == 1:
        raise SpecError("oft was given size=1, and one input alone has no rotation; give 2 at least.")
    same = Node("b c", trainable=False, map=Identity())
    blocks = Network("(b o) (c i)", {"o": size, "i": size}, R=Node("b i o", map=Cayley()), same=same)
    return AdapterSpec(blocks, dropout=dropout, join=TURNED)


def hra(rank: int = 8, dropout: float = 0.0) -> AdapterSpec:
    """HRA: ``W' = W H_1 .. H_r``, reflections along r trained vectors (Yuan et al. 2024; PEFT's HRA with ``apply_GS=False``).

    An even number of them starts in equal pairs, so that W' is W; an odd one turns W at the start. Count: r in a weight.
    """
    check_rank("hra", rank)
    even = rank % 2 == 0
    reflections = Node("o i", map=Householder(rank, less_one=even))
    return AdapterSpec(Network("o i", H=reflections), dropout=dropout, join=Multiply("right", residual=even))


def boft(size: int = 4, factors: int = 2, scaled: bool = False, dropout: float = 0.0) -> AdapterSpec:
    """BOFT: ``W' = W R_1 .. R_m``, a butterfly of block rotations (Liu et al. 2023, arXiv 2311.06243).

    An input's number is written to the base `size` (its last m digits); factor k rotates along digit k, for each value of the
    others, by a rotation of its own. One factor is OFT; two mix each input with size^2, as Group-and-Shuffle does (Gorbunov et
    al. 2024). Count: m in (size - 1) / 2 a weight, and out where scaled; size^m divides in.

    Args:
        size: of a rotation.
        factors: m.
        scaled: each output has a trained scale, one at first, as in PEFT's BOFT (which has one factor without a GPU).
        dropout: of the input of what is rotated.
    """
    check_count("boft", "size", size, 1 << 20)
    check_count("boft", "factors", factors, 16)
    if size == 1:
        raise SpecError("boft was given size=1, and one input alone has no rotation; give 2 at least.")
    nodes = {"same": Node("b c", trainable=False, map=Identity())}
    for k in range(factors):
        digits = " ".join([*(f"o{j}" for j in range(k)), *(f"i{j}" for j in range(k + 1, factors))])
        nodes[f"R{k + 1}"] = Node(f"b {digits} i{k} o{k}", map=Cayley())
    out, inward = (" ".join(f"{side}{j}" for j in reversed(range(factors))) for side in "oi")
    sizes = {f"{side}{j}": size for side in "oi" for j in range(factors)}
    return AdapterSpec(Network(f"(b {out}) (c {inward})", sizes, **nodes), dropout=dropout, join=replace(TURNED, scaled=scaled))


def goft(factors: int = 3, dropout: float = 0.0) -> AdapterSpec:
    """GOFT: ``W' = W G_1 .. G_m``, layers of Givens rotations of pairs of inputs (Ma et al. 2024, arXiv 2404.04316).

    Layer k rotates inputs whose numbers differ in bit k; with all bits of `in` every input meets every other. Count: m in / 2 a
    weight; 2^m divides in.
    """
    return boft(2, factors, dropout=dropout)


def psoft(rank: int = 32, dropout: float = 0.0) -> AdapterSpec:
    """PSOFT: ``dW = U S (b R a - 1) V``, U, S and V of the weight's SVD, R a rotation, a and b its scales (Wu et al. 2025).

    Equal to PEFT's PSOFT (its full SVD, Cayley's transform). Count: r (r - 1) / 2 + 2 r a weight.
    """
    turned = Node("r s", map=Cayley(less_one=True, scaled=True))
    nodes = {"U": based("o r", "left"), "S": based("r", "singular"), "R": turned, "V": based("s i", "right")}
    return AdapterSpec(Network("o i", {"r": rank, "s": rank}, **nodes), dropout=dropout)


def delora(rank: int, strength: float = 15.0, dropout: float = 0.0) -> AdapterSpec:
    """DeLoRA: rank-one parts of unit length: ``dW[o i] = (strength / r) lam B[o r] A[r i] |W|[i]`` (Bini et al. 2025).

    B's columns and A's rows are normalised (from 1e-4 on), B zero, lam one at first; |W| are the norms of W's columns. Equal to
    PEFT's DeLoRA, whose lambda is strength lam. Count: r (out + in) + 1 a weight.
    """
    check_number("delora", "strength", strength)
    unit = Normalised(least=1e-4)
    nodes = {
        "B": Node("r o", "zeros", map=unit),
        "A": Node("r i", map=unit),
        "lam": Node("", "ones"),
        "W": based("i", "columns"),
    }
    return AdapterSpec(Network("o i", {"r": rank}, **nodes), alpha=strength / rank, dropout=dropout)


def waveft(count: int = 1000, seed: int = 777, alpha: float | None = 25.0, dropout: float = 0.0) -> AdapterSpec:
    """WaveFT: dW from `count` coefficients of its Haar wavelets at random places (Bilican et al. 2025; PEFT's WaveFT, db1).

    They start at zero. Count: `count` a weight, whose sides are even.
    """
    return AdapterSpec(Network("o i", S=Node("o i", map=Haar(count, seed))), alpha=alpha, dropout=dropout)


def tiny_lora(count: int = 13, rank: int = 2, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """TinyLoRA: ``dW[m o i] = U[m o r] S[m r] v[n] P[m n r s] V[m s i]``, P random and frozen, v zero (arXiv 2602.04118).

    U, S and V of the weight's SVD. Whatever the count, a weight moves in r^2 directions alone. Count: `count` for all weights
    of a shape together.
    """
    nodes = {
        "U": based("m o r", "left"),
        "S": based("m r", "singular"),
        "v": Node("n", "zeros"),
        "P": Node("m n r s", "normal", trainable=False),
        "V": based("m s i", "right"),
    }
    sizes = {"r": rank, "s": rank, "n": count}
    return AdapterSpec(Network("m o i", sizes, **nodes), MEMBERS, alpha=alpha, dropout=dropout)


def uni_lora(count: int = 1000, rank: int = 4, seed: int = 0, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """Uni-LoRA: ``dW[m o i] = g B[m o r] A[m r i]``, the numbers of A and B drawn from one trained vector (Li et al. 2025).

    g starts at zero, as no such pair does; Uni-LoRA itself has none. Count: `count` + 1 for all weights of a shape together.
    """
    drawn = Spread(count, seed)
    nodes = {
        "g": Node("", "zeros"),
        "B": Node("m o r", trainable=False, map=Spread(count, seed + 1, of="A")),
        "A": Node("m r i", map=drawn),
    }
    return AdapterSpec(Network("m o i", {"r": rank}, **nodes), MEMBERS, alpha=alpha, dropout=dropout)


def vb_lora(
    rank: int = 4, vectors: int = 90, length: int = 64, top: int = 2, alpha: float | None = None, dropout: float = 0.0
) -> AdapterSpec:
    """VB-LoRA: A and B in pieces, each a mixture of the `top` best of a bank of vectors: ``dW = g B A`` (Li et al. 2024).

    ``B[m (u h) r] = b[m u r n] bank[n h]``, A alike; b and a are softmaxes. g starts at zero; VB-LoRA itself has none and
    starts at a small dW. Count: vectors length + 1, and M r vectors (out + in) / length.
    """
    best = Softmax(top)
    nodes = {
        "g": Node("", "zeros"),
        "b": Node("m u r n", map=best),
        "bank": Node("n h"),
        "a": Node("m r t p", map=best),
        "again": Node("p l", trainable=False, map=Same("bank")),
    }
    sizes = {"r": rank, "n": vectors, "p": vectors, "h": length, "l": length}
    return AdapterSpec(Network("m (u h) (t l)", sizes, **nodes), MEMBERS, alpha=alpha, dropout=dropout)


def moka(terms: int = 4, size: int = -1, alpha: float | None = None, dropout: float = 0.0) -> AdapterSpec:
    """MoKA: a mixture of Kronecker products, ``dW[(o1 o2) (i1 i2)] = g[n] A[n o1 i1] B[n o2 i2]`` (Sadeghi et al. 2025, arXiv
    2508.03527).

    g is a softmax of `terms` trained numbers, which its paper calls a gate; B zero. Here all products split alike.
    Count: terms (o1 i1 + o2 i2 + 1) a weight.

    Args:
        terms: how many products.
        size: of o1 and i1; -1 splits both most evenly.
    """
    nodes = {"g": Node("n", map=Softmax()), "A": Node("n o1 i1"), "B": Node("n o2 i2", "zeros")}
    sizes = {"n": terms, "o1": size, "i1": size}
    return AdapterSpec(Network("(o1 o2) (i1 i2)", sizes, **nodes), alpha=alpha, dropout=dropout)


MAPPED = {
    "boft": boft,
    "c3a": c3a,
    "delora": delora,
    "fourier_ft": fourier_ft,
    "goft": goft,
    "hra": hra,
    "moka": moka,
    "oft": oft,
    "psoft": psoft,
    "shira": shira,
    "tiny_lora": tiny_lora,
    "uni_lora": uni_lora,
    "vb_lora": vb_lora,
    "waveft": waveft,
}
