"""Augmented batches: the ranks' parts together are what one process reads and changes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from axialtrain.data.augment import AugmentConfig, draw
from axialtrain.data.batch import Batch
from axialtrain.data.config import DataConfig
from axialtrain.data.loader import Loader
from axialtrain.data.order import OrderState
from axialtrain.data.painting import Region
from axialtrain.data.region import Shards, open_shards
from axialtrain.data.turns import Turn
from axialtrain.grid import Rect

if TYPE_CHECKING:
    from conftest import Source

FIELDS = ("pixels", "labels", "instances", "present", "valid")
TURNED = {"vertical_flip": True, "horizontal_flip": True, "quarter_turns": True}
ALL = {
    **TURNED, "brightness": 0.2, "contrast": 0.3, "saturation": 0.4, "hue": 0.1, "hed": 0.1,
    "hed_bias": 0.02, "noise": 0.1,
}  # fmt: skip


def loader(
    source: Source, augment: dict[str, Any], window: list[int] | None = None, **changes: Any
) -> Loader:
    options: dict[str, Any] = {
        "patch": 16, "mesh_shape": (1, 1), "at": (0, 0), "data_rank": 0, "data_ranks": 1,
        "batch": 2, "micro_batch": 1, "seed": 7,
    }  # fmt: skip
    of_data = {key: changes.pop(key) for key in [*changes] if key not in options}
    config = DataConfig(source.url, window=window, augment=AugmentConfig(**augment), **of_data)
    return Loader(open_shards(source.url), config, **{**options, **changes})


def batches_of(one: Loader, first: int, last: int) -> list[Batch]:
    return [batch for step in one.steps(first, last) for batch in step]


def samples_of(one: Loader, first: int, last: int) -> dict[int, dict[str, torch.Tensor]]:
    """The tensors of each sample of a whole picture, by number; of micro-batches of one."""
    return {
        int(batch.samples[0]): {field: getattr(batch, field)[0] for field in FIELDS}
        for batch in batches_of(one, first, last)
    }


def cut_and_turned(stored: np.ndarray, rect: Rect, turn: Turn, missing: int) -> np.ndarray:
    """`rect` of `stored`, which may reach outside of it, turned by numpy."""
    array = np.full((rect.height, rect.width, *stored.shape[2:]), missing, stored.dtype)
    cut = stored[rect.top : rect.bottom, rect.left : rect.right]
    array[: cut.shape[0], : cut.shape[1]] = cut
    return np.rot90(np.fliplr(array) if turn.mirrored else array, turn.quarters)


def tiles_under(rect: Rect, image: np.ndarray) -> int:
    """Tiles of 16 px of `image` that `rect` touches."""
    inside = rect.intersect(Rect(0, image.shape[0], 0, image.shape[1]))
    rows = range(inside.top // 16, -(-inside.bottom // 16))
    return len(rows) * len(range(inside.left // 16, -(-inside.right // 16)))


@settings(max_examples=8, deadline=None)
@given(
    window=st.none() | st.tuples(st.integers(33, 120), st.integers(33, 120)),
    patch=st.sampled_from([5, 8, 11]),
    mesh=st.sampled_from([(1, 2), (2, 1), (2, 3), (3, 2)]),
    data_ranks=st.integers(1, 2),
    micro_batch=st.integers(1, 2),
    shift=st.integers(0, 30),
    off=st.sets(st.sampled_from(sorted(ALL))),
    seed=st.integers(0, 100),
)
def test_union_of_ranks_is_the_serial_sample(
    numbered: Source,
    window: tuple[int, int] | None,
    patch: int,
    mesh: tuple[int, int],
    data_ranks: int,
    micro_batch: int,
    shift: int,
    off: set[str],
    seed: int,
) -> None:
    augment = {key: value for key, value in ALL.items() if key not in off}
    augment |= {} if window is None else {"shift": shift}
    size, batch = None if window is None else list(window), 3
    options: dict[str, Any] = {"patch": patch, "batch": batch, "seed": seed}
    serial = samples_of(loader(numbered, augment, size, **options), 4, 5)
    assert sorted(serial) == [12, 13, 14]
    seen = []
    for data_rank in range(data_ranks):
        ranks = {
            at: batches_of(
                loader(
                    numbered, augment, size, mesh_shape=mesh, at=at, data_rank=data_rank,
                    data_ranks=data_ranks, micro_batch=micro_batch, workers=2, prefetch=1,
                    **options,
                ), 4, 5
            )
            for at in np.ndindex(mesh)
        }  # fmt: skip
        for number, first in enumerate(ranks[0, 0]):
            parts = [[ranks[r, c][number] for c in range(mesh[1])] for r in range(mesh[0])]
            for i, sample in enumerate(first.samples.tolist()):
                whole = {
                    field: torch.cat(
                        [torch.cat([getattr(p, field)[i] for p in row], 1) for row in parts]
                    )
                    for field in FIELDS
                }
                if not first.weight[i]:
                    assert not whole["present"].any()
                    continue
                seen.append(sample)
                for field, want in serial[sample].items():
                    height, width = want.shape[:2]
                    assert torch.equal(whole[field][:height, :width], want), field
                    rest = whole[field].clone()
                    rest[:height, :width] = 255 if field == "labels" else 0
                    assert (rest == (255 if field == "labels" else 0)).all(), field
    assert sorted(seen) == sorted(serial)


@pytest.mark.parametrize("window", [None, [60, 60], [40, 90], [310, 64]])
def test_a_sample_is_its_rectangle_turned(numbered: Source, window: list[int] | None) -> None:
    """Against numpy, on the pixels that were stored."""
    augment = {**TURNED, "shift": 0 if window is None else 20}
    one = loader(numbered, augment, window, patch=10, batch=1, mean=0.0, std=1.0)
    turns, moved = set(), 0
    for batch in batches_of(one, 0, 24):
        sample = int(batch.samples[0])
        picked, drawn = one.windows[one.order[sample]], draw(one.config.augment, 7, sample)
        turns.add(drawn.turn)
        assert batch.ids == (picked.id,)
        image = numbered.pixels[picked.name]
        rect = picked.rect
        if window is not None:
            height, width = window[::-1] if drawn.turn.quarters % 2 else window
            top = rect.top + (rect.height - height) // 2 + drawn.down
            left = rect.left + (rect.width - width) // 2 + drawn.right
            top = min(max(top, 0), max(image.shape[0] - height, 0))
            left = min(max(left, 0), max(image.shape[1] - width, 0))
            rect = Rect(top, top + height, left, left + width)
            moved += rect != picked.rect
        want = cut_and_turned(image, rect, drawn.turn, 0)
        height, width = want.shape[:2]
        if window is not None:
            assert [height, width] == window
        assert (batch.place.height, batch.place.width) == (-(-height // 10), -(-width // 10))
        shown = (0, slice(height), slice(width))
        np.testing.assert_array_equal(batch.pixels[shown], (want / 255).astype(np.float32))
        assert batch.labels is not None
        assert batch.instances is not None
        np.testing.assert_array_equal(
            batch.labels[shown], cut_and_turned(numbered.labels[picked.name], rect, drawn.turn, 255)
        )
        np.testing.assert_array_equal(
            batch.instances[shown],
            cut_and_turned(numbered.instances[picked.name], rect, drawn.turn, 0),
        )
        here = cut_and_turned(np.ones(image.shape[:2], bool), rect, drawn.turn, False)
        np.testing.assert_array_equal(batch.present[shown], here)
    assert len(turns) >= 6
    assert window is None or moved > 8


@pytest.mark.parametrize("window", [None, [96, 128]])
def test_each_rank_reads_its_own_rectangle_and_no_more(
    source: Source, monkeypatch: pytest.MonkeyPatch, window: list[int] | None
) -> None:
    read: list[tuple[str, Rect]] = []
    region = Shards.region

    def noted(self: Shards, name: str, rect: Rect, *, spare: bool = False) -> Region:
        read.append((name, rect))
        return region(self, name, rect, spare=spare)

    monkeypatch.setattr(Shards, "region", noted)
    augment = {**ALL, "shift": 0 if window is None else 16}
    batches_of(loader(source, augment, window), 0, 3)
    wholes, read[:] = read[:], []
    assert len(wholes) == 6
    plain = loader(source, {}, window)
    assert any((w.name, w.rect) in wholes for w in plain.windows) == (window is None)
    parts = []
    for at in np.ndindex(2, 3):
        one = loader(source, augment, window, mesh_shape=(2, 3), at=at)
        batches_of(one, 0, 3)
        parts.append(read[:])
        read.clear()
        tiles = sum(tiles_under(rect, source.pixels[name]) for name, rect in parts[-1])
        assert one.tiles_decoded == tiles
    for number, (name, whole) in enumerate(wholes):
        count = np.zeros((whole.height, whole.width), int)
        for rank in parts:
            assert rank[number][0] == name
            assert rank[number][1].intersect(whole) == rank[number][1]
            count[rank[number][1].slices(whole)] += 1
        assert (count == 1).all()


def test_missing_pixels_turn_with_the_others(masked: Source) -> None:
    """280 x 300 px with holes: every turn of it, and noise that stays off the holes."""
    augment = {**TURNED, "noise": 0.5}
    one = loader(masked, augment, patch=20, batch=1)
    plain = next(loader(masked, {}, patch=20).once())
    seen = set()
    for batch in batches_of(one, 0, 12):
        turn = draw(one.config.augment, 7, int(batch.samples[0])).turn
        seen.add(turn)
        np.testing.assert_array_equal(batch.present[0], turn.apply(plain.present[0].numpy()))
        np.testing.assert_array_equal(batch.valid[0], turn.apply(plain.valid[0].numpy()))
        assert not batch.valid.all()
        assert not batch.pixels[~batch.present].any()
        assert batch.pixels.shape[1:3] == turn.size(280, 300)
    assert len(seen) > 4


def test_the_stream_is_the_same_on_all_ways_and_when_it_goes_on(source: Source) -> None:
    """One run of 4 steps; others stop after 1 to 3 and go on with other ranks and workers."""
    augment, window = {**ALL, "shift": 9}, [64, 48]
    whole = {}
    for batch in batches_of(loader(source, augment, window, batch=4), 0, 4):
        whole[int(batch.samples[0])] = (batch.ids[0], batch.pixels[0])
    assert sorted(whole) == list(range(16))
    for stop, data_ranks, micro_batch, workers, prefetch in (
        (1, 2, 1, 1, 0), (2, 1, 4, 3, 2), (3, 3, 2, 2, 5)
    ):  # fmt: skip
        seen = []
        before = loader(source, augment, window, batch=4)
        state = OrderState.from_json(before.state(stop).to_json())
        for data_rank in range(data_ranks):
            after = loader(
                source, augment, window, batch=4, micro_batch=micro_batch, data_rank=data_rank,
                data_ranks=data_ranks, workers=workers, prefetch=prefetch,
            )  # fmt: skip
            for batch in batches_of(after, after.resume(state), 4):
                for i in torch.nonzero(batch.weight)[:, 0]:
                    name, pixels = whole[int(batch.samples[i])]
                    seen.append(int(batch.samples[i]))
                    assert batch.ids[i] == name
                    assert torch.equal(batch.pixels[i], pixels)
        assert sorted(seen) == list(range(stop * 4, 16))


def test_each_epoch_differs_and_validation_never_does(source: Source) -> None:
    augment = {**ALL, "shift": 5}
    one, plain = loader(source, augment, [128, 96], batch=1), loader(source, {}, [128, 96])
    count = len(one.windows)
    epochs = [batches_of(one, epoch * count, (epoch + 1) * count) for epoch in range(2)]
    first, second = ({batch.ids[0]: batch.pixels for batch in epoch} for epoch in epochs)
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[name], second[name]) for name in first)
    for got, want in zip(one.once(), plain.once(), strict=True):
        assert got.ids == want.ids
        for field in ("pixels", "labels", "present", "valid"):
            assert torch.equal(getattr(got, field), getattr(want, field))


def test_turned_images_are_held_to_the_mesh_and_the_memory(source: Source) -> None:
    """The small image is of 5 x 4 tokens: turned, of 4 x 5."""
    loader(source, {"vertical_flip": True}, mesh_shape=(5, 1))
    with pytest.raises(ValueError, match=r"data\.window: sample small@0,0: a grid of 4 x 5 tokens"):
        loader(source, {"quarter_turns": True}, mesh_shape=(5, 1))
    grids = loader(source, {"quarter_turns": True}).grids
    assert set(grids) == {(13, 19), (19, 13), (5, 4), (4, 5), (17, 7), (7, 17)}
    assert loader(source, {"quarter_turns": True}, [64, 32]).grids == [(4, 2)]


def test_whole_images_do_not_move(source: Source) -> None:
    with pytest.raises(ValueError, match=r"^data\.augment\.shift is 3, allowed is 0 where data\.w"):
        loader(source, {"shift": 3})


def test_bands_are_those_that_are_named(source: Source, masked: Source) -> None:
    one = loader(source, {}, bands=[2, 0, 0, 1], mean=[0.1, 0.2, 0.3, 0.4], std=0.5)
    assert one.bands == 4
    batch = next(one.once())
    assert batch.pixels.shape == (1, 208, 304, 4)
    expected = (source.pixels["wide"][..., [2, 0, 0, 1]] / 255 - [0.1, 0.2, 0.3, 0.4]) / 0.5
    np.testing.assert_array_equal(batch.pixels[0, :200, :300], expected.astype(np.float32))
    single = next(loader(source, {}, bands=[1], mean=0.2, std=0.5).once())
    expected = (source.pixels["wide"][..., [1]] / 255 - 0.2) / 0.5
    np.testing.assert_array_equal(single.pixels[0, :200, :300], expected.astype(np.float32))
    noisy = batches_of(loader(masked, {"noise": 0.1, "contrast": 0.1}, bands=[1], patch=20), 0, 1)
    assert noisy[0].pixels.shape == (1, 280, 300, 1)
    assert noisy[0].pixels.std() > 0.5


@pytest.mark.parametrize("bands", [[], [-1], [0, -1]])
def test_wrong_bands_are_named(bands: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^data\.bands is .*allowed are 1 to 4096 numbers"):
        DataConfig("x", bands=bands)


def test_bands_must_be_there_and_colours_need_three(source: Source) -> None:
    with pytest.raises(ValueError, match=r"^data\.bands has 3, allowed are 0 to 2, of .* 3 bands"):
        loader(source, {}, bands=[0, 3])
    with pytest.raises(ValueError, match=r"^data\.mean is .* 2 of them, one for each band"):
        loader(source, {}, bands=[0, 1], mean=[0.5] * 3)
    with pytest.raises(
        ValueError, match=r"^data\.augment\.hue is 0\.1, allowed is 0 for pixels of"
    ):
        loader(source, {"hue": 0.1}, bands=[0, 1])
    loader(source, {"hue": 0.1}, bands=[0, 0, 0])


def test_augmentation_comes_from_yaml_and_command_line() -> None:
    from axialtrain.train.compose import compose_run

    schema = OmegaConf.structured(DataConfig)
    read = OmegaConf.create("{shards: x, window: [64, 64], augment: {shift: 8, hed: 0.05}}")
    config = OmegaConf.to_object(OmegaConf.merge(schema, read))
    assert isinstance(config, DataConfig)
    assert config.augment == AugmentConfig(shift=8, hed=0.05)
    data = compose_run(
        ["data.shards=x", "data.augment.quarter_turns=true", "data.augment.noise=0.02",
         "data.bands=[3,2,1]"]
    )[0].data  # fmt: skip
    assert data.augment == AugmentConfig(quarter_turns=True, noise=0.02)
    assert data.bands == [3, 2, 1]
    assert compose_run(["data.shards=x"])[0].data == DataConfig("x")
    for override, named in (
        ("data.augment.hue=0.7", r"data\.augment\.hue is 0\.7, allowed are numbers from 0 to 0\.5"),
        ("data.augment.flip=true", r"unknown key data\.augment\.flip: allowed are .*'hed'"),
        ("data.augment.shift=4", r"data\.augment\.shift is 4, allowed is 0 where data\.window"),
    ):
        with pytest.raises(ValueError, match=named):
            compose_run(["data.shards=x", override])


def test_nothing_changes_where_nothing_is_asked_for(source: Source) -> None:
    one = loader(source, {}, [64, 48], batch=1)
    windows = {batch.ids[0]: batch for batch in one.once()}
    for batch in batches_of(one, 0, 5):
        want = windows[batch.ids[0]]
        for field in ("pixels", "labels", "present", "valid"):
            assert torch.equal(getattr(batch, field), getattr(want, field))
    view = replace(draw(one.config.augment, 7, 0)).view(Rect(3, 9, 2, 8), (20, 20), fixed=True)
    assert (view.rect, view.turn) == (Rect(3, 9, 2, 8), Turn())
