"""Where the classes of label rasters are: how many pixels of each a stored tile has.

The head of an image tells it, a text for each block, so that windows can be taken by what is in
them without a pixel being fetched.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.checked import shown
from axialtrain.data.manifest import UNLABELLED, ImageRow
from axialtrain.data.store import BlockEntry, Head
from axialtrain.data.windows import Windows, by_image, held
from axialtrain.grid import Rect

# A class in a tile: the tile's number in its block, the label, and how many pixels have it.
IN_TILE = np.dtype([("tile", "u1"), ("label", "u1"), ("pixels", "<u4")])


def count_labels(
    labels: NDArray[np.uint8],
    present: NDArray[np.bool_] | None,
    head: Head,
    block: tuple[int, int],
    stored: Sequence[int],
) -> NDArray[np.void]:
    """The classes in the tiles of `block`, (row, col), [n] of IN_TILE, by tile and label.

    labels: of the block, cut at the image's border. present: which of its pixels there are, None:
    all. stored: numbers of its tiles that are stored.
    """
    found = []
    rect = head.block_rect(*block)
    if present is not None:
        labels = np.where(present, labels, np.uint8(UNLABELLED))
    for number in sorted(stored):
        row, col = (
            at * head.block + n for at, n in zip(block, divmod(number, head.block), strict=True)
        )
        part = Rect(row, row + 1, col, col + 1).scaled(head.tile).intersect(rect)
        counts = np.bincount(labels[part.slices(rect)].ravel(), minlength=UNLABELLED + 1)
        found += [(number, label, counts[label]) for label in np.flatnonzero(counts[:UNLABELLED])]
    return np.array(found, IN_TILE)


def written(found: NDArray[np.void]) -> str:
    """`BlockEntry.labelled`, of what is found in a block, [n] of IN_TILE: deflated columns, in
    base64."""
    columns = b"".join(found[name].tobytes() for name in IN_TILE.names or ())
    return base64.b64encode(zlib.compress(columns, 9)).decode()


def labels_of(entry: BlockEntry, head: Head) -> NDArray[np.void]:
    """What a block's entry tells, as `count_labels` has found it.

    ValueError if its head does not tell them, or tells what cannot be.
    """
    where = f"head of {head.name!r}: block {entry.row}, {entry.col}: labelled"
    if entry.labelled is None:
        raise ValueError(
            f"{where} is missing: the image was sharded before labels were counted, or is too "
            "large for it; shard it again, in the second case in larger tiles (--passthrough never "
            "--tile)"
        )
    wrong = ValueError(
        f"{where} is {shown(entry.labelled)}, allowed are (tile, label, pixels) of stored tiles "
        f"and labels below {head.classes}, in order, as columns of uint8, uint8 and uint32, by "
        "zlib and base64"
    )
    found = _read(entry.labelled, head.block * head.block)
    if found is None:
        raise wrong
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


def _read(text: str, tiles: int) -> NDArray[np.void] | None:
    """What `written` wrote, of a block of `tiles`; None where it did not write it."""
    most = IN_TILE.itemsize * tiles * UNLABELLED
    inflate = zlib.decompressobj()
    try:
        columns = inflate.decompress(base64.b64decode(text, validate=True), most)
    except (binascii.Error, ValueError, zlib.error):
        return None
    count, rest = divmod(len(columns), IN_TILE.itemsize)
    if rest or not inflate.eof or inflate.unused_data:
        return None
    found = np.empty(count, IN_TILE)
    at = 0
    for name in IN_TILE.names or ():
        found[name] = np.frombuffer(columns, IN_TILE[name], count, at)
        at += count * IN_TILE[name].itemsize
    return found


def must_have_labels(images: Sequence[ImageRow]) -> None:
    """ValueError, naming one of `images`, where it has no labels to balance."""
    for row in images:
        if row.classes is None:
            raise ValueError(
                f"data.sample.classes is labels, but image {row.name!r} has none: shard the images "
                "with --labels"
            )


def label_weights(
    windows: Windows, head: Callable[[str], Head], *, per_image: bool
) -> NDArray[np.float64]:
    """How often each window is taken, so that each class of pixels is drawn as often; [n].

    A class is drawn, then one of its pixels, then a window in which it lies: the weight of window i
    is the sum over classes c of n_ic / sum_j n_jc, of n_ic pixels of c in it. In a tile they count
    as evenly spread. per_image: windows of an image share its pixels, however many they are.
    head: of the image of that name; each is asked for twice. ValueError where no window has a
    labelled pixel.
    """

    def sums(some: Windows, row: ImageRow, head: Head) -> NDArray[np.float64]:
        total = np.zeros(UNLABELLED)
        for label, pixels in _pixels_in(some, row, head):
            total[label] = np.cumsum(pixels)[-1]  # in order, so alike on every machine
        return total / len(some) if per_image else total

    total = np.cumsum(by_image(windows, head, sums), axis=0)[-1]
    if not total.any():
        name = windows.images[windows.image[0]].name
        raise ValueError(
            f"data.sample.classes is labels, but no window of {name!r} and its set has a labelled "
            "pixel, allowed are shards that have some in stored tiles"
        )

    def weights(some: Windows, row: ImageRow, head: Head) -> NDArray[np.float64]:
        found = np.zeros(len(some))
        for label, pixels in _pixels_in(some, row, head):
            if total[label] > 0:  # a class that none of all windows has
                found += pixels / total[label]
        return found / len(some) if per_image else found

    return np.concatenate(by_image(windows, head, weights))


def _pixels_in(
    windows: Windows, row: ImageRow, head: Head
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Of each label of an image, how many of its pixels each of its windows has, [n]."""
    found = [labels_of(entry, head) for entry in head.blocks]
    places = [_places(some, e, head) for some, e in zip(found, head.blocks, strict=True)]
    rows, cols = (np.concatenate(one) for one in zip(*places, strict=True))
    known = np.concatenate(found)
    # In whole numbers, whose sums and differences leave nothing where nothing is: as fine as all
    # pixels of the image leave room for.
    bits = 62 - (head.height * head.width).bit_length()
    shares = np.ldexp(known["pixels"] / _areas(rows, cols, head), bits)
    shares = np.maximum(np.rint(shares), 1).astype(np.int64)
    for label in np.unique(known["label"]).tolist():
        mine = known["label"] == label
        of_tiles = np.zeros(head.tile_grid, np.int64)
        of_tiles[rows[mine], cols[mine]] = shares[mine]
        yield label, np.ldexp(held(windows, row, head, of_tiles), -bits)


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
