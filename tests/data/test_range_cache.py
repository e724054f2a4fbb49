"""The cache of byte ranges: what it saves, its limit, and what kills, liars and disks do to it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from range_server import RangeServer, serving

from axialtrain.data import range_cache
from axialtrain.data.range_cache import LOCK, RangeCache, entry_name
from axialtrain.data.reading import ReadConfig
from axialtrain.data.region import Shards, open_shards

if TYPE_CHECKING:
    from conftest import Source

LIMIT = 300_000
# Keeps entries of many sizes, whose content follows from their number, until it is killed.
WRITER = f"""
import sys
from axialtrain.data.range_cache import LOCK, RangeCache, entry_name
cache = RangeCache(sys.argv[1], {LIMIT})
start = int(sys.argv[2])
print("ready", flush=True)
for number in range(start, start + int(sys.argv[3])):
    data = number.to_bytes(8, "big") * (1 + number * 7919 % 9000)
    cache.put({{entry_name(number, len(data)): data}})
"""


def content(number: int) -> bytes:
    return number.to_bytes(8, "big") * (1 + number * 7919 % 9000)


def name_of(number: int) -> str:
    return entry_name(number, 8 * (1 + number * 7919 % 9000))


def write(folder: Path, start: int, count: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WRITER, str(folder), str(start), str(count)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def held(folder: Path) -> int:
    """Bytes of all that is in the cache, half written or not."""
    total = 0
    with os.scandir(folder) as items:
        for item in items:
            if item.name != LOCK:
                try:
                    total += item.stat().st_size
                except FileNotFoundError:
                    continue  # it went meanwhile
    return total


def assert_right(folder: Path, numbers: range) -> int:
    """Each entry has what belongs to its name; how many there are."""
    cache = RangeCache(folder, LIMIT)
    known = {name_of(number): number for number in numbers}
    names = [path.name for path in folder.glob("*.range")]
    for name in names:
        data = content(known[name])
        assert cache.get(name, len(data)) == data
    return len(names)


@pytest.fixture
def server(source: Source) -> Iterator[RangeServer]:
    with serving(source.url) as server:
        yield server


def opened(server: RangeServer, folder: Path, **read: Any) -> Shards:
    return open_shards(server.url, ReadConfig(cache=str(folder), backoff=0.01, **read))


def check_all(shards: Shards, source: Source) -> None:
    for name, pixels in source.pixels.items():
        np.testing.assert_array_equal(shards.read(name, 0, 0, *pixels.shape[:2]), pixels)


def test_hits_make_no_request(source: Source, server: RangeServer, tmp_path: Path) -> None:
    """Blocks are kept, not what was asked for: another window finds them, too."""
    shards = opened(server, tmp_path / "new" / "cache")
    shards.read("wide", 10, 10, 20, 20)
    before = len(server.ranges())
    np.testing.assert_array_equal(
        shards.read("wide", 60, 40, 30, 50), source.pixels["wide"][60:90, 40:90]
    )
    assert len(server.ranges()) == before
    shards.read("wide", 0, 0, 200, 300)  # of four blocks, three are missing
    (start, stop), *more = server.ranges()[before:]
    first = min(shards.head("wide").blocks, key=lambda block: block.offset)
    assert (first.row, first.col) == (0, 0)
    assert (start, more) == (first.offset + first.length, [])
    assert stop - start == sum(block.length for block in shards.head("wide").blocks[1:])
    check_all(shards, source)
    server.asked.clear()
    check_all(shards, source)
    assert server.asked == []
    check_all(opened(server, tmp_path / "new" / "cache"), source)  # another process
    methods = [(method, name) for method, name, _ in server.asked]
    manifest = [("HEAD", "manifest.json"), ("GET", "manifest.json")]
    assert methods == [*manifest, ("HEAD", "shard-00000.tar")]


def test_another_version_of_a_shard_is_another_entry(
    source: Source, server: RangeServer, tmp_path: Path
) -> None:
    opened(server, tmp_path).read("small", 0, 0, 70, 50)
    count = len(list(tmp_path.glob("*.range")))
    server.tag = '"2"'
    server.asked.clear()
    opened(server, tmp_path).read("small", 0, 0, 70, 50)
    assert len(server.ranges()) == count == 2  # head and block
    assert len(list(tmp_path.glob("*.range"))) == 2 * count


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "link", "pipe"])
def test_damaged_entries_are_fetched_again(
    source: Source,
    server: RangeServer,
    tmp_path: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    check_all(opened(server, tmp_path), source)
    paths = list(tmp_path.glob("*.range"))
    for path in paths:
        data = path.read_bytes()
        path.unlink()
        if damage == "flipped":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        elif damage == "link":
            (tmp_path / "else").write_bytes(data)
            path.symlink_to(tmp_path / "else")
        elif damage == "pipe":
            os.mkfifo(path)
        else:
            path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    server.asked.clear()
    check_all(opened(server, tmp_path), source)
    fetched = sum(stop - start for start, stop in server.ranges())
    assert fetched >= held(tmp_path) - (tmp_path / "else").exists() * 10**6
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (len(paths) if damage == "flipped" else 0)
    assert all("shard-00000.tar: bytes" in text for text in said)
    server.asked.clear()
    check_all(opened(server, tmp_path), source)
    assert server.ranges() == []


def test_wrong_bytes_are_not_kept(source: Source, server: RangeServer, tmp_path: Path) -> None:
    shards = opened(server, tmp_path)
    shards.head("small")
    server.always["GET", "tar"] = "wrong"
    with pytest.raises(ValueError, match=r"shard-00000\.tar: byte \d+: "):
        shards.read("small", 0, 0, 70, 50)
    assert len(list(tmp_path.glob("*.range"))) == 1  # the head
    del server.always["GET", "tar"]
    server.once["GET", "tar"] = ["wrong"]
    check_all(shards, source)
    server.asked.clear()
    check_all(shards, source)
    assert server.ranges() == []


def test_the_limit_holds_and_what_is_used_stays(
    source: Source, server: RangeServer, tmp_path: Path
) -> None:
    lengths = [b.length for n in source.pixels for b in open_shards(server.url).head(n).blocks]
    limit = sum(lengths) // 2
    shards = opened(server, tmp_path, cache_gb=limit / 1e9)
    for _ in range(3):
        for name, pixels in source.pixels.items():
            for top in range(0, pixels.shape[0], 64):
                shards.read(name, top, 0, 64, pixels.shape[1])
                assert held(tmp_path) <= limit
    assert held(tmp_path) > limit // 3

    cache = RangeCache(tmp_path / "lru", 1000)
    names = [entry_name(i) for i in range(12)]
    for at, name in enumerate(names[:10]):
        cache.put({name: bytes([at]) * 100})
        os.utime(cache.folder / name, (at, at))
    assert cache.get(names[0], 100) == bytes(100)  # the oldest, and now the newest
    cache.put({names[10]: bytes(100)})
    assert [cache.get(name, 100) is not None for name in names[:11]] == [True, False] + [True] * 9
    cache.put({names[11]: bytes(1001)})  # more than there may be
    assert cache.get(names[11], 1001) is None
    assert held(cache.folder) == 1000
    RangeCache(cache.folder, 350)  # told to be smaller
    assert held(cache.folder) == 300


def test_what_is_not_its_own_stays(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_bytes(bytes(1000))
    cache = RangeCache(tmp_path, 150)
    for number in range(5):
        cache.put({entry_name(number): bytes(100)})
    assert (tmp_path / "mine.txt").stat().st_size == 1000
    assert len(list(tmp_path.glob("*.range"))) == 1


def test_killed_writers_leave_right_entries_and_the_limit(tmp_path: Path) -> None:
    rng = random.Random(0)
    count = 100_000
    for kill in range(4):
        process = write(tmp_path, kill * count, count)
        end = time.monotonic() + rng.uniform(0.05, 0.4)
        while time.monotonic() < end:
            assert held(tmp_path) <= LIMIT
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
        assert held(tmp_path) <= LIMIT
        # What the next one trusts, who does not count anew before it reaches the limit.
        assert int((tmp_path / LOCK).read_bytes()) >= held(tmp_path) > 0
        first = kill * count
        assert assert_right(tmp_path, range(first, first + 50_000)) > 0
        cache = RangeCache(tmp_path, LIMIT)
        for number in range(first + count - 40, first + count):
            cache.put({name_of(number): content(number)})
            assert held(tmp_path) <= LIMIT
        assert cache.get(name_of(number), len(content(number))) == content(number)
        for path in tmp_path.glob("*.range"):
            path.unlink()


def test_two_processes_share_it(tmp_path: Path) -> None:
    both = [write(tmp_path, start, 150) for start in (0, 75)]  # half of them alike
    while any(process.poll() is None for process in both):
        assert held(tmp_path) <= LIMIT
    assert [process.returncode for process in both] == [0, 0]
    assert assert_right(tmp_path, range(225)) > 3


def test_a_process_that_is_stopped_hinders_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_cache, "PATIENCE", 0.2)
    cache = RangeCache(tmp_path, LIMIT)
    name, data = name_of(1), content(1)
    with (tmp_path / LOCK).open("r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        start = time.monotonic()
        for _ in range(100):
            cache.put({name: data})  # waits once
        assert time.monotonic() - start < 10
        assert cache.get(name, len(data)) is None
    cache.put({name: data})
    assert cache.get(name, len(data)) == data


@pytest.mark.parametrize("disk", ["a file", "full", "read only"])
def test_a_disk_that_takes_nothing_is_warned_of_once(
    source: Source,
    server: RangeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    disk: str,
) -> None:
    folder = tmp_path / "cache"
    number = {"full": errno.ENOSPC, "read only": errno.EROFS}.get(disk, 0)
    if disk == "a file":
        folder.write_bytes(b"")
        folder = folder / "in it"
    else:
        opened(server, folder).head("wide")

        def refuse(self: Path, *_: Any, **__: Any) -> None:
            raise OSError(number, os.strerror(number), str(self))

        monkeypatch.setattr(Path, "rename" if disk == "full" else "unlink", refuse)
    shards = opened(server, folder)
    check_all(shards, source)
    check_all(shards, source)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"data.read.cache={folder}: nothing more is kept there (")
    if disk == "full":
        assert held(folder) == sum(path.stat().st_size for path in folder.glob("*.range"))
