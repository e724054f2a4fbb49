from __future__ import annotations

import json
import threading
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded import loader_of

from axialtrain.data.batch import Batch
from axialtrain.data.config import DataConfig
from axialtrain.data.loader import Loader, Steps, default_workers
from axialtrain.data.order import OrderState
from axialtrain.data.painting import Region
from axialtrain.data.region import Shards
from axialtrain.data.shard import shard_images
from axialtrain.data.store import UNLABELLED
from axialtrain.grid import Layout, Rect

if TYPE_CHECKING:
    from conftest import Source


def loader(source: Source, window: list[int] | None = None, **changes: Any) -> Loader:
    config = DataConfig(source.url, window=window, **changes.pop("config", {}))
    return loader_of(config, **{"batch": 2, **changes})


CLASSES = {"wide": 3, "small": 0, "tall": 65535}


@pytest.fixture(scope="module")
def classed(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The images of `source` without label rasters, each with a class of its own."""
    out = tmp_path_factory.mktemp("classed") / "shards"
    images = [Path(source.url).parent / f"{name}.tif" for name in CLASSES]
    shard_images(images, out, image_labels=list(CLASSES.values()), progress=False)
    return replace(source, url=str(out))


def test_batch_is_the_image_normalised(source: Source) -> None:
    one = loader(source, config={"mean": 0.4, "std": 0.2})
    batch = next(one.once())
    assert batch.ids == ("wide@0,0",)
    assert (batch.place.height, batch.place.width) == (13, 19)
    assert batch.place.layout is Layout.TILE
    assert batch.pixels.shape == (1, 208, 304, 3)
    assert batch.pixels.dtype == torch.float32
    expected = (source.pixels["wide"] / 255 - 0.4) / 0.2
    np.testing.assert_allclose(batch.pixels[0, :200, :300], expected, atol=1e-6)
    assert not batch.pixels[0, 200:].any()
    assert not batch.pixels[0, :, 300:].any()
    assert batch.labels is not None
    assert batch.labels.dtype == torch.uint8
    np.testing.assert_array_equal(batch.labels[0, :200, :300], source.labels["wide"])
    assert (batch.labels[0, 200:] == UNLABELLED).all()
    assert batch.present[0, :200, :300].all()
    assert batch.present.sum() == 200 * 300
    assert batch.valid.all()
    assert batch.weight.tolist() == [1.0]
    assert batch.samples.dtype == torch.int64


def test_targets_are_the_classes_of_the_images(classed: Source, source: Source) -> None:
    from axialtrain.train.loop import to_device

    batch = next(loader(classed, micro_batch=3, batch=3).once())
    assert batch.targets is not None
    assert batch.targets.dtype == torch.int64
    assert batch.targets.tolist() == [3, 0, 65535]
    assert batch.labels is None
    moved = to_device(batch, torch.device("meta")).targets
    assert moved is not None
    assert moved.is_meta
    without = next(loader(source).once())
    assert without.targets is None
    assert to_device(without, torch.device("meta")).targets is None


@pytest.mark.parametrize(("data_ranks", "mesh_shape"), [(1, (2, 1)), (2, (1, 1)), (3, (1, 2))])
def test_targets_go_with_their_samples_on_all_ranks(
    classed: Source, data_ranks: int, mesh_shape: tuple[int, int]
) -> None:
    """batch 5 in micro-batches of 2: every number of data ranks makes fillers."""
    fillers = 0
    taken_samples = {}
    for data_rank in range(data_ranks):
        for at in np.ndindex(mesh_shape):
            one = loader(
                classed, [100, 90], batch=5, micro_batch=2, mesh_shape=mesh_shape, at=at,
                data_rank=data_rank, data_ranks=data_ranks,
            )  # fmt: skip
            batches = [batch for step in one.steps(2, 4) for batch in step] + list(one.once())
            for batch in batches:
                assert batch.targets is not None
                names = [id.split("@")[0] for id in batch.ids]
                assert batch.targets.tolist() == [CLASSES[name] for name in names]
                fillers += int((batch.weight == 0).sum())
            for batch in batches[: 2 * one.accumulation]:
                assert batch.targets is not None
                for sample, target in zip(batch.samples, batch.targets, strict=True):
                    assert taken_samples.setdefault(int(sample), int(target)) == target
    assert fillers > 0
    assert sorted(taken_samples) == list(range(10, 20))


def test_smaller_samples_are_padded_with_invalid_tokens(source: Source) -> None:
    batch = next(loader(source, micro_batch=3, batch=3).once())
    assert (batch.place.height, batch.place.width) == (17, 19)  # of tall and of wide
    for i, (height, width) in enumerate([(13, 19), (5, 4), (17, 7)]):
        assert batch.valid[i, :height, :width].all()
        assert batch.valid[i].sum() == height * width
        assert not batch.pixels[i][~batch.present[i]].any()
        assert batch.labels is not None
        assert (batch.labels[i][~batch.present[i]] == UNLABELLED).all()


def test_pixels_behind_the_window_are_not_read(source: Source) -> None:
    """A window of 40 px under patches of 16: the third token has 8 px, though the image goes on."""
    batch = next(loader(source, [40, 40]).once())
    assert batch.pixels.shape == (1, 48, 48, 3)
    assert batch.present.sum() == 40 * 40
    assert batch.valid.all()


def join(parts: dict[tuple[int, int], Batch], field: str) -> torch.Tensor:
    """The tensors of the ranks of one mesh, put together."""
    rows = [
        torch.cat([getattr(parts[r, c], field) for c in sorted({c for _, c in parts})], dim=2)
        for r in sorted({r for r, _ in parts})
    ]
    return torch.cat(rows, dim=1)


@settings(max_examples=15, deadline=None)
@given(
    window=st.none() | st.tuples(st.integers(33, 140), st.integers(33, 140)),
    patch=st.sampled_from([5, 8, 11]),
    rows=st.integers(1, 3),
    cols=st.integers(1, 3),
    data_ranks=st.integers(1, 3),
    batch=st.integers(1, 5),
    micro_batch=st.integers(1, 2),
    seed=st.integers(0, 100),
)
def test_union_of_ranks_is_the_serial_read(
    source: Source,
    window: tuple[int, int] | None,
    patch: int,
    rows: int,
    cols: int,
    data_ranks: int,
    batch: int,
    micro_batch: int,
    seed: int,
) -> None:
    size = None if window is None else list(window)
    serial = loader(source, size, patch=patch, batch=batch, seed=seed)
    samples = {}
    for step in serial.steps(3, 5):
        for one in step:
            samples[int(one.samples[0])] = one
    assert sorted(samples) == list(range(3 * batch, 5 * batch))

    ranks = {
        (d, r, c): taken(
            loader(
                source, size, patch=patch, batch=batch, micro_batch=micro_batch, seed=seed,
                mesh_shape=(rows, cols), at=(r, c), data_rank=d, data_ranks=data_ranks,
            ).steps(3, 5)
        )
        for d in range(data_ranks) for r in range(rows) for c in range(cols)
    }  # fmt: skip
    seen = []
    accumulation = -(-batch // (micro_batch * data_ranks))
    for step in range(2):
        for a in range(accumulation):
            for d in range(data_ranks):
                parts = {(r, c): ranks[d, r, c][step][a] for r in range(rows) for c in range(cols)}
                first = parts[0, 0]
                joined = {f: join(parts, f) for f in ("pixels", "labels", "present", "valid")}
                for b in range(micro_batch):
                    if not first.weight[b]:
                        assert not joined["valid"][b].any()
                        assert not joined["pixels"][b].any()
                        continue
                    sample = int(first.samples[b])
                    seen.append(sample)
                    expected = samples[sample]
                    assert all(part.ids[b] == expected.ids[0] for part in parts.values())
                    for field, whole in joined.items():
                        want = getattr(expected, field)[0]
                        height, width = want.shape[:2]
                        assert torch.equal(whole[b][:height, :width], want), field
                        # What pads it to the size of the largest of the micro-batch is missing.
                        missing = UNLABELLED if field == "labels" else 0
                        assert (whole[b][height:] == missing).all(), field
                        assert (whole[b][:, width:] == missing).all(), field
    assert sorted(seen) == sorted(samples)


def test_positions_follow_accumulation_data_rank_and_slot(source: Source) -> None:
    """batch 7 over 2 data ranks of 2: position j = (a * 2 + d) * 2 + b, and j = 7 is a filler."""
    for d in range(2):
        rank = loader(source, [70, 50], batch=7, micro_batch=2, data_rank=d, data_ranks=2)
        assert rank.accumulation == 2
        ((first, second),) = taken(rank.steps(5, 6))
        base = 5 * 7
        if d == 0:
            assert first.samples.tolist() == [base, base + 1]
            assert second.samples.tolist() == [base + 4, base + 5]
            assert second.weight.tolist() == [1.0, 1.0]
        else:
            assert first.samples.tolist() == [base + 2, base + 3]
            assert second.samples.tolist() == [base + 6, base + 0]
            assert second.weight.tolist() == [1.0, 0.0]
            assert not second.valid[1].any()
            assert not second.present[1].any()
            assert second.labels is not None
            assert (second.labels[1] == UNLABELLED).all()
            assert second.ids[1] == rank.windows[rank.order[base]].id


@pytest.mark.parametrize("data_ranks", [1, 2, 3, 5])
def test_validation_pass_has_equal_length_on_all_ranks(source: Source, data_ranks: int) -> None:
    passes = [
        list(
            loader(
                source, [64, 64], batch=1, micro_batch=2, data_rank=d, data_ranks=data_ranks
            ).once()
        )
        for d in range(data_ranks)
    ]
    windows = loader(source, [64, 64]).windows
    expected = -(-len(windows) // (2 * data_ranks))
    assert [len(p) for p in passes] == [expected] * data_ranks
    ids = [
        batch.ids[b]
        for k in range(expected)
        for batch in (p[k] for p in passes)
        for b in range(2)
        if batch.weight[b]
    ]
    assert ids == [window.id for window in windows]  # each once, in plain order


def test_a_rank_reads_only_its_part(source: Source) -> None:
    whole = loader(source)
    list(whole.once())
    parts = [loader(source, mesh_shape=(2, 2), at=(r, c)) for r in range(2) for c in range(2)]
    for part in parts:
        list(part.once())
        assert 0 < part.tiles_decoded < 0.4 * whole.tiles_decoded
        assert 0 < part.bytes_read <= whole.bytes_read
    # Patches are as large as the tiles here, so no tile is decoded by two ranks.
    assert sum(part.tiles_decoded for part in parts) == whole.tiles_decoded
    assert whole.tiles_decoded == 13 * 19 + 5 * 4 + 17 * 7


def test_number_of_workers_changes_nothing(source: Source) -> None:
    streams = [
        taken(loader(source, [64, 64], batch=3, config={"workers": w, "prefetch": p}).steps(0, 4))
        for w, p in ((1, 0), (1, 2), (3, 5))
    ]
    for other in streams[1:]:
        for got, want in zip(other, streams[0], strict=True):
            for a, b in zip(got, want, strict=True):
                assert a.ids == b.ids
                assert torch.equal(a.pixels, b.pixels)


def taken(steps: Steps) -> list[list[Batch]]:
    return [list(step) for step in steps]


def workers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("axialtrain-data")]


def test_prefetch_is_bounded_and_ends_with_the_iterator(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    region = Shards.region

    def counted(self: Shards, name: str, rect: Rect, *, spare: bool) -> Region:
        read.append(name)
        return region(self, name, rect, spare=spare)

    monkeypatch.setattr(Shards, "region", counted)
    steps = loader(source, [64, 64], batch=1, config={"prefetch": 2}).steps(0, 1000)
    for _ in next(steps):
        pass
    steps.close()
    assert 1 <= len(read) <= 3
    assert workers() == []


def test_micro_batches_of_a_step_are_read_as_they_are_taken(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    load = Loader._load

    def counted(self: Loader, slots: list[Any]) -> tuple[Batch, int, int]:
        read.append(slots)
        return load(self, slots)

    monkeypatch.setattr(Loader, "_load", counted)
    steps = loader(source, [64, 64], batch=40, config={"prefetch": 2}).steps(0, 2)
    step = next(steps)
    assert read == []
    for number in range(1, 41):
        next(step)
        assert number <= len(read) <= number + 2
    assert list(step) == []
    assert [int(batch.samples[0]) for batch in next(steps)] == list(range(40, 80))
    assert list(steps) == []
    assert workers() == []


def test_steps_are_taken_in_order(source: Source) -> None:
    steps = loader(source, [64, 64], batch=3).steps(0, 2)
    step = next(steps)
    next(step)
    with pytest.raises(RuntimeError, match="2 micro-batches of the step before are not taken"):
        next(steps)
    assert len(list(step)) == 2
    assert len(list(next(steps))) == 3


def test_step_outlives_its_steps_and_ends_its_threads(source: Source) -> None:
    step = next(loader(source, [64, 64], batch=3).steps(0, 5))
    assert len(list(step)) == 3
    del step
    assert workers() == []


def test_workers_are_chosen_by_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert default_workers(2) == 3  # no more than can be read ahead
    assert default_workers(99) == 15
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert default_workers(99) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert default_workers(99) == 1


def test_batches_for_a_gpu_are_pinned(numbered: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []

    def pin(x: torch.Tensor) -> torch.Tensor:
        pinned.append(x)
        return x.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = next(loader(numbered, pin=True, config={"prefetch": 0}).once())
    assert [x.dtype for x in pinned] == [
        torch.float32, torch.uint8, torch.bool, torch.bool, torch.float32, torch.int32
    ]  # fmt: skip
    assert torch.equal(batch.pixels, next(loader(numbered).once()).pixels)
    assert len(pinned) == 6


def test_error_in_a_thread_reaches_the_consumer(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    region = Shards.region

    def failing(self: Shards, name: str, rect: Rect, *, spare: bool) -> Region:
        calls.append(name)
        if len(calls) == 3:
            raise ValueError("shard: byte 7: is damaged")
        return region(self, name, rect, spare=spare)

    monkeypatch.setattr(Shards, "region", failing)
    got = []
    with pytest.raises(ValueError, match="byte 7: is damaged"):
        for step in loader(source, [64, 64], batch=1).steps(0, 10):
            got.extend(step)
    assert len(got) == 2
    assert workers() == []


def test_grid_smaller_than_the_mesh_is_refused_at_once(source: Source) -> None:
    for at in ((0, 0), (5, 0)):
        with pytest.raises(ValueError, match=r"data\.window: sample small@0,0: a grid of 5 x 4"):
            loader(source, mesh_shape=(6, 1), at=at)


@pytest.mark.parametrize("window", [None, [1 << 20, 1 << 20]])
def test_image_beyond_all_memory_is_refused_at_once(
    source: Source, tmp_path: Path, window: list[int] | None
) -> None:
    data = json.loads((Path(source.url) / "manifest.json").read_bytes())
    data["images"][1] |= {"height": 1 << 20, "width": 1 << 20}
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    hostile = replace(source, url=str(tmp_path))
    message = r"data\.window is (null|\[1048576, 1048576\]): 4 micro-batches .* mesh row=1 col=2 "
    for at in ((0, 0), (0, 1)):
        with pytest.raises(ValueError, match=message + r"take up to 30786\.326 GB, allowed are"):
            loader(hostile, window, mesh_shape=(1, 2), at=at)


@pytest.mark.parametrize(("window", "micro_batch"), [(None, 1), (None, 2), ([90, 120], 2)])
@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 3)])
def test_memory_is_judged_alike_on_all_ranks_by_the_largest_part(
    source: Source,
    monkeypatch: pytest.MonkeyPatch,
    window: list[int] | None,
    micro_batch: int,
    mesh_shape: tuple[int, int],
) -> None:
    rows, cols = mesh_shape
    options: dict[str, Any] = {
        "micro_batch": micro_batch, "mesh_shape": mesh_shape, "config": {"prefetch": 1}
    }  # fmt: skip
    places = [(row, col) for row in range(rows) for col in range(cols)]
    largest = 0
    for at in places:
        for step in loader(source, window, at=at, batch=micro_batch, **deepcopy(options)).steps(
            0, 9
        ):
            for batch in step:
                parts = (batch.pixels, batch.labels, batch.present)
                largest = max(largest, sum(part.nbytes for part in parts if part is not None))
    for at in places:
        monkeypatch.setattr("axialtrain.data.loader.memory_bytes", lambda: 3 * largest)
        loader(source, window, at=at, **deepcopy(options))
        monkeypatch.setattr("axialtrain.data.loader.memory_bytes", lambda: 3 * largest - 1)
        with pytest.raises(ValueError, match=r"3 micro-batches .* of this machine's memory"):
            loader(source, window, at=at, **deepcopy(options))


def test_run_goes_on_where_it_stood(source: Source) -> None:
    one = loader(source, [64, 64], batch=3)
    state = OrderState.from_json(one.state(5).to_json())
    assert state.next_index == 15
    assert one.resume(state) == 5
    with pytest.raises(ValueError, match=r"data\.shards is not what the saved run read"):
        one.resume(replace(state, manifest="0" * 64))
    with pytest.raises(ValueError, match="seed is 7, allowed is the saved run's 8"):
        one.resume(replace(state, seed=8))
    with pytest.raises(ValueError, match=r"train\.batch is 4"):
        loader(source, [64, 64], batch=4).resume(state)
