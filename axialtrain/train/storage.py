"""A folder on this machine or at a URL that fsspec knows (s3://, gs://), in which a file is there
whole or not at all.

On this machine a file is written under a temporary name, synced and renamed; an object store shows
an object when all of it has arrived.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

PARTIAL = ".partial"  # ends the name of a file that is being written


class Folder:
    """The folder `url`: a path, or a URL with a protocol. It need not be there yet.

    ImportError where the protocol needs a package that is not installed, ValueError for an unknown
    one. Every method raises OSError where the place does not do what is asked, whatever the package
    behind it raises.
    """

    def __init__(self, url: str | Path) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(str(url))
        self._local: Path | None = None
        if "file" in _protocols(self._fs):
            self._local = Path(self._root)
        self.url = str(url) if self._local is None else str(self._local)

    def __str__(self) -> str:
        return self.url

    @property
    def local(self) -> Path | None:
        """The path, where the folder is on this machine."""
        return self._local

    def within(self, name: str) -> Folder:
        """The folder `name` in this one."""
        return Folder(f"{self.url.rstrip('/')}/{name}")

    def names(self) -> list[str]:
        """Of what is in it, sorted; none where it is not there."""
        try:
            with self._asked():
                entries = self._fs.ls(self._root, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {str(entry).rstrip("/").rpartition("/")[2] for entry in entries}
        return sorted(names - {self._root.rstrip("/").rpartition("/")[2], ""})

    def has(self, name: str) -> bool:
        # Not fsspec's `exists`, to which a place that does not answer has nothing.
        return name in self.names()

    def size(self, name: str) -> int:
        """Bytes of a file."""
        with self._asked():
            return int(self._fs.info(self._path(name))["size"])

    def read(self, name: str, size: int) -> bytes:
        """`size` bytes of it, or all if it has fewer."""
        if self.size(name) == 0 and self._local is None:
            return b""  # of which a store gives no range
        with self._asked():
            return bytes(self._fs.cat_file(self._path(name), start=0, end=size))

    def make(self) -> None:
        """Be there. An object store has no folders to make."""
        if self._local is not None:
            self._local.mkdir(parents=True, exist_ok=True)
            sync(self._local.parent)

    def write(self, name: str, content: bytes) -> None:
        """The file `name`, over an older one; it lasts when this returns."""
        if self._local is None:
            with self._asked():
                self._fs.pipe_file(self._path(name), content)
            return
        partial = self._local / f".{name}{PARTIAL}"
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self._local / name)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        sync(self._local)

    def remove(self, name: str) -> None:
        """The file `name`; nothing where there is none."""
        with suppress(FileNotFoundError), self._asked():
            self._fs.rm_file(self._path(name))
        if self._local is not None and self._local.is_dir():
            sync(self._local)

    def remove_all(self) -> None:
        """The folder and what is in it; nothing where there is none."""
        if self._local is not None:
            with suppress(FileNotFoundError):
                shutil.rmtree(self._local)
            return
        with suppress(FileNotFoundError), self._asked():
            self._fs.rm(self._root, recursive=True)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """The place itself, not what fsspec remembers of it; its errors are OSErrors."""
        self._fs.invalidate_cache()
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # of whatever package speaks to the place
            raise OSError(f"{self.url}: {type(error).__name__}: {error}") from error

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
