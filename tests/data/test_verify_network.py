"""`verify` of a URL: what passes is asked for again, as readers do, and what stays is a fault."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import pytest
from range_server import RangeServer, serving

from axialtrain.cli import main
from axialtrain.data import check_shard
from axialtrain.data import verify as verify_module
from axialtrain.data.reading import ReadConfig
from axialtrain.data.verify import MODES, Report, verify

if TYPE_CHECKING:
    from conftest import Source


@pytest.fixture
def server(source: Source, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setattr(verify_module, "READ", ReadConfig(retries=2, backoff=0.0, timeout=5.0))
    with serving(source.url) as server:
        yield server


def check(server: RangeServer, mode: str = "full") -> Report:
    return verify([server.url], mode=mode, jobs=2, progress=False)


@pytest.mark.parametrize(
    ("mode", "fault"),
    [*((mode, 503) for mode in MODES), *(("full", what) for what in ("reset", "cut", "short"))],
)
def test_what_passes_is_no_fault(server: RangeServer, mode: str, fault: int | str) -> None:
    server.once["GET", "tar"] = [fault, fault]
    assert check(server, mode).faults == []
    assert server.once["GET", "tar"] == []  # they came


def test_bytes_that_came_wrong_are_fetched_once_more(server: RangeServer) -> None:
    assert check(server).faults == []
    first = server.ranges()
    server.asked.clear()
    # One after the other; the last are the end of the archive, which has no checksum.
    server.once["GET", "tar"] = ["wrong", 200] * (len(first) - 1)
    assert check(server).faults == []
    starts = [start for start, _ in server.ranges()]  # of the blocks only those that were wrong
    assert starts == [start for start, _ in first[:-1] for _ in range(2)] + [first[-1][0]]
    server.always["GET", "tar"] = "wrong"
    assert len({fault.image for fault in check(server).faults}) == 4  # all three, and the end


@pytest.mark.parametrize("mode", MODES)
def test_what_stays_away_is_a_fault_with_its_place(
    server: RangeServer, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.once["GET", "tar"] = [200, 200]
    server.always["GET", "tar"] = 503
    assert main(["verify", f"--{mode}", server.url]) == 1
    out = capsys.readouterr().out
    assert f"{server.url}/shard-00000.tar: cannot be read (bytes " in out
    assert "not to be had in 3 tries" in out
    assert "verify again" in out


def test_shard_that_became_shorter_is_a_fault(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "shard-00000.tar"
    whole = server.folder
    (tmp_path / "manifest.json").write_bytes((whole / "manifest.json").read_bytes())
    cut.write_bytes((whole / "shard-00000.tar").read_bytes())
    server.folder = tmp_path
    measure = check_shard.ShardCheck.measure

    def measured(self: check_shard.ShardCheck) -> int:
        size = measure(self)
        cut.write_bytes(b"")
        return size

    monkeypatch.setattr(check_shard.ShardCheck, "measure", measured)
    (fault,) = check(server).faults
    assert fault.shard == "shard-00000.tar"
    assert "cannot be read" in fault.what


def test_blocks_are_asked_for_in_bounded_runs(
    server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(server)
    largest = max(stop - start for start, stop in server.ranges())
    server.asked.clear()
    monkeypatch.setattr(check_shard, "_AT_ONCE", largest // 2)
    assert check(server).faults == []
    assert max(stop - start for start, stop in server.ranges()) < largest


def test_folder_that_cannot_be_listed_hides_no_other_fault(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    for path in Path(source.url).iterdir():
        memory.pipe_file(f"/unlisted/{path.name}", path.read_bytes())
    memory.pipe_file("/unlisted/shard-00000.tar", memory.cat_file("/unlisted/shard-00000.tar") * 2)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError("who may read need not be allowed to list")

    try:
        monkeypatch.setattr(type(memory), "ls", refused)
        first, *others = verify(["memory://unlisted"], mode="quick", progress=False).faults
    finally:
        monkeypatch.undo()
        memory.rm("/unlisted", recursive=True)
    assert first.shard == "shard-00000.tar"
    assert "cannot be listed (PermissionError: who may read" in others[-1].what
