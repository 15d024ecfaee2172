"""What is wrong with a saved adapter, or with the disk under it."""

from __future__ import annotations


class CheckpointError(ValueError):
    """Files that are not an intact adapter, or not one for this base, or values that no file can hold."""


class DiskError(CheckpointError, OSError):
    """The folder or the disk refused; `errno` tells which way, as of any OSError."""

    @classmethod
    def of(cls, cause: OSError, words: str) -> DiskError:
        """The error in these words, with the errno of its cause."""
        error = cls(words)
        error.errno = cause.errno
        return error
