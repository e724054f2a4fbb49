"""Where patches lie: corners in px of a slide to the cells of a grid. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]

MAX_STEP = 1 << 16  # px
_FARTHEST = 1 << 40  # px, of a corner


@dataclass(frozen=True)
class Lattice:
    """The grid whose cells are patches.

    step: px of level 0 from a cell to the next. height, width: cells. row, col: [n], the cell of
    each patch; (0, 0) is at the smallest x and the smallest y.
    """

    step: int
    height: int
    width: int
    row: Index
    col: Index


def lattice_of(path: Path, coords: NDArray[Any], numbers: Mapping[str, float]) -> Lattice:
    """The grid of patches with the corners `coords`, integers [n, 2] of x, y.

    numbers: of `table.NUMBERS`. ValueError naming the file, and the first row that is not on the
    grid, or in the cell of a row before.
    """
    for wrong, allowed in ((coords < 0, "0 or more"), (coords > _FARTHEST, f"up to {_FARTHEST}")):
        if wrong.any():
            index = int(wrong.any(axis=1).argmax())
            raise ValueError(f"{path}: {_row(coords, index)}, allowed is {allowed}")
    whole = coords.astype(np.int64)
    cells = whole - whole.min(axis=0)
    given = step_of(path, numbers)
    step = _common_step(path, cells) if given is None else given
    off = ((whole - whole[0]) % step != 0).any(axis=1)
    if off.any():
        index = int(off.argmax())
        raise ValueError(
            f"{path}: {_row(coords, index)}, which is not on the grid of {step} px of the rows "
            "before: allowed are patches that lie edge to edge, without overlap, on one grid"
        )
    col, row = (cells // step).T
    lattice = Lattice(step, int(row.max()) + 1, int(col.max()) + 1, row, col)
    _check_apart(path, coords, lattice)
    if given is None and not _has_neighbours(lattice):
        raise ValueError(
            f"{path}: does not say its patch_size, and no two of its patches are {step} px apart, "
            "the greatest common step of its coords: give the coords the attribute "
            "patch_size_level0"
        )
    return lattice


def step_of(path: Path, numbers: Mapping[str, float]) -> int | None:
    """Side of a patch in px of level 0, as the file says it; None where it does not.

    TRIDENT's patch_size is that of its magnification, and patch_size_level0 stands beside it.
    CLAM's is of a level whose downsample stands beside it, of which it takes the whole part.
    """
    for key in ("patch_size_level0", "patch_size"):
        if key not in numbers:
            continue
        size = numbers[key]
        if key == "patch_size":
            downsample = numbers.get("downsample", 1.0)
            if not 1 <= downsample <= MAX_STEP:
                raise ValueError(f"{path}: downsample is {downsample}, allowed is 1 to {MAX_STEP}")
            size *= int(downsample)
        if not 1 <= size <= MAX_STEP or size != int(size):
            raise ValueError(
                f"{path}: {key} is {numbers[key]}, which makes {size} px of level 0, allowed are "
                f"whole numbers from 1 to {MAX_STEP}"
            )
        return int(size)
    return None


def _common_step(path: Path, cells: Index) -> int:
    """The greatest step that all distances along x and y are multiples of."""
    step = int(np.gcd.reduce(cells, axis=None))
    if not 1 <= step <= MAX_STEP:
        raise ValueError(
            f"{path}: does not say its patch_size, and its coords have a common step of {step} px, "
            f"allowed is 1 to {MAX_STEP}: give the coords the attribute patch_size_level0"
        )
    return step


def _check_apart(path: Path, coords: NDArray[Any], lattice: Lattice) -> None:
    """ValueError if two patches are in one cell."""
    cell = lattice.row * lattice.width + lattice.col
    order = np.argsort(cell, kind="stable")
    again = np.flatnonzero(cell[order][1:] == cell[order][:-1])
    if len(again):
        index = int(order[again + 1].min())
        first = int(np.flatnonzero(cell == cell[index])[0])
        raise ValueError(
            f"{path}: {_row(coords, index)}, the same as row {first}, allowed is each patch once"
        )


def _has_neighbours(lattice: Lattice) -> bool:
    """Whether two patches lie edge to edge."""
    for line, along in ((lattice.row, lattice.col), (lattice.col, lattice.row)):
        order = np.lexsort((along, line))
        beside = (np.diff(line[order]) == 0) & (np.diff(along[order]) == 1)
        if beside.any():
            return True
    return False


def _row(coords: NDArray[Any], index: int) -> str:
    x, y = coords[index].tolist()
    return f"row {index} of its coords is x={x}, y={y}"
