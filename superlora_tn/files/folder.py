"""One JSON and the tensors' file it names, replaced together in a folder that many processes read and save into.

Both files are written as *drafts*, under names that nobody can guess, opened so that no planted link is followed, and
on the disk before anything else happens. Then, one saver at a time (`flock` on the folder), the tensors get their name,
which holds their hash, and the JSON is replaced: this rename is the one commit. Whatever stops a saver, the JSON that
stands names tensors that stand. The tensors of the JSON before go last, while no other saver can be about to name them.

What killed savers left is removed by a later save when it is `OLD` seconds older than that save's own draft, by the file
system's clock, and no living process holds it locked. Where a folder cannot be locked (Windows, some network drives),
nothing younger is removed at all, not even the tensors of the JSON before: then savers are safe that end within that time.
Where a lock holds on one machine only, savers on several machines are safe with one adapter, as all ranks of a training
have it; with two different ones, taken up by turns, the folder may end without the tensors of the last.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from superlora_tn.declare.checks import shown
from superlora_tn.files.errors import CheckpointError, DiskError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

JSON = "adapter.json"
ENDINGS = (".safetensors", ".gguf")  # of the formats that are one file
TENSORS = re.compile(r"adapter-[0-9a-f]{16}\.safetensors")
DRAFT = re.compile(r"\.adapter-[0-9a-f]{32}\.draft")
OLD = 3600.0
PATIENCE = 60.0
"""Seconds that a saver waits for the folder; others hold it for the time of two renames."""
_NO_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS, errno.EROFS}
# Flags that only some platforms have. Without O_NONBLOCK, opening a pipe waits for its other end.
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_READ = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOCTTY", 0)
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)


def place_of(folder: str | os.PathLike[str]) -> Path:
    """The folder as a path.

    Raises:
        CheckpointError: it is none.
    """
    try:
        path = os.fspath(folder)
    except TypeError:
        path = None
    if not isinstance(path, str) or "\0" in path:
        raise CheckpointError(f"the folder of an adapter was given as {shown(folder)}; give a path such as 'adapter'.")
    return Path(path)


def check_folder(place: Path, whose: str) -> None:
    """Raise where a format that is a folder would go under a file's name, unless such a folder is there.

    Args:
        place: where.
        whose: the format.
    """
    if place.suffix in ENDINGS and not place.is_dir():
        raise CheckpointError(
            f"'{place}' is the name of a file, and {whose} is a folder; name a folder such as '{place.stem}', or give the "
            "format 'kohya' or 'lycoris', which are one file."
        )


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """A file to be read, links followed (the cache of the Hub is made of them).

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is a pipe, a device or a folder, or cannot be read.
    """
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | _READ))  # noqa: SIM115 (words for opening only)
    except FileNotFoundError:
        raise
    except IsADirectoryError as error:
        raise CheckpointError(f"{path} is a folder, and not the file of an adapter.") from error
    except OSError as error:
        raise DiskError.of(error, f"{path} cannot be opened: {error.strerror}.") from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise CheckpointError(f"{path} is a pipe or a device, and not the file of an adapter.")
        yield file


def content(file: BufferedReader, most: int) -> bytes:
    """All bytes of an opened file, at most `most` of them.

    Raises:
        CheckpointError: there are more, or the disk does not give them.
    """
    try:
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(size, most) + 1) or b""  # None: a file of /proc that would have to wait
    except OSError as error:
        raise DiskError.of(error, f"{file.name} cannot be read: {error.strerror}.") from error
    except MemoryError as error:
        raise CheckpointError(f"{file.name} has {size:,} bytes, more than this machine has memory.") from error
    if max(size, len(data)) > most:
        raise CheckpointError(f"{file.name} has {max(size, len(data)):,} bytes; what it is said to hold has at most {most:,}.")
    return data


@dataclass(frozen=True)
class Draft:
    """A file that has no name of its own yet: where it lies, and when the file system says it was written."""

    path: Path
    written: float


def commit(place: Path, name: str, tensors: bytes, text: bytes, owned: Callable[[bytes], Iterable[str]]) -> None:
    """Replace the adapter of a folder.

    Args:
        place: the folder; made where it does not exist.
        name: of the tensors' file; it follows from their hash.
        tensors: the bytes of that file.
        text: the new JSON.
        owned: which files a JSON names as its tensors' own.

    Raises:
        DiskError: the folder or the disk refuses. The adapter that was there stands, unless the error says otherwise.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _draft(place, tensors) as draft, _draft(place, text) as words, _held(place) as (handle, locked):
            before = set(owned(_standing(place)))
            new, old = ({place / name}, {place / one for one in before - {name}}) if locked else (set(), set())
            try:
                os.replace(draft.path, place / name)
                _sync(handle)
                os.replace(words.path, place / JSON)
                _confirm(place, handle)
                _remove(old)
                _sweep(place, draft.written, {name})
            except BaseException as error:
                # Each only where it is sure: a disk that fails now may hide what stands.
                if os.path.lexists(words.path):
                    _remove(new - {place / one for one in before})
                elif not isinstance(error, OSError) and _standing(place) == text:
                    _remove(old)
                raise
    except DiskError:
        raise
    except (FileExistsError, NotADirectoryError) as error:
        raise DiskError.of(error, f"cannot save to {place}: it, or what should hold it, is a file and no folder.") from error
    except OSError as error:
        raise DiskError.of(
            error, f"cannot save to {place}: {error.strerror or error}. What was there before is still there."
        ) from error


def _confirm(place: Path, handle: int | None) -> None:
    """See the commit on the disk: without, it may yet be lost with the power, and what it replaced has to stay."""
    try:
        _sync(handle)
    except OSError as error:
        raise DiskError.of(
            error, f"{place} holds the new adapter, but the disk does not confirm it: {error.strerror}. Save again."
        ) from error


def _standing(place: Path) -> bytes:
    """The JSON that is there; nothing where none can be read."""
    try:
        with opened(place / JSON) as file:
            return content(file, 16 << 20)
    except (OSError, CheckpointError):
        return b""


def _new(path: str, flags: int) -> int:
    del flags
    return os.open(path, _NEW | getattr(os, "O_BINARY", 0), 0o666)


@contextmanager
def _draft(place: Path, data: bytes) -> Iterator[Draft]:
    """A new file with these bytes, on the disk; it is gone in the end, unless it was given a name."""
    path = place / f".adapter-{secrets.token_hex(16)}.draft"
    try:
        with open(path, "xb", buffering=0, opener=_new) as file:
            if fcntl is not None:
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # in use, for as long as this process lives
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(file.fileno(), rest) :]
            os.fsync(file.fileno())
            draft = Draft(path, os.fstat(file.fileno()).st_mtime)
            if fcntl is None:
                file.close()  # Windows renames no open file
            yield draft
    finally:
        _remove([path])


def _remove(paths: Iterable[Path]) -> None:
    """Remove files, if they are there; an interruption is raised when that is done."""
    left = list(paths)
    try:
        while left:
            with suppress(OSError):
                os.unlink(left[-1])
            left.pop()
    finally:
        for path in left:
            with suppress(OSError):
                os.unlink(path)


@contextmanager
def _held(place: Path) -> Iterator[tuple[int | None, bool]]:
    """The folder, opened, and whether it is locked against all other savers; None where folders cannot be opened."""
    if fcntl is None:
        yield None, False
        return
    try:
        handle = os.open(place, _FOLDER)
    except PermissionError:  # files may be made in it, but not listed
        yield None, False
        return
    try:
        locked = _lock(handle, place)
        try:
            yield handle, locked
        finally:
            # Not left to `close`: a process forked meanwhile has the same handle, and would keep the lock.
            if locked:
                fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


def _lock(handle: int, place: Path) -> bool:
    """Wait for the lock; whether there is one."""
    end, pause = time.monotonic() + PATIENCE, 0.0005
    while time.monotonic() < end:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        else:
            return True
    raise DiskError.of(
        OSError(errno.EAGAIN, ""), f"cannot save to {place}: another process has locked the folder for {PATIENCE:g} s."
    )


def _sync(handle: int | None) -> None:
    """See the renames in a folder on the disk, where the file system can."""
    if handle is None:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _sweep(place: Path, now: float, keep: set[str]) -> None:
    """Remove what killed savers left long ago."""
    with suppress(OSError), os.scandir(place) as entries:
        for entry in entries:
            if entry.name in keep or not (DRAFT.fullmatch(entry.name) or TENSORS.fullmatch(entry.name)):
                continue
            if entry.is_file(follow_symlinks=False) and now - entry.stat(follow_symlinks=False).st_mtime > OLD:
                _remove([Path(entry.path)] if _idle(entry.path) else [])


def _idle(path: str) -> bool:
    """Whether no living process holds a file that it writes."""
    if fcntl is None:
        return True
    try:
        handle = os.open(path, os.O_RDONLY | _READ | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
    finally:
        os.close(handle)
    return True
