"""Where shards are put: a folder, or what fsspec writes to (s3://, gs://)."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import fsspec

from axialtrain.data.checked import plain
from axialtrain.data.names import is_shard_name
from axialtrain.data.whole import replacing

LOG = logging.getLogger(__name__)

LOCK = "shard.lock"  # at a URL, while a process works there
_MOST = 1 << 12  # bytes of it that are read


class Destination:
    """A folder that files are put into, each whole or not at all.

    url: a path, or one that fsspec knows. work: a folder on this machine, for a file on its way to
    elsewhere. kept: how to go on, for whoever reads that a file could not be put there.
    ValueError where the folder cannot be one.
    """

    def __init__(self, url: str | Path, work: Path, kept: str = "") -> None:
        self.url = str(url).rstrip("/") or "/"
        self._work = work
        self._kept = kept
        with self._naming():
            fs, self.root = fsspec.core.url_to_fs(self.url)
        self.local = Path(self.root) if "file" in _protocols(fs) else None
        self._fs = fs

    def check(self) -> None:
        """ValueError unless it is a folder that can be written to, or one that can be made.

        Of a URL only whether another process works there: nothing is put there yet.
        """
        if self.local is None:
            found = self._owner()
            if found is not None and found.partition("\n")[0] != self._who:
                raise self._held_by(found)
            return
        out = self.local
        with self._naming():
            there = next(path for path in (out, *out.absolute().parents) if path.exists())
            if not there.is_dir():
                raise ValueError(f"{out}: {there} is a file, allowed is a folder")
            if not os.access(there, os.W_OK | os.X_OK):
                raise ValueError(f"{out}: {there} cannot be written to")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else works here meanwhile, as far as a file can tell; whoever holds `work` asks.

        A folder of this machine holds its unfinished work, whose lock tells. At a URL a file named
        LOCK does: stores have no locks, so two that begin in the same second may both go on, and
        the file of a process that was killed stays until its work is gone on with. Being put first,
        it also tells whether files can be put here.

        ValueError where they cannot, and, naming it, where another process works here.
        """
        if self.local is not None:
            yield
            return
        self.check()
        mine = f"{self._who}\nprocess {os.getpid()}, since {datetime.now(UTC).isoformat()}\n"
        with self._naming():
            own = self._work / LOCK
            own.write_text(mine, "utf-8", "surrogateescape")
        with self._asking("cannot be written to"):
            self._fs.put_file(str(own), f"{self.root}/{LOCK}")
        try:
            found = self._owner()
            if found is None:
                raise ValueError(f"{self.url}: cannot be written to: what was put there is not")
            if found != mine:
                raise self._held_by(found)
            yield
        finally:
            self._let_go(mine)

    @property
    def _who(self) -> str:
        """The first line of LOCK. Whoever holds this work knows that nobody else is at it."""
        return f"the process with its work in {self._work.absolute()} on {socket.gethostname()}"

    def _held_by(self, owner: str) -> ValueError:
        return ValueError(
            f"{self.url}: {plain(', '.join(owner.splitlines()[:2]))[:400]} works here, allowed is "
            f"one at a time; if that process is gone, delete {self.url}/{LOCK}"
        )

    def _owner(self) -> str | None:
        """What LOCK has; None where there is none."""
        with self._asking("cannot be looked into"):
            try:
                data = self._fs.cat_file(f"{self.root}/{LOCK}", start=0, end=_MOST)
            except FileNotFoundError:
                return None
        return bytes(data).decode(errors="surrogateescape")

    def _let_go(self, mine: str) -> None:
        try:
            if self._owner() == mine:
                self._fs.rm_file(f"{self.root}/{LOCK}")
        except Exception as error:  # no reason to fail what is done, or to hide why it failed
            LOG.warning("%s: %s cannot be deleted (%s): delete it", self.url, LOCK, _told(error))

    def has(self, name: str) -> bool:
        with self._asking():
            return bool(self._fs.exists(f"{self.root}/{name}"))

    def shards(self, split: str) -> list[str]:
        """The names of the shards of a split; none where they cannot be listed, as on the web."""
        if "http" in _protocols(self._fs):
            return []
        with self._asking():
            try:
                paths = self._fs.ls(f"{self.root}/{split}".rstrip("/") or "/", detail=False)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                return []
            finally:
                self._fs.invalidate_cache()  # others may put files there
        names = (str(path).rstrip("/").rpartition("/")[2] for path in paths)
        return sorted(name for name in names if is_shard_name(name))

    def size(self, name: str) -> int | None:
        """Bytes of the file, None where there is none."""
        with self._asking():
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
        with self._asking(f"{name} cannot be put there", self._kept):
            self._fs.put_file(str(path), f"{self.root}/{name}")
        path.unlink()

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ImportError) as error:  # an ImportError names what to install
            raise ValueError(f"{self.url}: cannot be the folder of the shards ({error})") from error

    @contextmanager
    def _asking(
        self, what: str = "cannot be the folder of the shards", then: str = ""
    ) -> Iterator[None]:
        """Around what only asks the file system, of which each has errors of its own."""
        try:
            yield
        except Exception as error:
            also = f"; {then}" if then else ""
            raise ValueError(f"{self.url}: {what} ({_told(error)}){also}") from error


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
