from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from axialtrain.data.readers import Reader, open_image
from axialtrain.data.readers.resampled import resampled
from axialtrain.data.thumbnail import thumbnail
from axialtrain.data.tissue import kept_tiles, otsu, overview, tissue

GLASS, STAIN = (243, 242, 240), (170, 90, 150)


def slide(
    height: int, width: int, *stained: tuple[int, int, int, int], seed: int = 0
) -> np.ndarray:
    """Noisy glass, with tissue in the rectangles (top, bottom, left, right)."""
    rng = np.random.default_rng(seed)
    pixels = np.empty((height, width, 3), np.int64)
    pixels[:] = GLASS
    for top, bottom, left, right in stained:
        pixels[top:bottom, left:right] = STAIN
    return np.clip(pixels + rng.integers(-4, 5, pixels.shape), 0, 255).astype(np.uint8)


def write(path: Path, *levels: np.ndarray, tile: int = 32, **options: object) -> Path:
    kinds = {"tile": (tile, tile), "photometric": "rgb", "metadata": None, **options}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            levels[0],
            subifds=len(levels) - 1,
            resolution=(20000, 20000),
            resolutionunit="CENTIMETER",
            **kinds,
        )
        for level in levels[1:]:
            tiff.write(level, subfiletype=1, **kinds)
    return path


def pyramid(pixels: np.ndarray, most: int) -> list[np.ndarray]:
    """`pixels`, and those 2, 4, ... `most` times smaller."""
    levels = [pixels]
    while len(levels[-1]) * most > len(pixels):
        h, w, _ = levels[-1].shape
        squares = levels[-1].reshape(h // 2, 2, w // 2, 2, 3)
        levels.append(squares.mean(axis=(1, 3)).astype(np.uint8))
    return levels


def test_tiles_with_tissue(tmp_path: Path) -> None:
    pixels = slide(256, 320, (70, 120, 70, 150))
    path = write(tmp_path / "a.tif", pixels)
    expected = np.zeros((8, 10), np.bool_)
    expected[2:4, 2:5] = True
    np.testing.assert_array_equal(kept_tiles(path, 0, "auto", how="tissue"), expected)
    coarse = write(tmp_path / "b.tif", *pyramid(pixels, 8))
    np.testing.assert_array_equal(kept_tiles(coarse, 0, "auto", how="tissue"), expected)
    assert kept_tiles(path, 0, "auto", how="all").all()
    assert kept_tiles(path, 0, "auto", how="nodata").all()


def test_tissue_up_to_a_border_keeps_the_neighbour(tmp_path: Path) -> None:
    pixels = slide(256, 256, (64, 96, 64, 96))
    got = kept_tiles(write(tmp_path / "a.tif", pixels), 0, "auto", how="tissue")
    expected = np.zeros((8, 8), np.bool_)
    expected[1:4, 1:4] = True
    np.testing.assert_array_equal(got, expected)


def test_share_of_a_tiles_area(tmp_path: Path) -> None:
    """Cells of 4 px, by which tissue is grown: 8 + 4 of 32 columns, all rows of two tiles."""
    pixels = slide(128, 128, (32, 96, 32, 40))
    path = write(tmp_path / "a.tif", pixels)
    for share, kept in ((12 / 32, 2), (12.1 / 32, 0), (0.01, 6 + 2)):
        assert kept_tiles(path, 0, "auto", how="tissue", share=share).sum() == kept
    with pytest.raises(ValueError, match=r"share is 1\.5, allowed is 0 to 1"):
        kept_tiles(path, 0, "auto", how="tissue", share=1.5)


@pytest.mark.parametrize("seed", [0, 1])
def test_glass_keeps_nothing_and_tissue_all(tmp_path: Path, seed: int) -> None:
    glass = write(tmp_path / "a.tif", slide(200, 300, seed=seed))
    assert not kept_tiles(glass, 0, "auto", how="tissue").any()
    for shade in (40, 150):  # as much as it is stained; shades of it differ by twice
        pixels = slide(200, 300, seed=seed)
        pixels[:, :150, 1] -= shade
        pixels[:, 150:, 1] -= shade // 2
        full = write(tmp_path / "b.tif", pixels)
        assert kept_tiles(full, 0, "auto", how="tissue").all()


def test_ink_does_not_hide_pale_tissue(tmp_path: Path) -> None:
    pixels = slide(256, 256)
    pixels[:64, :64] = (10, 20, 250)
    pixels[128:160, 128:, 1] -= 60
    got = kept_tiles(write(tmp_path / "a.tif", pixels), 0, "auto", how="tissue")
    assert got[:2, :2].all()
    assert got[4, 4:].all()
    assert not got[6:].any()


def test_black_is_no_tissue() -> None:
    pixels = slide(64, 64)
    pixels[:32] = np.random.default_rng(0).integers(0, 12, (32, 64, 3))
    present = np.ones((64, 64), np.bool_)
    assert not tissue(pixels, present).any()
    pixels[40:, :32] = STAIN
    found = tissue(pixels, present)
    assert found[40:, :32].all()
    assert found.sum() == 24 * 32
    present[50:] = False
    assert tissue(pixels, present).sum() == 10 * 32


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=2, max_size=30))
def test_otsu_parts_as_trying_all_thresholds_does(counts: list[int]) -> None:
    values = np.repeat(np.arange(len(counts)), counts).astype(np.float64)

    def within(t: int) -> float:
        low, high = values[values <= t], values[values > t]
        if not len(low) or not len(high):
            return np.inf
        return len(low) * low.var() + len(high) * high.var()

    spread = [within(t) for t in range(len(counts))]
    got = otsu(np.array(counts, np.int64))
    if np.isinf(min(spread)):
        assert got == 0
    else:
        assert spread[got] == pytest.approx(min(spread), abs=1e-9)


def test_tiles_with_a_pixel(tmp_path: Path) -> None:
    """Each tile by itself, against its pixels; a single one is enough."""
    pixels = np.full((200, 330), np.nan, np.float32)
    pixels[70:75, 100:101] = 1
    pixels[180:, 300:] = 2
    path = write(tmp_path / "a.tif", pixels, photometric="minisblack")
    got = kept_tiles(path, 0, "auto", how="nodata")
    held = np.zeros((7, 11), np.bool_)
    for row, col in np.argwhere(np.isfinite(pixels)) // 32:
        held[row, col] = True
    assert got[held].all()
    assert got.sum() <= held.sum() + 8  # grown by one cell of 4 px
    assert not got[0].any()


def test_sparse_tiles_hold_nothing(tmp_path: Path) -> None:
    tiles = [np.full((64, 64, 3), 9, np.uint8), *[None] * 5]
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, iter(tiles), shape=(64, 384, 3), dtype=np.uint8, tile=(64, 64), photometric="rgb"
    )
    got = kept_tiles(path, 0, "auto", how="nodata")
    assert got.tolist() == [[True, True, False, False, False, False]]


def test_tiles_of_what_is_stored_at_another_resolution(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", slide(512, 640, (300, 340, 400, 500)))
    with resampled(path, "auto", 1.25, tile=16) as image:  # 40 px of the file
        got = kept_tiles(path, 0, "auto", how="tissue", stored=image.info)
    assert got.shape == (13, 16)
    expected = np.zeros((13, 16), np.bool_)
    expected[300 // 40 : 340 // 40 + 1, 400 // 40 : 500 // 40 + 1] = True
    assert got[expected][: 2 * 3].all()
    assert not np.delete(np.delete(got, np.s_[6:10], 0), np.s_[9:14], 1).any()


def test_coarse_level_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = slide(512, 512, (0, 100, 0, 100))
    path = write(tmp_path / "a.tif", *pyramid(pixels, 16))
    decoded = 0
    tile_at = Reader.tile_at

    def counted(self: Reader, row: int, col: int) -> object:
        nonlocal decoded
        decoded += self.tile**2
        return tile_at(self, row, col)

    monkeypatch.setattr(Reader, "tile_at", counted)
    assert kept_tiles(path, 0, "auto", how="tissue").sum() == 16
    assert decoded == 64 * 64  # of level 3: a tile is 4 px of it, and 2 of level 4
    decoded = 0
    assert kept_tiles(path, 0, "auto", how="all").all()
    assert decoded == 0


def test_what_is_no_slide_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", np.zeros((64, 64), np.uint16), photometric="minisblack")
    with pytest.raises(ValueError, match=r"1 band of uint16, allowed for how='tissue' is 3 bands"):
        kept_tiles(path, 0, "auto", how="tissue")
    with pytest.raises(ValueError, match="how is 'otsu', allowed is all, nodata, tissue"):
        kept_tiles(path, 0, "auto", how="otsu")


def test_slide_of_the_samples(sample: Callable[[str], Path]) -> None:
    path = sample("CMU-1-Small-Region.svs")
    kept = kept_tiles(path, 0, "auto", how="tissue")
    np.testing.assert_array_equal(kept, kept_tiles(path, 0, "auto", how="tissue"))
    assert kept[4:, 4:6].all()  # the tissue's middle
    assert not kept[5:8, :3].any()  # glass
    assert not kept[9:, 8:].any()
    with open_image(path) as image:
        size = (image.height, image.width, image.tile)
    picture = thumbnail(path, 0, "auto")
    drawn = overview(picture, kept, height=size[0], width=size[1], tile=size[2])
    assert (drawn.shape, drawn.dtype) == (picture.shape, np.uint8)


def test_overview_shows_what_is_kept() -> None:
    picture = np.full((100, 160, 3), 200, np.uint8)
    picture[..., 0] = 90
    kept = np.zeros((5, 8), np.bool_)
    kept[1:3, 2:5] = True
    drawn = overview(picture, kept, height=1000, width=1600, tile=200)
    blue = (drawn == (0, 114, 178)).all(-1)
    rows, cols = np.nonzero(blue)
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (20, 59, 40, 99)
    assert (drawn[25:55, 45:95] == picture[25:55, 45:95]).all()
    outside = np.ones((100, 160), np.bool_)
    outside[20:60, 40:100] = False
    assert (np.ptp(drawn[outside], axis=1) == 0).all()
    with pytest.raises(ValueError, match=r"kept is of shape \(8, 5\), allowed is \(5, 8\)"):
        overview(picture, kept.T, height=1000, width=1600, tile=200)
