"""Which windows of the images are samples: their size, how far apart they lie, how much they hold.

An index of them is three arrays of int32, 12 bytes a window: a `Window` is made as it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.checked import shown
from axialtrain.data.manifest import MAX_SIDE, ImageRow
from axialtrain.data.store import Head
from axialtrain.grid import Rect

T = TypeVar("T")

MAX_WINDOWS = 10_000_000  # an index of them takes 120 MB, and one epoch's order of them 80 MB
HEADS_AT_ONCE = 8  # that are fetched


@dataclass
class CutConfig:
    """The `data.cut` group: how windows of `data.window` lie, and which of them are taken.

    stride: px from one window to the next, one number or [down, right]; null is the window's own
        size, edge to edge. overlap: px that neighbours share, in place of `stride`.
    tissue: the least share of a window that is stored, 0 to 1. What is not, was left out when the
        shards were made (`axialtrain shard --keep tissue`, or tiles without data).
    """

    stride: Any = None
    overlap: Any = None
    tissue: float = 0.0

    def __post_init__(self) -> None:
        for key, low in (("stride", 1), ("overlap", 0)):
            value = getattr(self, key)
            if value is None:
                continue
            pair = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            numbers = [n for n in pair if isinstance(n, int) and not isinstance(n, bool)]
            if len(numbers) != len(pair) or len(pair) not in (1, 2) or min(pair) < low:
                raise ValueError(
                    f"data.cut.{key} is {shown(value)}, allowed is a number of px from {low}, or "
                    "[down, right], or null"
                )
            setattr(self, key, [pair[0], pair[-1]])
        if self.stride is not None and self.overlap is not None:
            raise ValueError(
                f"data.cut.overlap is {self.overlap} beside data.cut.stride={self.stride}, allowed "
                "is one of them"
            )
        if not 0 <= self.tissue <= 1:
            raise ValueError(f"data.cut.tissue is {self.tissue}, allowed is 0 to 1")

    def stride_of(self, window: Sequence[int] | None) -> list[int] | None:
        """[down, right], px, for windows of that size; None for whole images.

        ValueError if it is given without a window, or windows would overlap as a whole.
        """
        key = "overlap" if self.stride is None else "stride"
        given = getattr(self, key)
        if window is None:
            if given is not None:
                raise ValueError(
                    f"data.cut.{key} is {given} without data.window, allowed is null: whole images "
                    "are one window each"
                )
            return None
        if self.overlap is not None:
            if any(o >= w for o, w in zip(self.overlap, window, strict=True)):
                raise ValueError(
                    f"data.cut.overlap is {self.overlap}, allowed is less than data.window, "
                    f"{list(window)}"
                )
            return [w - o for w, o in zip(window, self.overlap, strict=True)]
        return list(window) if self.stride is None else list(self.stride)


@dataclass(frozen=True)
class Window:
    """A sample: `rect` of the image `name`, in px; it may reach outside a small image."""

    name: str
    rect: Rect

    @property
    def id(self) -> str:
        return f"{self.name}@{self.rect.top},{self.rect.left}"


class Windows(Sequence[Window]):
    """An index of windows, in the order of their images, each from top to bottom, left to right.

    images: those that they are cut from. size: (height, width) px, None where each is one image.
    image: int32 [n], which of `images`; top, left: int32 [n], px of the window's corner in it.
    """

    def __init__(
        self,
        images: Sequence[ImageRow],
        size: Sequence[int] | None,
        image: NDArray[np.int32],
        top: NDArray[np.int32],
        left: NDArray[np.int32],
    ) -> None:
        self.images = images
        self.size = None if size is None else (size[0], size[1])
        self.image = image
        self.top = top
        self.left = left

    def __len__(self) -> int:
        return len(self.image)

    @overload
    def __getitem__(self, index: int) -> Window: ...
    @overload
    def __getitem__(self, index: slice) -> Windows: ...
    def __getitem__(self, index: int | slice) -> Window | Windows:
        if isinstance(index, slice):
            return self.only(index)
        row = self.images[self.image[index]]
        top, left = int(self.top[index]), int(self.left[index])
        height, width = (row.height, row.width) if self.size is None else self.size
        return Window(row.name, Rect(top, top + height, left, left + width))

    def only(self, which: slice | NDArray[np.bool_]) -> Windows:
        """Those that a slice or a mask, bool [n], takes."""
        return Windows(self.images, self.size, self.image[which], self.top[which], self.left[which])

    def of_images(self) -> list[slice]:
        """For each image, where its windows stand."""
        edges = np.searchsorted(self.image, np.arange(len(self.images) + 1)).tolist()
        return [slice(a, b) for a, b in pairwise(edges)]

    def of_each_size(self) -> list[Window]:
        """The first window of each (height, width)."""
        if self.size is not None:
            return [self[0]]
        first: dict[tuple[int, int], int] = {}
        for index, image in enumerate(self.image.tolist()):
            row = self.images[image]
            first.setdefault((row.height, row.width), index)
        return [self[index] for index in first.values()]


def cut_windows(
    images: Sequence[ImageRow], size: Sequence[int] | None, stride: Sequence[int] | None = None
) -> Windows:
    """The windows of `images`, of size (height, width) px; None: each image is one window.

    They lie `stride` = (down, right) px apart, None: edge to edge. The last of a line moves back
    inside the image, and so overlaps the one before by more. An image smaller than the window gives
    one that reaches outside. ValueError if they are more than can be listed.
    """
    if size is None:
        image = np.arange(len(images), dtype=np.int32)
        return Windows(images, None, image, np.zeros_like(image), np.zeros_like(image))
    # What is larger than any image is as good as that, and fits the numbers below.
    high, wide = (min(length, MAX_SIDE) for length in size)
    steps = [min(length, MAX_SIDE) for length in (size if stride is None else stride)]
    height = np.array([row.height for row in images], np.int64)
    width = np.array([row.width for row in images], np.int64)
    # The last starts: what is behind them is one window.
    down, right = np.maximum(height - high, 0), np.maximum(width - wide, 0)
    line = -(-right // steps[1]) + 1
    counts = (-(-down // steps[0]) + 1) * line
    count = int(counts.sum())
    if count > MAX_WINDOWS:
        apart = "" if stride is None or list(stride) == list(size) else f" {list(stride)} px apart"
        raise ValueError(
            f"data.window is {list(size)}, which makes {count} windows{apart} of {len(images)} "
            f"images, allowed are at most {MAX_WINDOWS}"
        )
    image = np.repeat(np.arange(len(images), dtype=np.int32), counts)
    at = np.arange(count, dtype=np.int32) - (np.cumsum(counts) - counts).astype(np.int32)[image]
    row, col = np.divmod(at, line.astype(np.int32)[image])
    top = np.minimum(row * steps[0], down[image])
    left = np.minimum(col * steps[1], right[image])
    return Windows(images, size, image, top.astype(np.int32), left.astype(np.int32))


def with_tissue(windows: Windows, least: float, head: Callable[[str], Head]) -> Windows:
    """Those of which at least the share `least` is stored; all where it is 0.

    head: of the image of that name. ValueError if none is left.
    """
    if least <= 0:
        return windows
    kept = windows.only(tissue_shares(windows, head) >= least)
    if not len(kept):
        raise ValueError(
            f"data.cut.tissue is {least}, which none of the {len(windows)} windows has, allowed is "
            "less: the share of a window whose tiles are stored"
        )
    return kept


def tissue_shares(windows: Windows, head: Callable[[str], Head]) -> NDArray[np.float64]:
    """The share of each window, of its part that lies in the image, that is in stored tiles; [n].

    From the heads alone: no pixel is fetched. So pixels that are missing within a stored tile count
    as stored, and in shards of before empty tiles were named in the head, all do.
    """
    return np.concatenate([np.zeros(0), *by_image(windows, head, _shares)])


def by_image(
    windows: Windows, head: Callable[[str], Head], look: Callable[[Windows, ImageRow, Head], T]
) -> list[T]:
    """What `look` finds in the windows of each image that has any, in their order.

    head: of the image of that name; several are fetched at once.
    """

    def found(image: int, part: slice) -> T:
        row = windows.images[image]
        return look(windows.only(part), row, head(row.name))

    with ThreadPoolExecutor(HEADS_AT_ONCE, thread_name_prefix="axialtrain-heads") as pool:
        parts = [(k, part) for k, part in enumerate(windows.of_images()) if part.stop > part.start]
        return list(pool.map(lambda one: found(*one), parts))


def _shares(windows: Windows, row: ImageRow, head: Head) -> NDArray[np.float64]:
    """Of windows of one image."""
    stored = np.ones(head.tile_grid, np.int64)
    for entry in head.blocks:
        empty = np.array(entry.empty, np.int64)
        rows, cols = entry.row * head.block, entry.col * head.block
        stored[rows + empty // head.block, cols + empty % head.block] = 0
    top, bottom, left, right = _inside(windows, row)
    return np.asarray(held(windows, row, head, stored) / ((bottom - top) * (right - left)))


def held(
    windows: Windows, row: ImageRow, head: Head, of_tiles: NDArray[np.number[Any]]
) -> NDArray[Any]:
    """How much each window of the image `row` holds of what lies evenly in its tiles; [n].

    of_tiles: [rows, cols] of the tile grid, how much there is of it for each px.
    """
    grid = np.pad(of_tiles, ((0, 1), (0, 1)))
    # Sums of the tiles above, to the left, and both, of each.
    above = np.cumsum(grid, axis=0) - grid
    before = np.cumsum(grid, axis=1) - grid
    both = np.cumsum(above, axis=1) - above

    def within(y: NDArray[np.int64], x: NDArray[np.int64]) -> NDArray[Any]:
        """What is in the rectangle from the image's corner to (y, x)."""
        (r, dy), (c, dx) = np.divmod(y, head.tile), np.divmod(x, head.tile)
        whole = head.tile * (head.tile * both[r, c] + dy * before[r, c] + dx * above[r, c])
        return np.asarray(whole + dy * dx * grid[r, c])

    top, bottom, left, right = _inside(windows, row)
    return np.asarray(
        within(bottom, right) - within(top, right) - within(bottom, left) + within(top, left)
    )


def _inside(windows: Windows, row: ImageRow) -> tuple[NDArray[np.int64], ...]:
    """(top, bottom, left, right), px, of what of the windows lies in the image `row`."""
    height, width = (row.height, row.width) if windows.size is None else windows.size
    top, left = windows.top.astype(np.int64), windows.left.astype(np.int64)
    return top, np.minimum(top + height, row.height), left, np.minimum(left + width, row.width)
