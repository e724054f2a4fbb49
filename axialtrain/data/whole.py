"""Files that appear whole and on disk, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path`, whole and on disk, when the block ends; or not at all.

    It is written under a name of its own. What has that name goes first, never what it links to: a
    stranger's folder may hold a link to somewhere else.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def check_place(path: Path, what: str) -> None:
    """ValueError, beginning with `what`, unless a file can be made where `path` is to be, or is to
    be replaced; by trying it, in the folder or the nearest above it that is there."""
    above = next(one for one in path.absolute().parents if one.exists())
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise ValueError(f"{what}: no file can be written there ({error})") from error


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
