"""Where shards are put: a folder, or what fsspec writes to (s3://, gs://)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import fsspec

from axialtrain.data.whole import replacing


class Destination:
    """A folder that files are put into, each whole or not at all.

    url: a path, or one that fsspec knows. work: a folder on this machine, for a file on its way to
    elsewhere. ValueError where the folder cannot be one.
    """

    def __init__(self, url: str | Path, work: Path) -> None:
        self.url = str(url).rstrip("/") or "/"
        self._work = work
        with self._naming():
            fs, self.root = fsspec.core.url_to_fs(self.url)
        self.local = Path(self.root) if "file" in _protocols(fs) else None
        self._fs = fs

    def check(self) -> None:
        """ValueError unless it is a folder that can be written to, or one that can be made."""
        if self.local is None:
            return  # the first file that is put there tells
        out = self.local
        with self._naming():
            there = next(path for path in (out, *out.absolute().parents) if path.exists())
            if not there.is_dir():
                raise ValueError(f"{out}: {there} is a file, allowed is a folder")
            if not os.access(there, os.W_OK | os.X_OK):
                raise ValueError(f"{out}: {there} cannot be written to")

    def has(self, name: str) -> bool:
        with self._naming():
            return bool(self._fs.exists(f"{self.root}/{name}"))

    def size(self, name: str) -> int | None:
        """Bytes of the file, None where there is none."""
        with self._naming():
            try:
                size = self._fs.info(f"{self.root}/{name}").get("size")
            except FileNotFoundError:
                return None
        return size if isinstance(size, int) else None

    @contextmanager
    def file(self, name: str) -> Iterator[BinaryIO]:
        """A file that is at its place, whole, when the block ends."""
        if self.local is not None:
            path = self.local / name
            with self._naming():
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as file:
                    yield file
            return
        path = self._work / "out" / name
        with self._naming():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                yield file
            self._fs.put_file(str(path), f"{self.root}/{name}")
        path.unlink()

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ImportError) as error:  # an ImportError names what to install
            raise ValueError(f"{self.url}: cannot be the folder of the shards ({error})") from error


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
