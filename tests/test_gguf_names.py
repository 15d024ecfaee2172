"""Files of llama.cpp's on the models they were made for: names of architectures, and rows of heads, back again."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import superlora_tn as sl
from superlora_tn import CheckpointError
from superlora_tn.cli import main
from superlora_tn.files.gguf import Architecture, heads_in

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 32,
    "hidden_size": 24,  # heads of six: three pairs
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# float32 outputs of two layers of width 24
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def model(kind: str = "Llama") -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES)).eval()


def written(place: Path, kind: str = "Llama", targets: list[str] = PROJECTIONS) -> dict[str, Tensor]:
    """An adapter of random values in llama.cpp's file, and its dW by module."""
    tuned = sl.attach(model(kind), sl.lora(3, alpha=6), targets)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    tuned.save(place, format="gguf", architecture=Architecture(kind.lower(), (4, 2)))
    return {name: tuned.delta(name).detach() for name in tuned.targets}


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_llama_cpps_file_loads_on_the_model(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "x.gguf"
    deltas = written(place, kind, [*PROJECTIONS, "embed_tokens"])
    names = {tensor.name.rpartition(".weight")[0] for tensor in gguf.GGUFReader(str(place)).tensors}
    assert {"blk.0.attn_q", "blk.1.ffn_down", "token_embd"} <= names
    loaded = sl.load(model(kind), place)
    assert loaded.targets.keys() == deltas.keys()
    for name, delta in deltas.items():
        assert torch.equal(loaded.delta(name), delta), name


def test_rows_of_heads_are_what_llama_cpp_makes_of_them(tmp_path: Path) -> None:
    """llama.cpp stores row (head, half, j) of q at (head, j, half); the file's own numbers, read by its own reader."""
    written(tmp_path / "x.gguf")
    held = {t.name: np.array(t.data, dtype=np.float64) for t in gguf.GGUFReader(str(tmp_path / "x.gguf")).tensors}
    loaded = sl.load(model(), tmp_path / "x.gguf")
    for word, heads, rows in (("q", 4, 24), ("k", 2, 12)):
        a, b = (held[f"blk.1.attn_{word}.weight.lora_{side}"] for side in "ab")
        stored, size = 2.0 * b @ a, rows // heads  # alpha 6 over rank 3
        wanted = np.empty_like(stored)
        for head in range(heads):
            for half in range(2):
                for j in range(size // 2):
                    wanted[head * size + half * size // 2 + j] = stored[head * size + 2 * j + half]
        found = loaded.delta(f"model.layers.1.self_attn.{word}_proj").detach().double().numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)  # a float32 product of rank 3
        assert np.abs(found - stored).max() > 0.1


def test_it_loads_on_the_inner_model_and_within_another(tmp_path: Path) -> None:
    deltas = written(tmp_path / "x.gguf")
    inner = sl.load(model().model, tmp_path / "x.gguf")
    assert {f"model.{name}" for name in inner.targets} == deltas.keys()
    whole = model()
    outer = nn.ModuleDict({"language": whole, "eyes": nn.Linear(4, 4)})
    outer.config = whole.config
    loaded = sl.load(outer, tmp_path / "x.gguf")
    for name, delta in deltas.items():
        assert torch.equal(loaded.delta(f"language.{name}"), delta)


def test_a_model_of_the_files_own_names_takes_it_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = written(tmp_path / "x.gguf", targets=["v_proj"])
    monkeypatch.setitem(sys.modules, "gguf", None)  # not needed here
    block = nn.ModuleDict({"attn_v": nn.Linear(24, 12)})
    loaded = sl.load(nn.ModuleDict({"blk": nn.ModuleList([block, copy.deepcopy(block)])}), tmp_path / "x.gguf")
    for k, delta in enumerate(deltas.values()):
        assert torch.equal(loaded.delta(f"blk.{k}.attn_v"), delta)
    with pytest.raises(
        CheckpointError, match=r"architecture 'llama' need the package gguf: pip install 'superlora_tn\[gguf\]'"
    ):
        sl.load(model(), tmp_path / "x.gguf")


def test_what_is_not_clear_is_refused_and_the_model_left_as_it_was(tmp_path: Path) -> None:
    written(tmp_path / "x.gguf")
    two = nn.ModuleDict({"one": model(), "two": model()})
    two.config = two["one"].config
    with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_q' could be each of 'one\.model\..*', 'two\.model\.layers\.0"):
        sl.load(two, tmp_path / "x.gguf")
    bare = nn.ModuleDict({"model": model().model})
    with pytest.raises(
        CheckpointError, match=r"'model\.layers\.0\.self_attn\.q_proj' has its rows .* has no configuration that"
    ):
        sl.load(bare, tmp_path / "x.gguf")
    small = model()
    del small.model.layers[1]
    with pytest.raises(CheckpointError, match=r"7 of 14 weights are no module of this model, such as 'blk\.1\.attn_k'"):
        sl.load(small, tmp_path / "x.gguf")
    for one in (two, bare, small):
        assert all(parameter.requires_grad for parameter in one.parameters())
        assert not [m for m in one.modules() if type(m).__module__.startswith("superlora_tn")]


def test_an_architecture_that_stores_a_weight_otherwise_is_refused(tmp_path: Path) -> None:
    config = transformers.FalconConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=4)
    falcon = transformers.FalconForCausalLM(config)
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "falcon")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0)
    rows = falcon.transformer.h[0].self_attention.query_key_value.weight.shape[0]
    writer.add_tensor("blk.0.attn_qkv.weight.lora_a", np.ones((2, 16), dtype=np.float32))
    writer.add_tensor("blk.0.attn_qkv.weight.lora_b", np.ones((rows, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"in GGUF's architecture 'falcon', which is not read here"):
        sl.load(falcon, tmp_path / "x.gguf")


def test_conversion_takes_names_and_heads_from_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deltas = written(tmp_path / "x.gguf")
    base = model()
    base.save_pretrained(tmp_path / "base")
    for to in ("peft", "kohya", "superlora"):
        asked = ["convert", str(tmp_path / "x.gguf"), str(tmp_path / to), "--to", to]
        assert main(asked) == 2
        told = capsys.readouterr().err
        assert "names such as 'blk.0.attn_" in told
        assert "of GGUF's architecture 'llama', so the modules are known only with the base model; give it: --base" in told
        assert main([*asked, "--base", str(tmp_path / "base")]) == 0
        loaded = sl.load(model(), tmp_path / to)
        for name, delta in deltas.items():
            torch.testing.assert_close(loaded.delta(name), delta, **CLOSE)
    (tmp_path / "base" / "config.json").unlink()
    assert (
        main(["convert", str(tmp_path / "x.gguf"), str(tmp_path / "y"), "--to", "peft", "--base", str(tmp_path / "base")]) == 2
    )
    assert "has no configuration that tells their number" in capsys.readouterr().err


def test_heads_of_a_configuration() -> None:
    assert heads_in({"num_attention_heads": 8}) == (8, 8)
    assert heads_in({"num_attention_heads": 8, "num_key_value_heads": 2}) == (8, 2)
    assert heads_in({"text_config": {"num_attention_heads": 8}, "num_attention_heads": 3}) == (8, 8)
    assert heads_in({"num_attention_heads": [4, 8]}) is None
    assert heads_in({}) is None
