"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write in place of the path, which it then replaces: a run that is stopped halfway leaves no broken file."""
    partial = path.with_suffix(f".{os.getpid()}.part")
    yield partial
    partial.replace(path)
