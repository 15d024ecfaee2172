"""PEFT's structured methods for writing: one configuration builds all weights, so all have to be what it would build."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from superlora_tn.files.anatomy import Method
from superlora_tn.files.formats import Content, Row, Written, common, number, pair_split, patterns, split_of
from superlora_tn.files.plain import Wish, as_method
from superlora_tn.files.thin import Filled

Item = tuple[Filled, Method, float]


def peft_own(weights: Sequence[Filled], wish: Wish, prefix: str) -> Content | None:
    """All weights by the one structured method that they are, None where PEFT has none for all of them alike."""
    if wish.truncates:
        return None
    found: list[Item] = []
    for one in weights:
        narrow, method, off = as_method(one, wish.dtype)
        if method is None or method.kind != (found[0][1].kind if found else method.kind) or one.flipped:
            return None
        found.append((narrow, method, off))
    write = WRITERS.get(found[0][1].kind)
    return None if write is None else write(found, prefix)


def _content(found: Sequence[Item], tensors: Written, settings: Mapping[str, Any]) -> Content:
    rows = tuple(Row(one.name, method.kind, method.ranks, off) for one, method, off in found)
    return Content(tensors, rows, settings)


def _loha(found: Sequence[Item], prefix: str) -> Content | None:
    kernels = ["hada_t1" in method.fields for one, method, _ in found if math.prod(one.kernel) > 1]
    plain = any("hada_t1" in method.fields for one, method, _ in found if math.prod(one.kernel) == 1)
    if plain or len(set(kernels)) > 1 or any(len(set(method.ranks)) > 1 for _, method, _ in found):
        return None
    scales = {one.name: (method.ranks[0], one.scale * method.ranks[0]) for one, method, _ in found}
    settings = _scaled("LOHA", scales) | {"use_effective_conv2d": any(kernels)}
    return _content(found, _keys(found, prefix, lambda _, method: method.fields), settings)


def _scaled(method: str, scales: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    rank, alpha, ranks, alphas = patterns(scales)
    return {
        **common(method, list(scales)),
        "r": rank,
        "alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "init_weights": True,
    }


def _keys(found: Sequence[Item], prefix: str, fields: Callable[[Filled, Method], Mapping[str, Tensor]]) -> Written:
    return {f"{prefix}{one.name}.{name}": t for one, method, _ in found for name, t in fields(one, method).items()}


def _lokr(found: Sequence[Item], prefix: str) -> Content | None:
    kernels = {"lokr_t2" in m.fields for one, m, _ in found if math.prod(one.kernel) > 1 and "lokr_w2" not in m.fields}
    if len(kernels) > 1 or any("lokr_t2" in m.fields and math.prod(one.kernel) == 1 for one, m, _ in found):
        return None
    splits = [split_of(one, method.fields) for one, method, _ in found]
    both = any("lokr_w1_a" in method.fields for _, method, _ in found)
    for factor in [-1, *sorted({side for split in splits if split for pair in split for side in pair})]:
        ranks = [_lokr_rank(m, split, factor, both) for (_, m, _), split in zip(found, splits, strict=True)]
        if None not in ranks:
            break
    else:
        return None
    scales = {one.name: (rank, one.scale * rank) for (one, _, _), rank in zip(found, ranks, strict=True) if rank}
    settings = _scaled("LOKR", scales) | {
        "decompose_both": both,
        "decompose_factor": factor,
        "use_effective_conv2d": True in kernels,
        "rank_dropout_scale": False,
    }
    return _content(found, _keys(found, prefix, _lokr_fields), settings)


def _lokr_fields(one: Filled, method: Method) -> dict[str, Tensor]:
    fields = dict(method.fields)
    if "lokr_w2" in fields and one.kernel:
        fields["lokr_w2"] = fields["lokr_w2"].reshape(fields["lokr_w2"].shape[0], -1, *one.kernel)
    return fields


def _lokr_rank(method: Method, split: tuple[tuple[int, int], tuple[int, int]] | None, factor: int, both: bool) -> int | None:
    """The rank with which PEFT builds just these tensors, None where there is none.

    PEFT splits both sides by the factor; the second split has low rank where the rank is below half of its longer side, the
    first one likewise where both are to be taken apart.
    """
    if split is None or any(pair_split(a * b, factor) != (a, b) for a, b in split):
        return None
    (o1, o2), (i1, i2) = split
    if len(set(method.ranks)) > 1:
        return None
    fields = method.fields
    least = [-(-max(o2, i2) // 2)] * ("lokr_w2" in fields) + [-(-max(o1, i1) // 2)] * ("lokr_w1" in fields and both)
    below = [max(o2, i2) / 2] * ("lokr_w2" not in fields) + [max(o1, i1) / 2] * ("lokr_w1_a" in fields)
    rank = method.ranks[0] if method.ranks else max(least, default=1)
    fits = all(rank >= bound for bound in least) and all(rank < bound for bound in below)
    return max(rank, 1) if fits else None


def _adalora(found: Sequence[Item], prefix: str) -> Content | None:
    """One rank and one scale: AdaLoRA has no patterns for them."""
    ranks, scales = {m.ranks[0] for _, m, _ in found}, {one.scale for one, _, _ in found}
    if len(ranks) > 1 or len(scales) > 1 or any(one.kernel for one, _, _ in found):
        return None
    rank, scale = ranks.pop(), scales.pop()
    if scale <= 0:
        return None
    settings = {
        **common("ADALORA", [one.name for one, _, _ in found]),
        "r": rank,
        "init_r": rank,
        "target_r": rank,
        "lora_alpha": number(scale * (rank + 1e-5)),
        "total_step": 1,
        "rank_pattern": None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }

    def fields(one: Filled, method: Method) -> dict[str, Tensor]:
        own = method.fields
        return {"lora_A": own["down"], "lora_B": own["up"], "lora_E": own["E"].reshape(-1, 1)}

    return _content(found, _keys(found, prefix, fields), settings)


def _vera(found: Sequence[Item], prefix: str) -> Content | None:
    """One A and one B for all, of which each weight has the first columns and rows."""
    widest = max(found, key=lambda item: item[0].shape[1])[1].fields["vera_A"]
    longest = max(found, key=lambda item: item[0].shape[0])[1].fields["vera_B"]
    for one, method, _ in found:
        own = method.fields
        alike = own["vera_A"].shape[0] == widest.shape[0] and own["vera_B"].shape[1] == widest.shape[0]
        if one.scale != 1.0 or one.kernel or not alike or not torch.equal(own["vera_A"], widest[:, : one.shape[1]]):
            return None
        if not torch.equal(own["vera_B"], longest[: one.shape[0]]):
            return None
    tensors = _keys(found, prefix, lambda _, m: {"vera_lambda_b": m.fields["vera_b"], "vera_lambda_d": m.fields["vera_d"]})
    settings = {
        **common("VERA", [one.name for one, _, _ in found]),
        "r": widest.shape[0],
        "projection_prng_key": 0,
        "save_projection": True,
        "vera_dropout": 0.0,
        "d_initial": 0.1,
        "init_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    return _content(found, tensors | {"base_model.vera_A": widest, "base_model.vera_B": longest}, settings)


WRITERS: dict[str, Callable[[Sequence[Item], str], Content | None]] = {
    "loha": _loha,
    "lokr": _lokr,
    "adalora": _adalora,
    "vera": _vera,
}
