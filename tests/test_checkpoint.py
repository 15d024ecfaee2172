"""Saving and loading: exact and strict. What may happen meanwhile is in `test_checkpoint_atomic`, what strangers write in
`test_checkpoint_hostile`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import DIM, HIDDEN, TARGETS, VARIANTS, Block, ConvNet, Tiny, assert_untouched, noise, perturb, seeded, snapshot
from saved import (
    JSON,
    SPEC,
    body_of,
    edit_entry,
    edit_json,
    edit_tensors,
    make_first,
    names,
    output_of,
    put_tensors,
    refuse,
    save,
    tensors_of,
)
from torch import nn

import superlora_tn as sl
from superlora_tn.files.own import Entry, read, write
from superlora_tn.model.describe import names as stored_names

every_variant = pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved adapter, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


# --- exact ---------------------------------------------------------------------------------------------------------


@every_variant
def test_round_trip_under_another_seed_is_bit_equal(spec: sl.AdapterSpec, tmp_path: Path) -> None:
    model = save(tmp_path / "deep" / "er", spec)
    torch.manual_seed(12345)
    fresh = seeded(0, Tiny)
    loaded = sl.load(fresh, tmp_path / "deep" / "er")
    x = noise(2, 3, DIM)
    assert torch.equal(model(x), fresh(x))
    assert loaded.spec == spec
    assert loaded.targets == sl.tuned(model).targets
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {
        f"superlora.{n}" for n, _ in loaded.named_parameters()
    }


@every_variant
def test_the_spec_survives_json(spec: sl.AdapterSpec) -> None:
    assert sl.AdapterSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_the_folder_holds_two_files_and_no_pickle(saved: Path) -> None:
    assert names(saved) == sorted([JSON, tensors_of(saved).name])
    for file in saved.iterdir():
        data = file.read_bytes()
        assert not data.startswith((b"\x80", b"PK"))
        assert b"torch._utils" not in data


def test_the_json_gives_a_target_one_line(saved: Path) -> None:
    assert '\n    "layers.0.up": [20, 12],\n' in (saved / JSON).read_text()


@pytest.mark.parametrize("name", ["a [\n 1,\n 2\n ]", "[ 1, 2 ]", "ä 层 😀", 'quote " and \\', "x" * 4000, "[\\n 1,\\n 2\\n ]"])
def test_names_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    nodes = {"group0.factor_out": torch.ones(3, 1), "group0.factor_in": torch.ones(2, 1)}
    write(tmp_path, [Entry(sl.lora(1), {name: (3, 2)})], nodes, {name: torch.ones(2)})
    assert read(tmp_path).targets == {name: (3, 2)}
    assert set(read(tmp_path).buffers) == {name}


def test_the_file_is_no_larger_than_the_shared_parameters(saved: Path) -> None:
    tuned = sl.load(seeded(0, Tiny), saved)
    assert 4 * tuned.num_parameters <= tensors_of(saved).stat().st_size <= 4 * tuned.num_parameters + 2000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_saved_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = seeded(0, Tiny)
    tuned = sl.attach(model, SPEC, TARGETS, seed=0, dtype=dtype)
    perturb(tuned)
    tuned.save(tmp_path)
    fresh = seeded(0, Tiny)
    assert {p.dtype for p in sl.load(fresh, tmp_path).parameters()} == {dtype}
    assert torch.equal(fresh(noise(2, 3, DIM)), model(noise(2, 3, DIM)))
    again = seeded(0, Tiny)
    assert {p.dtype for p in sl.load(again, tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


def test_an_adapter_of_several_dtypes_loads_as_it_was(tmp_path: Path) -> None:
    model = seeded(0, Tiny)
    tuned = sl.attach(model, sl.lora(2), TARGETS, seed=0)
    perturb(tuned)
    for adapter, dtype in zip(tuned.adapters, (torch.bfloat16, torch.float64, torch.float16), strict=False):
        adapter.to(dtype)
    tuned.save(tmp_path)
    loaded = sl.load(seeded(0, Tiny), tmp_path)
    assert [p.dtype for p in loaded.parameters()] == [p.dtype for p in tuned.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), tuned.parameters(), strict=True))


@pytest.mark.parametrize(
    "spec", [sl.lora(2), sl.loha(2), sl.lotr(2), sl.vera(2), sl.dora(sl.lora(2)), sl.lorta(2, projection=sl.Fastfood(0.5))]
)
def test_nodes_of_several_dtypes_become_one_of_the_widest(spec: sl.AdapterSpec, tmp_path: Path) -> None:
    """A contraction takes one; values that bfloat16 holds are the same in all, so dW is."""
    model = seeded(0, Tiny).double()
    tuned = sl.attach(model, spec, TARGETS, seed=0, dtype=torch.float64)
    perturb(tuned)
    with torch.no_grad():
        for node in tuned.parameters():
            node.copy_(node.to(torch.bfloat16))
    kinds = [torch.bfloat16, torch.float64, torch.float32]
    saved = tuned._saved()
    # Frozen nodes keep theirs, whose values bfloat16 does not hold.
    trained = {
        name
        for k, a in enumerate(tuned.adapters)
        for name in stored_names(k, a)
        if f"node_{name.split('.')[-1]}" in a._parameters
    }
    tensors = {n: t.to(kinds[k % 3]) if n in trained else t for k, (n, t) in enumerate(saved.tensors.items())}
    write(tmp_path, saved.entries, tensors, saved.buffers)
    assert len({value.dtype for value in read(tmp_path).tensors.values()}) > 1
    base = seeded(0, Tiny).double()
    loaded = sl.load(base, tmp_path)
    x = noise(2, 3, DIM, dtype=torch.float64)
    # Some groups are of float32.
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    close(base(x), model(x))
    for name in tuned.targets:
        close(loaded.delta(name).double(), tuned.delta(name).double())
    loaded.bake()
    tuned.bake()
    for name in tuned.targets:
        close(base.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.weight"))


def test_convolutions_round_trip(tmp_path: Path) -> None:
    model, x = seeded(0, ConvNet), noise(2, 4, 8, 8)
    tuned = sl.attach(model, SPEC, ["first", "grouped", "strided", "line"], seed=0)
    perturb(tuned)
    tuned.save(tmp_path)
    fresh = seeded(0, ConvNet)
    sl.load(fresh, str(tmp_path))
    assert torch.equal(fresh(x), model(x))


def test_a_loaded_adapter_detaches_and_saves_again(saved: Path, tmp_path: Path) -> None:
    model = seeded(0, Tiny)
    before = snapshot(model)
    tuned = sl.load(model, saved)
    tuned.save(tmp_path)
    tuned.detach()
    assert_untouched(model, before)
    assert names(tmp_path) == names(saved)
    assert all((tmp_path / name).read_bytes() == (saved / name).read_bytes() for name in names(saved))


def test_an_adapter_of_this_library_has_no_part_to_load(saved: Path) -> None:
    """The part was passed over without a word."""
    with pytest.raises(sl.CheckpointError, match=r"is of this library and has no parts; leave part='unet' out"):
        sl.load(seeded(0, Tiny), saved, part="unet")


def test_loading_over_an_attached_model_raises(saved: Path) -> None:
    model = seeded(0, Tiny)
    sl.load(model, saved)
    before = snapshot(model)
    with pytest.raises(sl.AttachError, match="'superlora' already"):
        sl.load(model, saved)
    assert_untouched(model, before)


# --- the first schema ----------------------------------------------------------------------------------------------


@every_variant
def test_the_first_schema_loads_bit_for_bit(spec: sl.AdapterSpec, tmp_path: Path) -> None:
    save(tmp_path, spec)
    expected = output_of(tmp_path)
    make_first(tmp_path)
    assert names(tmp_path) == [JSON, "adapter.safetensors"]
    assert output_of(tmp_path) == expected


def test_the_first_schema_finds_its_old_tensors_beside_new_ones(folder: Path, tmp_path: Path) -> None:
    """As it stood during a save, the JSON not yet replaced; the new tensors may be larger than the JSON lets expect."""
    expected = output_of(folder)
    make_first(folder)
    (folder / "adapter.safetensors").rename(folder / "adapter.safetensors.previous")
    assert output_of(folder) == expected
    (folder / "adapter.safetensors").write_bytes(b"another adapter")
    assert output_of(folder) == expected
    (folder / "adapter.safetensors").write_bytes(bytes(20 << 20))
    assert output_of(folder) == expected
    (folder / "adapter.safetensors.previous").unlink()
    refuse(folder, "adapter.safetensors has 20,971,520 bytes", "at most")


def test_a_save_over_the_first_schema_leaves_the_second(folder: Path) -> None:
    make_first(folder)
    for name in ("adapter.safetensors.previous", "adapter.safetensors.new", "adapter.json.new", "adapter.safetensors.mine"):
        (folder / name).write_bytes(b"left")
    model = save(folder, seed=1)
    assert names(folder) == sorted([JSON, tensors_of(folder).name, "adapter.safetensors.mine"])
    assert output_of(folder) == model(noise(2, 3, DIM)).detach().numpy().tobytes()


# --- strict --------------------------------------------------------------------------------------------------------


def test_a_missing_folder_or_json_raises(folder: Path) -> None:
    def refused(place: Path, words: str) -> None:
        refuse(place, str(place))
        with pytest.raises(sl.CheckpointError, match=words):
            read(place)

    refused(folder / "nowhere", r"adapter\.json is missing; .*safetensors that it names")
    (folder / JSON).unlink()
    refused(folder, r"adapter\.json is missing")
    (folder / JSON).mkdir()
    refused(folder, r"adapter\.json is a folder")


@pytest.mark.parametrize("given", [None, 3, b"bytes", "null\0byte"])
def test_a_folder_that_is_no_path_raises(given: Any) -> None:
    for call in (read, lambda place: write(place, [], {})):
        with pytest.raises(sl.CheckpointError, match="give a path such as"):
            call(given)


def test_missing_tensors_raise(folder: Path) -> None:
    gone = tensors_of(folder)
    gone.unlink()
    refuse(folder, f"{gone} is missing")


@pytest.mark.parametrize("text", ["", "{", "hello", "\x00", "[" * 100_000, '{"a": 1e999', "9" * 5000])
def test_what_is_not_json_raises(folder: Path, text: str) -> None:
    (folder / JSON).write_text(text)
    refuse(folder, "is not JSON")


@pytest.mark.parametrize("text", ["1", "null", "[]", "{}", '{"format": "peft"}', '"superlora_tn adapter"'])
def test_json_of_something_else_raises(folder: Path, text: str) -> None:
    (folder / JSON).write_text(text)
    refuse(folder, "format='superlora_tn adapter'", "not an adapter of this library")


def test_bytes_that_are_not_text_raise(folder: Path) -> None:
    for data in (b"\xff\xfe{}\x00\xd8", (folder / JSON).read_text().encode("utf-16"), b"\xef\xbb\xbf{}"):
        (folder / JSON).write_bytes(data)
        refuse(folder, "is not JSON")


def test_a_newer_schema_raises_and_says_upgrade(folder: Path) -> None:
    edit_json(folder, lambda body: body.update(schema=4))
    refuse(folder, "schema 4", "up to 3", "upgrade superlora_tn")


@pytest.mark.parametrize("schema", [0, -1, True, "1", None, 1.0, [1]])
def test_a_schema_that_is_no_number_raises(folder: Path, schema: object) -> None:
    edit_json(folder, lambda body: body.update(schema=schema))
    refuse(folder, "schema=", "whole number")


@pytest.mark.parametrize("field", ["entries", "buffers", "tensors", "tensors_sha256", "digest"])
def test_missing_fields_raise(folder: Path, field: str) -> None:
    edit_json(folder, lambda body: body.pop(field), sign=False)
    refuse(folder, "has the fields", field)


def test_unknown_fields_raise(folder: Path) -> None:
    edit_json(folder, lambda body: body.update(extra=1))
    refuse(folder, "has the fields", "extra")
    edit_json(folder, lambda body: body.pop("extra"))
    edit_entry(folder, lambda entry: entry["spec"].update(quantised=True))
    refuse(folder, "a spec has no field 'quantised'")
    edit_entry(folder, lambda entry: (entry["spec"].pop("quantised"), entry.update(extra=1)))
    refuse(folder, "entries=", "extra")


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["entries"][0]["spec"].update(alpha=8),
        lambda body: body["entries"][0]["spec"].update(dropout=0.1),
        lambda body: body["entries"][0]["targets"].popitem(),
        lambda body: body["buffers"].update(extra=[1]),
        lambda body: body.update(tensors_sha256="0" * 64),
    ],
)
def test_an_edited_json_raises(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit_json(folder, change, sign=False)
    refuse(folder, "does not match its own digest", "edited or damaged")


def test_rslora_that_did_nothing_still_loads(folder: Path) -> None:
    """Earlier releases took and kept it without an alpha; the declaration means the same without it."""
    before = read(folder).spec
    edit_entry(folder, lambda entry: entry["spec"].update(alpha=None, rslora=True))
    assert read(folder).spec == replace(before, alpha=None)
    edit_entry(folder, lambda entry: entry["spec"].update(alpha=4.0))
    assert read(folder).spec == replace(before, alpha=4.0, rslora=True)


@pytest.mark.parametrize("name", ["../adapter-0000000000000000.safetensors", "adapter.safetensors", "/etc/passwd", None, 3, []])
def test_a_json_cannot_name_another_file(folder: Path, name: object) -> None:
    edit_json(folder, lambda body: body.update(tensors=name))
    refuse(folder, "tensors=", "its hash gives 'adapter-")


@pytest.mark.parametrize("sha256", [None, 1, "", "0" * 63, "G" * 64, "0" * 64 + "\n", ["0" * 64]])
def test_a_hash_that_is_none_raises(folder: Path, sha256: object) -> None:
    edit_json(folder, lambda body: body.update(tensors_sha256=sha256))
    refuse(folder, "tensors_sha256=", "64 hexadecimal digits")


def test_tensors_of_another_save_raise(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "other", seed=1)
    shutil.copy(tensors_of(tmp_path / "other"), tensors_of(folder))
    refuse(folder, tensors_of(folder).name, "SHA-256 differs", "damaged or foreign")


def test_a_missing_tensor_raises(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("group0.core"))
    refuse(folder, "lacks the tensor 'group0.core'", "which the declaration has")


def test_an_unexpected_tensor_raises(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update(extra=torch.zeros(2)))
    refuse(folder, "holds the tensor 'extra'", "does not have")


def test_a_wrong_shape_raises(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"group0.core": torch.zeros(4, 2, 3)}))
    refuse(folder, "'group0.core' has shape (4, 2, 3), expected (4, 2, 2)")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64])
def test_tensors_that_are_no_floats_raise(folder: Path, dtype: torch.dtype) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    refuse(folder, "expected one of F64, F32, F16, BF16")


def test_tensors_that_are_not_safetensors_raise(folder: Path) -> None:
    for data in (b"", b"short", b"not tensors at all", b"\xff" * 100, bytes(100), b"\2" + bytes(7) + b"[]"):
        put_tensors(folder, data)
        refuse(folder, "not a readable safetensors file")


@pytest.mark.parametrize("file", [JSON, "tensors"])
def test_a_file_cut_short_raises(folder: Path, file: str) -> None:
    path = folder / JSON if file == JSON else tensors_of(folder)
    data = path.read_bytes()
    for length in {0, 1, 7, 8, 9, len(data) // 2, len(data) - 3, len(data) - 2}:
        path.write_bytes(data[:length])
        refuse(folder, path.name)


@pytest.mark.parametrize("file", [JSON, "tensors"])
def test_a_flipped_byte_anywhere_raises(folder: Path, file: str) -> None:
    """JSON's white space between tokens carries nothing, so there a flip to other white space may load, equal."""
    path = folder / JSON if file == JSON else tensors_of(folder)
    data, expected = path.read_bytes(), output_of(folder)
    for place in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            assert output_of(folder) == expected
            assert file == JSON
            assert json.loads(damaged) == json.loads(data)
        except sl.CheckpointError as error:
            assert str(folder) in str(error)


def test_a_base_without_the_module_raises(folder: Path) -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])
            del self.layers[1].up
            self.layers[1].upp = nn.Linear(DIM, HIDDEN)

    refuse(folder, "no module 'layers.1.up'", "near names", "upp", model=seeded(0, Renamed))


def test_a_base_of_another_shape_raises(folder: Path) -> None:
    model = seeded(0, Tiny)
    model.layers[1].up = nn.Linear(DIM, HIDDEN + 1)
    refuse(folder, "'layers.1.up' is (21, 12) in this base and (20, 12)", "another base", model=model)


def test_a_base_of_other_layers_raises(folder: Path) -> None:
    model = seeded(0, Tiny)
    model.layers[1].up = nn.Identity()
    refuse(folder, "'layers.1.up' is a Identity", "cannot be adapted", model=model)


def test_an_attention_that_would_ignore_the_adapter_raises(tmp_path: Path) -> None:
    """The adapter was trained on a plain Linear of the name that a computed weight of an attention has."""
    source = nn.ModuleDict({"attn": nn.ModuleDict({"out_proj": nn.Linear(DIM, DIM)})})
    sl.attach(source, sl.lora(2), ["out_proj"]).save(tmp_path)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(DIM, 3)})
    nn.utils.parametrizations.weight_norm(model["attn"].out_proj)
    before = snapshot(model)
    with pytest.raises(sl.CheckpointError, match="is computed from others"):
        sl.load(model, tmp_path)
    assert_untouched(model, before)


def test_the_json_says_what_the_folder_holds(saved: Path) -> None:
    body = body_of(saved)
    assert sorted(body) == ["buffers", "digest", "entries", "format", "schema", "tensors", "tensors_sha256"]
    assert body["tensors"] == f"adapter-{body['tensors_sha256'][:16]}.safetensors"


@pytest.mark.parametrize(("format", "whose"), [("superlora", "this library's own format"), ("peft", "PEFT's format")])
def test_a_folder_is_not_called_as_a_file(format: Any, whose: str, tmp_path: Path) -> None:
    tuned = sl.attach(nn.Sequential(nn.Linear(8, 8)), sl.lora(2), ["0"])
    place = tmp_path / "x.safetensors"
    with pytest.raises(sl.CheckpointError, match=f"is the name of a file, and {whose} is a folder; name a folder such as 'x'"):
        tuned.save(place, format=format)
    assert not place.exists()
    place.mkdir()
    assert "0  saved as it is" in str(tuned.save(tmp_path / "own"))
    tuned.save(place, format=format)  # a folder that is there under such a name is one
    (file,) = tuned.save(place, format="kohya").files
    assert file == place / "lora.safetensors"
