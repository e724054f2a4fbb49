"""Levels of slides over OpenSlide that are not a whole number of times smaller."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pytest
from slides import write_aperio, write_leica

from axialtrain.data.readers import open_image
from axialtrain.data.readers import slide as reader
from axialtrain.grid import Rect

RNG = np.random.default_rng(6)


# Of the second, no px is whole on both levels but near (0, 0).
@pytest.mark.parametrize(
    ("size", "level", "most"),
    [((500, 600), (200, 240), 0), ((1201, 801), (300, 200), 4), ((903, 703), (311, 243), 2)],
)
def test_a_level_has_the_pixels_of_openslide(
    tmp_path: Path, size: tuple[int, int], level: tuple[int, int], most: int
) -> None:
    path = tmp_path / "a.svs"
    write_aperio(
        path, [np.zeros((*size, 3), np.uint8), RNG.integers(0, 256, (*level, 3), np.uint8)]
    )
    with openslide.OpenSlide(path) as slide:
        assert slide.level_downsamples[1] % 1 > 0
        expected = np.asarray(slide.read_region((0, 0), 1, level[::-1]))[..., :3].astype(int)
    with open_image(path, 1, "openslide") as image:
        assert image.tile == 64
        error = np.abs(image.read(Rect(0, level[0], 0, level[1])) - expected)
        for row in range(-(-level[0] // 64)):
            for col in range(-(-level[1] // 64)):
                found = image.tile_at(row, col)
                assert found is not None
                inside = np.s_[: level[0] - 64 * row, : level[1] - 64 * col]
                assert found.present is None or found.present[inside].all()
    assert error.max() <= most
    assert (error > 1).mean() < 0.001


@pytest.mark.parametrize("size", [(1203, 1603), (1201, 1597), (1199, 1601)])
def test_what_openslide_does_not_mix_is_left_alone(tmp_path: Path, size: tuple[int, int]) -> None:
    """Of Leica's slides it takes the px in which a corner lies."""
    path, level = tmp_path / "a.scn", (300, 400)
    write_leica(path, [np.zeros((*size, 3), np.uint8), RNG.integers(0, 256, (*level, 3), np.uint8)])
    with openslide.OpenSlide(path) as slide:
        assert slide.level_downsamples[1] % 1 > 0
        expected = np.asarray(slide.read_region((0, 0), 1, level[::-1]))[..., :3]
    with open_image(path, 1, "openslide") as image:
        assert image.tile < min(level)
        np.testing.assert_array_equal(image.read(Rect(0, level[0], 0, level[1])), expected)


def test_a_read_begins_on_both_levels_or_is_made_sharp() -> None:
    for first in (0, 1, 63, 64, 5000):
        assert reader._start(first, 4.0, "aperio") == (4 * first, first, 0.0)
        for downsample in (1.0004, 2.00058, 2.898494, 4.00152, 16.0642):
            corner, at, off = reader._start(first, downsample, "aperio")
            assert first - 64 <= at <= first
            assert abs(corner / downsample - at - off) < 1 / 256
            assert off == 0 or (1 / 300 <= abs(off) <= 0.5 and at <= first - 12)


@pytest.mark.parametrize("off", [(0.12, -0.2), (-0.25, 0.0), (0.0, 0.3)])
def test_what_was_there_comes_out_of_means(off: tuple[float, float]) -> None:
    """Also beside what is missing."""
    there = RNG.random((60, 50)) < 0.9
    there[20:30, 20:30] = False
    pixels = RNG.integers(0, 256, (60, 50, 3), np.uint8)
    whole = np.dstack([np.where(there[..., None], pixels, 0), 255 * there]).astype(float)
    mean = whole
    for axis, weight in enumerate(off):
        beside = np.roll(mean, -1 if weight > 0 else 1, axis)
        mean = (1 - abs(weight)) * mean + abs(weight) * beside
    straight = 255 * mean[..., :3] / np.maximum(mean[..., 3:], 1)
    blurred = np.dstack([straight, mean[..., 3]])
    got = reader._sharp(np.rint(blurred).astype(np.uint8), *off)
    inner = np.s_[12:-12, 12:-12]
    np.testing.assert_array_equal(got[inner][..., 3] > 0, there[inner])
    assert np.abs(got - whole)[inner][..., :3].max() <= 8
    assert (np.abs(got - whole)[inner][..., :3] > 2).mean() < 0.02
