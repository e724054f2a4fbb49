"""What no reader takes: in one sentence, before memory is taken, and without trust."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from zarrs import write_zarr

from axialtrain.data.readers import READERS, open_image
from axialtrain.data.shard import shard_images
from axialtrain.grid import Rect

NOISE = np.random.default_rng(3).integers(0, 65536, (150, 200, 5), np.uint16)
SMOOTH = (np.add.outer(np.arange(150), np.arange(200))[..., None] // np.array([2, 3, 4])).astype(
    np.uint8
)


@pytest.mark.parametrize(
    ("reader", "extra"), [("openslide", "slides"), ("rasterio", "geo"), ("zarr", "zarr")]
)
def test_library_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str, extra: str
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, SMOOTH, photometric="rgb")
    modules = {"openslide": "slide", "rasterio": "geo", "zarr": "ome_zarr"}
    monkeypatch.setitem(sys.modules, reader, None)
    monkeypatch.delitem(sys.modules, f"axialtrain.data.readers.{modules[reader]}", raising=False)
    message = (
        rf"a\.tif: {reader} is not installed .*the extra {extra} \(launch/install\.sh {extra}\)"
    )
    with pytest.raises(ValueError, match=message):
        open_image(path, reader=reader)
    if reader == "rasterio":
        with pytest.raises(ValueError, match=r"tifffile: not tiled.*rasterio: rasterio is not ins"):
            open_image(path)


@pytest.mark.parametrize("reader", READERS)
def test_each_reader_refuses_in_one_sentence(tmp_path: Path, reader: str) -> None:
    (tmp_path / "junk.tif").write_bytes(b"nothing" * 100)
    (tmp_path / "folder").mkdir()
    for name in ("junk.tif", "folder", "missing.tif", "x" * 300):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            open_image(tmp_path / name, reader=reader)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reader", ["tifffile", "rasterio"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint32, np.float64])
def test_other_types_are_refused(tmp_path: Path, reader: str, dtype: type[np.generic]) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, SMOOTH[..., 0].astype(dtype), tile=(64, 64))
    message = rf"a\.tif: its pixels are {np.dtype(dtype).name}, allowed is uint8 .* or uint16: conv"
    with pytest.raises(ValueError, match=message):
        open_image(path, reader=reader)


def _change(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_bytes())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("0/.zarray", lambda d: d.update(filters=[{"id": "pickle"}]), "pickle"),
        ("0/.zarray", lambda d: d.update(compressor={"id": "pickle"}), "pickle"),
        ("0/.zarray", lambda d: d.update(filters=[{"id": "base64"}]), "is coded with .*base64"),
        ("0/.zarray", lambda d: d.update(compressor={"id": "base64"}), "is coded with .*base64"),
        ("0/.zarray", lambda d: d.update(chunks=[5, 1 << 19, 1 << 19]), "its chunks are .*allowed"),
        ("0/.zarray", lambda d: d.update(shape=[5, 1 << 31, 1 << 31]), "allowed is up to 1048576"),
        ("0/.zarray", lambda d: d.update(shape=[65, 150, 200]), "65 bands, allowed is 1 to 64"),
        ("0/.zarray", lambda d: d.update(dtype="|O"), "not an OME-Zarr that can"),
        ("0/.zarray", lambda d: d.update(dtype="<i8"), "its pixels are int64, allowed"),
        (".zattrs", lambda d: d.pop("multiscales"), "multiscales is missing"),
        (".zattrs", lambda d: d["multiscales"].append({}), "multiscales is .*allowed is one image"),
        (".zattrs", lambda d: d["multiscales"][0].pop("axes"), "axes is missing"),
        (".zattrs", lambda d: d["multiscales"][0]["axes"].reverse(), "axes is .*in this order"),
        (
            ".zattrs",
            lambda d: d["multiscales"][0]["datasets"][0].update(path="../b.zarr/0"),
            "path is .*allowed is a path within the folder",
        ),
        (
            ".zattrs",
            lambda d: d["multiscales"][0]["datasets"][0].update(path="/etc"),
            "path is .*allowed is a path within the folder",
        ),
    ],
)
def test_hostile_zarr_is_refused(
    tmp_path: Path, file: str, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = tmp_path / "a.zarr"
    write_zarr(path, NOISE, 2)
    shutil.copytree(path, tmp_path / "b.zarr")
    _change(path / file, change)
    with pytest.raises(ValueError, match=rf"^{path}.*{message}"):
        open_image(path)


def test_zarr_never_unpickles(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    write_zarr(path, NOISE, 2)
    _change(path / "0/.zarray", lambda d: d.update(filters=[{"id": "pickle"}], compressor=None))

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    for chunk in (path / "0").glob("0*"):
        chunk.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="pickle"), open_image(path) as image:
        image.tile_pixels(0, 0)
    assert not (tmp_path / "sprung").exists()


def test_links_in_a_zarr_are_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    write_zarr(path, NOISE, 2)
    chunk = path / "0" / "0.0.0"
    chunk.unlink()
    chunk.symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"0\.0\.0: is a link, allowed in the folder of an image"):
        shard_images([path], tmp_path / "out", progress=False)


def test_png_that_would_take_the_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(SMOOTH).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (60_000).to_bytes(4) * 2
    path.write_bytes(data)
    with pytest.raises(ValueError, match="60000 x 60000 px, which take 10800000000 bytes, allowed"):
        open_image(path)


@pytest.mark.parametrize("reader", ["rasterio", "image"])
def test_damaged_file_is_a_value_error(tmp_path: Path, reader: str) -> None:
    path = tmp_path / "a"
    if reader == "rasterio":
        tifffile.imwrite(path, NOISE[..., :3], photometric="rgb", compression="zlib")
    else:
        Image.fromarray(SMOOTH).save(path, "PNG")
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(60):
        data = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.3 else whole)
        for at in rng.integers(0, min(len(data), 1500), 4):
            data[at] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            with open_image(path, reader=reader) as image:
                image.read(Rect(0, min(image.height, 300), 0, min(image.width, 300)))
        except ValueError as error:
            assert str(path) in str(error)
