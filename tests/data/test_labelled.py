"""Windows by the classes of their pixels: what heads tell of labels, and what is drawn by it."""

from __future__ import annotations

import base64
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import forged
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded import loader_of

from axialtrain.data.config import DataConfig
from axialtrain.data.labelled import label_weights, labels_of, written
from axialtrain.data.order import OrderState
from axialtrain.data.region import open_shards
from axialtrain.data.sampling import SampleConfig
from axialtrain.data.shard import shard_images
from axialtrain.data.verify import verify
from axialtrain.data.windows import cut_windows

if TYPE_CHECKING:
    from conftest import Source

TILE = 16
# Of two images, the label of each tile; 255 has none, and the last row and column are cut.
GRIDS = {
    "a": np.array([[0] * 11 + [1]] * 5 + [[0] * 10 + [2, 255]], np.uint8),
    "b": np.array([[3, 255], [0, 0], [0, 0]], np.uint8),
}
SIZES = {"a": (90, 181), "b": (48, 30)}
LABELS = SampleConfig(by="balanced", classes="labels")


@pytest.fixture(scope="module")
def gridded(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return sharded(tmp_path_factory.mktemp("gridded"), SIZES)


def sharded(folder: Path, sizes: dict[str, tuple[int, int]]) -> Source:
    """Images with one label in each tile; tile (4, 0) of "a" is not stored."""
    from conftest import Source

    rng, labels, pixels = np.random.default_rng(0), {}, {}
    for name, (height, width) in sizes.items():
        labels[name] = np.kron(GRIDS[name], np.ones((TILE, TILE), np.uint8))[:height, :width]
        pixels[name] = rng.integers(1, 256, (height, width), np.uint8)
        pixels[name][64:80, :16] = 0
        tifffile.imwrite(
            folder / f"{name}.tif",
            pixels[name],
            tile=(TILE, TILE),
            photometric="minisblack",
            extratags=[(42113, "s", 0, "0", True)],  # GDAL's nodata value
        )
        tifffile.imwrite(folder / f"{name}_labels.tif", labels[name], tile=(TILE, TILE))
    shard_images(
        [folder / f"{name}.tif" for name in sizes],
        folder / "shards",
        labels=[folder / f"{name}_labels.tif" for name in sizes],
        progress=False,
    )
    assert open_shards(str(folder / "shards")).head("a").blocks[0].empty == (32,)
    return Source(str(folder / "shards"), pixels, labels)


def test_heads_tell_the_pixels_of_each_class_in_each_tile(source: Source) -> None:
    shards = open_shards(source.url)
    for name, labels in source.labels.items():
        head = shards.head(name)
        for entry in head.blocks:
            found = labels_of(entry, head)
            assert len(found)
            for number in head.numbers_of(entry.row, entry.col):
                row, col = divmod(number, head.block)
                top, left = (
                    TILE * (first * head.block + step)
                    for first, step in ((entry.row, row), (entry.col, col))
                )
                tile = labels[top : top + TILE, left : left + TILE]
                mine = found[found["tile"] == number]
                expected = np.bincount(tile.ravel(), minlength=6)
                np.testing.assert_array_equal(
                    np.bincount(mine["label"], mine["pixels"], minlength=6), expected
                )


@settings(max_examples=60)
@given(
    window=st.none() | st.tuples(st.integers(1, 200), st.integers(1, 200)),
    stride=st.tuples(st.integers(5, 60), st.integers(5, 60)),
    per_image=st.booleans(),
)
def test_weights_draw_each_class_as_often(
    gridded: Source, window: tuple[int, int] | None, stride: tuple[int, int], per_image: bool
) -> None:
    """A class, one of its pixels, and a window in which it lies; of labels as they are."""
    shards = open_shards(gridded.url)
    windows = cut_windows(shards.images, window, stride)
    labels = {name: raster.copy() for name, raster in gridded.labels.items()}
    labels["a"][64:80, :16] = 255  # the tile that is not stored
    each = [
        np.bincount(
            labels[w.name][w.rect.top : w.rect.bottom, w.rect.left : w.rect.right].ravel(),
            minlength=256,
        )[:255].astype(float)
        for w in windows
    ]
    if per_image:
        names = [w.name for w in windows]
        each = [count / names.count(name) for count, name in zip(each, names, strict=True)]
    pixels = np.array(each)
    there = pixels.sum(0) > 0
    expected = (pixels[:, there] / pixels[:, there].sum(0)).sum(1)
    weights = label_weights(windows, shards.head, per_image=per_image)
    np.testing.assert_allclose(weights, expected, rtol=1e-10, atol=1e-15)


@settings(max_examples=40)
@given(
    window=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_tiles_of_many_classes_weigh_by_the_pixels_of_each(
    spread: Source, window: tuple[int, int], stride: tuple[int, int]
) -> None:
    """Windows of whole tiles, in which labels are counted: some of a few pixels, some missing."""
    shards = open_shards(spread.url)
    size, step = ([TILE * n for n in pair] for pair in (window, stride))
    windows = cut_windows(shards.images, size, step)
    each = []
    for w in windows:
        part = spread.labels[w.name][w.rect.top : w.rect.bottom, w.rect.left : w.rect.right]
        each.append(np.bincount(part.ravel(), minlength=256)[:255])
    pixels = np.array(each, float)
    there = pixels.sum(0) > 0
    expected = (pixels[:, there] / pixels[:, there].sum(0)).sum(1)
    weights = label_weights(windows, shards.head, per_image=False)
    np.testing.assert_allclose(weights, expected, rtol=1e-9)


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """An image of whole tiles with labels 0 to 4 in each, 9 in one pixel of two tiles, and missing
    pixels, whose labels are 7 in its file, and 255 here."""
    from conftest import Source

    folder = tmp_path_factory.mktemp("spread")
    rng = np.random.default_rng(3)
    labels = rng.choice(5, (160, 144), p=[0.6, 0.2, 0.15, 0.04, 0.01]).astype(np.uint8)
    labels[37, 70] = labels[120, 5] = 9
    missing = rng.random(labels.shape) < np.linspace(0, 0.2, 144)
    labels[missing] = 7
    pixels = np.where(missing, 0, rng.integers(1, 256, labels.shape)).astype(np.uint8)
    tifffile.imwrite(
        folder / "a.tif",
        pixels,
        tile=(TILE, TILE),
        photometric="minisblack",
        extratags=[(42113, "s", 0, "0", True)],  # GDAL's nodata value
    )
    tifffile.imwrite(folder / "l.tif", labels, tile=(TILE, TILE))
    url = str(folder / "shards")
    shard_images([folder / "a.tif"], url, labels=[folder / "l.tif"], progress=False)
    assert verify([url], mode="deep", progress=False).count == 0
    labels[missing] = 255
    return Source(url, {"a": pixels}, {"a": labels})


def test_a_head_that_would_be_too_large_does_without(
    spread: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = Path(spread.url).parent
    whole = open_shards(spread.url).images[0].head_length
    for most, counted in ((whole, True), (whole - 1, False)):
        monkeypatch.setattr("axialtrain.data.encode.MAX_HEAD_BYTES", most)
        url = str(tmp_path / str(most))
        shard_images([folder / "a.tif"], url, labels=[folder / "l.tif"], progress=False)
        head = open_shards(url).head("a")
        assert {entry.labelled is not None for entry in head.blocks} == {counted}
        assert ("cannot be balanced by labels" in caplog.text) is not counted
        assert verify([url], mode="deep", progress=False).count == 0
    with pytest.raises(ValueError, match=r"^head of 'a': block 0, 0: labelled is missing"):
        labels_of(head.blocks[0], head)
    monkeypatch.setattr("axialtrain.data.encode.MAX_HEAD_BYTES", 400)
    with pytest.raises(
        ValueError, match=r"a\.tif: its head takes \d+ bytes, allowed are 400: larger"
    ):
        shard_images([folder / "a.tif"], tmp_path / "x", labels=[folder / "l.tif"], progress=False)


def test_images_without_labels_have_none_of_them(masked: Source, tmp_path: Path) -> None:
    copy = shutil.copytree(masked.url, tmp_path / "copy")

    def wrong(record: dict[str, Any]) -> None:
        record["blocks"][2]["labelled"] = "AAAA"

    forged.forge(copy, "a", head=wrong)
    with pytest.raises(ValueError, match=r"labelled is 'AAAA', allowed is none where there are no"):
        open_shards(str(copy)).head("a")


@pytest.mark.parametrize("drawn", [True, False])
def test_windows_come_as_often_as_their_classes_ask(tmp_path: Path, drawn: bool) -> None:
    """Windows of one tile: those of each of four classes together are a quarter of all."""
    source = sharded(tmp_path, {"a": (96, 192), "b": (48, 32)})
    config = DataConfig(
        source.url,
        window=[TILE, TILE],
        mean=[0.5],
        std=[0.25],
        sample=replace(LABELS, replacement=drawn),
    )
    one = loader_of(config)
    count = 200 * len(one.windows)
    taken = np.bincount([one.order[i] for i in range(count)], minlength=len(one.windows))
    of_class = np.zeros(256)
    for times, window in zip(taken.tolist(), one.windows, strict=True):
        of_class[source.labels[window.name][window.rect.top, window.rect.left]] += times
        if window.name == "a" and (window.rect.top, window.rect.left) == (64, 0):
            assert times == 0  # it is not stored
    assert of_class[4:].sum() == 0
    np.testing.assert_allclose(of_class[:4] / count, 0.25, atol=0.015)


@pytest.mark.parametrize(
    "text",
    [
        "!",
        "AAAA",  # nothing deflated
        base64.b64encode(zlib.compress(bytes(7))).decode(),  # no whole entry
        base64.b64encode(zlib.compress(bytes(6)) + b"x").decode(),  # more behind it
        base64.b64encode(zlib.compress(bytes(6))[:-1]).decode(),  # cut short
        base64.b64encode(zlib.compress(bytes(1 << 24))).decode(),  # far more than can be
        lambda found: found[::-1],
        lambda found: np.concatenate((found, found[-1:])),
        lambda found: _with(found, "tile", 63),  # of no image
        lambda found: _with(found, "tile", 32),  # not stored
        lambda found: _with(found, "label", 3),
        lambda found: _with(found, "pixels", 0),
        lambda found: _with(found, "pixels", TILE * TILE + 1),
    ],
)
def test_what_heads_cannot_tell_is_named(gridded: Source, text: str | Callable[[Any], Any]) -> None:
    head = open_shards(gridded.url).head("a")
    (entry,) = [one for one in head.blocks if one.empty]
    found = labels_of(entry, head)
    np.testing.assert_array_equal(labels_of(replace(entry, labelled=written(found)), head), found)
    if not isinstance(text, str):
        text = written(text(found.copy()))
    with pytest.raises(ValueError, match=r"^head of 'a': block 0, 0: labelled is .*, allowed are"):
        labels_of(replace(entry, labelled=text), head)


def _with(found: Any, key: str, value: int) -> Any:
    """The entry that is the last in order with that value, or the first."""
    found[key][-1 if key == "tile" and value == 63 else 0] = value
    return np.sort(found, order=["tile", "label"])


@pytest.mark.parametrize("value", [3, "?", "A" * 200_000])
def test_what_is_no_text_of_a_head_is_named(source: Source, tmp_path: Path, value: object) -> None:
    copy = shutil.copytree(source.url, tmp_path / "copy")

    def wrong(record: dict[str, Any]) -> None:
        record["blocks"][1]["labelled"] = value

    forged.forge(copy, "tall", head=wrong)
    with pytest.raises(ValueError, match=r"head of 'tall' at byte \d+: blocks\[1\]: labelled is"):
        open_shards(str(copy)).head("tall")


def test_deep_verification_counts_again(source: Source, tmp_path: Path) -> None:
    copy = shutil.copytree(source.url, tmp_path / "copy")
    head = open_shards(source.url).head("tall")
    entry = head.blocks[1]
    found = labels_of(entry, head)
    less = found.copy()
    less["pixels"][0] -= 1
    columns = zlib.decompress(base64.b64decode(written(found)))
    other = base64.b64encode(zlib.compress(columns, 1)).decode()
    assert other != entry.labelled
    for text, what in (
        (written(less), "has other pixels of its classes than the head of its image tells"),
        ("AAAA", f"head of 'tall': block {entry.row}, {entry.col}: labelled is 'AAAA', allowed"),
        (other, None),  # of another zlib
    ):

        def changed(record: dict[str, Any], text: str = text) -> None:
            record["blocks"][1]["labelled"] = text

        forged.forge(copy, "tall", head=changed)
        assert verify([copy], progress=False).count == 0  # only deep looks
        faults = verify([copy], mode="deep", progress=False).faults
        assert len(faults) == (what is not None)
        for fault in faults:
            assert fault.member == f"tall/0/{entry.row:05d}_{entry.col:05d}.labels.png"
            assert fault.what.startswith(what)


def test_shards_without_labels_or_of_before_are_named(
    gridded: Source, masked: Source, tmp_path: Path
) -> None:
    config = DataConfig(masked.url, window=[32, 32], mean=[0.5] * 2, sample=LABELS)
    with pytest.raises(ValueError, match=r"^data\.sample\.classes is labels, but image 'a' has no"):
        loader_of(config)
    copy = shutil.copytree(gridded.url, tmp_path / "copy")

    def older(record: dict[str, Any]) -> None:
        for block in record["blocks"]:
            del block["labelled"]

    forged.forge(copy, "b", head=older)
    assert verify([copy], mode="deep", progress=False).count == 0
    config = DataConfig(str(copy), window=[32, 32], mean=[0.5], std=[0.25], sample=LABELS)
    with pytest.raises(ValueError, match=r"^head of 'b': block 0, 0: labelled is missing: .*again"):
        loader_of(config)


def test_where_nothing_is_labelled_nothing_is_drawn(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.ones((40, 40, 3), np.uint8), tile=(16, 16))
    tifffile.imwrite(tmp_path / "l.tif", np.full((40, 40), 255, np.uint8), tile=(16, 16))
    folder = tmp_path / "shards"
    shard_images([tmp_path / "a.tif"], folder, labels=[tmp_path / "l.tif"], progress=False)
    with pytest.raises(
        ValueError, match=r"^data\.sample\.classes is labels, but no window of 'a' "
    ):
        loader_of(DataConfig(str(folder), sample=LABELS))


def test_classes_of_labels_are_for_balancing_alone() -> None:
    with pytest.raises(
        ValueError, match=r"^data\.sample\.classes is 'pixels', allowed is images, "
    ):
        SampleConfig(by="balanced", classes="pixels")
    with pytest.raises(ValueError, match=r"^data\.sample\.classes is labels with .*by=uniform"):
        SampleConfig(classes="labels")


def test_a_run_goes_on_with_the_same_classes(source: Source) -> None:
    config = DataConfig(source.url, window=[32, 32], sample=LABELS)
    one = loader_of(config)
    state = OrderState.from_json(one.state(2).to_json())
    assert loader_of(config, data_ranks=2, mesh_shape=(2, 1)).resume(state) == 2
    other = loader_of(replace(config, sample=replace(LABELS, per="image")))
    with pytest.raises(ValueError, match=r"^data\.sample is not what the saved run had"):
        other.resume(state)
    assert "data.sample.classes" in state.plan
