"""One folder, many savers and readers, full disks, kills and interruptions: always one whole adapter, and nothing beside it."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from saved import JSON, LONG, forked, join, make_first, make_old, names, save_value, tensors_of, two_files, value_of

import superlora_tn as sl
from superlora_tn.files import folder as disk
from superlora_tn.files import own

fcntl = pytest.importorskip("fcntl", reason="locks and forks are tested where the platform has them")
# The thorough profile saves as often as an attack once did.
SAVES = 100 if settings().max_examples >= 300 else 15


# --- many at once --------------------------------------------------------------------------------------------------


def saver(folder: Path, values: list[float], barrier: Any) -> None:
    """Save each value, all savers at the same time; what stands then is whole."""
    for value in values:
        barrier.wait(LONG)
        save_value(folder, value)
        value_of(folder)


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0]], ids=["the same adapter", "adapters by turns"])
def test_threads_save_and_read_in_one_folder(values: list[float], tmp_path: Path) -> None:
    save_value(tmp_path, 1.0)
    errors: list[BaseException] = []
    done = threading.Event()

    def guarded(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)
                barrier.abort()

        return run

    def read_on() -> None:
        while not done.is_set():
            assert value_of(tmp_path) in values
            time.sleep(0.001)  # or readers hold the interpreter for most of the time

    savers, barrier = 4, threading.Barrier(4)
    turns = [[values[(k + n) % len(values)] for n in range(SAVES)] for k in range(savers)]
    threads = [threading.Thread(target=guarded(lambda t=turn: saver(tmp_path, t, barrier))) for turn in turns]
    readers = [threading.Thread(target=guarded(read_on)) for _ in range(2)]
    for thread in [*threads, *readers]:
        thread.start()
    for thread in threads:
        thread.join()  # its barrier ends it where another does not come
    done.set()
    for thread in readers:
        thread.join(LONG)
    assert not errors
    assert not any(thread.is_alive() for thread in readers)
    assert names(tmp_path) == two_files(tmp_path)


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0, 3.0]], ids=["the same adapter", "adapters by turns"])
def test_processes_save_and_read_in_one_folder(values: list[float], tmp_path: Path) -> None:
    """As all ranks of a first training script do."""
    save_value(tmp_path, 1.0)
    barrier = multiprocessing.get_context("fork").Barrier(3)
    turns = [[values[(k + n) % len(values)] for n in range(SAVES)] for k in range(3)]
    processes = forked(*(lambda t=turn: saver(tmp_path, t, barrier) for turn in turns))
    read = 0
    while any(process.is_alive() for process in processes):
        assert value_of(tmp_path) in values
        read += 1
    join(processes)
    assert read > 10
    assert names(tmp_path) == two_files(tmp_path)


def test_the_first_saves_of_all_make_the_folder(tmp_path: Path) -> None:
    folder, barrier = tmp_path / "new" / "er", multiprocessing.get_context("fork").Barrier(4)
    join(forked(*(lambda v=v: saver(folder, [float(v)], barrier) for v in range(1, 5))))
    assert names(folder) == two_files(folder)


def test_without_locks_savers_remove_nothing_young(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "fcntl", None)
    barrier = threading.Barrier(3)
    turns = [[float((k + n) % 3 + 1) for n in range(SAVES)] for k in range(3)]
    threads = [threading.Thread(target=saver, args=(tmp_path, turn, barrier)) for turn in turns]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names(tmp_path)) == 4  # the JSON and the tensors of all three
    make_old(tmp_path)
    save_value(tmp_path, 4.0)
    assert names(tmp_path) == two_files(tmp_path)


def test_a_saver_waits_while_another_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One saver has put its tensors and not yet its JSON; their name is the one that the other wants to remove."""
    save_value(tmp_path, 1.0)
    half_way, replace = threading.Event(), os.replace

    def slow(source: Path, target: Path) -> None:
        replace(source, target)
        if threading.current_thread() is first and Path(target).name != JSON:
            half_way.set()
            second.join(0.3)  # it would be done by now, if it did not wait

    monkeypatch.setattr(os, "replace", slow)
    first = threading.Thread(target=save_value, args=(tmp_path, 1.0))
    second = threading.Thread(target=lambda: half_way.wait(LONG) and save_value(tmp_path, 2.0))
    second.start(), first.start()
    first.join(LONG), second.join(LONG)
    assert value_of(tmp_path) == 2.0
    assert names(tmp_path) == two_files(tmp_path)


def test_a_folder_that_someone_keeps_locked_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PATIENCE", 0.05)
    save_value(tmp_path, 1.0)
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(sl.CheckpointError, match="another process has locked the folder"):
            save_value(tmp_path, 2.0)
        assert value_of(tmp_path) == 1.0  # readers need no lock
    finally:
        os.close(handle)
    assert names(tmp_path) == two_files(tmp_path)


def test_a_process_forked_during_a_save_does_not_keep_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PATIENCE", 5.0)
    end, replace, children = multiprocessing.get_context("fork").Event(), os.replace, []

    def forking(source: Path, target: Path) -> None:
        replace(source, target)
        if not children:
            children.extend(forked(lambda: end.wait(LONG) and None))

    monkeypatch.setattr(os, "replace", forking)
    save_value(tmp_path, 1.0)
    save_value(tmp_path, 2.0)
    end.set()
    join(children)
    assert value_of(tmp_path) == 2.0


# --- a reader beside a saver ----------------------------------------------------------------------------------------


def test_a_save_after_the_tensors_were_read_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_value(tmp_path, 1.0)
    check = own._check_shapes

    def between(*arguments: Any) -> None:
        save_value(tmp_path, 5.0)
        check(*arguments)

    monkeypatch.setattr(own, "_check_shapes", between)
    assert value_of(tmp_path) == 1.0
    monkeypatch.undo()
    assert value_of(tmp_path) == 5.0


def overtaking(folder: Path, monkeypatch: pytest.MonkeyPatch, values: Iterator[float]) -> None:
    """Whenever the JSON has been read, another saver replaces it and removes its tensors, for as long as there are values."""
    read = own._read_json

    def then_saved(place: Path) -> bytes:
        text = read(place)
        for value in itertools.islice(values, 1):
            save_value(folder, value)
        return text

    monkeypatch.setattr(own, "_read_json", then_saved)


def test_a_reader_that_is_overtaken_reads_the_new_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_value(tmp_path, 1.0)
    overtaking(tmp_path, monkeypatch, iter([2.0, 3.0, 4.0, 5.0, 6.0, 7.0]))
    assert value_of(tmp_path) == 7.0


def test_a_reader_overtaken_by_the_same_adapter_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The JSON it reads is the same each time, and its tensors are away each time but the last."""
    save_value(tmp_path, 1.0)
    opened, away = disk.opened, [True, True]

    @contextlib.contextmanager
    def gone(path: Path) -> Iterator[Any]:
        if path.suffix == ".safetensors" and away:
            away.pop()
            raise FileNotFoundError
        with opened(path) as file:
            yield file

    monkeypatch.setattr(own, "opened", gone)
    assert value_of(tmp_path) == 1.0
    assert not away


def test_a_reader_that_is_overtaken_for_ever_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "TRIES", 5)
    save_value(tmp_path, 1.0)
    overtaking(tmp_path, monkeypatch, (float(v) for v in itertools.count(2)))
    with pytest.raises(sl.CheckpointError, match="was saved to 5 times while it was read"):
        value_of(tmp_path)


def test_the_first_schema_replaced_during_a_read_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_value(tmp_path, 1.0)
    make_first(tmp_path)
    overtaking(tmp_path, monkeypatch, iter([2.0]))
    assert value_of(tmp_path) == 2.0


# --- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_none_raises_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "in" / "it"):
        with pytest.raises(sl.CheckpointError, match="is a file and no folder"):
            save_value(folder, 1.0)
        with pytest.raises(sl.CheckpointError, match=r"is missing|cannot be opened"):
            value_of(folder)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_raises_in_words(tmp_path: Path) -> None:
    save_value(tmp_path, 1.0)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(sl.CheckpointError, match=r"cannot save to .*ermission"):
            save_value(tmp_path, 2.0)
        assert value_of(tmp_path) == 1.0
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_in_the_place_of_a_file_raises_in_words(tmp_path: Path) -> None:
    save_value(tmp_path, 1.0)
    name = tensors_of(tmp_path).name
    for blocked in (name, JSON):
        folder = tmp_path / f"with {blocked}"
        (folder / blocked / "mine").mkdir(parents=True)
        with pytest.raises(sl.CheckpointError, match="cannot save to"):
            save_value(folder, 1.0)
        assert names(folder) == [blocked]
        with pytest.raises(sl.CheckpointError, match=r"is a folder|missing"):
            value_of(folder)


def test_the_files_have_the_modes_of_new_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_value(tmp_path, 1.0)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_saving_moves_no_random_numbers(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    save_value(tmp_path, 1.0)
    value_of(tmp_path)
    assert torch.equal(before, torch.get_rng_state())
