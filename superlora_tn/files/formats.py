"""The files of other libraries, as keys, tensors and settings: a weight's own method where the format has it, else a LoRA.

Which methods a format has, and in which sizes, is what its library's own loader builds again from the file: PEFT from one
configuration for all weights, LyCORIS from each weight's tensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from superlora_tn.declare.fold import factorise
from superlora_tn.files.anatomy import Method, method_of
from superlora_tn.files.plain import Pair, Wish, as_method, pair_of
from superlora_tn.files.thin import Filled


@dataclass(frozen=True)
class Row:
    """What became of one weight.

    Attributes:
        name: of the target.
        method: what it is in the file.
        ranks: its bonds there.
        error: ``||dW - dW in the file|| / ||dW||`` in the Frobenius norm.
    """

    name: str
    method: str
    ranks: tuple[int, ...]
    error: float


@dataclass(frozen=True, eq=False)
class Content:
    """What goes into a file.

    Attributes:
        tensors: by their keys.
        rows: what became of each weight.
        settings: PEFT's configuration.
        metadata: strings beside the tensors.
    """

    tensors: Mapping[str, Tensor]
    rows: tuple[Row, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


Written = dict[str, Tensor]


def number(value: float) -> float:
    """A whole number as such, as PEFT writes its alphas."""
    return int(value) if value == int(value) and abs(value) < 1 << 53 else value


def kernelled(down: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """(r, in) as a convolution's (r, channels, *kernel)."""
    return down.reshape(down.shape[0], -1, *kernel) if kernel else down


def pointwise(matrix: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """A matrix as a convolution of 1x1."""
    return matrix.reshape(*matrix.shape, *(1 for _ in kernel))


# --- plain LoRA -----------------------------------------------------------------------------------------------------


def lora(
    weights: Sequence[Filled],
    wish: Wish,
    write: Callable[[Filled, Pair], Written],
    held: Callable[[Pair], Pair] = lambda pair: pair,
) -> Content:
    """All weights as plain LoRAs; `held` makes of a pair what the format holds of it."""
    tensors: Written = {}
    rows, scales = [], {}
    for one in weights:
        pair = held(pair_of(one, method_of(one), wish))
        tensors |= write(one, pair)
        rows.append(Row(one.name, "lora", (pair.rank,), pair.error))
        scales[one.name] = (pair.rank, pair.alpha)
    settings = lora_settings(scales) | {"use_dora": any(one.magnitude is not None for one in weights)}
    return Content(tensors, tuple(rows), settings)


def lora_settings(scales: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """PEFT's configuration for LoRAs of these ranks and alphas: the most frequent ones, and patterns for the others."""
    rank, alpha, ranks, alphas = patterns(scales)
    return {
        **common("LORA", list(scales)),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def common(method: str, names: Sequence[str]) -> dict[str, Any]:
    """What all of PEFT's configurations say."""
    return {
        "peft_type": method,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": sorted(names),
        "modules_to_save": None,
    }


def patterns(scales: Mapping[str, tuple[int, float]]) -> tuple[int, float, dict[str, int], dict[str, float]]:
    """(rank, alpha, ranks, alphas) of the weights, the exceptions by PEFT's patterns for whole names."""
    rank = Counter(r for r, _ in scales.values()).most_common(1)[0][0]
    alpha = Counter(a for _, a in scales.values()).most_common(1)[0][0]

    def whole(name: str) -> str:
        return "^" + name.replace(".", r"\.")

    ranks = {whole(n): r for n, (r, _) in scales.items() if r != rank}
    alphas = {whole(n): number(a) for n, (_, a) in scales.items() if a != alpha}
    return rank, number(alpha), ranks, alphas


def upright(one: Filled, pair: Pair) -> tuple[Tensor, Tensor]:
    """Its factors (r, in) and (out, r), also of an embedding whose dW is held as (in, out)."""
    return (pair.up.T, pair.down.T) if one.turned else (pair.down, pair.up)


def peft_pair(prefix: str) -> Callable[[Filled, Pair], Written]:
    """PEFT's keys for a LoRA."""

    def write(one: Filled, pair: Pair) -> Written:
        name = f"{prefix}{one.name}"
        if one.flipped:
            inner, outer = upright(one, pair)
            return {f"{name}.lora_embedding_A": inner, f"{name}.lora_embedding_B": outer}
        return {
            f"{name}.lora_A.weight": kernelled(pair.down, one.kernel),
            f"{name}.lora_B.weight": pointwise(pair.up, one.kernel),
            **magnitude(one, f"{name}.lora_magnitude_vector", 0 if one.kernel else None),
        }

    return write


def magnitude(one: Filled, key: str, axis: int | None) -> Written:
    """DoRA's magnitudes under a key, if there are any: (out, 1, ..) with `axis` 1, (1, out, 1, ..) with 0, (out,) with None."""
    if one.magnitude is None:
        return {}
    rest = (1,) * len(one.kernel)
    shape = {None: (-1,), 0: (1, -1, *rest), 1: (-1, 1, *rest)}[axis]
    return {key: one.magnitude.reshape(shape)}


def kohya_held(pair: Pair) -> Pair:
    """A pair whose alpha is float32, and zeros where that would be 0, which readers of kohya's files take for the rank."""
    if not float(float32(pair.alpha)):
        lost = bool(pair.scale) and bool(pair.up.any()) and bool(pair.down.any())
        return replace(pair, up=torch.zeros_like(pair.up), scale=1.0, error=1.0 if lost else pair.error)
    return replace(pair, error=pair.error + alpha_error(pair.alpha))


def kohya_pair(rename: Callable[[str], str]) -> Callable[[Filled, Pair], Written]:
    """kohya's keys for a LoRA."""

    def write(one: Filled, pair: Pair) -> Written:
        name = rename(one.name)
        return {
            f"{name}.lora_down.weight": kernelled(pair.down, one.kernel),
            f"{name}.lora_up.weight": pointwise(pair.up, one.kernel),
            f"{name}.alpha": float32(pair.alpha),
            **magnitude(one, f"{name}.dora_scale", 1),
        }

    return write


# --- LyCORIS --------------------------------------------------------------------------------------------------------


def lycoris(weights: Sequence[Filled], wish: Wish, rename: Callable[[str], str], kept: bool) -> Content:
    """Each weight by its own method where LyCORIS has it.

    Args:
        weights: to be written.
        wish: for those that become LoRAs.
        rename: a target's name to the file's.
        kept: whether they were read from such a file, whose sizes are LyCORIS' business then.
    """
    tensors: Written = {}
    rows = []
    for one in weights:
        narrow, method, off = _as_method(one, wish.dtype)
        own = None if method is None or wish.truncates else _lycoris_own(narrow, method, kept)
        if own is None or method is None:
            pair = kohya_held(pair_of(one, method_of(one), wish))
            tensors |= kohya_pair(rename)(one, pair)
            rows.append(Row(one.name, "lora", (pair.rank,), pair.error))
            continue
        keys = {"up": "lora_up.weight", "mid": "lora_mid.weight", "down": "lora_down.weight"}
        tensors |= {f"{rename(one.name)}.{keys.get(f, f)}": t for f, t in own.items()}
        tensors |= magnitude(one, f"{rename(one.name)}.dora_scale", 1)
        rows.append(
            Row(one.name, method.kind, method.ranks, off + alpha_error(one.scale * method.ranks[0] if method.ranks else 0.0))
        )
    return Content(tensors, tuple(rows))


def _as_method(one: Filled, dtype: torch.dtype | None) -> tuple[Filled, Method | None, float]:
    """`as_method`; LyCORIS takes 1 for the scale where no factor has a rank, so it goes into a node."""
    method = method_of(one)
    if method is None or method.ranks or one.scale == 1.0:
        return as_method(one, dtype)
    first, *others = one.nodes
    whole = replace(one, nodes=(first.double() * one.scale, *others), scale=1.0)
    return as_method(whole, dtype or torch.promote_types(one.dtype, torch.float32))


def float32(value: float) -> Tensor:
    """An alpha as a file's tensor."""
    return torch.tensor(value, dtype=torch.float32)


def alpha_error(alpha: float) -> float:
    """What the scale loses as an alpha in float32, all of it where that is 0 there."""
    return abs(float(float32(alpha)) - alpha) / abs(alpha) if alpha else 0.0


def _lycoris_own(one: Filled, method: Method, kept: bool) -> Written | None:
    """The tensors of LyCORIS' own method, None where its loader would not build it again."""
    fields, kernel = dict(method.fields), one.kernel
    if method.kind == "full":
        return {"diff": kernelled(fields["diff"], kernel)}
    if method.kind not in ("lora", "loha", "lokr") or len(set(method.ranks)) > 1:
        return None
    if method.kind == "lokr" and not kept and not _lycoris_builds(one, fields):
        return None
    if method.kind == "lora":
        axes = fields["mid"].shape[2:] if "mid" in fields else kernel
        fields["up"] = pointwise(fields["up"], tuple(axes))
        fields["down"] = pointwise(fields["down"], tuple(axes)) if "mid" in fields else kernelled(fields["down"], kernel)
    if "lokr_w2" in fields:
        fields["lokr_w2"] = kernelled(fields["lokr_w2"], kernel)
    alpha = float32(one.scale * method.ranks[0] if method.ranks else 1.0)
    if not float(alpha):  # which LyCORIS takes for the rank, so dW is zero by its first factor
        first = next(iter(fields))
        fields, alpha = {**fields, first: torch.zeros_like(fields[first])}, float32(method.ranks[0])
    return {**fields, "alpha": alpha}


def split_of(one: Filled, fields: Mapping[str, Tensor]) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """((o1, o2), (i1, i2)) of a LoKr, inputs counted in channels; None where the second factor holds no whole kernel."""
    first = fields.get("lokr_w1")
    o1, i1 = first.shape if first is not None else (fields["lokr_w1_a"].shape[0], fields["lokr_w1_b"].shape[1])
    o2, rest = one.shape[0] // o1, (one.shape[1] // i1) % math.prod(one.kernel)
    return None if rest else ((o1, o2), (i1, one.shape[1] // i1 // math.prod(one.kernel)))


def _lycoris_builds(one: Filled, fields: Mapping[str, Tensor]) -> bool:
    """Whether LyCORIS finds these sizes again: it tries the even split, then a factor's larger side, and knows one rank."""
    split = split_of(one, fields)
    if split is None or ("lokr_w1_a" in fields and "lokr_w2_a" not in fields) or "lokr_t2" in fields:
        return False
    (o1, o2), (i1, i2) = split
    # A low factor's columns count the kernel in.
    seen = i2 * (math.prod(one.kernel) if "lokr_w2_b" in fields else 1)
    sides = [side for side, rows, columns in ((max(o1, i1), o1, i1), (max(o2, seen), o2, seen)) if side in (rows, columns)]
    both = [side for side in sides if side in (o1, o2) and side in (i1, seen)]
    even = pair_split(o1 * o2, -1)[0] == o1 and pair_split(i1 * seen, -1)[0] == i1
    factor = -1 if even else both[0] if both else min(sides)
    if pair_split(o1 * o2, factor) != (o1, o2) or pair_split(i1 * i2, factor) != (i1, i2):
        return False
    ranks = [(fields["lokr_w1_a"].shape[1], max(o1, i1))] if "lokr_w1_a" in fields else []
    ranks += [(fields["lokr_w2_a"].shape[1], max(o2, i2))] if "lokr_w2_a" in fields else []
    return all(rank < side / 2 for rank, side in ranks)


def pair_split(size: int, factor: int) -> tuple[int, int]:
    """How PEFT and LyCORIS split a size in two, the smaller first."""
    first, second = sorted(factorise(size, 2, factor))
    return first, second
