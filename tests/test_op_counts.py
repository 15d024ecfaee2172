"""A guard against slower programs that needs no clock: what the generated lines do, counted.

Numbers are upper bounds seen when each program was measured (benchmarks/results); a change that needs more operations
has to show by measurement that it is worth it, and then raise them here.
"""

from __future__ import annotations

import re

import pytest
import torch
from superlora_tn_backends.tensorly_torch import _add_product
from superlora_tn_backends.writer import backward_source, forward_source

import superlora_tn as sl
from superlora_tn.contraction.plan import make_plan

HEADS = sl.AdapterSpec(sl.CP(8), sl.PhysicalFold("layer type head out in", heads=12))
# spec: (products forward, products backward), for a 768 x 768 weight and 2048 tokens.
LIMITS = {
    "lora": (sl.lora(8), 2, 4),
    "lokr": (sl.lokr(8), 3, 6),
    "loha": (sl.loha(8), 2, 4),
    "lotr": (sl.lotr(8), 3, 6),
    "lorta_cp": (HEADS, 2, 4),
    "vera": (sl.vera(8), 2, 4),
}
PRODUCT = r"matmul\(|addmm_\("


def products(source: str) -> int:
    """Matrix products on the longest way through the source: of an if and its else, one runs."""
    # Outer products' gradients, one small product for each row ("None" in them), are as cheap as elementwise work.
    lines = [line for line in source.split("\n") if re.search(PRODUCT, line) and not re.search(r"None[,\]]", line)]
    # The line before an addmm_ into a given buffer is its alternative for when there is none.
    alternatives = sum("addmm_" in line for line in lines)
    return sum(len(re.findall(PRODUCT, line.split(" if alpha")[0])) for line in lines) - alternatives


def sources(spec: sl.AdapterSpec) -> tuple[str, str]:
    shapes = {f"layers.{k}.{t}_proj": (768, 768) for k in range(2) for t in "qv"}
    plan = make_plan(spec.lay_out(shapes)[0][1], "apply", 2048)
    return forward_source(plan), backward_source(plan, (True, *(n.trainable for n in spec.lay_out(shapes)[0][1].nodes)))


@pytest.mark.parametrize("name", LIMITS)
def test_a_step_needs_no_more_products_than_when_it_was_measured(name: str) -> None:
    spec, ahead, back = LIMITS[name]
    forward, backward = sources(spec)
    assert 0 < products(forward) <= ahead, forward
    assert 0 < products(backward) <= back, backward


@pytest.mark.parametrize("name", LIMITS)
def test_the_update_is_added_in_place(name: str) -> None:
    forward, _ = sources(LIMITS[name][0])
    assert re.search(r"TL\.reshape\(out, .*\)\.addmm_\(", forward), forward


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (3,)])
def test_the_layers_gradient_joins_that_of_the_network_in_place(shape: tuple[int, ...]) -> None:
    total, grad, base = torch.ones(shape), torch.randn(*shape[:-1], 4), torch.randn(4, 3)
    with torch.no_grad():  # as in backward
        found = _add_product(total, grad, base)
    assert found.data_ptr() == total.data_ptr()
    assert found.shape == total.shape
    torch.testing.assert_close(found, 1 + grad @ base)


@pytest.mark.parametrize("name", LIMITS)
def test_the_activation_is_only_reshaped(name: str) -> None:
    for source in sources(LIMITS[name][0]):
        assert not re.search(r"transpose\((TL\.reshape\()?v0\b", source), source
        assert "v0.contiguous" not in source


def test_large_products_of_nodes_are_made_again_and_freed() -> None:
    # At 4096 LoHa's two joined factors hold 2**18 numbers each; kept, they are the layer's whole extra memory.
    shapes = {"layers.0.q_proj": (4096, 4096)}
    plan = make_plan(sl.loha(8).lay_out(shapes)[0][1], "apply", 32)
    forward, backward = forward_source(plan), backward_source(plan, (True,) * 5)
    joined = [f"v{5 + k}" for k, s in enumerate(plan.steps) if not s.contracted]
    assert len(joined) == 2
    kept = re.search(r"return out, \((.*)\)", forward)[1]
    for name in joined:
        assert name not in kept
        assert f"{name} = " in forward
        assert f"{name} = " in backward
        assert re.search(rf"del .*{name}", backward)


def test_small_products_of_nodes_are_kept() -> None:
    forward, backward = sources(sl.loha(8))
    assert re.search(r"return out, \(v5, v6, v7", forward), forward
    assert "v5 = " not in backward
