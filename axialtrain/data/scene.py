"""Drawn scenes whose labels cannot be told without seeing a whole row or column.

A scene is a field of parcels, in row bands and column bands cut at arbitrary pixels. On the right
margin each row band has a marker of one of CLASSES colours, on the bottom margin each column band
has one; the classes are drawn uniformly and independently. A parcel carries the row texture or the
column texture, by chance: its label is the class of its row's marker, or of its column's. Its
brightness, hue and noise say nothing. A gap of GAP px between field and markers keeps any one
patch from seeing both; gap, markers and corner are unlabelled. Each parcel is an instance.

What can be had without long range. Far from the markers, the class of a pixel is independent of
what a model sees there, whatever it predicts. Let class c, of C equiprobable ones, be predicted on
the share p_c of the pixels. Its intersection with the truth is then p_c / C, its union
p_c + 1/C - p_c / C, so IoU_c = p_c / (1 + (C - 1) p_c). That is concave in p_c and the p_c sum to
1, so the mean over c is largest at p_c = 1/C, where it is 1 / (2C - 1): 0.091 for 6 classes.
If a share s of the pixels lies within reach of its marker and is told rightly, a share
a = s + (1 - s) / C of all pixels is right; by symmetry each class has an intersection of a / C and
a union of (2 - a) / C, so the mean IoU is a / (2 - a). `ceiling` gives it; the expectation is over
many scenes, as one of 6 x 6 bands may miss a class.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from axialtrain.data.codec import Instances, Pixels
from axialtrain.data.order import MAX_SEED
from axialtrain.data.store import UNLABELLED
from axialtrain.grid import Rect

CLASSES = 6
COLOURS = np.array(
    [(220, 40, 40), (40, 170, 60), (50, 80, 220), (230, 200, 40), (190, 60, 200), (40, 190, 200)],
    np.uint8,
)
GAP = 64  # px, between field and markers
MIN_SIZE = 256  # px
TILE = 256  # px, of the files
_MIN_MARKER = 64  # px
_NEUTRAL = 128  # grey of gap and corner
_PERIOD = 8  # px, of the parcels' stripes; a marker's strokes are half as wide
_TEXTURE = 512  # px, side of a texture before it repeats
_QUALITY = 90


@dataclass(frozen=True)
class Scene:
    """A drawn scene and the truth about it.

    pixels: uint8 [size, size, 3]. labels: uint8 [size, size], 255 where there is no target.
    instances: uint16 [size, size], the parcels from 1, row by row; 0 where there is none.
    row_edges, col_edges: px, borders of the bands, one more than there are bands.
    row_classes, col_classes: class of each band's marker. by_row: bool [rows, cols], whether a
    parcel follows its row. field: side of the field of parcels, px.
    """

    pixels: Pixels
    labels: Pixels
    instances: Instances
    row_edges: list[int]
    col_edges: list[int]
    row_classes: NDArray[np.int64]
    col_classes: NDArray[np.int64]
    by_row: NDArray[np.bool_]
    field: int


def ceiling(classes: int = CLASSES, known: float = 0.0) -> float:
    """The best mean IoU without long range; known: share of pixels in reach of their marker."""
    if classes < 2:
        raise ValueError(f"classes is {classes}, allowed is at least 2")
    if not 0 <= known <= 1:
        raise ValueError(f"known is {known}, allowed is 0 to 1")
    accuracy = known + (1 - known) / classes
    return accuracy / (2 - accuracy)


def draw_scenes(
    out: str | Path,
    *,
    count: int,
    size: int,
    seed: int,
    first: int = 0,
    bands: tuple[int, int] = (6, 8),
    lossless: bool = False,
) -> list[tuple[Path, Path, Path]]:
    """Draw scenes number first .. first+count-1 of `seed` into the folder `out`.

    size: px, at least 256. bands: fewest and most row bands, and column bands, of a scene.
    lossless: pixels as they were drawn; JPEG, which scanners write, halves the resolution of hues.
    Returns (image, labels, instances) of each: a pyramidal TIFF, a raster of uint8 labels and one
    of uint16 instances.
    """
    if count < 1:
        raise ValueError(f"count is {count}, allowed is at least 1")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(first, first + count):
        scene = draw_scene(size=size, seed=seed, index=index, bands=bands)
        image = out / f"scene_{index:04d}.tif"
        labels = out / f"scene_{index:04d}_labels.tif"
        instances = out / f"scene_{index:04d}_instances.tif"
        _write_image(image, scene.pixels, lossless=lossless)
        for path, raster in ((labels, scene.labels), (instances, scene.instances)):
            tifffile.imwrite(path, raster, tile=(TILE, TILE), compression="zlib", metadata=None)
        paths.append((image, labels, instances))
    return paths


def draw_scene(*, size: int, seed: int, index: int = 0, bands: tuple[int, int] = (6, 8)) -> Scene:
    """Scene `index` of `seed`: the same arguments give the same scene."""
    if size < MIN_SIZE:
        raise ValueError(f"size is {size}, allowed is at least {MIN_SIZE} px")
    if not 1 <= bands[0] <= bands[1] <= 8:
        raise ValueError(f"bands is {bands}, allowed is (fewest, most) from 1 to 8")
    if not (0 <= seed <= MAX_SEED and 0 <= index <= MAX_SEED):
        raise ValueError(f"seed, index is {seed}, {index}, allowed is 0 to {MAX_SEED} for each")
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
    marker = max(_MIN_MARKER, size // 32)
    field = size - GAP - marker
    row_edges = _edges(rng, field, int(rng.integers(bands[0], bands[1] + 1)))
    col_edges = _edges(rng, field, int(rng.integers(bands[0], bands[1] + 1)))
    rows, cols = len(row_edges) - 1, len(col_edges) - 1
    scene = Scene(
        pixels=np.full((size, size, 3), _NEUTRAL, np.uint8),
        labels=np.full((size, size), UNLABELLED, np.uint8),
        instances=np.zeros((size, size), np.uint16),
        row_edges=row_edges,
        col_edges=col_edges,
        row_classes=rng.integers(0, CLASSES, rows),
        col_classes=rng.integers(0, CLASSES, cols),
        by_row=rng.integers(0, 2, (rows, cols)).astype(np.bool_),
        field=field,
    )
    _draw_parcels(scene, rng)
    _draw_markers(scene, rng)
    return scene


def _edges(rng: np.random.Generator, length: int, parts: int) -> list[int]:
    """Borders of `parts` bands, each moved by up to a quarter of a band; no band under half."""
    step = length / parts
    inner = (np.arange(1, parts) + rng.uniform(-0.25, 0.25, parts - 1)) * step
    return [0, *np.round(inner).astype(int).tolist(), length]


def _draw_parcels(scene: Scene, rng: np.random.Generator) -> None:
    stripes = _stripes(rng, _PERIOD)
    for r, (top, bottom) in enumerate(pairwise(scene.row_edges)):
        for c, (left, right) in enumerate(pairwise(scene.col_edges)):
            by_row = scene.by_row[r, c]
            colour = rng.uniform(88, 168, 3)  # brightness and hue at once
            here = np.s_[top:bottom, left:right]
            area = Rect(top, bottom, left, right)
            texture = _cut(stripes, rng, area, horizontal=by_row)
            _paint(scene.pixels[here], texture, colour)
            scene.labels[here] = scene.row_classes[r] if by_row else scene.col_classes[c]
            scene.instances[here] = r * (len(scene.col_edges) - 1) + c + 1


def _draw_markers(scene: Scene, rng: np.random.Generator) -> None:
    strokes = _stripes(rng, _PERIOD // 2)
    start, size = scene.field + GAP, scene.pixels.shape[0]
    for r, (top, bottom) in enumerate(pairwise(scene.row_edges)):
        texture = _cut(strokes, rng, Rect(top, bottom, start, size), horizontal=True)
        _paint(scene.pixels[top:bottom, start:], texture, COLOURS[scene.row_classes[r]])
    for c, (left, right) in enumerate(pairwise(scene.col_edges)):
        texture = _cut(strokes, rng, Rect(start, size, left, right), horizontal=False)
        _paint(scene.pixels[start:, left:right], texture, COLOURS[scene.col_classes[c]])


def _stripes(rng: np.random.Generator, period: int) -> Pixels:
    """Noisy horizontal stripes around 32, uint8 [_TEXTURE, _TEXTURE]; it repeats seamlessly."""
    wave = 16 * np.sign(np.sin(2 * np.pi * (np.arange(_TEXTURE) + 0.5) / period))
    noise = rng.integers(-12, 13, (_TEXTURE, _TEXTURE))
    return (32 + wave[:, None] + noise).astype(np.uint8)


def _cut(stripes: Pixels, rng: np.random.Generator, area: Rect, *, horizontal: bool) -> Pixels:
    """The repeated texture over `area`, turned if not horizontal: [area.height, area.width].

    Its noise starts anywhere, its stripes keep their phase over the image: a projection of a patch
    then tells the textures apart, and what is hard in a scene is its range alone.
    """
    down, right = rng.integers(0, _TEXTURE // _PERIOD, 2) * _PERIOD
    source = stripes if horizontal else stripes.T
    tall = np.take(source, np.arange(down + area.top, down + area.bottom) % _TEXTURE, axis=0)
    return np.take(tall, np.arange(right + area.left, right + area.right) % _TEXTURE, axis=1)


def _paint(area: Pixels, texture: Pixels, colour: NDArray[np.generic]) -> None:
    """`colour`, made lighter and darker by `texture`, into `area`; by table, which is fast."""
    shade = np.arange(64)[:, None] - 32
    table = np.clip(np.asarray(colour, np.float64) + shade, 0, 255).astype(np.uint8)
    area[...] = table[texture]


def _write_image(path: Path, pixels: Pixels, *, lossless: bool) -> None:
    """A pyramid of 256 px tiles, JPEG (YCbCr, as most scanners write) unless `lossless`, halved
    down to one tile."""
    compression: dict[str, Any] = {"compression": "zlib", "predictor": True}
    if not lossless:
        compression = {"compression": "jpeg", "compressionargs": {"level": _QUALITY}}
    levels = [pixels]
    while max(levels[-1].shape) > TILE:
        levels.append(_halve(levels[-1]))
    with tifffile.TiffWriter(path) as tiff:
        for number, level in enumerate(levels):
            tiff.write(
                level,
                subifds=len(levels) - 1 if number == 0 else None,
                subfiletype=0 if number == 0 else 1,
                tile=(TILE, TILE),
                photometric="rgb",  # of the input; tifffile stores JPEG as YCbCr
                metadata=None,
                **compression,
            )


def _halve(pixels: Pixels) -> Pixels:
    """Means of 2 x 2 px; an odd last line is dropped."""
    height, width = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
    lines = pixels[0:height:2].astype(np.uint16) + pixels[1:height:2]
    total = lines[:, 0:width:2] + lines[:, 1:width:2]
    return (total >> 2).astype(np.uint8)
