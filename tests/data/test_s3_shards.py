"""Shards on an S3-compatible server on loopback: the batches of local files, until it goes away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import numpy as np
import pytest
import tifffile
import torch
from s3_server import Server, s3_server

from axialtrain.data.batch import Batch
from axialtrain.data.config import DataConfig
from axialtrain.data.destination import LOCK
from axialtrain.data.listing import entries_of
from axialtrain.data.loader import Loader
from axialtrain.data.passing import UnreachableError
from axialtrain.data.reading import ReadConfig
from axialtrain.data.region import open_shards
from axialtrain.data.shard import make_shards, prepare
from axialtrain.data.sharding import Sharding
from axialtrain.data.verify import verify

if TYPE_CHECKING:
    from conftest import Source

pytestmark = pytest.mark.slow

URL = "s3://bucket/shards"


@pytest.fixture
def server(source: Source, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with s3_server(monkeypatch) as server:
        fs = fsspec.filesystem("s3")
        for path in Path(source.url).iterdir():
            if path.is_file():
                fs.pipe_file(f"bucket/shards/{path.name}", path.read_bytes())
        yield server


def loader(url: str, read: ReadConfig, at: tuple[int, int] = (0, 0)) -> Loader:
    config = DataConfig(url, window=[64, 96], workers=2, read=read)
    return Loader(
        open_shards(url, config.read), config, patch=16, mesh_shape=(1, 2), at=at, data_rank=0,
        data_ranks=1, batch=2, micro_batch=2, seed=3,
    )  # fmt: skip


def batches(loader: Loader, steps: int) -> list[Batch]:
    return [batch for step in loader.steps(0, steps) for batch in step]


def assert_alike(got: list[Batch], expected: list[Batch]) -> None:
    assert [batch.ids for batch in got] == [batch.ids for batch in expected]
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.present, other.present)
        assert one.labels is not None
        assert other.labels is not None
        assert torch.equal(one.labels, other.labels)


def test_a_loader_reads_what_it_reads_of_local_files(
    source: Source, server: Server, tmp_path: Path
) -> None:
    """Of both ranks of a mesh; then what is in the cache after the server has gone, and no more."""
    read = ReadConfig(retries=1, backoff=0.01, cache=str(tmp_path / "cache"))
    for at in ((0, 0), (0, 1)):
        expected = batches(loader(source.url, read, at), 9)
        assert_alike(batches(loader(URL, read, at), 9), expected)
    warm = loader(URL, read)
    first = batches(warm, 1)
    server.stop()
    assert_alike(batches(warm, 9), batches(loader(source.url, read), 9))
    assert_alike(first, batches(loader(source.url, read), 1))
    with pytest.raises(
        UnreachableError, match=r"bucket/shards/manifest\.json: its size: not to be"
    ):
        open_shards(URL, read)


def test_a_server_that_goes_away(server: Server) -> None:
    read = ReadConfig(retries=2, backoff=0.01, timeout=30)
    steps = iter(loader(URL, read).steps(0, 100))
    (batch,) = next(steps)
    assert batch.present.any()
    server.stop()
    start = time.monotonic()
    with pytest.raises(UnreachableError, match=r"in 3 tries \(") as raised:
        for step in steps:
            list(step)
    assert raised.value.path == "bucket/shards/shard-00000.tar"
    assert time.monotonic() - start < 120


def test_a_bucket_that_is_not_there_is_no_passing_fault(server: Server) -> None:
    with pytest.raises(ValueError, match=r"^s3://none/shards: no shards here"):
        open_shards("s3://none/shards", ReadConfig(retries=3, backoff=60.0))


def test_one_process_at_a_time_shards_to_a_bucket(server: Server, tmp_path: Path) -> None:
    image, out = tmp_path / "a.tif", "s3://bucket/made"
    tifffile.imwrite(image, np.full((40, 50, 3), 7, np.uint8), tile=(16, 16), photometric="rgb")
    how = Sharding()
    work = prepare(entries_of([image]), how)
    store = fsspec.filesystem("s3")
    store.pipe_file(f"bucket/made/{LOCK}", b"the process elsewhere\n")
    with pytest.raises(ValueError, match="the process elsewhere works here, allowed is one at a"):
        make_shards(work, out, how, scratch=tmp_path / "scratch", progress=False)
    store.rm_file(f"bucket/made/{LOCK}")
    make_shards(work, out, how, scratch=tmp_path / "scratch", progress=False)
    store.invalidate_cache()
    assert not store.exists(f"bucket/made/{LOCK}")
    assert verify([out], mode="deep", progress=False).count == 0
    nowhere = "s3://no-such-bucket/made"
    with pytest.raises(ValueError, match=f"{nowhere}: cannot be written to"):
        make_shards(work, nowhere, how, scratch=tmp_path / "other", progress=False)
