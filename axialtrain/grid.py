"""Where a rank's tokens are in the grid of the image. Pure arithmetic, no torch.

Row attention needs whole rows, column attention whole columns; everything else works token by
token and does not care. So tokens move only when the next pass needs it, and what moves is known
on every rank from (size of the grid, shape of the mesh, own coordinates): no shape is ever
exchanged at run time.

Words: mesh *axis* `row` says which band of rows a rank holds, mesh axis `col` which band of
columns. A `Rect` is in tokens unless its name says pixels.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise


class Layout(enum.Enum):
    """How the H x W token grid is spread over the row x col mesh."""

    TILE = "tile"  # H over row, W over col: reading, patch embedding, windows, dense heads
    ROWS = "rows"  # H over row then col, W whole: row attention
    COLS = "cols"  # H whole, W over col then row: column attention


def split(size: int, parts: int, index: int) -> tuple[int, int]:
    """The half-open interval that part `index` of `parts` holds of `size` things.

    Balanced: sizes differ by at most one; a part is empty only where size < parts.
    """
    return size * index // parts, size * (index + 1) // parts


def tokens_across(pixels: int, patch: int) -> int:
    """Tokens that cover `pixels` pixels with patches of `patch` pixels; the last may be partial."""
    return -(-pixels // patch)


@dataclass(frozen=True)
class Rect:
    """Half-open rectangle: rows top..bottom, columns left..right."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def area(self) -> int:
        return self.height * self.width

    @property
    def empty(self) -> bool:
        return self.height <= 0 or self.width <= 0

    def intersect(self, other: Rect) -> Rect:
        """The common part; of height and width 0 where there is none."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom, right = min(self.bottom, other.bottom), min(self.right, other.right)
        if bottom <= top or right <= left:
            return Rect(0, 0, 0, 0)
        return Rect(top, bottom, left, right)

    def scaled(self, factor: int) -> Rect:
        """The same rectangle in units `factor` times finer (tokens -> pixels)."""
        return Rect(
            self.top * factor, self.bottom * factor, self.left * factor, self.right * factor
        )

    def shifted(self, down: int, right: int) -> Rect:
        return Rect(self.top + down, self.bottom + down, self.left + right, self.right + right)

    def slices(self, origin: Rect) -> tuple[slice, slice]:
        """Index of this rectangle in an array that holds `origin`."""
        return (
            slice(self.top - origin.top, self.bottom - origin.top),
            slice(self.left - origin.left, self.right - origin.left),
        )


def owned_rect(
    height: int,
    width: int,
    layout: Layout,
    shape: tuple[int, int],
    at: tuple[int, int],
    unit: int = 1,
) -> Rect:
    """The rectangle of an H x W grid held at mesh coordinates `at` = (row, col) under `layout`.

    unit: tiles are cut at multiples of it, of which H and W are multiples too.
    Under ROWS and COLS the second split divides the band of the first, so that TILE <-> ROWS
    stays among the ranks of one band of rows, and TILE <-> COLS among those of one band of columns.
    """
    (rows, cols), (row, col) = shape, at
    top, bottom = (edge * unit for edge in split(height // unit, rows, row))
    left, right = (edge * unit for edge in split(width // unit, cols, col))
    if layout is Layout.TILE:
        return Rect(top, bottom, left, right)
    if layout is Layout.ROWS:
        start, stop = split(bottom - top, cols, col)
        return Rect(top + start, top + stop, 0, width)
    start, stop = split(right - left, rows, row)
    return Rect(0, height, left + start, left + stop)


@dataclass(frozen=True)
class Place:
    """Which part of an image's token grid a rank's [B, h, w, D] tensor is.

    height, width: the whole grid, in tokens.
    layout: how the grid is spread.
    shape: (rows, cols) of the mesh.
    at: (row, col), the coordinates of this rank.
    unit: tiles are cut at multiples of it: the cells of one token stay together on finer grids.
    coarse: whether this is the grid of a strided layer, which may be smaller than the mesh: some
        ranks then hold nothing of it.
    band: (index, count): the index-th of so many bands of whole lines of what a rank holds under
        ROWS or COLS; (0, 1) is all of it.
    """

    height: int
    width: int
    layout: Layout = Layout.TILE
    shape: tuple[int, int] = (1, 1)
    at: tuple[int, int] = (0, 0)
    unit: int = 1
    coarse: bool = False
    band: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        rows, cols = self.shape
        assert self.band == (0, 1) or self.layout is not Layout.TILE, "a tile has no whole lines"
        assert self.height % self.unit == 0 == self.width % self.unit, self
        if not self.coarse and (self.height // self.unit < rows or self.width // self.unit < cols):
            height, width = self.height // self.unit, self.width // self.unit
            raise ValueError(
                f"a grid of {height} x {width} tokens is smaller than mesh "
                f"row={rows} col={cols}: allowed are meshes of at most {height} x {width}"
            )

    @property
    def rect(self) -> Rect:
        return self.rect_of(self.at)

    def under(self, layout: Layout) -> Place:
        return replace(self, layout=layout)

    @property
    def grid(self) -> Rect:
        """The whole grid."""
        return Rect(0, self.height, 0, self.width)

    def rect_of(self, at: tuple[int, int]) -> Rect:
        """What the rank at mesh coordinates `at` holds of the same grid, in the same layout."""
        rect = owned_rect(self.height, self.width, self.layout, self.shape, at, self.unit)
        index, count = self.band
        if count == 1:
            return rect
        if self.layout is Layout.ROWS:
            start, stop = split(rect.height, count, index)
            return Rect(rect.top + start, rect.top + stop, rect.left, rect.right)
        start, stop = split(rect.width, count, index)
        return Rect(rect.top, rect.bottom, rect.left + start, rect.left + stop)

    def bands(self, count: int) -> list[Place]:
        """What is here under ROWS or COLS, in `count` bands of whole lines; some may be empty."""
        return [replace(self, band=(index, count)) for index in range(count)]

    def pixels(self, patch: int, height: int, width: int) -> Rect:
        """What this part holds of a window of height x width px, in px from the window's corner.

        patch: px of a token. Empty where a window smaller than the grid does not reach this part.
        """
        return self.rect.scaled(patch).intersect(Rect(0, height, 0, width))

    def finer(self, factor: int) -> Place:
        """The grid with factor x factor cells for each one of this: each stays where it is."""
        assert self.layout is Layout.TILE, "finer grids are spread in tiles"
        return replace(
            self,
            height=self.height * factor,
            width=self.width * factor,
            unit=self.unit * factor,
        )

    def coarser(self, stride: int) -> Place:
        """The grid of every stride-th cell: each stays where it is if the unit divides, or else
        the grid is split anew, balanced."""
        assert self.layout is Layout.TILE, "coarser grids are spread in tiles"
        aligned = self.unit % stride == 0
        return replace(
            self,
            height=-(-self.height // stride),
            width=-(-self.width // stride),
            unit=self.unit // stride if aligned else 1,
            coarse=self.coarse or not aligned,
        )


@dataclass(frozen=True)
class Kernel:
    """Which cells of one grid a cell of another is computed from, by a convolution or pooling.

    size: cells along each dim, `dilation` apart. stride: cells from one result to the next.
    padding: cells above and left of the grid that the first result asks for.
    """

    size: int
    stride: int = 1
    dilation: int = 1
    padding: int = 0

    def needs(self, out: Rect) -> Rect:
        """The cells that `out` of the coarser grid is computed from; may reach outside the grid.

        An empty rectangle needs none.
        """
        if out.empty:
            return Rect(0, 0, 0, 0)
        reach = self.dilation * (self.size - 1) + 1 - self.padding
        return Rect(
            out.top * self.stride - self.padding,
            (out.bottom - 1) * self.stride + reach,
            out.left * self.stride - self.padding,
            (out.right - 1) * self.stride + reach,
        )


@dataclass(frozen=True)
class Enlargement:
    """Which cells of `grid` the cells of one `factor` times finer are interpolated from: those that
    they lie in, and their neighbours within the grid."""

    factor: int
    grid: Rect

    def needs(self, out: Rect) -> Rect:
        if out.empty:
            return Rect(0, 0, 0, 0)
        return Rect(
            out.top // self.factor - 1,
            -(-out.bottom // self.factor) + 1,
            out.left // self.factor - 1,
            -(-out.right // self.factor) + 1,
        ).intersect(self.grid)


def windows_of(rect: Rect, size: int, shift: int) -> Rect:
    """The whole windows that `rect` touches, as one rectangle; it may reach outside the image.

    Windows of size x size tokens are cut at the coordinates k * size - shift of the whole grid.
    An empty rectangle touches none.
    """
    if rect.empty:
        return Rect(0, 0, 0, 0)

    def down(at: int) -> int:
        return (at + shift) // size * size - shift

    def up(at: int) -> int:
        return -(-(at + shift) // size) * size - shift

    return Rect(down(rect.top), up(rect.bottom), down(rect.left), up(rect.right))


def cuts_windows(length: int, parts: int, size: int, shift: int) -> bool:
    """Whether a balanced split of `length` tokens into `parts` cuts through a window."""
    return any((split(length, parts, i)[0] + shift) % size for i in range(1, parts))


@dataclass(frozen=True)
class Messages:
    """What one rank of a group sends to and receives from each other rank of it.

    send[i] is a rectangle of what I own, receive[i] one of what I want; both may be empty.
    """

    send: tuple[Rect, ...]
    receive: tuple[Rect, ...]


def messages(owned: Sequence[Rect], wanted: Sequence[Rect], me: int) -> Messages:
    """Who sends what to whom, from owned rectangles to wanted, possibly overlapping, ones.

    owned must not overlap; a wanted part that nobody owns (outside the image) is in no message.
    """
    return Messages(
        send=tuple(owned[me].intersect(want) for want in wanted),
        receive=tuple(own.intersect(wanted[me]) for own in owned),
    )


@dataclass(frozen=True)
class WindowBand:
    """Consecutive tokens along one axis that lie in whole windows, or in a part of one.

    windows: how many windows. queries, keys: how many tokens ask, and how many are asked; start,
    first: the coordinates of the first of each.
    """

    windows: int
    queries: int
    keys: int
    start: int
    first: int


def window_bands(
    queries: tuple[int, int], keys: tuple[int, int], size: int, shift: int
) -> list[WindowBand]:
    """`queries` start..stop, cut into the part of a window it begins with, whole windows, and the
    part of one it ends with, each where there is one.

    keys: start..stop of the tokens of the image in windows that the queries touch. Windows are cut
    at the coordinates k * size - shift.
    """
    start, stop = queries
    inner = (-(-(start + shift) // size) * size - shift, (stop + shift) // size * size - shift)
    cuts = [start, *(cut for cut in sorted(set(inner)) if start < cut < stop), stop]
    bands = []
    for begin, end in pairwise(cuts):
        first = max((begin + shift) // size * size - shift, keys[0])
        last = min(-(-(end + shift) // size) * size - shift, keys[1])
        count = -(-(end + shift) // size) - (begin + shift) // size
        bands.append(WindowBand(count, end - begin, last - first, begin, first))
    return bands
