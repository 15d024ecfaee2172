"""Saving and loading: exact, atomic, strict, and safe against any bytes."""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    DIM,
    HIDDEN,
    TARGETS,
    VARIANTS,
    Block,
    ConvNet,
    Tiny,
    assert_untouched,
    bounded,
    noise,
    perturb,
    seeded,
    snapshot,
)
from safetensors.torch import load_file, save_file
from torch import nn

import superlora_tn as sl
from superlora_tn.files import own as checkpoint

every_variant = pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS)
JSON, TENSORS = "adapter.json", "adapter.safetensors"
# A fuzzed file costs a millisecond, so it gets more examples than the profile's.
many = settings(max_examples=10 * settings().max_examples)
# The thorough profile feeds `load` 100,000 broken adapters, in the two tests of files.
files = settings(max_examples=300 if settings().max_examples < 300 else 50_000)
SPEC = sl.lotr(2, alpha=4)


def save(folder: Path, spec: sl.AdapterSpec = SPEC, seed: int = 0) -> nn.Module:
    """A trained adapter in a folder; returns its model."""
    model = seeded(0, Tiny)
    tuned = sl.attach(model, spec, TARGETS, seed=seed)
    perturb(tuned, seed)
    tuned.save(folder)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved adapter, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def edit_json(folder: Path, change: Callable[[dict[str, Any]], None], sign: bool = True) -> None:
    """Change the JSON; with `sign`, give it the right digest again, as someone who knows the format would."""
    body = json.loads((folder / JSON).read_text())
    change(body)
    if sign:
        body["digest"] = checkpoint._digest(body)
    (folder / JSON).write_text(json.dumps(body))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors and sign them again."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    (folder / TENSORS).unlink()
    save_file(tensors, folder / TENSORS)
    edit_json(folder, lambda body: body.update(tensors_sha256=checkpoint._sha256(folder / TENSORS)))


def refuse(folder: Path, *words: str, model: nn.Module | None = None) -> None:
    """Loading raises CheckpointError with these words, in bounded work, and leaves the model alone."""
    model = model or seeded(0, Tiny)
    before = snapshot(model)
    with bounded(400_000), pytest.raises(sl.CheckpointError) as caught:
        sl.load(model, folder)
    for word in words:
        assert word in str(caught.value)
    assert_untouched(model, before)


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
    assert sorted(p.name for p in saved.iterdir()) == [JSON, TENSORS]
    for file in saved.iterdir():
        data = file.read_bytes()
        assert not data.startswith((b"\x80", b"PK"))
        assert b"torch._utils" not in data


def test_the_file_is_no_larger_than_the_shared_parameters(saved: Path) -> None:
    tuned = sl.load(seeded(0, Tiny), saved)
    assert 4 * tuned.num_parameters <= (saved / TENSORS).stat().st_size <= 4 * tuned.num_parameters + 2000


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
    assert (tmp_path / JSON).read_bytes() == (saved / JSON).read_bytes()
    assert (tmp_path / TENSORS).read_bytes() == (saved / TENSORS).read_bytes()


def test_loading_over_an_attached_model_raises(saved: Path) -> None:
    model = seeded(0, Tiny)
    sl.load(model, saved)
    before = snapshot(model)
    with pytest.raises(sl.AttachError, match="'superlora' already"):
        sl.load(model, saved)
    with pytest.raises(sl.AttachError, match="adapted already"):
        sl.load(model, saved, name="second")
    assert_untouched(model, before)


# --- atomic --------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process ends here: nothing in the library may catch it."""


class Disk:
    """Counts the calls that change the disk, and crashes at the k-th, before or after it acts."""

    def __init__(self, at: int, after: bool) -> None:
        self.at, self.after, self.calls = at, after, 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            return self.step(lambda: function(*arguments, **options))

        return call

    def step(self, act: Callable[[], Any]) -> Any:
        self.calls += 1
        crash = self.calls == self.at
        if crash and not self.after:
            raise Crash
        result = act()
        if crash:
            raise Crash
        return result

    def open(self, path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if "w" not in mode and "a" not in mode:
            return REAL_OPEN(path, mode, *arguments, **options)
        self.step(lambda: REAL_OPEN(path, mode).close())  # makes the file, or empties it
        return HalfFile(REAL_OPEN(path, mode, *arguments, **options), self)


class HalfFile:
    """A file whose crashing write leaves half of the data behind."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def write(self, data: bytes) -> None:
        self.disk.calls += 1
        if self.disk.calls == self.disk.at:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            raise Crash
        self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return int(self.file.fileno())

    def __enter__(self) -> HalfFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


REAL_OPEN = builtins.open
CALLS = [(os, "replace"), (os, "link"), (os, "fsync"), (os, "unlink"), (os, "rename")]


@contextlib.contextmanager
def disk_that_crashes(at: int, after: bool) -> Iterator[Disk]:
    disk = Disk(at, after)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in CALLS:
            patch.setattr(module, name, disk.wrap(getattr(module, name)))
        patch.setattr(builtins, "open", disk.open)
        yield disk


def save_with_crash(tuned: sl.Tuned, folder: Path, at: int, after: bool) -> bool:
    """Save, crashing at the `at`-th change of the disk; whether that many happened."""
    with disk_that_crashes(at, after):
        try:
            tuned.save(folder)
        except Crash:
            return True
    return False


def output_of(folder: Path) -> bytes:
    model = seeded(0, Tiny)
    sl.load(model, folder)
    return model(noise(2, 3, DIM)).detach().numpy().tobytes()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_crash_anywhere_in_a_save_leaves_the_old_or_the_new_adapter(saved: Path, tmp_path: Path, after: bool) -> None:
    other = save(tmp_path / "other", seed=1)
    old, new = output_of(saved), output_of(tmp_path / "other")
    assert old != new
    seen = []
    for at in range(1, 100):
        place = Path(shutil.copytree(saved, tmp_path / f"crash{at}"))
        crashed = save_with_crash(sl.tuned(other), place, at, after)
        seen.append(output_of(place))
        assert seen[-1] in (old, new)
        sl.tuned(other).save(place)
        assert output_of(place) == new
        assert sorted(p.name for p in place.iterdir()) == [JSON, TENSORS]
        if not crashed:
            break
    assert not crashed
    assert len(seen) > 6
    assert seen[0] == old
    assert seen[-1] == new


def test_two_crashes_in_a_row_leave_a_loadable_adapter(saved: Path, tmp_path: Path) -> None:
    second, third = save(tmp_path / "b", seed=1), save(tmp_path / "c", seed=2)
    known = {output_of(saved), output_of(tmp_path / "b"), output_of(tmp_path / "c")}
    for first_crash in range(1, 14):
        for second_crash in range(1, 14):
            place = Path(shutil.copytree(saved, tmp_path / "place"))
            for model, at in ((second, first_crash), (third, second_crash)):
                save_with_crash(sl.tuned(model), place, at, True)
                assert output_of(place) in known
            shutil.rmtree(place)


def test_a_crash_in_a_first_save_leaves_nothing_that_loads_wrongly(tmp_path: Path) -> None:
    model = save(tmp_path / "whole")
    new = output_of(tmp_path / "whole")
    for at in range(1, 100):
        place = tmp_path / f"crash{at}"
        crashed = save_with_crash(sl.tuned(model), place, at, False)
        try:
            assert output_of(place) == new
        except sl.CheckpointError as error:
            assert "missing" in str(error)
            assert crashed
        if not crashed:
            return
    pytest.fail("the save never ended")


# --- strict --------------------------------------------------------------------------------------------------------


def test_a_missing_folder_or_json_raises(folder: Path) -> None:
    refuse(folder / "nowhere", "adapter.json is missing", "adapter.safetensors")
    (folder / JSON).unlink()
    refuse(folder, "adapter.json is missing")
    (folder / JSON).mkdir()
    refuse(folder, "adapter.json is missing")


def test_missing_tensors_raise(folder: Path) -> None:
    (folder / TENSORS).unlink()
    refuse(folder, "adapter.safetensors is missing")


@pytest.mark.parametrize("text", ["", "{", "hello", "\x00", "[" * 100_000, '{"a": 1e999', "9" * 5000])
def test_what_is_not_json_raises(folder: Path, text: str) -> None:
    (folder / JSON).write_text(text)
    refuse(folder, "is not JSON", "damaged")


@pytest.mark.parametrize("text", ["1", "null", "[]", "{}", '{"format": "peft"}', "NaN", '"superlora_tn adapter"'])
def test_json_of_something_else_raises(folder: Path, text: str) -> None:
    (folder / JSON).write_text(text)
    refuse(folder, "format='superlora_tn adapter'", "not an adapter of this library")


def test_bytes_that_are_not_text_raise(folder: Path) -> None:
    (folder / JSON).write_bytes(b"\xff\xfe{}\x00\xd8")
    refuse(folder, "is not JSON")


def test_a_newer_schema_raises_and_says_upgrade(folder: Path) -> None:
    edit_json(folder, lambda body: body.update(schema=2))
    refuse(folder, "schema 2", "up to 1", "upgrade superlora_tn")


@pytest.mark.parametrize("schema", [0, -1, True, "1", None, 1.0, [1]])
def test_a_schema_that_is_no_number_raises(folder: Path, schema: object) -> None:
    edit_json(folder, lambda body: body.update(schema=schema))
    refuse(folder, "schema=", "whole number")


@pytest.mark.parametrize("field", ["spec", "targets", "tensors_sha256", "digest"])
def test_missing_fields_raise(folder: Path, field: str) -> None:
    edit_json(folder, lambda body: body.pop(field), sign=False)
    refuse(folder, "has the fields", field)


def test_unknown_fields_raise(folder: Path) -> None:
    edit_json(folder, lambda body: body.update(extra=1))
    refuse(folder, "has the fields", "extra")
    edit_json(folder, lambda body: body.pop("extra"))
    edit_json(folder, lambda body: body["spec"].update(quantised=True))
    refuse(folder, "fields", "quantised")


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["spec"].update(alpha=8),
        lambda body: body["spec"].update(dropout=0.1),
        lambda body: body["targets"].popitem(),
        lambda body: body.update(tensors_sha256="0" * 64),
    ],
)
def test_an_edited_json_raises(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit_json(folder, change, sign=False)
    refuse(folder, "does not match its own digest", "edited or damaged")


def test_tensors_of_another_save_raise(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / TENSORS, folder / TENSORS)
    refuse(folder, TENSORS, "SHA-256 differs", "damaged or foreign")


def test_a_missing_tensor_raises(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("group0.core"))
    refuse(folder, "lacks the tensor 'group0.core'", "(4, 2, 2)")


def test_an_unexpected_tensor_raises(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update(extra=torch.zeros(2)))
    refuse(folder, "holds the tensor 'extra'", "does not have")


def test_a_wrong_shape_raises(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"group0.core": torch.zeros(4, 2, 3)}))
    refuse(folder, "'group0.core' has shape (4, 2, 3), expected (4, 2, 2)")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64])
def test_tensors_that_are_no_floats_raise(folder: Path, dtype: torch.dtype) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    refuse(folder)


def test_tensors_that_are_not_safetensors_raise(folder: Path) -> None:
    (folder / TENSORS).write_bytes(b"not tensors at all")
    edit_json(folder, lambda body: body.update(tensors_sha256=checkpoint._sha256(folder / TENSORS)))
    refuse(folder, "not a readable safetensors file")


@pytest.mark.parametrize("file", [JSON, TENSORS])
def test_a_file_cut_short_raises(folder: Path, file: str) -> None:
    data = (folder / file).read_bytes()
    for length in {0, 1, 7, 8, 9, len(data) // 2, len(data) - 3, len(data) - 2}:
        (folder / file).write_bytes(data[:length])
        refuse(folder, file)


@pytest.mark.parametrize("file", [JSON, TENSORS])
def test_a_flipped_byte_anywhere_raises(folder: Path, file: str) -> None:
    """JSON's white space between tokens carries nothing, so there a flip to other white space may load, equal."""
    data, expected = (folder / file).read_bytes(), output_of(folder)
    for place in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        (folder / file).write_bytes(damaged)
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
    with pytest.raises((sl.CheckpointError, sl.AttachError), match="MultiheadAttention"):
        sl.load(model, tmp_path)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["spec"]["network"].update(rank=1 << 20),
        lambda body: body["spec"]["network"].update(rank=1 << 60),
        lambda body: body["spec"]["network"].update(rank=10**400),
        lambda body: body["targets"].update({k: [1 << 40, 1 << 40] for k in body["targets"]}),
        lambda body: (
            body["targets"].update({k: [1 << 40, 1 << 40] for k in body["targets"]}),
            body["spec"]["network"].update(rank=1 << 20),
        ),
        lambda body: body["targets"].update({f"t{k}": [10**400, 3] for k in range(3)}),
        lambda body: body["targets"].update({k: [-1, 3] for k in body["targets"]}),
        lambda body: body["targets"].update({k: ["12", 3] for k in body["targets"]}),
        lambda body: body["targets"].update(dict.fromkeys(body["targets"], 7)),
        lambda body: body["targets"].clear(),
        lambda body: body.update(targets=[1, 2]),
        lambda body: body.update(spec=None),
        lambda body: body.update(tensors_sha256=None),
        lambda body: body["spec"].update(alpha=10**400),
        lambda body: body["spec"].update(alpha=float("nan")),
        lambda body: body["spec"].update(alpha="4"),
        lambda body: body["spec"]["network"].update(factors=True),
        lambda body: body["spec"]["network"].update(factors="out out"),
        lambda body: body["spec"]["fold"].update(modes="head member out in", heads=0),
        lambda body: body["spec"]["fold"].update(modes="head member out in", heads="4"),
        lambda body: body["spec"].update(
            fold={"kind": "FlatFold", "order": 32, "groups": 10**9, "splits": 32, "stacked": False, "multiple": 1}
        ),
        lambda body: body["spec"].update(
            fold={"kind": "FlatFold", "order": 3, "groups": 10**9, "splits": 1, "stacked": False, "multiple": 1}
        ),
        lambda body: body["spec"]["network"].update(kind="Exec"),
        lambda body: body["spec"]["network"].update(kind=["Tucker"]),
    ],
)
def test_a_declaration_that_lies_raises_fast_and_allocates_nothing(
    folder: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    """Signed with the right digest, so that nothing but the checks of the declaration stands in the way."""
    edit_json(folder, change)
    refuse(folder, JSON[:7])


def nested(depth: int) -> dict[str, Any]:
    part: dict[str, Any] = {"kind": "CP", "rank": 1, "dense_if_large": False}
    for _ in range(depth):
        part = {"kind": "Hadamard", "parts": [part]}
    return part


@pytest.mark.parametrize("depth", [17, 300])
def test_a_declaration_nested_too_deep_raises(folder: Path, depth: int) -> None:
    edit_json(folder, lambda body: body["spec"].update(network=nested(depth)))
    refuse(folder, "nests deeper than 16 levels")


@pytest.mark.parametrize("depth", [3, 7, 9, 15])
def test_what_can_be_saved_can_be_loaded_however_deep(depth: int, tmp_path: Path) -> None:
    network: sl.CP | sl.Hadamard = sl.CP(1)
    for _ in range(depth):
        network = sl.Hadamard(network)
    model = nn.ModuleDict({"layer": nn.Linear(4, 4)})
    try:
        sl.attach(model, sl.AdapterSpec(network), ["layer"]).save(tmp_path)
    except (sl.SpecError, sl.CheckpointError):
        return
    sl.load(nn.ModuleDict({"layer": nn.Linear(4, 4)}), tmp_path)


def test_a_declaration_of_thousands_of_nodes_raises_fast(folder: Path) -> None:
    wide = {"kind": "Hadamard", "parts": [nested(0)] * 3000}
    edit_json(folder, lambda body: body["spec"].update(network=wide))
    refuse(folder)


# --- any bytes -----------------------------------------------------------------------------------------------------


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Overwrite, insert, delete or cut at random places."""
    edits = draw(
        st.lists(
            st.tuples(st.sampled_from(["set", "insert", "delete", "cut"]), st.floats(0, 1), st.binary(max_size=8)),
            min_size=1,
            max_size=5,
        )
    )

    def apply(data: bytes) -> bytes:
        for kind, where, piece in edits:
            k = int(where * len(data))
            gone = {"set": len(piece), "insert": 0, "delete": len(piece), "cut": len(data)}[kind]
            data = data[:k] + (piece if kind in ("set", "insert") else b"") + data[k + gone :]
        return data

    return apply


def loads_or_refuses(folder: Path) -> None:
    model = seeded(0, Block)
    before = snapshot(model)
    with contextlib.suppress(sl.CheckpointError):
        sl.load(model, folder)
        return
    assert_untouched(model, before)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    sl.attach(seeded(0, Block), sl.lora(2), ["up"], seed=0).save(folder)
    return folder


@files
@given(file=st.sampled_from([JSON, TENSORS]), mutate=mutations(), sign=st.booleans())
def test_mutated_bytes_load_or_raise_checkpoint_error(small: Path, file: str, mutate: Any, sign: bool) -> None:
    original = {name: (small / name).read_bytes() for name in (JSON, TENSORS)}
    try:
        (small / file).write_bytes(mutate(original[file]))
        if sign and file == TENSORS:
            edit_json(small, lambda body: body.update(tensors_sha256=checkpoint._sha256(small / TENSORS)))
        loads_or_refuses(small)
    finally:
        for name, data in original.items():
            (small / name).write_bytes(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.sampled_from(["", "out in", "o r", "r i", "o i", "CP"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "rank", "x"]), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mangled(draw: st.DrawFn) -> Any:
    """A real declaration in which some values, fields or kinds are replaced at random."""
    data = json.loads(json.dumps(draw(st.sampled_from(sorted(VARIANTS.items())))[1].to_dict()))
    for _ in range(draw(st.integers(1, 3))):
        place, key = data, draw(st.sampled_from(sorted(data)))
        while isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
            place = place[key]
            key = draw(st.sampled_from(sorted(place))) if isinstance(place, dict) else draw(st.integers(0, len(place) - 1))
        kinds = st.sampled_from(sorted(["CP", "Tucker", "Network", "Dense", "Hadamard", "FlatFold", "Node", "Shuffle"]))
        place[key] = draw(kinds if key == "kind" else json_values)
        if not isinstance(data, dict) or not data:
            break
    return data


SHAPES = {"layers.0.up": (20, 12), "layers.1.up": (20, 12), "layers.0.down": (12, 20)}


@many
@given(mangled() | json_values)
def test_any_json_is_a_spec_or_a_spec_error(data: Any) -> None:
    try:
        spec = sl.AdapterSpec.from_dict(data)
        assert spec.count(SHAPES) > 0
        assert sl.AdapterSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    except sl.SpecError as error:
        assert str(error)


@files
@given(mangled())
def test_any_signed_declaration_loads_or_raises_checkpoint_error(small: Path, data: Any) -> None:
    original = (small / JSON).read_bytes()
    try:
        edit_json(small, lambda body: body.update(spec=data))
        loads_or_refuses(small)
    finally:
        (small / JSON).write_bytes(original)


def test_no_module_of_the_package_unpickles() -> None:
    root = Path(sl.__file__).parents[1]
    sources = [*(root / "superlora_tn").rglob("*.py"), *(root / "backends").rglob("*.py")]
    assert len(sources) > 15
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {a.name for a in node.names} | {getattr(node, "module", None) or ""}
                assert not names & {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}, source
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                # Tensors and plain containers alone: what comes from elsewhere (a published .pth) runs no code.
                assert "weights_only=True" in [ast.unparse(k).strip() for k in node.keywords], source
