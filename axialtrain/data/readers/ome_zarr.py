"""OME-Zarr: folders of chunked arrays with `multiscales` metadata, of zarr formats 2 and 3.

The only file that knows zarr. What a folder may ask of it is checked first: its codecs by name
(among numcodecs' is one that unpickles), its chunks by size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from axialtrain.data.checked import Record, shown
from axialtrain.data.kinds import Raster
from axialtrain.data.readers.reader import (
    TILE,
    Info,
    Tile,
    check_level,
    check_size,
    fits_a_tile,
    kind_of,
    one_line,
    padded,
    window_of,
)

METADATA = ("zarr.json", ".zattrs", ".zgroup")
_MAX_METADATA = 1 << 24  # bytes
_MAX_CHUNK = 1 << 28  # bytes, in memory
_MAX_LEVELS = 64
_CODECS = {"blosc", "zstd", "lz4", "zlib", "gzip", "bz2", "lzma"}  # of format 2
_CODECS |= {"bytes", "crc32c", "transpose", "sharding_indexed"}  # and of format 3
_FILTERS = {"delta", "shuffle"}  # of format 2
_AXES = ("t", "c", "z", "y", "x")
_SEGMENT = r"(?!\.\.?(?:/|$))[A-Za-z0-9._ -]+"
_DATASET = re.compile(rf"{_SEGMENT}(/{_SEGMENT}){{0,7}}")
_UNITS = {"micrometer": 1.0, "micron": 1.0, "nanometer": 1e-3, "millimeter": 1e3}
_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    ImportError,
    MemoryError,
    NotImplementedError,
)


class ZarrSource:
    """A level of an OME-Zarr."""

    def __init__(self, path: Path, level: int) -> None:
        self._path = path
        try:
            _check_folder(path)
            self.info = self._open(level)
        except _ERRORS as error:
            if isinstance(error, ValueError) and str(error).startswith(str(path)):
                raise
            raise ValueError(
                f"{path}: not an OME-Zarr that can be read ({one_line(error)})"
            ) from error

    def _open(self, level: int) -> Info:
        path = self._path
        group = zarr.open_group(str(path), mode="r", use_consolidated=False)
        attributes: dict[str, Any] = dict(group.attrs)
        record = Record.of(attributes.get("ome", attributes), str(path))
        images = record.records("multiscales", _MAX_LEVELS)
        if len(images) != 1:
            raise record.wrong("multiscales", "one image")
        image = images[0]
        axes = [axis.text("name", re.compile("[a-z]"), "t, c, z, y or x") for axis in _axes(image)]
        if axes[-2:] != ["y", "x"] or [axis for axis in _AXES if axis in axes] != axes:
            raise image.wrong("axes", f"some of {', '.join(_AXES)}, in this order, y and x at last")
        datasets = image.records("datasets", _MAX_LEVELS)
        check_level(path, level, len(datasets))
        base, self._array = (
            _array(path, group, each, len(axes)) for each in (datasets[0], datasets[level])
        )
        _check_codecs(path, self._array.metadata.to_dict())
        sizes = dict(zip(axes, self._array.shape, strict=True))
        if sizes.get("t", 1) != 1 or sizes.get("z", 1) != 1:
            raise ValueError(f"{path}: is of {sizes}, allowed is one plane: t and z of 1")
        height, width = sizes["y"], sizes["x"]
        check_size(path, height, width)
        kind = kind_of(path, sizes.get("c", 1), self._array.dtype)
        stored = self._array.shards or self._array.chunks
        if np.prod([float(n) for n in stored]) * kind.numpy.itemsize > _MAX_CHUNK:
            raise ValueError(
                f"{path}: its chunks are {stored}, allowed is up to {_MAX_CHUNK} bytes"
            )
        # All axes before y but the channels' are of size 1.
        self._plane = tuple(slice(None) if axis == "c" else 0 for axis in axes[:-2])
        side, across = self._array.chunks[-2:]
        pixel = [_pixel_size(image, each) for each in (datasets[0], datasets[level])]
        return Info(
            height=height,
            width=width,
            kind=kind,
            tile=side if side == across and fits_a_tile(side, kind) else TILE,
            mpp=pixel[1],
            downsample=max(1.0, max(base.shape[-2:]) / max(height, width)),
            levels=len(datasets),
            masked=kind.dtype == "float32",
        )

    def tile(self, row: int, col: int) -> Tile | None:
        rect = window_of(self.info, row, col)
        at = (*self._plane, slice(rect.top, rect.bottom), slice(rect.left, rect.right))
        try:
            found: Raster = np.asarray(self._array[at], self.info.kind.numpy)
        except _ERRORS as error:
            raise ValueError(
                f"{self._path}: tile row={row} col={col} cannot be read ({one_line(error)})"
            ) from error
        bands = found[..., None] if found.ndim == 2 else np.moveaxis(found, 0, -1)
        return padded(self.info, np.ascontiguousarray(bands))

    def jpeg(self, row: int, col: int) -> bytes | None:
        raise AssertionError("zarr decodes")

    def close(self) -> None:
        """Nothing: zarr opens each chunk when it is read."""


def _check_folder(path: Path) -> None:
    found = [path / name for name in METADATA if (path / name).is_file()]
    if not path.is_dir() or not found:
        raise ValueError(f"{path}: no OME-Zarr, allowed is a folder with {' or '.join(METADATA)}")
    for file in found:
        if file.stat().st_size > _MAX_METADATA:
            raise ValueError(f"{file}: is over {_MAX_METADATA} bytes")


def _array(path: Path, group: zarr.Group, dataset: Record, dims: int) -> zarr.Array[Any]:
    name = dataset.text("path", _DATASET, "a path within the folder")
    array = group[name]
    if not isinstance(array, zarr.Array) or len(array.shape) != dims:
        raise ValueError(f"{path}: {name} is no array of {dims} axes")
    return array


def _axes(image: Record) -> list[Record]:
    """The axes; names alone, as version 0.3 has them, are without units."""
    names = image.items("axes", len(_AXES))
    if all(isinstance(name, str) for name in names):
        return [Record.of({"name": name}, image.where) for name in names]
    return image.records("axes", len(_AXES))


def _check_codecs(path: Path, metadata: dict[str, Any]) -> None:
    """ValueError unless every codec that decoding would call is one of those that are known."""
    filters = metadata.get("filters") or ()
    codecs = [c for c in (metadata.get("compressor"),) if c is not None]
    names = {*(c["id"] for c in codecs), *_names(metadata.get("codecs", ()))}
    wrong = (names - _CODECS) | ({f["id"] for f in filters} - _FILTERS)
    if wrong:
        raise ValueError(
            f"{path}: is coded with {shown(sorted(wrong))}, allowed is "
            f"{', '.join(sorted(_CODECS | _FILTERS))}"
        )


def _names(codecs: Iterable[dict[str, Any]]) -> set[str]:
    """Of codecs, and of those within them."""
    found = set()
    for codec in codecs:
        found.add(codec["name"])
        inner = codec.get("configuration", {})
        found |= _names((*inner.get("codecs", ()), *inner.get("index_codecs", ())))
    return found


def _pixel_size(image: Record, dataset: Record) -> float | None:
    """Micrometres per px along y and x, where both are known and the same."""
    scale = [1.0, 1.0]
    for record in (dataset, image):
        if "coordinateTransformations" not in record.values:
            continue
        for step in record.records("coordinateTransformations", 16):
            if step.values.get("type") == "scale":
                values = step.items("scale", len(_AXES))[-2:]
                if not all(isinstance(value, (int, float)) for value in values):
                    raise step.wrong("scale", "a list of numbers")
                scale = [a * float(str(b)) for a, b in zip(scale, values, strict=True)]
    units = [_UNITS.get(str(axis.values.get("unit"))) for axis in _axes(image)[-2:]]
    if units[0] is None or units[1] is None:
        return None
    y, x = scale[0] * units[0], scale[1] * units[1]
    return y if 1e-3 < y < 1e6 and abs(y - x) <= 0.01 * y else None
