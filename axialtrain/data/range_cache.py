"""Byte ranges on a disk of this machine, up to a size, for all processes that read them.

    {sha256}.range   one range; its name says of what. Read without a lock, touched when it is.
    axialtrain.incoming  the one that is being written; a rename makes it an entry
    axialtrain.lock  held by who writes; its content is how many bytes there are, or too many

The count goes up before the bytes are there, so one who is killed at any moment leaves it too high,
never too low: the next to reach the limit counts anew. What a power failure leaves of an entry is
for the checksums of those who read: nothing is synced here.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

LOG = logging.getLogger(__name__)

LOCK, INCOMING = "axialtrain.lock", "axialtrain.incoming"  # nobody else's
PATIENCE = 1.0  # s that one waits for another who writes; then the entry is not kept
_ENTRY = re.compile(r"[0-9a-f]{64}\.range")
_COUNT = re.compile(rb"[0-9]{20}")
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def entry_name(*key: object) -> str:
    """The name of the entry for `key`, of which the parts' texts count."""
    return hashlib.sha256("\0".join(map(str, key)).encode()).hexdigest() + ".range"


class RangeCache:
    """Ranges in `folder`, of up to `limit` bytes together; those not used for longest go first.

    A disk that is full or cannot be written to is warned of once, and then not written to again;
    no method raises for it.
    """

    def __init__(self, folder: str | Path, limit: int) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.limit = limit
        self._written = True  # whether it still is
        self._patience = PATIENCE
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._held() as lock:
                if lock is not None:
                    _note(lock, self._trim(limit))
        except OSError as error:
            self._leave(error)

    def get(self, name: str, size: int) -> bytes | None:
        """The `size` bytes of the entry `name`; None where it is not there, or is another size."""
        try:
            handle = os.open(self.folder / name, _READ)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:  # a link, which is nothing of ours
                self.drop(name)
            return None
        try:
            found = os.fstat(handle)
            if stat.S_ISREG(found.st_mode) and found.st_size == size:
                with os.fdopen(os.dup(handle), "rb") as file:
                    data = file.read(size)
                with suppress(OSError):  # a disk that is only read
                    os.utime(handle)
                if len(data) == size:
                    return data
        except OSError:
            return None
        finally:
            os.close(handle)
        self.drop(name)
        return None

    def drop(self, name: str) -> None:
        """The entry `name` goes; nothing where there is none."""
        with suppress(OSError):
            (self.folder / name).unlink()

    def put(self, entries: Mapping[str, bytes]) -> None:
        """Keep `entries`, their data by their names, if nobody else writes for too long."""
        if not self._written or not entries:
            return
        try:
            with self._held() as lock:
                if lock is not None:
                    for name, data in entries.items():
                        self._write(lock, name, data)
        except OSError as error:
            self._leave(error)

    def _write(self, lock: int, name: str, data: bytes) -> None:
        path, incoming = self.folder / name, self.folder / INCOMING
        if len(data) > self.limit or path.exists():
            return
        total = _noted(lock)
        if total is None or total + len(data) > self.limit:
            # Some more than is needed, so that not every entry counts anew.
            total = self._trim(self.limit - max(len(data), self.limit // 16))
        _note(lock, total + len(data))
        incoming.unlink(missing_ok=True)
        try:
            with incoming.open("xb") as file:
                file.write(data)
            incoming.rename(path)
        except OSError:
            with suppress(OSError):
                incoming.unlink(missing_ok=True)
            raise

    def _trim(self, most: int) -> int:
        """Let the oldest go until there are at most `most` bytes; how many there are then."""
        (self.folder / INCOMING).unlink(missing_ok=True)
        found = []
        with os.scandir(self.folder) as items:
            for item in items:
                if _ENTRY.fullmatch(item.name):
                    with suppress(FileNotFoundError):  # one that was dropped just now
                        info = item.stat(follow_symlinks=False)
                        found.append((info.st_mtime_ns, item.name, info.st_size))
        total = sum(size for _, _, size in found)
        for _, name, size in sorted(found):
            if total <= most:
                break
            (self.folder / name).unlink(missing_ok=True)
            total -= size
        return total

    @contextmanager
    def _held(self) -> Iterator[int | None]:
        """The lock, which ends with its process; None where another holds it for too long."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(self.folder / LOCK, flags, 0o666)
        try:
            end = time.monotonic() + self._patience
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= end:
                        self._patience = 0.0  # one who was stopped costs this once
                        yield None
                        return
                    time.sleep(0.002)
            self._patience = PATIENCE
            try:
                yield lock
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # also where a child has it by a fork
        finally:
            os.close(lock)

    def _leave(self, error: OSError) -> None:
        if self._written:
            self._written = False
            LOG.warning("data.read.cache=%s: nothing more is kept there (%s)", self.folder, error)


def _noted(lock: int) -> int | None:
    """The count in the lock; None where there is none."""
    text = os.pread(lock, 20, 0)
    return int(text) if _COUNT.fullmatch(text) else None


def _note(lock: int, total: int) -> None:
    os.pwrite(lock, b"%020d" % total, 0)
