"""Trainable-parameter counts that papers and libraries published, from the declaration alone; sources in method.md."""

from __future__ import annotations

import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, cases

from superlora_tn.declare.fold import FlatFold, PhysicalFold
from superlora_tn.declare.maps import Fastfood
from superlora_tn.declare.parts import CP, Network, Node, Tucker
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.variants import dense, loha, lokr, lonkr, lora, lorta, lotr, superlora, vera
from superlora_tn.update.make import make_adapter

Shapes = dict[str, tuple[int, int]]


def stack(layers: int, **types: tuple[int, int]) -> Shapes:
    return {f"layers.{k}.{name}": shape for k in range(layers) for name, shape in types.items()}


UNET = {f"narrow.{k}": s for k, s in stack(5, q=(64, 64), v=(64, 64)).items()}
UNET |= {f"wide.{k}": s for k, s in stack(16, q=(128, 128), v=(128, 128)).items()}
LLAMA = stack(28, q_proj=(3072, 3072), v_proj=(1024, 3072))
LLAMA_MLP = stack(28, gate_proj=(8192, 3072), up_proj=(8192, 3072), down_proj=(3072, 8192))
VIT_QV = stack(12, q_proj=(768, 768), v_proj=(768, 768))
VIT_QKV = stack(12, q_proj=(768, 768), k_proj=(768, 768), v_proj=(768, 768))
VIT_HEAD = 77_669

LORA_FA = AdapterSpec(Network("o i", {"r": 32}, B="o r", A=Node("r i", trainable=False)))
ADALORA = AdapterSpec(Network("o i", {"r": 64}, P="o r", lam=Node("r", init="zeros"), Q="r i"))


def tenslora(modes: str, rank: int) -> AdapterSpec:
    return AdapterSpec(Tucker(rank), PhysicalFold(modes, heads=12 if "head" in modes else None))


PUBLISHED = [
    ("unet-lora", lora(8), UNET, 75_776),
    ("unet-2d", AdapterSpec(CP(13), FlatFold(2, groups=8, stacked=True)), UNET, 70_720),
    ("unet-2d-reshape-projected", superlora(4, order=2, groups=4, projection=Fastfood(0.5)), UNET, 8_512),
    # Inferred rule, not a published count: the near-square side of 565,248 elements, 752, rounds up to 6 * 128.
    ("unet-2d-reshape", AdapterSpec(CP(4), FlatFold(2, multiple=128)), UNET, 4 * 2 * 768),
    ("unet-lorta-m3-g12-r5", lorta(5, order=3, groups=12), UNET, 8_160),
    ("unet-lorta-m3-g1-r4", lorta(4, order=3), UNET, 1_060),
    ("unet-lorta-projected", lorta(4, order=3, groups=4, projection=Fastfood(0.01)), UNET, 832),
    ("unet-lorta-m5-g1-r1", lorta(1, order=5), UNET, 76),
    ("unet-dense", dense(), UNET, 565_248),
    ("llama-lora", lora(32), LLAMA, 9_175_040),
    ("llama-lora-mlp", lora(10), LLAMA_MLP, 9_461_760),
    ("llama-lora-fa", LORA_FA, LLAMA, 3_670_016),
    ("llama-loha", loha(32), LLAMA, 18_350_080),
    ("llama-lokr", lokr(32, factor=4), LLAMA, 2_294_656),
    ("llama-vera", vera(256), LLAMA, 129_024),
    ("llama-adalora", ADALORA, LLAMA, 18_353_664),
    ("vit-lora", lora(16), VIT_QV, 667_493 - VIT_HEAD),
    ("vit-lokr", lokr(16), VIT_QV, 116_069 - VIT_HEAD),
    ("roberta-lotr", lotr(2), VIT_QV, 3_168),
    ("tenslora-depth-4", tenslora("layer out in", 4), VIT_QKV, 18_768),
    ("tenslora-depth-8", tenslora("layer out in", 8), VIT_QKV, 38_688),
    ("tenslora-depth-16", tenslora("layer out in", 16), VIT_QKV, 86_592),
    ("tenslora-qkv-depth-4", tenslora("layer type out in", 4), VIT_QKV, 6_460),
    ("tenslora-qkv-depth-8", tenslora("layer type out in", 8), VIT_QKV, 16_504),
    ("tenslora-qkv-depth-16", tenslora("layer type out in", 16), VIT_QKV, 90_352),
    ("tenslora-att-qkv-depth-4", tenslora("layer type head out in", 4), VIT_QKV, 4_460),
    ("tenslora-att-qkv-depth-8", tenslora("layer type head out in", 8), VIT_QKV, 39_640),
    ("tenslora-att-qkv-depth-16", tenslora("layer type head out in", 16), VIT_QKV, 1_062_320),
]


@pytest.mark.parametrize(("spec", "shapes", "count"), [p[1:] for p in PUBLISHED], ids=[p[0] for p in PUBLISHED])
def test_the_published_count(spec: AdapterSpec, shapes: Shapes, count: int) -> None:
    assert spec.count(shapes) == count


SIZES = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=4)


@given(SIZES)
def test_lora_loha_and_dense_follow_their_rules(pairs: list[tuple[int, int]]) -> None:
    assert lora(1).count(pairs) == oracle.count_lora(1, pairs)
    assert loha(1).count(pairs) == 2 * oracle.count_lora(1, pairs)
    assert dense().count(pairs) == sum(o * i for o, i in pairs)


@given(st.lists(st.tuples(st.integers(2, 40), st.integers(2, 40)).map(lambda p: (6 * p[0], 6 * p[1])), min_size=1, max_size=3))
def test_lokr_follows_pefts_rule(pairs: list[tuple[int, int]]) -> None:
    for rank, factor in ((1, -1), (2, 4)):
        splits = [oracle.even_pair(s, factor)[1] for pair in pairs for s in pair]
        if min(splits) >= rank:
            assert lokr(rank, factor).count(pairs) == oracle.count_lokr(rank, pairs, factor)


@given(SIZES, st.integers(2, 5), st.integers(1, 4), st.sampled_from([1.0, 0.5, 0.25]))
def test_lorta_follows_the_papers_rule(pairs: list[tuple[int, int]], order: int, groups: int, ratio: float) -> None:
    total = sum(o * i for o, i in pairs)
    if total >= groups:
        projection = None if ratio == 1.0 else Fastfood(ratio)
        spec = lorta(1, order, groups, projection)
        assert spec.count(pairs) == oracle.count_lorta(1, order, groups, ratio * total)


def test_stacked_2d_follows_the_papers_rule() -> None:
    for groups, rank in ((1, 3), (8, 13), (16, 2)):
        spec = AdapterSpec(CP(rank), FlatFold(2, groups=groups, stacked=True))
        assert spec.count(UNET) == oracle.count_stacked(rank, groups, 565_248, 128)


def test_lonkr_counts_each_split() -> None:
    assert lonkr(1, splits=3).count([(64, 27)]) == 3 * (4 + 3)


@given(cases())
def test_the_count_is_that_of_the_tensors_that_exist(case: Case) -> None:
    made = 0
    for group, graph in case.spec.lay_out(case.shapes):
        made += sum(p.numel() for p in make_adapter(case.spec, group, graph).parameters())
    assert case.spec.count(case.shapes) == made
