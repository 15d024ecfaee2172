"""Variants with a node that is a function of what is stored: places, spectra, circulant blocks, rotations, reflections."""

from __future__ import annotations

from superlora_tn.declare.joins import Multiply
from superlora_tn.declare.node_maps import Cayley, Circulant, Fourier, Householder, Identity, Selected
from superlora_tn.declare.parts import Network, Node, SpecError, check_count
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
    even = rank % 2 == 0
    reflections = Node("o i", map=Householder(rank, less_one=even))
    return AdapterSpec(Network("o i", H=reflections), dropout=dropout, join=Multiply("right", residual=even))


MAPPED = {"c3a": c3a, "fourier_ft": fourier_ft, "hra": hra, "oft": oft, "shira": shira}
