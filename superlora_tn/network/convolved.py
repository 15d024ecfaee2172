"""Presets that hold a convolution's kernel apart from its channels, so that they run as chains of thin convolutions.

``o`` out, ``i`` in (channels), ``k`` the kernel, ``r s`` bonds. On linear layers and pointwise convolutions k has size 1, and
they are LoRA and LoKr. One declaration adapts layers of several kernels; `attach` takes their sizes from the layers.
"""

from __future__ import annotations

from superlora_tn.declare.fold import PhysicalFold
from superlora_tn.declare.parts import CP, Dense, Kronecker, Tucker
from superlora_tn.network.spec import AdapterSpec

KERNEL = PhysicalFold("out in kernel")


def conv_lora(
    rank: int, tucker: bool = False, alpha: float | None = None, rslora: bool = False, dropout: float = 0.0
) -> AdapterSpec:
    """LoRA on convolutions: ``dW[o i k] = B[o r] A[r i k]``; with `tucker` ``B[o r] C[r s k] A[s i]`` (LoCon; LyCORIS's
    `use_tucker`; Yeh et al. 2023). Count: r (out + in k), or r (out + in) + r^2 k a weight.
    """
    network = Tucker(rank, factors="out in" if tucker else "out", over="cap")
    return AdapterSpec(network, KERNEL, alpha=alpha, rslora=rslora, dropout=dropout)


def conv_lokr(
    rank: int | None = None,
    factor: int = -1,
    tucker: bool = False,
    decompose_both: bool = False,
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
) -> AdapterSpec:
    """LoKr on convolutions: ``dW[(o1 o2) (i1 i2) k] = W1[o1 i1] W2[o2 i2 k]`` (Yeh et al. 2023), channels split by PEFT's rule.

    Args:
        rank: of W2: ``B[o2 r] A[r i2 k]``, with `tucker` ``B[o2 r] C[r s k] A[s i2]`` (`lokr_t2` in LyCORIS and PEFT); None
            leaves it dense, as these do where the rank is at least half of its larger side.
        factor: the wanted first factor; -1 splits most evenly.
        tucker: whether the kernel stands apart in W2 too.
        decompose_both: give W1 low rank as well.
    """
    low = Dense() if rank is None else Tucker(rank, factors="out in" if tucker else "out", over="cap")
    first = Dense() if rank is None or not decompose_both else CP(rank, dense_if_large=True, over="cap")
    return AdapterSpec(Kronecker(first, low, factor=factor), KERNEL, alpha=alpha, rslora=rslora, dropout=dropout)
