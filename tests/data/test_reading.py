"""Shards from a server that fails: what passes is asked for again, what lasts is reported."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import re
import shutil
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import botocore.exceptions
import fsspec
import numpy as np
import pytest
from fsspec.exceptions import FSTimeoutError
from hypothesis import given
from hypothesis import strategies as st
from range_server import Fault, RangeServer, serving
from yarl import URL

from axialtrain.data import reading
from axialtrain.data.passing import DeniedError, UnreachableError, is_passing, without_secrets
from axialtrain.data.reading import ByteSource, ReadConfig, Span, size_in, wait_before
from axialtrain.data.region import Shards, open_shards
from axialtrain.grid import Rect

if TYPE_CHECKING:
    from conftest import Source

WHOLE = Rect(0, 70, 0, 50)  # of the image "small", which is one block
GET, HEAD = ("GET", "tar"), ("HEAD", "tar")
MANIFEST = ("GET", "json"), ("HEAD", "json")


@pytest.fixture
def server(source: Source) -> Iterator[RangeServer]:
    with serving(source.url) as server:
        yield server


def opened(server: RangeServer, **read: Any) -> Shards:
    """The shards of `server`, with the head of "small" read, and nothing counted yet."""
    shards = open_shards(server.url, ReadConfig(**{"backoff": 0.01, "retries": 3, **read}))
    shards.head("small")
    server.asked.clear()
    return shards


def block(shards: Shards) -> tuple[int, int]:
    (entry,) = shards.head("small").blocks
    return entry.offset, entry.offset + entry.length


def where(server: RangeServer, span: tuple[int, int]) -> str:
    return f"{server.url}/shard-00000.tar: bytes {span[0]} to {span[1]}"


@pytest.mark.parametrize("fault", [503, 500, 429, 408, "stall", "reset", "cut", "short", "wrong"])
def test_what_passes_is_asked_for_again(
    source: Source, server: RangeServer, caplog: pytest.LogCaptureFixture, fault: Fault
) -> None:
    shards = opened(server, timeout=1.5 if fault == "stall" else 60)
    times = 1 if fault in ("wrong", "stall") else 3
    server.once[GET] = [fault] * times
    region = shards.region("small", WHOLE)
    np.testing.assert_array_equal(region.pixels, source.pixels["small"])
    np.testing.assert_array_equal(region.labels, source.labels["small"])
    assert server.ranges() == [block(shards)] * (times + 1)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == times
    assert all(text.startswith(where(server, block(shards))) for text in said)
    if fault != "wrong":
        assert f"try {times} of 4 failed (" in said[-1]


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (503, "503"),
        ("reset", "ClientPayloadError|ClientOSError|ConnectionReset"),
        ("cut", "ClientPayloadError"),
        ("short", r"ConnectionError: \d+ of the \d+ bytes came"),
        ("stall", r"no whole answer within 0\.2 s"),
    ],
)
def test_what_does_not_pass_ends_in_one_error(
    server: RangeServer, fault: Fault, cause: str
) -> None:
    shards = opened(server, retries=2, **({"timeout": 0.2} if fault == "stall" else {}))
    server.always[GET] = fault
    start = time.monotonic()
    with pytest.raises(UnreachableError, match=cause) as raised:
        shards.region("small", WHOLE)
    assert time.monotonic() - start < 60
    error = raised.value
    assert str(error).startswith(f"{where(server, block(shards))}: not to be had in 3 tries (")
    assert (error.start, error.stop, error.tries) == (*block(shards), 3)
    assert error.path == f"{server.url}/shard-00000.tar"
    assert server.ranges() == [block(shards)] * 3
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.cause) == (UnreachableError, str(error), error.cause)
    del server.always[GET]
    assert shards.region("small", WHOLE).tiles_decoded == 5 * 4  # nothing of it stays


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (404, r"the file is not there \(any more\)"),
    ],
)
def test_what_lasts_is_not_asked_for_again(
    server: RangeServer, fault: Fault, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    shards = opened(server)
    server.always[GET] = fault
    with pytest.raises(ValueError, match=message) as raised:
        shards.region("small", WHOLE)
    assert str(raised.value).startswith(where(server, block(shards)))
    assert server.ranges() == [block(shards)]
    assert not caplog.records


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "cannot be read .*401"),
        (403, "cannot be read .*403"),
        (416, "cannot be read .*416"),
        ("whole", r"its server sends \d+ bytes, allowed is one that serves ranges"),
    ],
)
def test_what_is_refused_is_no_damage(server: RangeServer, status: Fault, message: str) -> None:
    """It would be masked, as damage that lasts is, although it says nothing of what is stored."""
    shards = opened(server)
    server.always[GET] = status
    for spare in (False, True):
        with pytest.raises(DeniedError, match=message) as raised:
            shards.region("small", WHOLE, spare=spare)
        assert str(raised.value).startswith(where(server, block(shards)))
    assert server.ranges() == [block(shards)] * 2
    server.always[GET] = 404
    (damage,) = shards.region("small", WHOLE, spare=True).damaged
    assert "the file is not there (any more)" in damage.what


def test_wrong_bytes_are_damage_when_they_come_twice(server: RangeServer) -> None:
    shards = opened(server)
    server.always[GET] = "wrong"
    with pytest.raises(ValueError, match=rf"shard-00000\.tar: byte {block(shards)[0]}: "):
        shards.region("small", WHOLE)
    assert server.ranges() == [block(shards)] * 2
    row = shards.row("tall")
    with pytest.raises(ValueError, match=r"head of 'tall' at byte \d+: is damaged"):
        shards.head("tall")
    head = (row.head_offset, row.head_offset + row.head_length)
    assert server.ranges()[2:] == [head] * 2
    server.once[GET] = ["wrong"]
    del server.always[GET]
    assert shards.head("tall").name == "tall"
    assert server.ranges()[4:] == [head] * 2


def test_beside_what_is_damaged_nothing_is_fetched_twice(source: Source, tmp_path: Path) -> None:
    copy = shutil.copytree(source.url, tmp_path / "copy")
    entries = open_shards(source.url).head("wide").blocks
    bad = entries[1]
    with (copy / "shard-00000.tar").open("r+b") as file:
        file.seek(bad.offset + 600)
        (byte,) = file.read(1)
        file.seek(bad.offset + 600)
        file.write(bytes([byte ^ 1]))
    with serving(copy) as server:
        shards = open_shards(server.url)
        shards.head("wide")
        server.asked.clear()
        region = shards.region("wide", Rect(0, 200, 0, 300), spare=True)
    (damage,) = region.damaged
    assert (damage.row, damage.col) == (bad.row, bad.col)
    start, stop = entries[0].offset, entries[-1].offset + entries[-1].length
    assert server.ranges() == [(start, stop), (bad.offset, bad.offset + bad.length)]


def test_a_shard_that_has_become_shorter_is_reported(source: Source, tmp_path: Path) -> None:
    for path in Path(source.url).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with serving(tmp_path) as server:
        shards = opened(server)
        start, stop = block(shards)
        shard = tmp_path / "shard-00000.tar"
        shard.write_bytes(shard.read_bytes()[: stop - 700])
        with pytest.raises(ValueError, match=f"ends after {stop - 700}: the shard was cut short"):
            shards.region("small", WHOLE)
        assert server.ranges() == [(start, stop)]


@pytest.mark.parametrize("fault", [503, 429])
def test_sizes_and_manifests_are_asked_for_again(server: RangeServer, fault: Fault) -> None:
    """fsspec's HTTP asks for a size by HEAD, then by GET, and says "not found" of any failure."""
    for kind in (*MANIFEST, GET, HEAD):
        server.once[kind] = [fault]
    assert opened(server).shard_sizes()["shard-00000.tar"] > 0
    assert not any(server.once.values())


def test_a_manifest_that_does_not_come(server: RangeServer) -> None:
    read = ReadConfig(retries=1, backoff=0.0)
    for kind in MANIFEST:
        server.always[kind] = 503
    with pytest.raises(UnreachableError, match=r"manifest\.json: its size: not to be had in 2 tri"):
        open_shards(server.url, read)
    del server.always["HEAD", "json"]
    with pytest.raises(UnreachableError, match=r"manifest\.json: bytes 0 to \d+: not to be had"):
        open_shards(server.url, read)
    server.always = dict.fromkeys(MANIFEST, 403)
    with pytest.raises(ValueError, match=rf"^{server.url}: no shards can be read here .*403"):
        open_shards(server.url, read)
    server.always = dict.fromkeys(MANIFEST, 404)
    server.asked.clear()
    with pytest.raises(ValueError, match=rf"^{server.url}: no shards here, allowed is a folder"):
        open_shards(server.url, read)
    assert [method for method, _, _ in server.asked] == ["HEAD", "GET"]


def test_a_shard_that_is_not_there_is_named(server: RangeServer) -> None:
    shards = open_shards(server.url)
    server.always = {GET: 404, HEAD: 404}
    with pytest.raises(ValueError, match=r"shard-00000\.tar: manifest\.json names this shard, but"):
        shards.head("small")


def test_requests_at_once_are_bounded(server: RangeServer) -> None:
    """Over all threads that read, as there are several in a loader."""
    source = ByteSource(fsspec.filesystem("http"), ReadConfig(requests=3))
    path = f"{server.url}/shard-00000.tar"
    whole = (server.folder / "shard-00000.tar").read_bytes()
    ranges = [(at, at + 100) for at in range(0, 6000, 500)]
    server.delay = 0.1
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda some: source.fetch(path, some), [ranges[:6], ranges[6:]]))
    assert got[0] + got[1] == [whole[start:stop] for start, stop in ranges]
    assert sorted(server.ranges()) == ranges
    assert server.most == 3


def test_near_ranges_are_one_request_and_large_ones_several(
    source: Source, server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = opened(server)
    entries = shards.head("wide").blocks
    server.asked.clear()
    rect = Rect(0, 200, 0, 300)
    np.testing.assert_array_equal(shards.region("wide", rect).pixels, source.pixels["wide"])
    start, stop = entries[0].offset, entries[-1].offset + entries[-1].length
    assert server.ranges() == [(start, stop)]
    monkeypatch.setattr(reading, "PIECE", 100_000)
    server.asked.clear()
    np.testing.assert_array_equal(shards.region("wide", rect).pixels, source.pixels["wide"])
    expected = [(at, min(at + 100_000, stop)) for at in range(start, stop, 100_000)]
    assert len(expected) > 1
    assert sorted(server.ranges()) == expected


@given(cuts=st.lists(st.integers(0, 2_000_000), max_size=12, unique=True), keep=st.integers(0, 63))
def test_spans_are_what_stands_in_the_file(
    cuts: list[int], keep: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "numbers"
    if not path.exists():
        path.write_bytes(np.arange(500_000, dtype=np.uint32).tobytes())
    whole, ends = path.read_bytes(), sorted(cuts)
    pairs = [(a, b) for i, (a, b) in enumerate(pairwise(ends)) if keep >> i & 1]
    spans = [Span(start, stop, 0) for start, stop in pairs]
    got = list(ByteSource(fsspec.filesystem("file")).spans(str(path), spans))
    assert got == [whole[start:stop] for start, stop in pairs]


def test_files_of_this_machine_take_no_other_way(
    source: Source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No thread, no cache, no second look; unless it fails."""
    monkeypatch.setattr(ByteSource, "_wait_for", None)
    read = ReadConfig(cache=str(tmp_path / "cache"))
    np.testing.assert_array_equal(
        open_shards(source.url, read).read("small", 0, 0, 70, 50), source.pixels["small"]
    )
    assert not (tmp_path / "cache").exists()


def test_a_mount_that_stumbles_is_asked_again(
    source: Source, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shards = open_shards(source.url, ReadConfig(backoff=0.0, retries=1))
    shards.head("small")
    local = type(fsspec.filesystem("file"))
    cat, failing = local.cat_file, [errno.ESTALE, errno.ESTALE]

    def stale(*arguments: Any) -> bytes:
        raise OSError(errno.ESTALE, "stale file handle")

    def stumbling(self: Any, *arguments: Any, **options: Any) -> Any:
        if failing:
            raise OSError(failing.pop(), "stale file handle")
        return cat(self, *arguments, **options)

    monkeypatch.setattr(os, "pread", stale)
    monkeypatch.setattr(local, "cat_file", stumbling)
    np.testing.assert_array_equal(shards.read("small", 0, 0, 70, 50), source.pixels["small"])
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    failing.extend([errno.EACCES] * 2)
    with pytest.raises(DeniedError, match=r"bytes \d+ to \d+: cannot be read \(PermissionError"):
        shards.read("small", 0, 0, 70, 50)


def answer(status: int) -> aiohttp.ClientResponseError:
    url = URL("http://x/")
    headers: Any = {}
    info = aiohttp.RequestInfo(url, "GET", headers, url)
    return aiohttp.ClientResponseError(info, (), status=status)


def aws(code: str, status: int) -> botocore.exceptions.ClientError:
    record: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(record, "GetObject")


def because(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (answer(503), True),
        (answer(429), True),
        (answer(404), False),
        (because(FileNotFoundError("x"), answer(502)), True),
        (because(FileNotFoundError("x"), answer(404)), False),
        (because(FileNotFoundError("x"), TimeoutError()), True),
        (FileNotFoundError("x"), False),
        (PermissionError("x"), False),
        (because(OSError(errno.EBUSY, "x"), aws("SlowDown", 503)), True),
        (because(OSError(errno.EIO, "x"), aws("Odd", 400)), False),
        (because(TimeoutError("x"), aws("RequestTimeout", 400)), True),
        (because(PermissionError("x"), aws("AccessDenied", 403)), False),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="x"), True),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="x"), True),
        (botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2), True),
        (botocore.exceptions.NoCredentialsError(), False),
        (aiohttp.ServerDisconnectedError(), True),
        (aiohttp.ClientPayloadError(), True),
        (FSTimeoutError(), True),
        (ConnectionResetError(), True),
        (OSError(errno.ENETUNREACH, "x"), True),
        (OSError(errno.ENOSPC, "x"), False),
        (ssl.SSLEOFError(), True),
        (ssl.SSLCertVerificationError(), False),
        (ValueError("x"), False),
    ],
)
def test_which_errors_pass(error: Exception, passing: bool) -> None:
    assert is_passing(error) is passing


def test_waits_grow_differ_and_are_the_same_each_time() -> None:
    waits = [wait_before(tries, 0.5, "s3://b/a.tar", 7) for tries in range(1, 40)]
    assert waits == [wait_before(tries, 0.5, "s3://b/a.tar", 7) for tries in range(1, 40)]
    for tries, wait in enumerate(waits, 1):
        base = min(0.5 * 2 ** (tries - 1), reading.MOST_WAIT)
        assert base / 2 <= wait <= base * 1.5
    assert len({wait_before(1, 0.5, "s3://b/a.tar", start) for start in range(100)}) == 100


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("requests", 0), ("timeout", 0.0), ("retries", -1), ("backoff", float("nan"))),
        *(("cache_gb", -1.0), ("cache", "")),
    ],
)
def test_what_cannot_be_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^data\.read\.{key} is {value}.*, allowed is "):
        ReadConfig(**{key: value})


def test_secrets_of_a_url_are_not_told() -> None:
    for path, shown in (
        ("https://me:secret@host/a/b.tar?X-Amz-Signature=1", "https://host/a/b.tar"),
        ("bucket/a@b?c/d.tar", "bucket/a@b?c/d.tar"),
        ("/here/a@b.tar", "/here/a@b.tar"),
    ):
        assert without_secrets(path) == shown
        assert str(UnreachableError(path, 1, 2, 3, "no")).startswith(f"{shown}: bytes 1 to 2: ")
        with pytest.raises(ValueError, match=f"^{re.escape(shown)}: is a directory, allowed is a"):
            size_in({"type": "directory"}, path)
