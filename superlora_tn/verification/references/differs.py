"""Where a peer differs from the textbook: each case shows the peer's number beside the formula's.

These are news about the peers' releases, not verdicts on this library; `tests` and `verify` hold us to the formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from superlora_tn.declare.fold import Shape
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.variants import loha, lokr, lora
from superlora_tn.verification.cases import Case, Sized, as_array, linear, linear_model
from superlora_tn.verification.references import peers
from superlora_tn.verification.references.carry import to_peft
from superlora_tn.verification.references.papers import adalora
from superlora_tn.verification.references.textbook import Array

SHAPE: Shape = (6, 8)
NAME = "layer.0.q_proj"


@dataclass(frozen=True)
class Difference:
    """A named difference.

    Attributes:
        property: what the peer does.
        package: the peer.
        show: the peer's numbers and the formula's, as arrays of one shape.
    """

    property: str
    package: str
    show: Callable[[], tuple[Array, Array]]


def _sized(spec: AdapterSpec) -> Sized:
    [sized] = Case(spec, ((NAME, SHAPE),), seed=1).groups()
    return sized


def _lycoris(spec: AdapterSpec, call: str) -> tuple[Array, Array]:
    sized = _sized(spec)
    module = peers.lycoris_modules(sized)[NAME]
    if call == "get_diff_weight":
        return as_array(module.get_diff_weight(1, SHAPE)[0]), sized.formula()[NAME]
    before = as_array(module.org_weight)
    with torch.no_grad():
        module.merge_to(1.0)
    return as_array(module.org_weight) - before, sized.formula()[NAME]


def _dense_lokr() -> tuple[Array, Array]:
    """Both splits dense at alpha 3, rank 4: the declared scale is 3/4, LyCORIS takes 1."""
    sized = _sized(lokr(4, alpha=3.0))
    module = peers.load("lycoris.modules.lokr").LokrModule
    with peers.quiet():
        made = module("peer", linear(torch.zeros(SHAPE), torch.float64), 1.0, lora_dim=4, alpha=3.0).double()
    for name, value in to_peft(sized.spec, sized.values).tensors.items():
        dict(made.named_parameters())[name].data = torch.from_numpy(value.copy())
    return as_array(made.get_weight(SHAPE)), sized.formula()[NAME]


def _out_proj() -> tuple[Array, Array]:
    """PEFT's update of the output of an nn.MultiheadAttention whose out_proj alone has a LoRA."""
    peft, width, x = peers.load("peft"), 8, torch.eye(8, dtype=torch.float64)[None]
    with peers.quiet():
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(width, 1, bias=False, batch_first=True, dtype=torch.float64)
        plain = _attention(attention, x)
        layer = peers.load("peft.tuners.lora.layer").MultiheadAttention(
            attention, "default", peft.LoraConfig(r=2, lora_alpha=2), r=2, lora_alpha=2
        )
    projection = layer.base_layer.out_proj
    values = np.random.default_rng(0)
    a, b = values.standard_normal((2, width)), values.standard_normal((width, 2))
    # PEFT adapts the in-projection with it; that update is set to zero.
    layer.lora_B["default"].weight.data = torch.zeros(3 * width, 2, dtype=torch.float64)
    layer.lora_A["default"].weight.data = torch.from_numpy(a)
    projection.lora_A["default"].weight.data = torch.from_numpy(a)
    projection.lora_B["default"].weight.data = torch.from_numpy(b)
    inner = plain @ torch.linalg.inv(projection.get_base_layer().weight.T)
    return as_array(_attention(layer, x) - plain), as_array(inner) @ (b @ a).T


def _attention(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), peers.quiet():
        return module(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


def _loha_scale() -> tuple[Array, Array]:
    """PEFT's float64 LoHa at scale 1/3, through a scale of 1 to get by the guard, which is then set."""
    sized = _sized(loha(3, alpha=3.0))
    carried = to_peft(sized.spec, sized.values)
    layer: Any = peers.peft_layer(carried, linear(torch.zeros(SHAPE), torch.float64))
    layer.scaling["default"] = 1 / 3
    return as_array(layer.get_delta_weight("default")), sized.formula()[NAME] / 3


def _adalora_scale() -> tuple[Array, Array]:
    """PEFT's AdaLoRA at lora_alpha = r, where the declared scale is 1: it divides by r + 1e-5."""
    sized = _sized(adalora(2))
    layer: Any = peers.peft_layer(to_peft(sized.spec, sized.values), linear(torch.zeros(SHAPE), torch.float64))
    layer.scaling["default"] = 2.0
    return as_array(layer.get_delta_weight("default")), sized.formula()[NAME]


def _unmerge_drift() -> tuple[Array, Array]:
    """A bfloat16 weight after PEFT's merge and unmerge, and as it was."""
    sized = _sized(lora(2, alpha=2.0))
    base = linear_model(sized.shapes, torch.bfloat16, 0).get_submodule(NAME)
    assert isinstance(base, nn.Linear)
    before = as_array(base.weight.clone())
    layer = peers.peft_layer(to_peft(sized.spec, sized.values), base)
    layer.merge()  # type: ignore[operator]
    layer.unmerge()  # type: ignore[operator]
    return as_array(base.weight), before


DIFFERENCES = (
    Difference("lokr: merge_to scales twice", "lycoris", lambda: _lycoris(lokr(1, alpha=3.0), "merge_to")),
    Difference("loha: merge_to scales twice", "lycoris", lambda: _lycoris(loha(2, alpha=6.0), "merge_to")),
    Difference("lokr: get_diff_weight scales twice", "lycoris", lambda: _lycoris(lokr(1, alpha=3.0), "get_diff_weight")),
    Difference("lokr, both splits dense: alpha ignored", "lycoris", _dense_lokr),
    Difference("MultiheadAttention.out_proj: dW added twice", "peft", _out_proj),
    Difference("loha in float64: scale rounded to float32", "peft", _loha_scale),
    Difference("adalora: scale divided by r + 1e-5", "peft", _adalora_scale),
    Difference("bf16: unmerge does not restore the weight", "peft", _unmerge_drift),
)
