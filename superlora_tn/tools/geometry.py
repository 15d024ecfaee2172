"""How near is one weight update to another? Shared singular directions and distance (SuperLoRA, geometry analysis).

For dW = U S V' and a reference dW' (dense fine-tuning's, as a rule), with the k largest singular values of each:
``dL = ||U_k' U'_k||_F^2 / k``, ``dR = ||V_k' V'_k||_F^2 / k``, ``dE = ||dW - dW'||_F``. Nearer is dL -> 1, dR -> 1,
dE -> 0. Dividing by k is our reading of the paper, which does not write the normalisation out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superlora_tn.declare.fold import split_name
from superlora_tn.tools.draw import INK, PALETTE, panels, save
from superlora_tn.tools.singular import DEPTH, EXACT_SIDE, SPARE, exact, refined

TOLERANCE = 1e-7  # of the sine of the angle between found and true directions
MEASURES = (("left", "dL, left directions"), ("right", "dR, right directions"), ("distance", "dE, distance"))


@dataclass(frozen=True)
class Comparison:
    """One update beside its reference.

    Attributes:
        left: dL in [0, 1], the share of the k left singular directions (of the outputs) that both have.
        right: dR in [0, 1], likewise of the inputs.
        distance: dE, the Frobenius norm of the difference, in the weights' unit.
    """

    left: float
    right: float
    distance: float


def compare(delta: Tensor, reference: Tensor, k: int = 5) -> Comparison:
    """dL, dR and dE of two updates, in float64 on the CPU.

    An update of numerical rank r < k has only r directions, and the missing ones share nothing: against any other
    its dL and dR are at most r / k (so two equal updates of rank 3 have 3/5 at k = 5), and a zero update, such as
    every adapter at its start, has 0. Rank counts singular values above ``eps ||dW||_F``, eps that of the given
    dtype: smaller ones may be rounding. Where the k-th and the next singular value are equal, the k directions are
    any of several choices, and so is the result.

    Args:
        delta: dW, (out, in), any real floating dtype and device.
        reference: dW', of the same shape.
        k: how many directions, from 1 to min(out, in).

    Raises:
        ValueError: not two matrices of one shape, k out of range, numbers that are not real, or not finite.
    """
    _check(delta, reference, k)
    ours, theirs = (_directions(matrix, k) for matrix in (delta, reference))
    left, right = (float((a.T @ b).square().sum()) / k for a, b in zip(ours, theirs, strict=True))
    return Comparison(min(left, 1.0), min(right, 1.0), _size(_double(delta) - _double(reference)))


def compare_all(deltas: Mapping[str, Tensor], references: Mapping[str, Tensor], k: int = 5) -> dict[str, Comparison]:
    """`compare` for each weight by name, in the order of `deltas`.

    Raises:
        ValueError: the two name different weights, or a pair does not compare (the message names it).
    """
    alone = sorted(set(deltas) ^ set(references))
    if alone:
        side = "the updates" if alone[0] in deltas else "the references"
        raise ValueError(f"'{alone[0]}' is among {side} only; give both for the same weights ({len(alone)} have no partner).")
    results = {}
    for name, delta in deltas.items():
        try:
            results[name] = compare(delta, references[name], k)
        except ValueError as error:
            raise ValueError(f"weight '{name}': {error}") from error
    return results


def _check(delta: Tensor, reference: Tensor, k: int) -> None:
    if delta.dim() != 2 or delta.shape != reference.shape:
        raise ValueError(
            f"two updates of shapes {tuple(delta.shape)} and {tuple(reference.shape)} were given; both must be matrices "
            "(out, in) of one shape. Reshape a convolution's update to (out, in * kernel)."
        )
    most = min(delta.shape)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= most:
        raise ValueError(f"k={k!r} directions were asked of a matrix {tuple(delta.shape)}; choose k from 1 to {most}.")
    for word, matrix in (("update", delta), ("reference", reference)):
        if not matrix.is_floating_point():
            raise ValueError(f"the {word} is of dtype {matrix.dtype}; give real floating-point numbers.")
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError(f"the {word} has numbers that are not finite; the training that made it diverged.")


def _double(matrix: Tensor) -> Tensor:
    return matrix.detach().to(device="cpu", dtype=torch.float64)


def _size(matrix: Tensor) -> float:
    """The Frobenius norm; scaled first, since squares of very small or large numbers leave the range of float64."""
    largest = matrix.abs().max()
    return float(largest * torch.linalg.matrix_norm(matrix / largest)) if largest > 0 else 0.0


def _directions(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k left and right singular directions, (out, r) and (in, r), r = min(k, numerical rank)."""
    scaled = _double(matrix)
    if not bool(scaled.any()):
        return scaled[:, :0], scaled.T[:, :0]
    scaled = scaled / scaled.abs().max()
    scaled = scaled / torch.linalg.matrix_norm(scaled)
    # A singular value of zero shows up to rounding of the entries (eps) and of the decomposition (its own eps).
    least = torch.finfo(matrix.dtype).eps + max(scaled.shape) * torch.finfo(torch.float64).eps
    # With many directions of few the range finder's blocks would be as large as the matrix.
    large = min(scaled.shape) > max(EXACT_SIDE, 2 * (DEPTH + 1) * (k + SPARE))
    found = _randomised(scaled, k, least) if large else None
    u, s, v = found or exact(scaled)
    rank = int((s[:k] > least).sum())
    return u[:, :rank], v[:, :rank]


def _randomised(matrix: Tensor, k: int, least: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """The first singular triples by the range finder of `singular`.

    None where the angle to the true directions is not below `TOLERANCE` after its rounds, as with singular values that
    hardly fall.
    """
    for u, s, v in refined(matrix, k + SPARE):
        rank = int((s[:k] > least).sum())
        residual = torch.linalg.matrix_norm(matrix @ v[:, :rank] - u[:, :rank] * s[:rank])
        # Wedin's theorem: the sine of the angle is at most the residual over the gap behind the last direction.
        if rank == 0 or float(residual) <= TOLERANCE * float(s[rank - 1] - s[rank]):
            return u, s, v
    return None


def figure(results: Mapping[str, Mapping[str, Comparison]], path: str | Path, title: str = "") -> Path:
    """Draw dL, dR and dE over the layers as a PNG: a row a type of weight (query, value), a line a variant.

    Args:
        results: variant -> weight's name -> comparison, as `compare_all` gives it.
        path: where the PNG goes.
        title: above the picture.

    Returns:
        The path.

    Raises:
        ValueError: there is no comparison to draw.
    """
    names = list(dict.fromkeys(name for own in results.values() for name in own))
    if not names:
        raise ValueError("there is no comparison to draw; give at least one variant with at least one weight.")
    layers = list(dict.fromkeys(split_name(name)[0] for name in names))
    kinds = list(dict.fromkeys(split_name(name)[1] for name in names))
    picture, grid = panels(len(kinds), len(MEASURES))
    for kind, row in zip(kinds, grid, strict=True):
        for (measure, label), axes in zip(MEASURES, row, strict=True):
            for (variant, own), colour in zip(results.items(), _colours(len(results)), strict=True):
                values = {split_name(n)[0]: getattr(c, measure) for n, c in own.items() if split_name(n)[1] == kind}
                there = [k for k, layer in enumerate(layers) if layer in values]
                axes.plot(there, [values[layers[k]] for k in there], "o-", color=colour, markersize=3.5, label=variant)
            _label(axes, layers, kind, label, bounded=measure != "distance")
    grid[0][0].legend(fontsize=7, framealpha=0.9)
    picture.suptitle(title, color=INK, fontsize=11)
    return save(picture, path)


def _colours(count: int) -> list[str]:
    return [PALETTE[k % len(PALETTE)] for k in range(count)]


def _label(axes: Any, layers: Sequence[str], kind: str, label: str, bounded: bool) -> None:
    step = math.ceil(len(layers) / 12)
    ticks = range(0, len(layers), step)
    axes.set_xticks(list(ticks), [layers[k].rpartition(".")[2] for k in ticks])
    axes.set_xlabel("layer", fontsize=8)
    axes.set_title(f"{kind}: {label}", fontsize=9, color=INK)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.set_ylim(*((-0.03, 1.03) if bounded else (0, None)))
