"""Files from strangers: whatever lies in a folder, reading it is bounded, takes nothing else for a file, and ends in an
adapter or in `CheckpointError`."""

from __future__ import annotations

import errno
import inspect
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from saved import (
    JSON,
    body_of,
    digest,
    edit_entry,
    edit_json,
    make_first,
    names,
    put_tensors,
    refuse,
    save,
    save_value,
    tensors_of,
    two_files,
    value_of,
    with_header,
)

import superlora_tn as sl
from superlora_tn.files import record
from superlora_tn.files.own import read

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


@pytest.fixture
def _no_hanging() -> Iterator[None]:
    """An error instead of waiting for the other end of a pipe."""

    def late(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 30)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


no_hanging = pytest.mark.usefixtures("_no_hanging")

# --- links, pipes, devices -----------------------------------------------------------------------------------------


def test_saving_follows_no_planted_link(tmp_path: Path) -> None:
    save_value(tmp_path / "before", 1.0)
    name, victim, folder = tensors_of(tmp_path / "before").name, tmp_path / "victim", tmp_path / "adapter"
    victim.write_text("mine")
    for target in (victim, tmp_path / "nowhere", tmp_path):
        folder.mkdir(exist_ok=True)
        for planted in (JSON, name):
            (folder / planted).unlink(missing_ok=True)
            (folder / planted).symlink_to(target)
        save_value(folder, 1.0)
        assert value_of(folder) == 1.0
        assert not any(path.is_symlink() for path in folder.iterdir())
    assert victim.read_text() == "mine"
    assert names(tmp_path) == ["adapter", "before", "victim"]


def test_what_a_planted_json_names_is_removed_in_the_folder_only(tmp_path: Path) -> None:
    """A link in the place of the old tensors is removed, and not what it leads to."""
    save_value(tmp_path / "adapter", 1.0)
    victim, old = tmp_path / "victim", tensors_of(tmp_path / "adapter")
    old.rename(victim)
    old.symlink_to(victim)
    assert value_of(tmp_path / "adapter") == 1.0
    save_value(tmp_path / "adapter", 2.0)
    assert names(tmp_path / "adapter") == two_files(tmp_path / "adapter")
    assert victim.exists()


def test_links_are_followed_by_readers(tmp_path: Path) -> None:
    """The cache of the Hub is made of them."""
    save_value(tmp_path / "blobs", 1.0)
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(Path("..") / "blobs" / path.name)
    assert value_of(tmp_path / "snapshot") == 1.0


@no_hanging
def test_saving_over_a_pipe_does_not_wait(tmp_path: Path) -> None:
    save_value(tmp_path, 1.0)
    name = tensors_of(tmp_path).name
    for pipe in (name, JSON):
        (tmp_path / pipe).unlink()
        os.mkfifo(tmp_path / pipe)
        save_value(tmp_path, 1.0)
        assert value_of(tmp_path) == 1.0
    assert names(tmp_path) == two_files(tmp_path)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _link_to(device: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(device)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        before = Path.cwd()
        os.chdir(path.parent)  # a socket's whole path may have 100 characters only
        try:
            one.bind(path.name)
        finally:
            os.chdir(before)


@no_hanging
@pytest.mark.parametrize("schema", [1, 2])
@pytest.mark.parametrize("file", [JSON, TENSORS])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_pipe, "is a pipe or a device"),
        (_socket, "cannot be opened"),
        (Path.mkdir, "is a folder"),
        (_link_to("/dev/zero"), "is a pipe or a device"),
        (_link_to("/dev/tty"), ""),  # it cannot be opened where there is no terminal
        (_link_to("/proc/kmsg"), ""),  # a file, to root, that is empty or waits
        (_link_to("adapter.json"), ""),
    ],
    ids=["pipe", "socket", "folder", "zeros", "terminal", "kernel", "circle"],
)
def test_a_reader_takes_no_pipe_and_no_device(
    make: Callable[[Path], None], words: str, file: str, schema: int, folder: Path
) -> None:
    path = tensors_of(folder) if file == TENSORS else folder / JSON
    if schema == 1:
        make_first(folder)
        path = folder / "adapter.safetensors" if file == TENSORS else path
    path.unlink()
    make(path)
    refuse(folder, words)


@no_hanging
def test_a_file_that_is_too_large_is_not_read(folder: Path) -> None:
    """Holes: ten terabytes that no disk has to hold."""
    for path in (tensors_of(folder), folder / JSON):
        with open(path, "r+b") as file:
            try:
                file.truncate(10 << 40)
            except OSError as error:
                assert error.errno == errno.EFBIG
                pytest.skip("the file system has no files of this size")
        refuse(folder, f"{path} has 10,995,116,277,760 bytes", "at most")


OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


@no_hanging
@pytest.mark.skipif(
    not OVERCOMMIT.exists() or OVERCOMMIT.read_text().strip() == "1", reason="this system promises memory that it has not"
)
def test_a_file_larger_than_memory_raises(folder: Path) -> None:
    """The declaration lies too, so that no other bound stands in the way: eight terabytes, all holes."""
    edit_entry(folder, lambda entry: entry.update(spec=sl.lora(1).to_dict(), targets={"layers.0.up": [1 << 40, 1 << 40]}))
    with open(tensors_of(folder), "r+b") as file:
        try:
            file.truncate(8 << 40)
        except OSError:
            pytest.skip("the file system has no files of this size")
    refuse(folder, "has 8,796,093,022,208 bytes, more than this machine has memory")


# --- JSON ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": "superlora_tn adapter", "schema": 1, "schema": 2}', "one name twice"),
        ('{"a": {"b": 1, "b": 1}}', "one name twice"),
        ('{"a": NaN}', "'NaN', which is not finite"),
        ("[Infinity]", "'Infinity', which is not finite"),
        ("[-Infinity]", "'-Infinity', which is not finite"),
        ('{"a": 1e999}', "'1e999', which is not finite"),
        ('{"a": -1e999}', "not finite"),
        (f'{{"a": {10**400}}}', "a number of 401 digits"),
        (f'["{"x" * 5000}"]', "a string of 5,000 characters"),
        (f'{{"{"x" * 5000}": 1}}', "a string of 5,000 characters"),
        ('["\\ud800"]', "surrogates not allowed"),
        ('{"\\udc00\\ud800": 1}', "surrogates not allowed"),
        ("[" * 66 + "]" * 66, "nests deeper than 64 levels"),
        ('{"a":' * 66 + "1" + "}" * 66, "nests deeper than 64 levels"),
        ("[" * 300_000, "nests deeper than 64 levels"),
        ("[" + "[]," * 300_000 + "1]", "holds 600,001 values"),
        ("[" + "1," * 600_000 + "1]", "holds 600,001 values"),
        (" " * (9 << 20), "9,437,184 bytes"),
    ],
)
def test_json_that_no_adapter_has_raises(text: str, words: str, folder: Path) -> None:
    (folder / JSON).write_text(text)
    refuse(folder, words)


@pytest.mark.parametrize("depth", [*range(960, 1000, 5), 5000, 100_000])
def test_no_depth_leaks_a_recursion_error(depth: int, folder: Path) -> None:
    body = body_of(folder)
    text = json.dumps(body).replace(json.dumps(body["entries"]), "[" * depth + "]" * depth)
    (folder / JSON).write_text(text)
    refuse(folder, "nests deeper than 64 levels")


def test_a_reader_deep_in_a_program_reads_as_well(saved: Path) -> None:
    """Few levels are left to it on the stack; what it needs does not grow with the file."""

    def deep(levels: int) -> int:
        return deep(levels - 1) if levels else len(read(saved).targets)

    left = sys.getrecursionlimit() - len(inspect.stack())
    assert deep(left - 150) == 8


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(entries={}),
        lambda body: body.update(entries=[]),
        lambda body: body.update(entries=[1]),
        lambda body: body.update(entries=[[]]),
        lambda body: body.update(entries=2 * body["entries"]),
        lambda body: body.update(buffers=[]),
        lambda body: body.update(buffers={"a": 1}),
        lambda body: body.update(buffers={"a": [-1]}),
        lambda body: body.update(buffers={"a": [1 << 60]}),
        lambda body: body.update(buffers={"a": [1.0]}),
        lambda body: body.update(buffers={"a": [True]}),
        lambda body: body.update(buffers={"a": [1]}),
        lambda body: body.update(tensors_sha256=None),
        lambda body: body.update(format=["superlora_tn adapter"] * 30_000),
        lambda body: body.update(schema=["x" * 4000] * 1000),
        lambda body: body.update(entries=["x" * 4000] * 1000),
        lambda body: body.update({f"field {k}": 0 for k in range(10_000)}),
    ],
)
def test_a_signed_json_that_lies_raises(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_json(folder, change)
    refuse(folder)


LARGE: dict[str, Callable[[], Any]] = {
    "empty lists": lambda: [[]] * 149_000,
    "empty dicts": lambda: [{}] * 149_000,
    "numbers": lambda: list(range(10**15, 10**15 + 290_000)),
    "floats": lambda: [1e300 + k for k in range(290_000)],
    "strings": lambda: ["\N{PILE OF POO}" * 4000] * 170 + [str(k) for k in range(290_000)],
    "dicts of one": lambda: [{str(k): k} for k in range(140_000)],
    "targets": lambda: [{"spec": sl.lora(1).to_dict(), "targets": {f"layers.{k}.weight": [4, 4] for k in range(95_000)}}],
}
"""As many values as a JSON may hold, or nearly; of the longest strings so many that it is as long as it may be."""

READ_LARGE = """
import contextlib, re, sys, time
from pathlib import Path
from superlora_tn import CheckpointError
from superlora_tn.files import record, tensors

def resident(field):
    return int(re.search(field + r":\\s+([0-9]+) kB", Path("/proc/self/status").read_text())[1]) / 1024

before = resident("VmRSS")
for path in sorted(Path(sys.argv[1]).iterdir()):
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far
    data, start = path.read_bytes(), time.process_time()
    names = {f"group{k}.core": (1,) for k in range(111_000)}
    with contextlib.suppress(CheckpointError):
        if path.suffix == ".json":
            record.entries_of(record.record_of("it", data))
        else:
            tensors.check_shapes("it", data, names, {})
    print(f"{time.process_time() - start:.2f} {resident('VmHWM') - before:.0f} {path.name}")
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell a process its memory")
def test_the_largest_files_cost_little(tmp_path: Path) -> None:
    """Signed, so that all of it is parsed, hashed and decoded. Measured on a busy machine: 0.1 to 1.2 s, 7 to 130 MB."""
    for name, made in LARGE.items():
        body = {"format": record.FORMAT, "schema": 2, "entries": made(), "buffers": {}, "tensors_sha256": "0" * 64}
        body["tensors"] = record.file_name("0" * 64)
        body["digest"] = digest(body)
        text = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= record.BOUNDS.size
        assert 0.9 * record.BOUNDS.values < sum(text.count(c) for c in (b",", b"[", b"{")) <= record.BOUNDS.values
        (tmp_path / f"{name}.json").write_bytes(text)
    entries = {f"group{k}.core": {"dtype": "F32", "shape": [1], "data_offsets": [4 * k, 4 * k + 4]} for k in range(111_000)}
    (tmp_path / "header.safetensors").write_bytes(with_header(json.dumps(entries).encode()))
    root = Path(sl.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "backends")])}
    command = [sys.executable, "-c", READ_LARGE, str(tmp_path)]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300).stdout
    costs = [line.split(" ", 2) for line in printed.splitlines()]
    assert len(costs) == len(LARGE) + 1
    assert max(float(seconds) for seconds, _, _ in costs) < 10, printed
    assert max(float(megabytes) for _, megabytes, _ in costs) < 200, printed


# --- headers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (with_header(b"{}", size=2**64 - 1), "said to have 18,446,744,073,709,551,615 bytes"),
        (with_header(b"{}", size=1 << 40), "said to have"),
        (with_header(b" " * (17 << 20)), "bytes; what it is said to hold has at most 16,"),
        (with_header(b"[" * 100_000), "nests deeper"),
        (with_header(b"[" + b"[]," * 600_000 + b"1]"), "holds 1,200,001 values"),
        (with_header(b'{"a": {"dtype": "F32"}, "a": {}}'), "one name twice"),
        (with_header(b'{"a": NaN}'), "not finite"),
        (with_header(b"[]"), "its header is no dict"),
        (with_header(b'{"__metadata__": {}}'), "lacks the tensor"),
        (with_header(b"{}"), "lacks the tensor"),
    ],
)
def test_a_header_that_no_adapter_has_raises(data: bytes, words: str, folder: Path) -> None:
    put_tensors(folder, data)
    refuse(folder, words)


def test_foreign_metadata_in_the_header_is_no_tensor(folder: Path) -> None:
    data = tensors_of(folder).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = {"__metadata__": {"made by": "another program"}, **json.loads(data[8 : 8 + size])}
    put_tensors(folder, with_header(json.dumps(header).encode(), data[8 + size :]))
    assert len(read(folder).targets) == 8
