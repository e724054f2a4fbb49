"""OME-Zarr images, as small as they can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr

AXES = [
    {"name": "c", "type": "channel"},
    {"name": "y", "type": "space", "unit": "micrometer"},
    {"name": "x", "type": "space", "unit": "micrometer"},
]


def write_zarr(path: Path, pixels: np.ndarray, zarr_format: int, **options: Any) -> None:
    """`pixels` [h, w, bands] and a level of half the size, as an OME-Zarr of 0.5 um/px."""
    group = zarr.open_group(str(path), mode="w", zarr_format=zarr_format)
    datasets = []
    for level, planes in enumerate((pixels, pixels[::2, ::2])):
        planes = np.moveaxis(planes, -1, 0)
        chunks = {"chunks": (1, 64, 64), **options}
        array = group.create_array(str(level), shape=planes.shape, dtype=planes.dtype, **chunks)
        array[:] = planes
        scale = [1, 0.5 * 2**level, 0.5 * 2**level]
        transforms = [{"type": "scale", "scale": scale}]
        datasets.append({"path": str(level), "coordinateTransformations": transforms})
    image = {"version": "0.4", "axes": AXES, "datasets": datasets}
    if zarr_format == 2:
        group.attrs["multiscales"] = [image]
    else:
        group.attrs["ome"] = {"version": "0.5", "multiscales": [image]}
