"""Whatever bytes lie in a file: it is read, or a `CheckpointError` says what is wrong; nothing is run, hung on or blown up."""

from __future__ import annotations

import json
import os
import pickle
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from superlora_tn.files.container import load
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.foreign import Parsed
from superlora_tn.files.read import read
from superlora_tn.files.thin import thin

# 20,000 files in the thorough profile, over the readers below.
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
FILES = 5000 if THOROUGH else 60
fuzz = settings(max_examples=FILES, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

GOOD: dict[str, Tensor] = {
    "lora_unet_a.lora_up.weight": torch.ones(4, 2),
    "lora_unet_a.lora_down.weight": torch.ones(2, 6, 1, 1),
    "lora_unet_a.alpha": torch.tensor(2.0),
    "lora_unet_b.lokr_w1": torch.ones(2, 2),
    "lora_unet_b.lokr_w2_a": torch.ones(3, 2),
    "lora_unet_b.lokr_w2_b": torch.ones(2, 3),
    "lora_unet_b.dora_scale": torch.ones(6, 1),
    "lora_unet_c.diff": torch.ones(3, 3),
    "lora_unet_c.diff_b": torch.ones(3),
}
SHAPES = {"a": (4, 6), "b": (6, 6), "c": (3, 3)}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"q": 2}, "alpha_pattern": {"^a.q$": 1}}
FOLDER = {"base_model.model.a.q.lora_A.weight": torch.ones(2, 6), "base_model.model.a.q.lora_B.weight": torch.ones(4, 2)}


def outcome(path: Path) -> Parsed | None:
    """What was read, and may be fitted and taken apart; None where the error says why not."""
    try:
        found = read(path)
        assert isinstance(found, Parsed)
        for weight in found.weights:
            assert weight.shape[0] >= 1
            thin(weight)
        found.fitted(SHAPES, parameters=["a.weight", "c.weight", "c.bias"], weights=lambda name: torch.ones(SHAPES[name]))
    except CheckpointError as error:
        assert 20 < len(str(error)) < 4000
        return None
    return found


def header(data: bytes) -> dict[str, Any]:
    """The JSON of a safetensors file."""
    size = struct.unpack("<Q", data[:8])[0]
    found = json.loads(data[8 : 8 + size])
    assert isinstance(found, dict)
    return found


def with_header(data: bytes, changed: Any) -> bytes:
    """The same numbers under another header."""
    size = struct.unpack("<Q", data[:8])[0]
    text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


@fuzz
@given(st.data())
def test_mutated_bytes(tmp_path: Path, data: st.DataObject) -> None:
    packed = bytearray(save(GOOD))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(packed) - 1))
        packed[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(packed))))
    (tmp_path / "x.safetensors").write_bytes(bytes(packed[:cut]))
    outcome(tmp_path / "x.safetensors")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["dtype", "shape", "data_offsets"])


@fuzz
@given(st.data())
def test_mutated_headers(tmp_path: Path, data: st.DataObject) -> None:
    packed = save(GOOD)
    changed = header(packed)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(changed)))
        kind = data.draw(st.sampled_from(["field", "entry", "drop", "rename", "metadata"]))
        if kind == "field" and isinstance(changed[name], dict):
            value = data.draw(JUNK | st.lists(st.integers(-2, 1 << 40), max_size=9) | st.sampled_from(["F16", "I8", "F8_E5M2"]))
            changed[name] = changed[name] | {data.draw(FIELDS): value}
        elif kind == "entry":
            changed[name] = data.draw(JUNK)
        elif kind == "drop" and len(changed) > 1:
            del changed[name]
        elif kind == "rename":
            ending = data.draw(
                st.sampled_from([".lokr_t2", ".lora_mid.weight", ".hada_t1", ".alpha", ".oft_blocks", ".weight", ""])
            )
            changed[data.draw(st.text(max_size=6)) + ending] = changed.pop(name)
        else:
            changed["__metadata__"] = data.draw(JUNK | st.dictionaries(st.just("lora_adapter_metadata"), st.text(max_size=20)))
    (tmp_path / "x.safetensors").write_bytes(with_header(packed, changed))
    outcome(tmp_path / "x.safetensors")


SUFFIXES = [
    *("lora_up.weight", "lora_down.weight", "lora_mid.weight", "lora_A.weight", "lora_B.weight", "lora_B.bias", "alpha"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b"),
    *("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "diff", "diff_b", "w_norm", "b_norm", "dora_scale", "weight", "bias"),
    *("lora_magnitude_vector", "lora_E", "lora_embedding_A", "lora_embedding_B", "vera_lambda_b", "vera_lambda_d"),
    *("randlora_lambda", "randlora_gamma", "miss_block", "c3a_kernel", "gralora_A", "gralora_B"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8, torch.float8_e4m3fn]


@fuzz
@given(st.data())
def test_any_tensors_under_known_names(tmp_path: Path, data: st.DataObject) -> None:
    """Sizes and kinds that do not belong together."""
    tensors = {}
    for _ in range(data.draw(st.integers(1, 6))):
        name = data.draw(st.sampled_from(["lora_unet_a.", "a.", "base_model.model.b.", "lora_te_c.", ""]))
        shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 6]), max_size=5))
        value = data.draw(st.sampled_from([0.0, 1.0, -2.0, float("nan"), float("inf")]))
        dtype = data.draw(st.sampled_from(DTYPES))
        plain = torch.full(shape, value if dtype.is_floating_point else 1.0)
        tensors[name + data.draw(st.sampled_from(SUFFIXES))] = plain.to(dtype)
    write(tmp_path / "x.safetensors", tensors)
    outcome(tmp_path / "x.safetensors")


@fuzz
@given(
    st.dictionaries(st.sampled_from([*CONFIG, "use_dora", "use_rslora", "init_lora_weights", "bias", "x"]), JUNK), st.binary()
)
def test_mutated_settings(tmp_path: Path, changes: dict[str, Any], tail: bytes) -> None:
    write(tmp_path / "adapter_model.safetensors", FOLDER)
    text = json.dumps(CONFIG | changes).encode()
    (tmp_path / "adapter_config.json").write_bytes(text if not tail else text[: len(tail)] + tail)
    outcome(tmp_path)


def test_the_files_that_are_mutated_are_read(tmp_path: Path) -> None:
    assert outcome(write(tmp_path / "x.safetensors", GOOD)) is not None
    write(tmp_path / "adapter_model.safetensors", FOLDER)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    found = read(tmp_path / "adapter_config.json")
    assert isinstance(found, Parsed)
    assert found.weights[0].scale == 0.5


HEADERS: dict[str, tuple[Any, str]] = {
    "one tensor twice": (b'{"a.diff":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},"a.diff":{}}', "one name twice"),
    "tensors on each other": (
        {n: {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]} for n in ("a.diff", "b.diff")},
        "do not follow",
    ),
    "a size of 2 ** 62": (
        {"a.diff": {"dtype": "F32", "shape": [1 << 31, 1 << 31], "data_offsets": [0, 4]}},
        "but its header gives it 4",
    ),
    "a negative size": ({"a.diff": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, "readable shape"),
    "a hundred axes": ({"a.diff": {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]}}, "readable shape"),
    "an unknown dtype": ({"a.diff": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}, "is of dtype 'Q4'"),
    "more than its bytes": ({"a.diff": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}, "it is cut short"),
    "a list": ([1], "expected an object"),
    "deep nesting": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nests deeper|holds .* values"),
    "a number of 5,000 digits": (b'{"a.diff":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', "digits"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie(case: str, tmp_path: Path) -> None:
    changed, words = HEADERS[case]
    packed = save({"a.diff": torch.ones(1, 1)})
    (tmp_path / "x.safetensors").write_bytes(with_header(packed, changed))
    with pytest.raises(CheckpointError, match=words):
        read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 40])
def test_files_cut_short(size: int, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(save(GOOD)[:size])
    with pytest.raises(CheckpointError, match=r"not a safetensors file|cut short"):
        read(tmp_path / "x.safetensors")


def test_a_header_length_that_looks_like_a_pickle(tmp_path: Path) -> None:
    """19,280 bytes of header begin as a zip does, 640 as a pickle does; both are safetensors."""
    for length, start in ((0x4B50, b"PK"), (0x280, b"\x80\x02")):
        text = json.dumps({"a.diff": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}).encode().ljust(length)
        data = struct.pack("<Q", length) + text + b"\0" * 4
        assert data.startswith(start)
        (tmp_path / "x.safetensors").write_bytes(data)
        assert read(tmp_path / "x.safetensors") is not None


class Bomb:
    """A pickle that would write a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return (open, (str(self.place), "w"))


@pytest.mark.parametrize("name", ["x.bin", "x.pt", "x.ckpt", "x.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickles_never_run(name: str, how: str, tmp_path: Path) -> None:
    if how == "torch":
        torch.save({"a.diff": Bomb(tmp_path / "ran")}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
    with pytest.raises(CheckpointError, match=r"pickle|tensors alone"):
        read(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_tensor_of_strides_of_zero(tmp_path: Path) -> None:
    """Four bytes that claim to be 4 TB."""
    torch.save({"a.diff": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="no plain tensor"):
        load(tmp_path / "adapter_model.bin")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    os.mkfifo(tmp_path / "adapter_config.json")
    errors: list[Exception] = []

    def look(path: Path) -> None:
        try:
            read(path)
        except CheckpointError as error:
            errors.append(error)

    threads = [threading.Thread(target=look, args=(p,), daemon=True) for p in (tmp_path / "x.safetensors", tmp_path)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(errors) == 2


PLACES = {
    "nothing": (lambda p: p / "nowhere", "is missing"),
    "an empty folder": (lambda p: p, "holds no adapter"),
    "several files": (lambda p: (write(p / "a.safetensors", GOOD), write(p / "b.safetensors", GOOD), p)[2], "holds 2 files"),
    "no path": (lambda p: 3, "give a path"),
}


@pytest.mark.parametrize("case", PLACES)
def test_places_that_hold_no_adapter(case: str, tmp_path: Path) -> None:
    make, words = PLACES[case]
    with pytest.raises(CheckpointError, match=words):
        read(make(tmp_path))  # type: ignore[arg-type]


def test_a_whole_model_is_no_adapter(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", {"layers.0.weight": torch.ones(4, 4), "layers.0.bias": torch.ones(4)})
    with pytest.raises(CheckpointError, match="holds no adapter"):
        read(tmp_path / "x.safetensors")


def test_ten_thousand_weights_take_seconds(tmp_path: Path) -> None:
    """Generous, for what must not be quadratic."""
    import time

    names = [f"layers.{k}.m{j}" for k in range(100) for j in range(100)]
    tensors = {f"lora_unet_{n.replace('.', '_')}.lora_{w}.weight": torch.ones(2, 2) for n in names for w in ("up", "down")}
    write(tmp_path / "x.safetensors", tensors)
    start = time.monotonic()
    found = read(tmp_path / "x.safetensors")
    assert isinstance(found, Parsed)
    made = found.fitted({f"model.{n}": (2, 2) for n in names})
    assert len(made.entries) == 1
    assert time.monotonic() - start < 60
