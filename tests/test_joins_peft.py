"""Updates that are not added, inside PEFT: the same numbers as attached, saved, merged, switched, and in mixed batches."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from optional import library
from torch import Tensor, nn

import superlora_tn as sl
from superlora_tn.declare.joins import Join

JOINS: dict[str, Join] = {"magnitude": sl.Magnitude(), "left": sl.Multiply("left"), "right": sl.Multiply("right")}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def wrapped(spec: sl.AdapterSpec) -> tuple[Any, Any, nn.Module, Tensor]:
    """PEFT's model with moved values, its config, and the base."""
    peft = library("peft")
    from superlora_tn.peft import SuperLoraConfig

    torch.manual_seed(0)
    base = Two().double()
    config = SuperLoraConfig(spec=spec, target_modules=["up", "down"])
    model = peft.get_peft_model(copy.deepcopy(base), config).double()
    x = torch.randn(3, 10, dtype=torch.float64)
    torch.testing.assert_close(model(x), base(x), rtol=0, atol=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model, config, base, x


@pytest.mark.parametrize("name", JOINS)
def test_a_join_inside_peft_is_the_attached_one(name: str, tmp_path: Path) -> None:
    spec = replace(sl.lora(2), join=JOINS[name])
    model, _, base, x = wrapped(spec)
    trained = [p for p in model.parameters() if p.requires_grad]
    ours = copy.deepcopy(base)
    tuned = sl.attach(ours, spec, ["up", "down"], dtype=torch.float64)
    with torch.no_grad():
        for own, given in zip(tuned.parameters(), trained, strict=True):
            own.copy_(given)
    y = model(x)
    torch.testing.assert_close(y, ours(x), rtol=1e-12, atol=1e-13)
    for one in (y, ours(x)):
        one.square().sum().backward()
    for own, given in zip(tuned.parameters(), trained, strict=True):
        torch.testing.assert_close(own.grad, given.grad, rtol=1e-10, atol=1e-12)
    changed = model.base_model.model.up.get_delta_weight("default")
    torch.testing.assert_close(changed, tuned.delta("up").detach(), rtol=1e-10, atol=1e-12)
    model.save_pretrained(tmp_path)
    again = library("peft").PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).double()
    torch.testing.assert_close(again(x), y, rtol=1e-12, atol=1e-13)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-12)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), y, rtol=0, atol=0)
    torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", JOINS)
def test_adapters_that_do_not_add_are_switched_but_not_stacked(name: str) -> None:
    model, config, base, x = wrapped(replace(sl.lora(2), join=JOINS[name]))
    y = model(x)
    model.add_adapter("other", config)
    model.set_adapter("other")
    torch.testing.assert_close(model(x), base(x), rtol=1e-12, atol=1e-13)
    model.set_adapter("default")
    model.eval()
    if name == "right":
        with pytest.raises(ValueError, match="one for all rows"):
            model(x, adapter_names=["default", "other", "__base__"])
    else:
        mixed = model(x, adapter_names=["default", "other", "__base__"])
        torch.testing.assert_close(mixed, torch.cat([y[:1], base(x)[1:]]), rtol=1e-12, atol=1e-13)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="works where all are added"):
        model(x)
    with pytest.raises(ValueError, match="works where all are added"):
        model.merge_adapter()
