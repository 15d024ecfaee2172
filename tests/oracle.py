"""The dense oracle: every method written out from its paper, in numpy and float64, without the library.

Nothing here imports `superlora_tn`. Functions take plain numbers and arrays, build every tensor in full, and prefer
the textbook's form (outer products, `numpy.kron`, explicit matrices) to a fast one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np

Array = np.ndarray

# --- tensors from their factors -------------------------------------------------------------------------------------


def cp(factors: Sequence[Array]) -> Array:
    """``T = sum_r a_1r o a_2r o ... o a_Mr``; factor m has shape (d_m, r)."""
    terms = (reduce(np.multiply.outer, [f[:, r] for f in factors]) for r in range(factors[0].shape[1]))
    return sum(terms, np.zeros([f.shape[0] for f in factors]))


def mode_product(tensor: Array, matrix: Array, mode: int) -> Array:
    """``tensor x_mode matrix``; the matrix has shape (new size, old size)."""
    unfolded = np.moveaxis(tensor, mode, 0)
    product = matrix @ unfolded.reshape(unfolded.shape[0], -1)
    return np.moveaxis(product.reshape(matrix.shape[0], *unfolded.shape[1:]), 0, mode)


def tucker(core: Array, factors: Mapping[int, Array]) -> Array:
    """``T = C x_1 A_1 ... x_M A_M``; modes without a factor stay as the core has them."""
    for mode, factor in factors.items():
        core = mode_product(core, factor, mode)
    return core


def tensor_train(cores: Sequence[Array]) -> Array:
    """``T[i1..iM] = G_1[i1] G_2[i2] ... G_M[iM]``, a product of matrices for each element."""
    if len(cores) == 1:
        return cores[0]
    inner = [cores[0][None], *cores[1:-1], cores[-1][..., None]]
    result = np.empty([c.shape[1] for c in inner], dtype=np.result_type(*inner))
    for place in np.ndindex(*result.shape):
        result[place] = reduce(np.matmul, [c[:, i, :] for c, i in zip(inner, place, strict=True)])[0, 0]
    return result


def kronecker(parts: Sequence[Array]) -> Array:
    """The mode-wise Kronecker product; the first part has the slowest index."""
    return reduce(np.kron, parts)


def hadamard_product(parts: Sequence[Array]) -> Array:
    """The elementwise product."""
    return reduce(np.multiply, parts)


def network(modes: str, nodes: Mapping[str, tuple[str, Array]]) -> Array:
    """Any network in index notation: node name -> (indices, array); one einsum, then split modes are joined."""
    letter: dict[str, int] = {}
    operands: list[object] = []
    size: dict[str, int] = {}
    for indices, array in nodes.values():
        names = indices.split()
        size |= dict(zip(names, array.shape, strict=True))
        operands += [array, [letter.setdefault(n, len(letter)) for n in names]]
    groups = [re.sub(r"[()]", "", g).split() for g in re.findall(r"\([^()]*\)|[^\s()]+", modes)]
    result = np.einsum(*operands, [letter[n] for g in groups for n in g])
    return result.reshape([math.prod(size[n] for n in g) for g in groups])


# --- matrices from their papers -------------------------------------------------------------------------------------


def lora(b: Array, a: Array) -> Array:
    """``B A`` (Hu et al. 2021): B (out, r), A (r, in)."""
    return b @ a


def loha(b1: Array, a1: Array, b2: Array, a2: Array) -> Array:
    """``(B1 A1) * (B2 A2)`` (Hyeon-Woo et al. 2021)."""
    return (b1 @ a1) * (b2 @ a2)


def lokr(w1: Array, w2: Array) -> Array:
    """``W1 (x) W2`` (Yeh et al. 2023)."""
    return np.kron(w1, w2)


def lotr(u: Array, core: Array, v: Array) -> Array:
    """``U G_m V^T`` for one member's core (Bershatsky et al. 2024): U (out, r), V (in, r)."""
    return u @ core @ v.T


def vera(b: Array, big_b: Array, d: Array, big_a: Array) -> Array:
    """``diag(b) B diag(d) A`` (Kopiczko et al. 2023)."""
    return np.diag(b) @ big_b @ np.diag(d) @ big_a


def lorta_vector(core: Array, factors: Sequence[Array], length: int) -> Array:
    """SuperLoRA's LoRTA for one group: the Tucker sum term by term, flattened, the surplus cut off."""
    total = np.zeros([f.shape[0] for f in factors])
    for place in np.ndindex(*core.shape):
        columns = [f[:, r] for f, r in zip(factors, place, strict=True)]
        total += core[place] * reduce(np.multiply.outer, columns)
    return total.reshape(-1)[:length]


# --- folds ----------------------------------------------------------------------------------------------------------


def layer_and_type(name: str) -> tuple[str, str]:
    """A module's name cut behind the last number that has a word after it."""
    found = re.match(r"^((?:.*\.)?\d+)\.(.+)$", name)
    return (found[1], found[2]) if found else ("", name)


def member_place(modes: Sequence[str], target: str, targets: Sequence[str]) -> dict[int, int]:
    """Axis -> position of a target along the member modes; each mode numbers what it meets in order."""
    words = {
        "layer": [layer_and_type(t)[0] for t in targets],
        "type": [layer_and_type(t)[1] for t in targets],
        "member": list(targets),
    }
    own = targets.index(target)
    return {k: list(dict.fromkeys(words[m])).index(words[m][own]) for k, m in enumerate(modes) if m in words}


def physical_weight(tensor: Array, modes: Sequence[str], place: Mapping[int, int]) -> Array:
    """One member's (out, in) from the whole tensor: pick its positions, order (head, out, in), join head and out."""
    left = [m for k, m in enumerate(modes) if k not in place]
    picked = tensor[tuple(place.get(k, slice(None)) for k in range(tensor.ndim))]
    ordered = picked.transpose([left.index(m) for m in ("head", "out", "in") if m in left])
    return ordered.reshape(-1, ordered.shape[-1])


def run_lengths(total: int, groups: int) -> list[int]:
    """The lengths of the groups' runs, as even as can be."""
    return [len(run) for run in np.array_split(np.arange(total), groups)]


def flat_weights(vectors: Sequence[Array], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Array]:
    """All weights from the groups' vectors: cut each to its run, concatenate, slice per weight."""
    total = sum(o * i for o, i in shapes.values())
    lengths = run_lengths(total, len(vectors))
    whole = np.concatenate([v[:n] for v, n in zip(vectors, lengths, strict=True)])
    ends = np.cumsum([o * i for o, i in shapes.values()])
    return {name: whole[end - o * i : end].reshape(o, i) for (name, (o, i)), end in zip(shapes.items(), ends, strict=True)}


# --- fixed maps -----------------------------------------------------------------------------------------------------


def hadamard_matrix(size: int) -> Array:
    """Sylvester's Hadamard matrix: ``H[j k] = (-1)^(number of ones in j and k)``."""
    return np.array([[1.0 - 2.0 * (bin(j & k).count("1") % 2) for k in range(size)] for j in range(size)])


def fastfood_matrix(signs: Array, order: Array, weights: Array, size_out: int) -> Array:
    """``F = H G P H B / sqrt(p n)`` cut to (size_out, n): every factor an explicit p x p matrix."""
    n, p = len(signs), len(order)
    h = hadamard_matrix(p)
    b = np.zeros((p, n))
    b[np.arange(n), np.arange(n)] = signs
    permutation = np.zeros((p, p))
    permutation[np.arange(p), order] = 1.0
    return (h @ np.diag(weights) @ permutation @ h @ b / math.sqrt(p * n))[:size_out]


# --- whole numbers --------------------------------------------------------------------------------------------------


def even_pair(size: int, factor: int = -1) -> tuple[int, int]:
    """PEFT's `factorization`, from its description: the factor where it divides, else the nearest divisor below."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    below = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0 and (factor < 1 or d <= factor)]
    return max(below), size // max(below)


def side(length: int, order: int) -> int:
    """The smallest d with d^order >= length, by trying."""
    d = max(int(length ** (1.0 / order)) - 2, 0)
    while d**order < length:
        d += 1
    return d


def count_lora(rank: int, shapes: Sequence[tuple[int, int]]) -> int:
    """``r sum(out + in)``."""
    return rank * sum(o + i for o, i in shapes)


def count_lokr(rank: int, shapes: Sequence[tuple[int, int]], factor: int = -1) -> int:
    """PEFT's LoKr: W1 dense, W2 of low rank unless rank >= max(side) / 2."""
    total = 0
    for o, i in shapes:
        (o1, o2), (i1, i2) = even_pair(o, factor), even_pair(i, factor)
        total += o1 * i1 + (o2 * i2 if rank >= max(o2, i2) / 2 else rank * (o2 + i2))
    return total


def count_lorta(rank: int, order: int, groups: int, elements: float) -> int:
    """``G (r^M + M d r)`` with ``d = ceil((elements / G)^(1/M))``; `elements` is rho N."""
    return groups * (rank**order + order * rank * side(math.ceil(elements / groups), order))


def count_stacked(rank: int, groups: int, total: int, width: int) -> int:
    """SuperLoRA 2D: ``G r (width + N / (G width))``."""
    return groups * rank * (width + math.ceil(total / groups / width))
