"""Files that are written whole or not at all."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write in place of the path, which it then replaces.

    A run that is stopped halfway, or finds no room, leaves the old file as it was, and nothing beside it.

    Args:
        path: of the finished file; its folder exists.

    Yields:
        The file to write, in the same folder.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
