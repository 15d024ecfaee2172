"""The places that a configuration names: what is there, what may be the hub's, and what may have been meant."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from superlora_tn.commands import UsageError

FILES = (".jsonl", ".json", ".csv", ".txt")
# What stands in front of no name of the hub's: its site has pages there.
PAGES = ("models", "datasets", "spaces")
# How near a name is to one that may have been meant, from 0 to 1: where the hub may have it, and where it has not.
NEAR, LIKE = 0.8, 0.6
# Bytes of a block of a file, and how many are read of a large one.
BLOCK, BLOCKS = 4096, 256


class ConfigError(UsageError):
    """A configuration that cannot be meant; the message says where and what to write."""


def check_there(name: str, path: str, where: str, beside: Path) -> None:
    """Raise for a path that is not there, or not what its key needs.

    A name that may be the hub's is left; where one nearly so is here, that is said at once, as the hub may take long to answer.

    Args:
        name: the key.
        path: what it says.
        where: its place, for the message.
        beside: the folder of the configuration.
    """
    place = Path(path)
    if path and place.exists():
        if name == "model" and not place.is_dir():
            raise ConfigError(f"{where}: model is '{path}', which is a file; give the folder that save_pretrained wrote.")
        if name == "spec" and place.is_dir():
            raise ConfigError(f"{where}: spec is '{path}', which is a folder; give a JSON file of AdapterSpec.to_dict().")
        return
    if not path:
        return
    is_path = name == "spec" or _is_path(path)
    close = list(dict.fromkeys(map(str, _close(place, beside, LIKE if is_path else NEAR))))
    meant = f"; did you mean {' or '.join(close[:3])}?" if close else ""
    if is_path:
        raise ConfigError(f"{where}: {name} is '{path}', which is not there{meant or '.'}")
    if meant:
        print(f"{where}: {name} is '{path}', which is not here{meant} The hub is asked for it.", file=sys.stderr)


def _is_path(path: str) -> bool:
    """Whether this can be no name of the hub's."""
    place = Path(path)
    if place.is_absolute() or path.startswith((".", "~")) or path.endswith("/") or "\\" in path or place.suffix in FILES:
        return True
    count = len(place.parts)
    return count > 2 or (count == 2 and (place.parent.is_dir() or place.parts[0] in PAGES))


def _close(place: Path, beside: Path, least: float) -> Iterator[Path]:
    """What is there under nearly such a name: in its folder, in one of nearly that name, or beside the configuration."""
    folders = [place.parent] if place.parent.is_dir() else _near(place.parent.name, place.parent.parent, least)
    for folder in folders:
        yield from _near(place.name, folder, least)
    if (beside / place).exists():
        yield beside / place
    elif len(place.parts) == 1:
        yield from _near(place.name, beside, least)


def _near(name: str, folder: Path, least: float) -> list[Path]:
    """Names in a folder that are near to one, or that one alone."""
    there = [other.name for other in folder.iterdir()] if folder.is_dir() else []
    return [folder / close for close in ([name] if name in there else get_close_matches(name, there, n=3, cutoff=least))]


def digest(place: Path, without: Path, sampled: bool = False) -> str:
    """Of a file its bytes, of a folder the names and sizes of what is in it, as SHA-256.

    What is hidden, caches of datasets, and what is in the folder `without` (resolved) do not count. `sampled` adds blocks of
    each file's bytes, all of a small one: weights that changed are of the same size.
    """
    if place.is_file():
        with place.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    found, root = hashlib.sha256(), place.resolve()
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        aside = any(part.startswith(".") for part in name.parts) or name.match("cache-*.arrow") or path.is_relative_to(without)
        if path.is_file() and not aside:
            size = path.stat().st_size
            found.update(f"{name.as_posix()} {size}\n".encode())
            if sampled:
                with path.open("rb") as file:
                    for start in range(0, size, max(BLOCK, size // BLOCKS)):
                        file.seek(start)
                        found.update(file.read(BLOCK))
    return found.hexdigest()


def unreachable(key: str, name: str, error: Exception) -> ConfigError:
    """The refusal of a hub's name, or of a folder, from which nothing could be had."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if Path(name).exists():
        return ConfigError(f"{key} is '{name}', which cannot be read: {first}")
    repo = f"hf download {name}{' --repo-type dataset' if key == 'data' else ''} --local-dir FOLDER"
    return ConfigError(
        f"{key} is '{name}', which is no file or folder here, and could not be had from the hub: {first} Where there is no "
        f"network, get it elsewhere ('{repo}') and give the folder."
    )
