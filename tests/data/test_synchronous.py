"""File systems of fsspec without asyncio: one that stalls hinders no try and no process."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from fsspec.implementations.local import LocalFileSystem

from axialtrain.data.passing import DeniedError
from axialtrain.data.reading import ByteSource, ReadConfig

if TYPE_CHECKING:
    from conftest import Source

STALLING = """
import sys, time
import fsspec
from fsspec.implementations.local import LocalFileSystem
from axialtrain.data.passing import UnreachableError
from axialtrain.data.reading import ReadConfig
from axialtrain.data.region import open_shards

class Stalling(LocalFileSystem):
    protocol = "stalling"
    def cat_file(self, path, start=None, end=None, **options):
        if path.endswith(".tar"):
            time.sleep(3600)
        return super().cat_file(path, start, end, **options)

fsspec.register_implementation("stalling", Stalling)
shards = open_shards("stalling://" + sys.argv[1], ReadConfig(timeout=1.0, retries=1, backoff=0.0))
try:
    shards.read("small", 0, 0, 70, 50)
except UnreachableError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_file_system_without_asyncio_that_stalls_hinders_no_process_from_ending(
    source: Source,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STALLING, source.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "in 2 tries (no whole answer within 1 s)" in done.stdout


class Stalling(LocalFileSystem):
    """Each that was made stands still in the first thing that it is asked, if it is one of the
    first `stalled`."""

    protocol = "stalls"
    stalled = 0
    go_on = threading.Event()
    made: ClassVar[list[Stalling]] = []

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.asked = self.most = self.now = 0
        self.made.append(self)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **options: Any
    ) -> bytes:
        self.asked += 1
        self.now += 1
        self.most = max(self.most, self.now)
        if any(self is one for one in self.made[: self.stalled]):  # all are equal
            assert self.go_on.wait(60)
        self.now -= 1
        return bytes(super().cat_file(path, start, end, **options))


@pytest.mark.slow
def test_a_file_system_that_stalls_is_left_to_its_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without asyncio it need not be safe to be asked twice at a time."""
    monkeypatch.setattr(Stalling, "made", [])
    monkeypatch.setattr(Stalling, "stalled", 2)
    path = tmp_path / "numbers"
    path.write_bytes(bytes(range(200)))
    source = ByteSource(
        Stalling(skip_instance_cache=True), ReadConfig(timeout=1.0, retries=2, backoff=0.0)
    )
    try:
        got = source.fetch(str(path), [(3, 9), (20, 25)])
        assert got == [bytes(range(3, 9)), bytes(range(20, 25))]
        assert [fs.asked for fs in Stalling.made] == [1, 1, 2]
        assert [fs.most for fs in Stalling.made] == [1, 1, 1]
    finally:
        Stalling.go_on.set()


@pytest.mark.parametrize("error", [SystemExit(3), StopIteration(), CancelledError()])
def test_whatever_a_file_system_raises_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def raising(*arguments: Any, **options: Any) -> bytes:
        raise error

    monkeypatch.setattr(Stalling, "cat_file", raising)
    fs = Stalling(skip_instance_cache=True)
    with pytest.raises(DeniedError, match=r"bytes 0 to 5: cannot be read \("):
        ByteSource(fs, ReadConfig(retries=0)).fetch(str(tmp_path / "x"), [(0, 5)])
