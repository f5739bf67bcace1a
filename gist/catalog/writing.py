"""Writing to a folder that other processes may be writing to."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits for other processes that are in here: several workers read a dataset once.

    A network file system may have no locks. Then each reads for itself, and the last one's is kept.

    Args:
        folder: Is made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def may_write(path: Path) -> bool:
    """Whether something that may not exist yet can be written: by its closest folder that does."""
    there = next(folder for folder in path.parents if folder.exists())
    return os.access(there, os.W_OK)
