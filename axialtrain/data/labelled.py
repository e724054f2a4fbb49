"""Where the classes of label rasters are: how many pixels of each a stored tile has.

The head of an image tells it, a text for each block, so that windows can be taken by what is in
them without a pixel being fetched.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.checked import shown
from axialtrain.data.manifest import UNLABELLED, ImageRow
from axialtrain.data.store import BlockEntry, Head
from axialtrain.data.windows import Windows, by_image, held
from axialtrain.grid import Rect

_BITS = 20  # of a part of a pixel: all of the largest image stays below 2**63
# A class in a tile: the tile's number in its block, the label, and how many pixels have it.
IN_TILE = np.dtype([("tile", "u1"), ("label", "u1"), ("pixels", "<u4")])


def count_labels(
    labels: NDArray[np.uint8], head: Head, block: tuple[int, int], stored: list[int]
) -> str:
    """What `BlockEntry.labelled` says of `block`, (row, col).

    labels: of the block, cut at the image's border. stored: numbers of its tiles that are stored.
    """
    found = []
    rect = head.block_rect(*block)
    for number in sorted(stored):
        row, col = (
            at * head.block + n for at, n in zip(block, divmod(number, head.block), strict=True)
        )
        part = Rect(row, row + 1, col, col + 1).scaled(head.tile).intersect(rect)
        counts = np.bincount(labels[part.slices(rect)].ravel(), minlength=UNLABELLED + 1)
        found += [(number, label, counts[label]) for label in np.flatnonzero(counts[:UNLABELLED])]
    return base64.b64encode(np.array(found, IN_TILE).tobytes()).decode()


def labels_of(entry: BlockEntry, head: Head) -> NDArray[np.void]:
    """The classes in the tiles of a block, of IN_TILE, by tile and label.

    ValueError if its head was written before they were counted, or tells what cannot be.
    """
    where = f"head of {head.name!r}: block {entry.row}, {entry.col}: labelled"
    if entry.labelled is None:
        raise ValueError(
            f"{where} is missing, from shards of before labels were counted: shard again"
        )
    wrong = ValueError(
        f"{where} is {shown(entry.labelled)}, allowed is the base64 of (tile, label, pixels), of "
        f"uint8, uint8 and uint32, of stored tiles and labels below {head.classes}, in order"
    )
    try:
        found = np.frombuffer(base64.b64decode(entry.labelled, validate=True), IN_TILE)
    except (binascii.Error, ValueError) as error:
        raise wrong from error
    keys = found["tile"].astype(np.int64) << 8 | found["label"]
    stored = head.numbers_of(entry.row, entry.col) - set(entry.empty)
    if (np.diff(keys) <= 0).any() or not stored.issuperset(found["tile"].tolist()):
        raise wrong
    if (found["label"] >= (head.classes or 0)).any() or (found["pixels"] == 0).any():
        raise wrong
    sums = np.bincount(found["tile"], found["pixels"])
    if (sums[found["tile"]] > _areas(*_places(found, entry, head), head)).any():
        raise wrong
    return found


def label_weights(
    windows: Windows, head: Callable[[str], Head], *, per_image: bool
) -> NDArray[np.float64]:
    """How often each window is taken, so that each class of pixels is drawn as often; [n].

    A class is drawn, then one of its pixels, then a window in which it lies: the weight of window i
    is the sum over classes c of n_ic / sum_j n_jc, of n_ic pixels of c in it. In a tile they count
    as evenly spread. per_image: windows of an image share its pixels, however many they are.
    head: of the image of that name. ValueError if one has no labels, or nothing is labelled.
    """
    found = by_image(windows, head, _pixels_in)
    if per_image:
        found = [(labels, pixels / pixels.shape[1]) for labels, pixels in found]
    sums = np.zeros(UNLABELLED)
    for labels, pixels in found:  # cumsum adds in order, on every machine
        sums[labels] += np.cumsum(pixels, axis=1)[:, -1]
    if not sums.any():
        raise ValueError(
            "data.sample.classes is labels, but no window has a labelled pixel in a stored tile"
        )
    rate = np.divide(1.0, sums, out=np.zeros_like(sums), where=sums > 0)
    parts = [
        np.cumsum(pixels * rate[labels, None], axis=0)[-1] if len(labels) else pixels.sum(0)
        for labels, pixels in found
    ]
    return np.concatenate(parts)


def _pixels_in(
    windows: Windows, row: ImageRow, head: Head
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """(the labels [k] of an image, pixels [k, n] of each in each of its windows)."""
    if row.classes is None or head.classes is None:
        raise ValueError(
            f"data.sample.classes is labels, but image {row.name!r} has none: shard the images "
            "with --labels"
        )
    found = [labels_of(entry, head) for entry in head.blocks]
    places = [_places(some, e, head) for some, e in zip(found, head.blocks, strict=True)]
    rows, cols = (np.concatenate(one) for one in zip(*places, strict=True))
    known = np.concatenate(found)
    labels, part = np.unique(known["label"], return_inverse=True)
    # In whole numbers, whose sums and differences leave nothing where nothing is.
    density = -(-(known["pixels"].astype(np.int64) << _BITS) // _areas(rows, cols, head))
    pixels = np.empty((len(labels), len(windows)))
    for k in range(len(labels)):
        mine = part == k
        of_tiles = np.zeros(head.tile_grid, np.int64)
        of_tiles[rows[mine], cols[mine]] = density[mine]
        pixels[k] = np.ldexp(held(windows, row, head, of_tiles), -_BITS)
    return labels.astype(np.intp), pixels


def _places(
    found: NDArray[np.void], entry: BlockEntry, head: Head
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(rows, cols), in the image's tile grid, of what is found in a block."""
    rows, cols = np.divmod(found["tile"].astype(np.int64), head.block)
    return entry.row * head.block + rows, entry.col * head.block + cols


def _areas(rows: NDArray[np.int64], cols: NDArray[np.int64], head: Head) -> NDArray[np.int64]:
    """Of tiles of the image's grid, how many px of them lie in the image."""
    high, wide = head.height - rows * head.tile, head.width - cols * head.tile
    return np.asarray(np.minimum(high, head.tile) * np.minimum(wide, head.tile))
