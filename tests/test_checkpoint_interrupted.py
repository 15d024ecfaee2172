"""Saves that are interrupted, killed, or meet a full disk: the old adapter or the new one, and nothing beside it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from saved import LONG, forked, join, make_first, make_old, names, save_value, two_files, value_of

import superlora_tn as sl

fcntl = pytest.importorskip("fcntl", reason="kills and locks are tested where the platform has them")
# The thorough profile kills as often as an attack once did.
KILLS = 360 if settings().max_examples >= 300 else 15

# --- interruptions -------------------------------------------------------------------------------------------------

CALLS = ("open", "write", "fsync", "fstat", "replace", "unlink", "close", "mkdir", "scandir")


class Interruption:
    """Counts the calls for files, and strikes at the k-th, before or after it acts."""

    def __init__(self, at: int, after: bool, strike: Callable[[], object]) -> None:
        self.at, self.after, self.strike, self.calls = at, after, strike, 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.at and not self.after:
                self.strike()
            if self.calls != self.at or not self.after:
                return function(*arguments, **options)
            with contextlib.suppress(OSError):
                result = function(*arguments, **options)
                if isinstance(result, Iterator):
                    result.close()  # of scandir: nobody else can, once the caller does not get it
            self.strike()
            return None

        return call


@contextlib.contextmanager
def interrupted(at: int, after: bool, strike: Callable[[], object], calls: tuple[str, ...] = CALLS) -> Iterator[Interruption]:
    one = Interruption(at, after, strike)
    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            patch.setattr(os, name, one.wrap(getattr(os, name)))
        if calls == CALLS:
            patch.setattr(fcntl, "flock", one.wrap(fcntl.flock))
        yield one


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def went(at: int, after: bool, work: Callable[[], object]) -> bool:
    """Whether a work came to its `at`-th call, and was interrupted there."""
    with interrupted(at, after, interrupt) as one, contextlib.suppress(KeyboardInterrupt):
        work()
    return one.calls >= at


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("first", [False, True], ids=["second schema", "first schema"])
def test_an_interruption_at_any_call_leaves_one_adapter_and_nothing_else(after: bool, first: bool, tmp_path: Path) -> None:
    seen = []
    for at in itertools.count(1):
        folder = tmp_path / str(at)
        save_value(folder, 1.0)
        if first:
            make_first(folder)
        old = names(folder)
        reached = went(at, after, lambda f=folder: save_value(f, 2.0))
        seen.append(value_of(folder))
        assert seen[-1] in (1.0, 2.0)
        assert names(folder) == (old if seen[-1] == 1.0 else two_files(folder)), f"left behind at call {at}"
        save_value(folder, 2.0)
        assert names(folder) == two_files(folder)
        if not reached:
            break
    assert len(seen) > 15
    assert seen == sorted(seen)  # one commit: before it the old adapter, from it on the new one
    assert seen[0] == 1.0
    assert seen[-1] == 2.0


def test_two_interruptions_in_a_row_leave_a_loadable_adapter(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    for one, two in itertools.product(range(1, 30, 5), repeat=2):
        save_value(folder, 1.0)
        went(one, True, lambda: save_value(folder, 2.0))
        assert value_of(folder) in (1.0, 2.0)
        went(two, False, lambda: save_value(folder, 3.0))
        assert value_of(folder) in (1.0, 2.0, 3.0)
        assert names(folder) == two_files(folder)


def test_an_interrupted_first_save_leaves_nothing_that_loads_wrongly(tmp_path: Path) -> None:
    for at in itertools.count(1):
        folder = tmp_path / str(at)
        reached = went(at, False, lambda f=folder: save_value(f, 1.0))
        try:
            assert value_of(folder) == 1.0
            assert names(folder) == two_files(folder)
        except sl.CheckpointError as error:
            assert "missing" in str(error)
            assert reached
            assert not folder.exists() or names(folder) == []
        if not reached:
            return


def test_an_interrupted_read_closes_its_files(tmp_path: Path) -> None:
    save_value(tmp_path, 1.0)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    for at in range(1, 20):
        went(at, False, lambda: value_of(tmp_path))
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_interruptions_at_any_moment_leave_nothing(tmp_path: Path) -> None:
    """By a real signal, wherever Python is then; between `open` and its `with`, only the garbage collector closes."""
    armed = False

    def strike(*_: object) -> None:
        if armed:
            raise KeyboardInterrupt

    save_value(tmp_path, 1.0)
    start = time.perf_counter()
    save_value(tmp_path, 1.0)
    took = time.perf_counter() - start
    before = signal.signal(signal.SIGALRM, strike)
    interrupted = 0
    try:
        for k in range(4 * KILLS):
            signal.setitimer(signal.ITIMER_REAL, took * (0.02 + k % 60 / 40))
            try:
                armed = True
                save_value(tmp_path, float(k % 7 + 1))
                armed = False
            except KeyboardInterrupt:
                interrupted += 1
                torch.set_grad_enabled(True)  # where it struck as torch's own no_grad was about to do so
            armed = False
            value_of(tmp_path)
            assert names(tmp_path) == two_files(tmp_path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 5  # how many, is the machine's affair


# --- kills ---------------------------------------------------------------------------------------------------------


def test_a_killed_saver_leaves_a_loadable_adapter(tmp_path: Path) -> None:
    save_value(tmp_path, 1.0)

    def save_on() -> None:
        for value in itertools.cycle([1.0, 2.0, 3.0]):
            save_value(tmp_path, value)

    for k in range(KILLS):
        [process] = forked(save_on)
        time.sleep(0.02 + 0.003 * (k % 17))
        process.kill()
        process.join(LONG)
        assert value_of(tmp_path) in (1.0, 2.0, 3.0)
    # What they left goes when it is old, and the next save is not disturbed by it before.
    save_value(tmp_path, 4.0)
    make_old(tmp_path)
    save_value(tmp_path, 5.0)
    assert names(tmp_path) == two_files(tmp_path)
    assert value_of(tmp_path) == 5.0


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_at_any_call_leaves_the_old_or_the_new_adapter(after: bool, tmp_path: Path) -> None:
    for at in itertools.count(1):
        folder = tmp_path / str(at)
        save_value(folder, 1.0)

        def die(folder: Path = folder, at: int = at) -> None:
            with interrupted(at, after, lambda: os._exit(9)):
                save_value(folder, 2.0)

        [process] = forked(die)
        process.join(LONG)
        assert value_of(folder) in (1.0, 2.0)
        make_old(folder)
        save_value(folder, 3.0)
        assert names(folder) == two_files(folder)
        if process.exitcode == 0:
            break
    assert at > 15


def test_what_may_be_in_use_stays(tmp_path: Path) -> None:
    """A draft that its writer holds, drafts and tensors that are not old, and whatever is named otherwise."""
    save_value(tmp_path, 1.0)
    slow, young = tmp_path / f".adapter-{'a' * 32}.draft", tmp_path / f".adapter-{'b' * 32}.draft"
    mine, tensors = tmp_path / "adapter-final.safetensors", tmp_path / f"adapter-{'c' * 16}.safetensors"
    for path in (slow, mine):
        path.write_bytes(b"slow")
    make_old(tmp_path)
    for path in (young, tensors):
        path.write_bytes(b"young")
    with open(slow, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        save_value(tmp_path, 2.0)
        assert names(tmp_path) == sorted([*two_files(tmp_path), slow.name, young.name, mine.name, tensors.name])
    make_old(tmp_path)
    save_value(tmp_path, 3.0)
    assert names(tmp_path) == sorted([*two_files(tmp_path), mine.name])


# --- full disks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["write", "fsync", "replace", "open"])
def test_a_full_disk_leaves_the_old_adapter_and_says_so(call: str, code: int, tmp_path: Path) -> None:
    def refuse() -> None:
        raise OSError(code, os.strerror(code))

    for at in itertools.count(1):
        folder = tmp_path / str(at)
        save_value(folder, 1.0)
        with interrupted(at, False, refuse, (call,)) as one:
            error = None
            try:
                save_value(folder, 2.0)
            except sl.CheckpointError as found:
                error = found
        found_value = value_of(folder)
        if error is not None:
            assert isinstance(error, OSError)
            assert error.errno == code
            assert str(folder) in str(error)
            assert os.strerror(code) in str(error)
            assert found_value == 1.0 or "holds the new adapter, but the disk does not confirm it" in str(error)
        assert error is not None or found_value == 2.0
        assert found_value == 2.0 or names(folder) == two_files(folder)
        save_value(folder, 3.0)
        make_old(folder)
        save_value(folder, 3.0)
        assert names(folder) == two_files(folder)
        if one.calls < at:
            break
    assert at > 2


def test_a_disk_that_takes_half_of_the_bytes_leaves_the_old_adapter(tmp_path: Path) -> None:
    """A limit of the operating system stands for the full disk: the second write of a file fails, not the first."""
    save_value(tmp_path, 1.0)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            save_value(tmp_path, 2.0, size=1000)
        except sl.CheckpointError as error:
            assert isinstance(error, OSError)
            assert error.errno == errno.EFBIG
        else:
            raise AssertionError("8,000 bytes went into a file of 5,000")
        assert value_of(tmp_path) == 1.0
        assert names(tmp_path) == two_files(tmp_path)

    join(forked(fill))
    assert value_of(tmp_path) == 1.0
    assert names(tmp_path) == two_files(tmp_path)
