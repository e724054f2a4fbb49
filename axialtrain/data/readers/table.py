"""A table of patches: for each its corner and its features, whatever file it lies in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.kinds import MAX_FEATURES

HDF5, ZIP = b"\x89HDF\r\n\x1a\n", b"PK\3\4"  # what files of either kind begin with
COORDS, FEATURES = "coords", "features"
# What a file may say of its patches in a number each: sizes in px, and micrometres per px.
NUMBERS = ("patch_size_level0", "patch_size", "downsample", "mpp")
MAX_ROWS = 1 << 22
_COORDS_SHAPE, _FEATURES_SHAPE = "[n, 2] or [1, n, 2]", "[n, D] or [1, n, D]"


class Table(Protocol):
    """An open file of patches. Handles belong to the thread and process that opened them.

    coords: integers [n, 2], x and y of each patch's top left corner, px of level 0. width: D.
    numbers: those of NUMBERS that the file has.
    """

    coords: NDArray[Any]
    width: int
    numbers: dict[str, float]

    def lines(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start to stop of the features, [stop - start, D] of float16 or float32."""

    def close(self) -> None: ...


def check_coords(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """How many rows they are; ValueError naming the file if they are no coordinates."""
    if dtype.kind not in "iu":
        raise ValueError(f"{path}: its {COORDS} are {dtype}, allowed are integers")
    rows, width = _plain(path, COORDS, shape, _COORDS_SHAPE)
    if width != 2:
        raise ValueError(f"{path}: its {COORDS} are of shape {shape}, allowed is {_COORDS_SHAPE}")
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"{path}: holds {rows} patches, allowed is 1 to {MAX_ROWS}")
    return rows


def check_features(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], rows: int) -> int:
    """Their width D; ValueError naming the file if they are not the features of `rows` patches."""
    if dtype.kind != "f" or dtype.itemsize not in (2, 4):
        raise ValueError(f"{path}: its {FEATURES} are {dtype}, allowed is float32 or float16")
    found, width = _plain(path, FEATURES, shape, _FEATURES_SHAPE)
    if found != rows:
        raise ValueError(f"{path}: has {found} {FEATURES} and {rows} {COORDS}, allowed is as many")
    if not 1 <= width <= MAX_FEATURES:
        raise ValueError(
            f"{path}: its {FEATURES} have {width} channels, allowed is 1 to {MAX_FEATURES}"
        )
    return width


def _plain(path: Path, name: str, shape: tuple[int, ...], allowed: str) -> tuple[int, int]:
    """`shape` without the batch of one that some tools put in front."""
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 2:
        raise ValueError(f"{path}: its {name} are of shape {shape}, allowed is {allowed}")
    return shape[0], shape[1]
