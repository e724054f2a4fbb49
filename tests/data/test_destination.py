"""Shards at a URL: one process at a time, and a sentence where nothing can be put there."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import tifffile
from fsspec.implementations.memory import MemoryFileSystem
from range_server import serving

from axialtrain.cli import main
from axialtrain.data import making
from axialtrain.data.destination import LOCK, Destination
from axialtrain.data.listing import entries_of
from axialtrain.data.region import open_shards
from axialtrain.data.scratch import Scratch
from axialtrain.data.shard import make_shards, prepare, shard_images
from axialtrain.data.sharding import Sharding
from axialtrain.data.verify import verify

URL = "memory://destination/set"
HOW = Sharding()


class StoreError(Exception):
    """What a store raises is often no OSError."""


@pytest.fixture
def fs() -> Iterator[MemoryFileSystem]:
    memory = fsspec.filesystem("memory")
    yield memory
    if memory.exists("/destination"):
        memory.rm("/destination", recursive=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.full((40, 50, 3), 7, np.uint8), tile=(16, 16), photometric="rgb")
    return path


def shard(image: Path, scratch: Path, **options: Any) -> None:
    work = prepare(entries_of([image]), HOW)
    make_shards(work, URL, HOW, jobs=1, scratch=scratch, progress=False, **options)


def test_only_one_process_works_at_a_url(
    fs: MemoryFileSystem, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run, refused = making.write_run, []

    def meanwhile(*arguments: Any) -> Any:
        with pytest.raises(ValueError, match="works here, allowed is one at a time") as error:
            shard(image, tmp_path / "other")
        refused.append(str(error.value))
        return write_run(*arguments)

    monkeypatch.setattr(making, "write_run", meanwhile)
    shard(image, tmp_path / "one")
    (said,) = refused
    assert f"in {tmp_path / 'one'} on {socket.gethostname()}, process {os.getpid()}, since" in said
    assert f"delete {URL}/{LOCK}" in said
    assert not (tmp_path / "other").exists()
    assert not fs.exists(f"/destination/set/{LOCK}")
    assert verify([URL], mode="deep", progress=False).count == 0


def test_lock_of_a_killed_process_stays_until_its_work_is_gone_on_with(
    fs: MemoryFileSystem, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Destination, "_let_go", lambda *_: None)
        patch.setattr(Scratch, "finish", _killed)
        with pytest.raises(KeyboardInterrupt):
            shard(image, tmp_path / "one")
    assert fs.exists(f"/destination/set/{LOCK}")
    with pytest.raises(ValueError, match="works here, allowed is one at a time"):
        shard(image, tmp_path / "other")
    shard(image, tmp_path / "one", resume=True)
    assert not fs.exists(f"/destination/set/{LOCK}")
    assert [row.name for row in open_shards(URL).images] == ["a"]


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_of_two_that_began_at_once_the_last_one_goes_on(
    fs: MemoryFileSystem, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = MemoryFileSystem.put_file

    def overtaken(self: MemoryFileSystem, local: str, path: str, **options: Any) -> None:
        put(self, local, path, **options)
        self.pipe_file(path, b"the process elsewhere\n")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", overtaken)
        with pytest.raises(ValueError, match=f"{URL}: the process elsewhere works here"):
            shard(image, tmp_path / "one")
    assert fs.cat_file(f"/destination/set/{LOCK}") == b"the process elsewhere\n"  # not deleted


@pytest.mark.parametrize("raised", [StoreError("no credentials"), PermissionError("no")])
def test_url_that_cannot_be_written_to_is_refused_before_the_work(
    fs: MemoryFileSystem,
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
) -> None:
    def refusing(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(making, "write_run", lambda *_: pytest.fail("its work was begun"))
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", refusing)
        with pytest.raises(ValueError, match=rf"{URL}: cannot be written to \(\w+: no"):
            shard(image, tmp_path / "one")
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", lambda *_, **__: None)
        with pytest.raises(ValueError, match="cannot be written to: what was put there is not"):
            shard(image, tmp_path / "one")
    monkeypatch.setattr(MemoryFileSystem, "exists", refusing)
    with pytest.raises(ValueError, match=rf"{URL}: cannot be the folder of the shards \(\w+: no"):
        shard(image, tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_web_server_that_takes_no_files_is_refused_in_a_sentence(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scratch = tmp_path / "scratch"
    with serving(tmp_path) as server:
        assert main(["shard", str(image), "--out", server.url, "--scratch", str(scratch)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"axialtrain: {server.url}: cannot be written to (ClientResponseError: ")
    assert said.count("\n") == 1
    assert not scratch.exists()


def test_what_could_not_be_put_there_is_kept_and_gone_on_with(
    fs: MemoryFileSystem, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = MemoryFileSystem.put_file

    def failing(self: MemoryFileSystem, local: str, path: str, **options: Any) -> None:
        if path.endswith(".tar"):
            raise StoreError("503")
        put(self, local, path, **options)

    scratch = tmp_path / "one"
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", failing)
        message = (
            rf"{URL}: shard-00000\.tar cannot be put there \(StoreError: 503\); what is done is "
            rf"kept in {scratch}, go on with it by --resume"
        )
        with pytest.raises(ValueError, match=message):
            shard(image, scratch)
        with pytest.raises(ValueError, match=r"cannot be put there \(StoreError: 503\)$"):
            shard(image, tmp_path / "other", keep=False)
    assert not fs.exists(f"/destination/set/{LOCK}")
    shard(image, scratch, resume=True)
    assert verify([URL], mode="deep", progress=False).count == 0


def test_lock_that_cannot_be_deleted_is_said_and_no_failure(
    fs: MemoryFileSystem, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def refusing(*_: object) -> None:
        raise StoreError("delete")

    monkeypatch.setattr(MemoryFileSystem, "rm_file", refusing)
    shard(image, tmp_path / "one")
    monkeypatch.undo()
    assert f"{LOCK} cannot be deleted (StoreError: delete)" in caplog.text
    assert verify([URL], progress=False).count == 0


def test_folder_with_shards_of_another_run_is_refused(
    fs: MemoryFileSystem, image: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "shard-7.txt").touch()  # is no shard
    shard_images([image], out, progress=False)
    for split in ("", "train"):
        folder = tmp_path / f"stray{split}"
        (folder / split).mkdir(parents=True)
        (folder / split / "shard-00007.tar").write_text("hello")
        before = sorted(folder.rglob("*"))
        given = ["--split", "train=1"] if split else []
        assert main(["shard", str(image), "--out", str(folder), *given]) == 2
        assert sorted(folder.rglob("*")) == before
        with pytest.raises(ValueError, match=r"has a shard-00007\.tar already"):
            shard_images([image], folder / split, progress=False)
    fs.pipe_file("/destination/set/shard-00007.tar", b"hello")
    with pytest.raises(ValueError, match=r"has a shard-00007\.tar already, allowed is a new or an"):
        shard(image, tmp_path / "one")
    assert not (tmp_path / "one").exists()
