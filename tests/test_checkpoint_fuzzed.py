"""Any bytes: declarations that lie, and files and declarations altered at random, load or end in `CheckpointError`."""

from __future__ import annotations

import ast
import contextlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VARIANTS, Block, assert_untouched, seeded, snapshot
from saved import (
    JSON,
    edit_entry,
    put_tensors,
    refuse,
    save,
    tensors_of,
    with_header,
)
from torch import nn

import superlora_tn as sl

# A fuzzed file costs a millisecond, so it gets more examples than the profile's.
many = settings(max_examples=10 * settings().max_examples)
# The thorough profile feeds `load` 100,000 broken adapters, in the three tests of files.
files = settings(max_examples=300 if settings().max_examples < 300 else 34_000)
TENSORS = "tensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved adapter, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def restore(folder: Path, original: dict[str, bytes]) -> None:
    for path in folder.iterdir():
        if path.name not in original:
            path.unlink()
    for name, data in original.items():
        (folder / name).write_bytes(data)


# --- declarations that lie -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry["spec"]["network"].update(rank=1 << 20),
        lambda entry: entry["spec"]["network"].update(rank=1 << 60),
        lambda entry: entry["spec"]["network"].update(rank=10**400),
        lambda entry: entry["targets"].update({k: [1 << 40, 1 << 40] for k in entry["targets"]}),
        lambda entry: (
            entry["targets"].update({k: [1 << 40, 1 << 40] for k in entry["targets"]}),
            entry["spec"]["network"].update(rank=1 << 20),
        ),
        lambda entry: entry["targets"].update({f"t{k}": [10**400, 3] for k in range(3)}),
        lambda entry: entry["targets"].update({k: [-1, 3] for k in entry["targets"]}),
        lambda entry: entry["targets"].update({k: ["12", 3] for k in entry["targets"]}),
        lambda entry: entry["targets"].update(dict.fromkeys(entry["targets"], 7)),
        lambda entry: entry["targets"].clear(),
        lambda entry: entry.update(targets=[1, 2]),
        lambda entry: entry.update(spec=None),
        lambda entry: entry["spec"].update(alpha=10**400),
        lambda entry: entry["spec"].update(alpha=float("nan")),
        lambda entry: entry["spec"].update(alpha="4"),
        lambda entry: entry["spec"]["network"].update(factors=True),
        lambda entry: entry["spec"]["network"].update(factors="out out"),
        lambda entry: entry["spec"]["fold"].update(modes="head member out in", heads=0),
        lambda entry: entry["spec"]["fold"].update(modes="head member out in", heads="4"),
        lambda entry: entry["spec"].update(
            fold={"kind": "FlatFold", "order": 32, "groups": 10**9, "splits": 32, "stacked": False, "multiple": 1}
        ),
        lambda entry: entry["spec"].update(
            fold={"kind": "FlatFold", "order": 3, "groups": 10**9, "splits": 1, "stacked": False, "multiple": 1}
        ),
        lambda entry: entry["spec"]["network"].update(kind="Exec"),
        lambda entry: entry["spec"]["network"].update(kind=["Tucker"]),
    ],
)
def test_a_declaration_that_lies_raises_fast_and_allocates_nothing(
    folder: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    """Signed with the right digest, so that nothing but the checks of the declaration stands in the way."""
    edit_entry(folder, change)
    refuse(folder, "adapter")


def nested(depth: int) -> dict[str, Any]:
    part: dict[str, Any] = {"kind": "CP", "rank": 1, "dense_if_large": False}
    for _ in range(depth):
        part = {"kind": "Hadamard", "parts": [part]}
    return part


@pytest.mark.parametrize("depth", [17, 30, 300])
def test_a_declaration_nested_too_deep_raises(folder: Path, depth: int) -> None:
    edit_entry(folder, lambda entry: entry["spec"].update(network=nested(depth)))
    refuse(folder, "nests deeper than")


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
    edit_entry(folder, lambda entry: entry["spec"].update(network=wide))
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


class Small:
    """A small adapter to be damaged again and again, and a model that takes it or stays as it was."""

    def __init__(self, folder: Path) -> None:
        sl.attach(seeded(0, Block), sl.lora(2), ["up"], seed=0).save(folder)
        self.folder, self.original = folder, {path.name: path.read_bytes() for path in folder.iterdir()}
        self.json, self.tensors = (self.original[path.name] for path in (folder / JSON, tensors_of(folder)))
        self.model = seeded(0, Block)
        self.before = snapshot(self.model)

    def loads_or_refuses(self, damage: Callable[[Path], object]) -> None:
        try:
            damage(self.folder)
            with contextlib.suppress(sl.CheckpointError):
                sl.load(self.model, self.folder).detach()
            assert_untouched(self.model, self.before)
        finally:
            restore(self.folder, self.original)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("small"))


@files
@given(file=st.sampled_from([JSON, TENSORS]), mutate=mutations(), sign=st.booleans())
def test_mutated_bytes_load_or_raise_checkpoint_error(small: Small, file: str, mutate: Any, sign: bool) -> None:
    def damage(folder: Path) -> None:
        if file == JSON:
            (folder / JSON).write_bytes(mutate(small.json))
        elif sign:
            put_tensors(folder, mutate(small.tensors))
        else:
            tensors_of(folder).write_bytes(mutate(small.tensors))

    small.loads_or_refuses(damage)


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
def test_any_signed_declaration_loads_or_raises_checkpoint_error(small: Small, data: Any) -> None:
    small.loads_or_refuses(lambda folder: edit_entry(folder, lambda entry: entry.update(spec=data)))


@files
@given(st.data())
def test_any_signed_header_loads_or_raises_checkpoint_error(small: Small, data: st.DataObject) -> None:
    size = struct.unpack("<Q", small.tensors[:8])[0]
    header = json.loads(small.tensors[8 : 8 + size])
    for _ in range(data.draw(st.integers(1, 3))):
        entry = header[data.draw(st.sampled_from(sorted(header)))]
        if isinstance(entry, dict) and data.draw(st.booleans()):
            key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
            numbers = st.lists(st.integers(-1, 90) | st.integers(0, 2**65), max_size=3)
            entry[key] = data.draw(numbers | st.sampled_from(["F64", "F16", "I8", "F4"]) | json_values)
        else:
            header[data.draw(st.sampled_from([*header, "__metadata__", "other"]))] = data.draw(json_values)
    changed = with_header(json.dumps(header).encode(), small.tensors[8 + size :])
    small.loads_or_refuses(lambda folder: put_tensors(folder, changed))


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
