"""Grids of features: tables of patches whose vectors become pixels of float32.

A cell of the grid is a patch, a cell without one is missing. float16 becomes float32, which holds
all its numbers. Of HDF5 only the index of the patches is in memory, and what a tile needs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from axialtrain.data.kinds import Kind
from axialtrain.data.readers.lattice import lattice_of
from axialtrain.data.readers.reader import Info, Tile, believed_mpp, check_level, check_size
from axialtrain.data.readers.table import HDF5, ZIP, Table
from axialtrain.data.store import MIN_TILE

_SIDES = (256, 128, 64, 32, 16)  # px, of tiles
_TILE_BYTES = 1 << 20  # that a tile should take at most: a block is 64 of them


class FeatureSource:
    """The patches of an HDF5 file or an .npz, see `table.Table`, as an image of one level."""

    def __init__(self, path: Path, level: int) -> None:
        check_level(path, level, 1)
        self._table = _open(path)
        try:
            lattice = lattice_of(path, self._table.coords, self._table.numbers)
            check_size(path, lattice.height, lattice.width)
        except ValueError:
            self._table.close()
            raise
        kind = Kind(self._table.width, "float32")
        side = tile_side(kind)
        mpp = believed_mpp(self._table.numbers.get("mpp", 0.0))
        self.info = Info(
            height=lattice.height,
            width=lattice.width,
            kind=kind,
            tile=side,
            mpp=None if mpp is None else mpp * lattice.step,
            downsample=float(lattice.step),
            masked=True,
        )
        self._row, self._col = lattice.row % side, lattice.col % side
        self._cols = -(-lattice.width // side)
        tile = lattice.row // side * self._cols + lattice.col // side
        self._order = np.argsort(tile, kind="stable")  # the rows of the table, tile by tile
        self._tile = tile[self._order]

    def tile(self, row: int, col: int) -> Tile | None:
        number = row * self._cols + col
        first, last = np.searchsorted(self._tile, (number, number + 1))
        if first == last:
            return None
        lines = self._order[first:last]  # in ascending order
        side = self.info.tile
        pixels = np.zeros((side, side, self.info.kind.bands), np.float32)
        present = np.zeros((side, side), np.bool_)
        for run in np.split(lines, np.flatnonzero(np.diff(lines) != 1) + 1):
            cells = self._row[run], self._col[run]
            pixels[cells] = self._table.lines(int(run[0]), int(run[-1]) + 1)
            present[cells] = True
        return Tile(pixels, present)

    def jpeg(self, row: int, col: int) -> bytes | None:
        raise AssertionError("features are no JPEG")

    def close(self) -> None:
        self._table.close()


def tile_side(kind: Kind) -> int:
    """Side of the tiles of a grid of such vectors, in cells."""
    fitting = (side for side in _SIDES if side * side * kind.pixel_bytes <= _TILE_BYTES)
    return next(fitting, MIN_TILE)


def _open(path: Path) -> Table:
    try:
        with path.open("rb") as file:
            start = file.read(len(HDF5))
    except OSError as error:
        raise ValueError(f"{path}: not a table that can be read ({error})") from error
    if start == HDF5:
        from axialtrain.data.readers.hdf5 import Hdf5Table

        return Hdf5Table(path)
    if start.startswith(ZIP):
        from axialtrain.data.readers.npz import NpzTable

        return NpzTable(path)
    raise ValueError(f"{path}: is no HDF5 and no .npz, which is all that reader=features reads")
