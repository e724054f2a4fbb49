"""Which reader an image is opened with.

`auto` goes by what the first bytes say, not by what a file is called, where they say anything.
Among several it takes the first that does not decline; why the ones before it did is kept.
Libraries are imported by the reader that needs them, and only then.
"""

from __future__ import annotations

from pathlib import Path

from axialtrain.data.readers.reader import Reader, Source, Unfit
from axialtrain.data.readers.table import HDF5, ZIP

READERS = ("tifffile", "openslide", "rasterio", "zarr", "image", "features")
AUTO = "auto"
# Of pyproject.toml.
_EXTRAS = {"openslide": "slides", "rasterio": "geo", "zarr": "zarr", "features": "features"}
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PLAIN = {b"\x89PNG\r\n\x1a\n": "a PNG", b"\xff\xd8\xff": "a JPEG"}
_GEO = {b"\0\0\0\x0cjP  ": "JPEG 2000"}
_TABLES = {HDF5: "HDF5", ZIP: "a zip, as .npz is"}
_DICOM, _DICOM_AT = b"DICM", 128
# Of slides whose first bytes say nothing, or something else (an MRXS begins as a JPEG).
_SLIDES = (".mrxs", ".vms", ".vmu", ".czi", ".scn", ".bif", ".ndpi", ".svslide")


def open_image(path: str | Path, level: int = 0, reader: str = AUTO) -> Reader:
    """The image at `path`, at `level` of its pyramid (0 is the finest).

    reader: one of READERS, or "auto". ValueError, naming the file, what was tried and what can be
    done, for what is no image, or none that can be read by tiles.
    """
    return _open(Path(path), level, reader, indices=False)


def open_raster(path: str | Path) -> Reader:
    """The raster of labels or instance numbers at `path`: of a palette, the indices.

    ValueError as `open_image` has it.
    """
    return _open(Path(path), 0, AUTO, indices=True)


def _open(path: Path, level: int, reader: str, *, indices: bool) -> Reader:
    if reader not in (AUTO, *READERS):
        raise ValueError(f"reader is {reader!r}, allowed are {', '.join((AUTO, *READERS))}")
    if not _may_exist(path):
        raise ValueError(f"{path}: there is no such file")
    if reader != AUTO:
        return _reader(path, _source(reader, path, level, indices), reader, ["asked for"])
    names, why = _candidates(path)
    declined: list[Unfit] = []
    for name in names:
        try:
            source = _source(name, path, level, indices)
        except Unfit as error:
            declined.append(error)
        else:
            reasons = [f"not {n}: {e.reason}" for n, e in zip(names, declined, strict=False)]
            return _reader(path, source, name, [why, *reasons])
    if len(declined) == 1:
        raise declined[0]
    tried = "; ".join(
        f"{name}: {str(error).removeprefix(f'{path}: ')}"
        for name, error in zip(names, declined, strict=True)
    )
    raise ValueError(f"{path}: no reader takes it ({tried})") from declined[0]


def _reader(path: Path, source: Source, name: str, why: list[str]) -> Reader:
    if source.info.opacity:  # GDAL calls a fourth band one where it is not told otherwise
        why = [*why, "its last band is an opacity, which says what is missing"]
    return Reader(path, source, name, "; ".join(why))


def _candidates(path: Path) -> tuple[tuple[str, ...], str]:
    """(readers that may take `path`, best first; what it seems to be)."""
    try:
        if path.is_dir() and (path.suffix == ".zarr" or _has_zarr(path)):
            return ("zarr",), "a folder with zarr's metadata"
        with path.open("rb") as file:
            start = file.read(_DICOM_AT + len(_DICOM))
    except OSError:
        return ("tifffile",), "cannot be read"  # which tifffile then says
    if path.suffix.lower() in _SLIDES:
        return ("openslide",), f"named as a slide ({path.suffix})"
    if start.startswith(_TIFF):
        return ("tifffile", "openslide", "rasterio"), "a TIFF"
    if start[_DICOM_AT:] == _DICOM:
        return ("openslide",), "DICOM"
    for reader, kinds in (("image", _PLAIN), ("rasterio", _GEO), ("features", _TABLES)):
        for magic, kind in kinds.items():
            if start.startswith(magic):
                return (reader,), kind
    return ("tifffile",), "of an unknown kind"


def _may_exist(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, say: its reader tells
        return True


def _has_zarr(path: Path) -> bool:
    return any((path / name).is_file() for name in ("zarr.json", ".zattrs", ".zgroup"))


def _source(name: str, path: Path, level: int, indices: bool) -> Source:
    """The level over the library of reader `name`."""
    try:
        if name == "tifffile":
            from axialtrain.data.readers.tiff import TiffSource

            return TiffSource(path, level, indices=indices)
        if name == "openslide":
            from axialtrain.data.readers.slide import SlideSource

            return SlideSource(path, level)
        if name == "rasterio":
            from axialtrain.data.readers.geo import GeoSource

            return GeoSource(path, level, indices=indices)
        if name == "zarr":
            from axialtrain.data.readers.ome_zarr import ZarrSource

            return ZarrSource(path, level)
        if name == "features":
            from axialtrain.data.readers.features import FeatureSource

            return FeatureSource(path, level)
        from axialtrain.data.readers.plain import PlainSource

        return PlainSource(path, level, indices=indices)
    except ImportError as error:
        extra = _EXTRAS.get(name)
        if extra is None:
            raise
        raise Unfit(
            path,
            f"{name} is not installed here ({error})",
            f"install the extra {extra} (launch/install.sh {extra}), which may read it",
        ) from error
