"""Byte ranges of files, over a network or from this machine: asked for again where that may help.

A busy server, a lost connection, an answer that does not come or is cut short are passing: they are
logged with their place, asked for again after a while, and in the end an UnreachableError. What is
not for us is a DeniedError at once, and what is not there a ValueError. Bytes that fail their
checksum are fetched once more, past the cache, before whoever wanted them is given them as they
are.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import os
import threading
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import fsspec
import google_crc32c
import numpy as np
from fsspec.asyn import get_loop, sync
from fsspec.implementations.local import LocalFileSystem

from axialtrain.data.fetch import merge
from axialtrain.data.passing import (
    DeniedError,
    UnreachableError,
    is_passing,
    place,
    status_of,
    without_secrets,
)
from axialtrain.data.range_cache import RangeCache, entry_name
from axialtrain.data.synchronous import alike, ask_in_thread

LOG = logging.getLogger(__name__)

PIECE = 1 << 23  # bytes of one request: larger ranges are several, at once
MOST_WAIT = 30.0  # s, and up to half as much again, before what failed is asked for again
_LOCAL = frozenset({"file", "local", "memory"})
# What tells one version of a file from another, as the stores call it.
_VERSIONS = (
    *("ETag", "etag", "Content-MD5", "md5Hash"),
    *("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "modified"),
)


@dataclass
class ReadConfig:
    """How shards are read over a network; files of this machine are simply read.

    requests: at once, of one process and one set of shards. timeout: seconds until a request that
    is not answered whole is given up. retries: how often what fails in passing is asked for again,
    backoff: seconds before the first time, twice as many before each next one, up to MOST_WAIT;
    from half to one and a half times that, by a hash of what is asked for.
    cache: a folder on this machine that keeps what was read, for all processes; null keeps nothing.
    cache_gb: how much of it, in 10^9 bytes.
    """

    requests: int = 8
    timeout: float = 30.0
    retries: int = 5
    backoff: float = 0.5
    cache: str | None = None
    cache_gb: float = 20.0

    def __post_init__(self) -> None:
        for key, least, most in (
            ("requests", 1, 1024),
            ("timeout", 0.01, 86400),
            ("retries", 0, 1000),
            ("backoff", 0, 3600),
            ("cache_gb", 0, 1e9),
        ):
            value = getattr(self, key)
            if not least <= value <= most:
                raise ValueError(
                    f"data.read.{key} is {value}, allowed is from {least:g} to {most:g}"
                )
        if self.cache == "":
            raise ValueError("data.read.cache is empty, allowed is a folder or null")


@dataclass(frozen=True)
class Span:
    """Bytes [start, stop) of a file. checksum: their CRC-32C, or SHA-256 in hexadecimal."""

    start: int
    stop: int
    checksum: int | str

    def is_right(self, data: bytes) -> bool:
        """Whether `data` are these bytes, as far as the checksum tells."""
        if isinstance(self.checksum, int):
            return google_crc32c.value(data) == self.checksum
        return hashlib.sha256(data).hexdigest() == self.checksum


@dataclass(frozen=True)
class _File:
    """size: None where its server does not say. version: changes when the file does."""

    size: int | None
    version: tuple[str, ...]


class _LastingError(ValueError):
    """What asking again will not change; says so itself."""


class ByteSource:
    """The files of one file system of fsspec. Safe to use from several threads.

    local: whether they are on this machine, where nothing is cached or asked for at once.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, read: ReadConfig | None = None) -> None:
        self._fs = fs
        self._read = read if read is not None else ReadConfig()
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self.local = not protocols.isdisjoint(_LOCAL)
        # What is not asynchronous need not be safe to ask from several threads.
        self._free = asyncio.Semaphore(self._read.requests if fs.async_impl else 1)
        self._files: dict[str, _File] = {}
        self._lock = threading.Lock()

    @cached_property
    def _cache(self) -> RangeCache | None:
        if self._read.cache is None or self.local:
            return None
        return RangeCache(self._read.cache, int(self._read.cache_gb * 1e9))

    def size(self, path: str) -> int | None:
        """Bytes of the file at `path`, asked once; None where its server does not say.

        FileNotFoundError where it is not there; ValueError where it is no file; DeniedError where
        it must not be read; UnreachableError where there is no answer.
        """
        return self._file(path).size

    def beginning(self, path: str, most: int) -> bytes:
        """The first bytes of the file, up to `most`. Errors as `size` has them."""
        if self.local:
            return bytes(self._fs.cat_file(path, 0, most))
        return self._wait_for(
            self._tried(lambda: self._ask("cat_file", path, start=0, end=most), path)
        )

    def fetch(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes [start, stop) of the file for each of `ranges`, each as long as that.

        ValueError, naming the place, where they are not there; DeniedError where they must not be
        read; UnreachableError where they do not come.
        """
        if self.local:
            with suppress(OSError):  # it is seen below what that was, and whether it has passed
                found = [bytes(self._fs.cat_file(path, start, stop)) for start, stop in ranges]
                if all(len(f) == b - a for f, (a, b) in zip(found, ranges, strict=True)):
                    return found
        pieces = [
            [(at, min(at + PIECE, stop)) for at in range(start, stop, PIECE)]
            for start, stop in ranges
        ]
        came = iter(self._wait_for(self._all(path, [piece for some in pieces for piece in some])))
        parts = [[next(came) for _ in some] for some in pieces]
        return [part[0] if len(part) == 1 else b"".join(part) for part in parts]

    def spans(self, path: str, spans: Sequence[Span]) -> Generator[bytes, None, None]:
        """The bytes of each of `spans`, which are in order and apart; to be closed.

        Those of this machine are read one by one, when it is their turn: so they are still in the
        processor's cache, and in memory that the one before has left, when they are decoded. Those
        of a network come all before the first is given out, near ones together, and are looked for
        in the cache first; what of them is not right is fetched once more, and is given out as it
        then comes. Errors as `fetch` has them.
        """
        if self.local:
            yield from self._from_here(path, spans)
        elif spans:
            yield from self._from_afar(path, spans)

    def _from_here(self, path: str, spans: Sequence[Span]) -> Generator[bytes, None, None]:
        with ExitStack() as stack:
            file = None
            if isinstance(self._fs, LocalFileSystem):
                with suppress(OSError):
                    file = stack.enter_context(open(path, "rb", buffering=0))
            for span in spans:
                data, size = b"", span.stop - span.start
                if file is not None:
                    with suppress(OSError):
                        data = os.pread(file.fileno(), size, span.start)
                if len(data) < size:  # it is seen there what that was, and whether it has passed
                    (data,) = self.fetch(path, [(span.start, span.stop)])
                yield data

    def _from_afar(self, path: str, spans: Sequence[Span]) -> list[bytes]:
        names = self._names(path, spans)
        found = self._kept(path, names)
        came = self._fetched(path, [span for span in spans if span not in found])
        wrong = [span for span, data in came.items() if not span.is_right(data)]
        for span in wrong:
            where = place(path, span.start, span.stop)
            LOG.warning("%s: came with a wrong checksum, fetched once more", where)
        again = self._fetched(path, wrong)
        damaged = {span for span, data in again.items() if not span.is_right(data)}
        came |= again
        if self._cache is not None:
            self._cache.put({names[span]: came[span] for span in came if span not in damaged})
        found |= came
        return [found[span] for span in spans]

    def _names(self, path: str, spans: Sequence[Span]) -> dict[Span, str]:
        """Of `spans` in the cache; none where there is no cache."""
        if self._cache is None:
            return {}
        file = self._file(path)
        key = (self._fs.unstrip_protocol(path), file.size, *file.version)
        return {span: entry_name(*key, span.start, span.stop) for span in spans}

    def _kept(self, path: str, names: dict[Span, str]) -> dict[Span, bytes]:
        """What of `names` is in the cache, and right; what is there and is not, goes."""
        cache = self._cache
        found: dict[Span, bytes] = {}
        if cache is None:
            return found
        for span, name in names.items():
            data = cache.get(name, span.stop - span.start)
            if data is not None and span.is_right(data):
                found[span] = data
            elif data is not None:
                cache.drop(name)
                LOG.warning("%s: damaged in the cache", place(path, span.start, span.stop))
        return found

    def _fetched(self, path: str, spans: list[Span]) -> dict[Span, bytes]:
        return dict(zip(spans, self._merged(path, spans), strict=True)) if spans else {}

    def _merged(self, path: str, spans: Sequence[Span]) -> list[bytes]:
        runs = merge([(span.start, span.stop) for span in spans])
        chunks = zip(runs, self.fetch(path, runs), strict=True)
        found: list[bytes] = []
        (start, stop), chunk = next(chunks, ((0, 0), b""))
        for span in spans:
            while span.stop > stop:
                (start, stop), chunk = next(chunks)
            found.append(chunk[span.start - start : span.stop - start])
        return found

    def _file(self, path: str) -> _File:
        with self._lock:
            if path in self._files:
                return self._files[path]
        if self.local:
            info = self._fs.info(path)
        else:
            info = self._wait_for(self._tried(lambda: self._ask("info", path), path))
        version = tuple(str(info[key]) for key in _VERSIONS if info.get(key))
        file = _File(size_in(info, path), version)
        with self._lock:
            self._files[path] = file
        return file

    def _wait_for(self, coroutine: Awaitable[Any]) -> Any:
        """Of the loop, in a thread of fsspec's, to which all requests of this process belong."""
        loop = self._fs.loop if self._fs.async_impl else get_loop()

        async def wait() -> Any:
            return await coroutine

        return sync(loop, wait)

    async def _ask(self, what: str, path: str, **bounds: int) -> Any:
        """`info` or `cat_file` of the file system, whose bounds have other places in each."""
        if self._fs.async_impl:
            return await getattr(self._fs, f"_{what}")(path, **bounds)
        try:
            return await ask_in_thread(self._fs, what, path, **bounds)
        except asyncio.CancelledError:  # it may still be at it
            self._fs = alike(self._fs)
            raise

    async def _all(self, path: str, pieces: list[tuple[int, int]]) -> list[bytes]:
        """`pieces` of the file, as many at once as may be; the first that fails ends the others."""
        tasks = [asyncio.ensure_future(self._piece(path, *piece)) for piece in pieces]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _piece(self, path: str, start: int, stop: int) -> bytes:
        async def asked() -> bytes:
            data = await self._ask("cat_file", path, start=start, end=stop)
            if len(data) > stop - start:
                raise DeniedError(
                    f"{place(path, start, stop)}: its server sends {len(data)} bytes, allowed is "
                    "one that serves ranges of bytes"
                )
            if len(data) < stop - start:
                size = size_in(await self._ask("info", path), path)
                if size is not None and size < stop:
                    raise _LastingError(
                        f"{place(path, start, stop)} belong to it, but it ends after {size}: "
                        "the shard was cut short"
                    )
                raise ConnectionError(f"{len(data)} of the {stop - start} bytes came")
            return data

        return bytes(await self._tried(asked, path, start, stop))

    async def _tried(
        self,
        ask: Callable[[], Awaitable[Any]],
        path: str,
        start: int | None = None,
        stop: int | None = None,
    ) -> Any:
        """What `ask` gives, as often asked as is allowed; start, stop: the bytes it asks for."""
        tries = 0
        while True:
            tries += 1
            try:
                async with self._free, asyncio.timeout(self._read.timeout):
                    return await ask()
            except (_LastingError, DeniedError, ImportError, MemoryError):
                raise
            except Exception as error:
                if not is_passing(error):
                    raise _lasting(error, path, start, stop) from error
                cause = _told(error)
                if isinstance(error, TimeoutError) and not str(error):
                    cause = f"no whole answer within {self._read.timeout:g} s"
                if tries > self._read.retries:
                    raise UnreachableError(path, start, stop, tries, cause) from error
            wait = wait_before(tries, self._read.backoff, path, start or 0)
            LOG.warning(
                "%s: try %d of %d failed (%s); again in %.1f s",
                place(path, start, stop), tries, self._read.retries + 1, cause, wait,
            )  # fmt: skip
            await asyncio.sleep(wait)


def size_in(info: dict[str, Any], path: str) -> int | None:
    """Bytes of the file at `path` of which fsspec gives `info`, None where it does not say.

    ValueError where it is no file: a pipe would never end, nor would a link to a device.
    """
    if info["type"] != "file":
        kind = info["type"] if info["type"] == "directory" else "pipe, device or the like"
        raise ValueError(f"{without_secrets(path)}: is a {kind}, allowed is a file")
    size = info.get("size")
    return size if isinstance(size, int) else None


def wait_before(tries: int, first: float, path: str, start: int) -> float:
    """Seconds after the failed try number `tries` (from 1 on) of the bytes at `start` of `path`.

    Ranks that ask for different bytes wait for different times, and the same in each run.
    """
    key = np.array([google_crc32c.value(path.encode()), start], np.uint64)
    word = np.random.Philox(key=key, counter=tries).random_raw()
    return min(math.ldexp(first, tries - 1), MOST_WAIT) * (0.5 + word / 2**64)


def _lasting(error: Exception, path: str, start: int | None, stop: int | None) -> Exception:
    """What to raise for an `error` that will be there again."""
    if isinstance(error, FileNotFoundError):
        if start is None and _is_absent(error):
            return error
        if _is_absent(error):
            return ValueError(f"{place(path, start, stop)}: the file is not there (any more)")
    return DeniedError(f"{place(path, start, stop)}: cannot be read ({_told(error)})")


def _is_absent(error: FileNotFoundError) -> bool:
    """Whether it is the file that is not there; of every refused question fsspec's HTTP says so."""
    return error.__cause__ is None or status_of(error.__cause__) in (None, 404, 410)


def _told(error: BaseException) -> str:
    """In one line, for a message."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())
