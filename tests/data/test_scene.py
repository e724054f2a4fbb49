from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tifffile

from axialtrain.data.readers import open_image, open_raster
from axialtrain.data.scene import (
    CLASSES,
    COLOURS,
    GAP,
    Scene,
    ceiling,
    draw_scene,
    draw_scenes,
)
from axialtrain.data.store import UNLABELLED
from axialtrain.grid import Rect


def bands(edges: list[int]) -> list[tuple[int, int]]:
    return list(pairwise(edges))


def marker_class(pixels: np.ndarray) -> int:
    return int(np.abs(pixels.mean((0, 1)) - COLOURS.astype(float)).sum(1).argmin())


@pytest.mark.parametrize("size", [512, 777, 1024])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_labels_follow_texture_and_marker(size: int, seed: int) -> None:
    scene = draw_scene(size=size, seed=seed)
    start = scene.field + GAP
    assert size - start >= 64
    for top, bottom in bands(scene.row_edges):
        row_class = marker_class(scene.pixels[top:bottom, start:])
        for left, right in bands(scene.col_edges):
            col_class = marker_class(scene.pixels[start:, left:right])
            parcel = scene.pixels[top:bottom, left:right].astype(float).mean(2)
            along_y, along_x = (np.abs(np.diff(parcel, axis=axis)).mean() for axis in (0, 1))
            by_row = along_y > along_x  # horizontal stripes change from line to line
            label = scene.labels[top:bottom, left:right]
            assert (label == (row_class if by_row else col_class)).all()


def test_only_the_field_is_labelled() -> None:
    scene = draw_scene(size=600, seed=4)
    assert (scene.labels[: scene.field, : scene.field] < CLASSES).all()
    assert (scene.labels[scene.field :] == UNLABELLED).all()
    assert (scene.labels[:, scene.field :] == UNLABELLED).all()
    gap = scene.pixels[scene.field : scene.field + GAP, : scene.field]
    assert (gap == gap[0, 0]).all()
    assert gap.shape[0] >= 64


@pytest.mark.parametrize("size", [512, 777])
def test_instances_number_the_parcels_row_by_row(size: int) -> None:
    scene = draw_scene(size=size, seed=2, bands=(2, 5))
    assert scene.instances.dtype == np.uint16
    number = 0
    for top, bottom in bands(scene.row_edges):
        for left, right in bands(scene.col_edges):
            number += 1
            assert (scene.instances[top:bottom, left:right] == number).all()
    # Where no class is, no instance is, and the other way round.
    np.testing.assert_array_equal(scene.instances == 0, scene.labels == UNLABELLED)


@pytest.mark.parametrize(
    ("size", "seed", "few", "digest"),
    [
        (512, 0, (6, 8), "9586c89ed0b6f0e3c824a65be4751de57cd1914a4398eb2f88b8767a9f8749ba"),
        (777, 3, (2, 3), "cb4ef25406e4ff69913ddce26a327a1bb8f078acc9dfdcfbf7b9d51711548a00"),
    ],
)
def test_scenes_are_those_of_before_there_were_instances(
    size: int, seed: int, few: tuple[int, int], digest: str
) -> None:
    scene = draw_scene(size=size, seed=seed, bands=few)
    drawn = scene.pixels.tobytes() + scene.labels.tobytes()
    assert hashlib.sha256(drawn).hexdigest() == digest


def test_bands_are_cut_at_arbitrary_pixels() -> None:
    scenes = [draw_scene(size=1024, seed=0, index=i) for i in range(12)]
    edges = np.concatenate([s.row_edges[1:-1] + s.col_edges[1:-1] for s in scenes])
    assert {len(s.row_edges) - 1 for s in scenes} == {6, 7, 8}
    assert np.unique(edges % 16).size == 16
    assert min(np.diff(s.row_edges).min() for s in scenes) >= 1024 / 8 / 4


def test_seed_and_index_decide_the_scene() -> None:
    def same(a: Scene, b: Scene) -> bool:
        return bool((a.pixels == b.pixels).all())

    first = draw_scene(size=512, seed=1, index=2)
    assert same(first, draw_scene(size=512, seed=1, index=2))
    assert not same(first, draw_scene(size=512, seed=2, index=2))
    assert not same(first, draw_scene(size=512, seed=1, index=3))


def test_texture_and_brightness_say_nothing_about_the_class() -> None:
    """Over many parcels, mean colour and texture are independent of the label."""
    colours, labels, kinds = [], [], []
    for index in range(24):
        scene = draw_scene(size=512, seed=9, index=index)
        for r, (top, bottom) in enumerate(bands(scene.row_edges)):
            for c, (left, right) in enumerate(bands(scene.col_edges)):
                colours.append(scene.pixels[top:bottom, left:right].mean((0, 1)))
                labels.append(scene.labels[top, left])
                kinds.append(scene.by_row[r, c])
    one_hot = np.eye(CLASSES)[np.array(labels)]
    features = np.column_stack([np.array(colours), kinds])
    correlation = np.corrcoef(features.T, one_hot.T)[:4, 4:]
    # Parcels of a band share a class: about 24 * 14 draws, not 24 * 49.
    assert np.abs(correlation).max() < 4 / np.sqrt(24 * 14)


def test_files_hold_the_scene(tmp_path: Path) -> None:
    paths = draw_scenes(tmp_path, count=2, size=700, seed=3, first=5)
    assert [p.name for scene in paths for p in scene] == [
        "scene_0005.tif",
        "scene_0005_labels.tif",
        "scene_0005_instances.tif",
        "scene_0006.tif",
        "scene_0006_labels.tif",
        "scene_0006_instances.tif",
    ]
    scene = draw_scene(size=700, seed=3, index=5)
    with open_image(paths[0][0]) as image, open_image(paths[0][1]) as labels:
        assert (image.height, image.width, image.tile, image.jpeg) == (700, 700, 256, True)
        whole = Rect(0, 700, 0, 700)
        error = np.abs(image.read(whole).astype(int) - scene.pixels)
        assert error.mean() < 10
        np.testing.assert_array_equal(labels.read(whole)[..., 0], scene.labels)
    with open_raster(paths[0][2]) as instances:
        np.testing.assert_array_equal(instances.read(whole)[..., 0], scene.instances)
    with tifffile.TiffFile(paths[0][0]) as tiff:
        assert [level.shape[0] for level in tiff.series[0].levels] == [700, 350, 175]
    again = draw_scenes(tmp_path / "again", count=1, size=700, seed=3, first=5)
    assert again[0][0].read_bytes() == paths[0][0].read_bytes()


def test_lossless_files_hold_every_pixel(tmp_path: Path) -> None:
    ((path, *_),) = draw_scenes(tmp_path, count=1, size=300, seed=3, first=5, lossless=True)
    with open_image(path) as image:
        assert (image.tile, image.jpeg) == (256, False)
        pixels = image.read(Rect(0, 300, 0, 300))
    np.testing.assert_array_equal(pixels, draw_scene(size=300, seed=3, index=5).pixels)


def test_ceiling_bounds_every_guess() -> None:
    assert ceiling() == pytest.approx(1 / 11)
    assert ceiling(known=1.0) == 1.0
    assert 1 / 11 < ceiling(known=0.1) < ceiling(known=0.2)
    rng = np.random.default_rng(0)
    truth = rng.integers(0, CLASSES, 200_000)
    for shares in ([1 / 6] * 6, [1, 0, 0, 0, 0, 0], [0.4, 0.3, 0.1, 0.1, 0.05, 0.05]):
        guess = rng.choice(CLASSES, truth.size, p=shares)
        ious = [
            ((guess == c) & (truth == c)).sum() / ((guess == c) | (truth == c)).sum()
            for c in range(CLASSES)
        ]
        assert np.mean(ious) <= ceiling() + 0.002
    guess = np.where(rng.random(truth.size) < 0.3, truth, rng.integers(0, CLASSES, truth.size))
    right = ((guess == 0) & (truth == 0)).sum() / ((guess == 0) | (truth == 0)).sum()
    assert right == pytest.approx(ceiling(known=0.3), abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 255}, "size is 255, allowed is at least 256"),
        ({"size": 512, "bands": (5, 3)}, "bands is"),
        ({"size": 512, "seed": -1}, "seed, index is -1, 0"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_scene(**{"seed": 0, **options})
    with pytest.raises(ValueError, match="count is 0"):
        draw_scenes("nowhere", count=0, size=512, seed=0)
    with pytest.raises(ValueError, match="classes is 1"):
        ceiling(1)
    with pytest.raises(ValueError, match="known is 2"):
        ceiling(6, 2.0)
