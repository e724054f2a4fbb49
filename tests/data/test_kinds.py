"""Other pixels than RGB of 8 bits: how they are stored, checked, and made into batches."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from test_store import HEAD, ROW

from axialtrain.data import encode
from axialtrain.data.codec import decode, encode_png
from axialtrain.data.config import DataConfig
from axialtrain.data.kinds import DTYPES, Kind
from axialtrain.data.loader import Loader
from axialtrain.data.region import open_shards
from axialtrain.data.shard import shard_images
from axialtrain.data.store import BlockIndex, Head, Manifest, Tile, max_tile_bytes, tile_member
from axialtrain.data.tile_tiff import encode_tiff
from axialtrain.grid import Rect

RNG = np.random.default_rng(5)
GRADIENT = np.add.outer(np.arange(48.0), np.arange(80.0))[..., None]


def pixels_of(kind: Kind, height: int = 48, width: int = 80) -> np.ndarray:
    noise = RNG.normal(size=(height, width, kind.bands))
    values = np.add.outer(np.arange(height), np.arange(width))[..., None] + 9 * noise
    return (values if kind.dtype == "float32" else values % 256 * 200).astype(kind.dtype)


def shards_of(folder: Path, *images: np.ndarray) -> str:
    paths = []
    for number, pixels in enumerate(images):
        paths.append(folder / f"{number}.tif")
        many = {"planarconfig": "contig"} if pixels.shape[2] > 1 else {}
        plain = pixels if pixels.shape[2] > 1 else pixels[..., 0]
        tifffile.imwrite(paths[-1], plain, tile=(16, 16), photometric="minisblack", **many)
    shard_images(paths, folder / "out", progress=False)
    return str(folder / "out")


def loader(url: str, **config: Any) -> Loader:
    return Loader(
        open_shards(url),
        DataConfig(url, **config),
        patch=16,
        mesh_shape=(1, 1),
        at=(0, 0),
        data_rank=0,
        data_ranks=1,
        batch=1,
        micro_batch=1,
        seed=0,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bands", [1, 2, 3, 4, 5, 64])
def test_tiles_are_kept_without_loss(dtype: str, bands: int) -> None:
    kind = Kind(bands, dtype)
    pixels = pixels_of(kind)
    data = (encode_png if kind.lossless == "png" else encode_tiff)(pixels)
    assert kind.lossless == ("png" if bands <= 4 and dtype != "float32" else "tif")
    got = decode(data, pixels.shape, dtype)
    assert got.dtype == pixels.dtype
    np.testing.assert_array_equal(got, pixels)
    if kind.lossless == "tif":  # which other tools read, too
        theirs = tifffile.imread(io.BytesIO(data))
        np.testing.assert_array_equal(theirs.reshape(pixels.shape), pixels)
    for wrong in ((80, 48, bands), (48, 80, bands + 1)):
        with pytest.raises(ValueError, match="belongs"):
            decode(data, wrong, dtype)
    for other in DTYPES.keys() - {dtype}:
        with pytest.raises(ValueError, match=r"^is (a|no) "):
            decode(data, pixels.shape, other)


def test_floats_keep_their_bits() -> None:
    odd = np.array([0.0, -0.0, 1e-45, 3.4e38, -1.5, np.pi] * 8, np.float32).reshape(4, 6, 2)
    assert decode(encode_tiff(odd), odd.shape, "float32").tobytes() == odd.tobytes()


def test_tiff_that_inflates_to_more_is_refused() -> None:
    pixels = pixels_of(Kind(5, "uint16"))
    data = encode_tiff(pixels)
    bomb = imagecodecs.zlib_encode(bytes(1 << 26))
    entry = data.index(struct.pack("<HHI", 279, 4, 1)) + 8
    start = struct.unpack_from("<I", data, data.index(struct.pack("<HHI", 273, 4, 1)) + 8)[0]
    hostile = bytearray(data[:start]) + bomb
    struct.pack_into("<I", hostile, entry, len(bomb))
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode(bytes(hostile), pixels.shape, "uint16")


def test_damaged_tiff_is_a_value_error() -> None:
    pixels = pixels_of(Kind(5, "float32"), 16, 16)
    whole = encode_tiff(pixels)
    rng = np.random.default_rng(1)
    for _ in range(2000):
        data = bytearray(whole[: rng.integers(4, len(whole))] if rng.random() < 0.2 else whole)
        for at in rng.integers(0, min(len(data), 400), 3):
            data[at] = rng.integers(0, 256)
        try:
            got = decode(bytes(data), pixels.shape, "float32")
        except ValueError:
            continue
        assert (got.shape, got.dtype) == (pixels.shape, pixels.dtype)


def test_records_of_other_kinds_survive_json() -> None:
    row = replace(ROW, bands=5, dtype="float32")
    head = replace(
        HEAD, bands=5, dtype="float32", encoding="tif", masked=True, crs="EPSG:32632",
        transform=(10.0, 0.0, 5e5, 0.0, -10.0, 6e6),
    )  # fmt: skip
    assert Manifest.from_json(Manifest((row,)).to_json(), "m").images == (row,)
    assert Manifest((row,)).digest != Manifest((ROW,)).digest
    assert Head.from_json(head.to_json(), row, 1 << 20, "h") == head
    index = BlockIndex(1, 0, (Tile(8, 1, tile_member(8, 1, "tif"), 5),), None, mask_crc32c=9)
    assert BlockIndex.from_json(index.to_json(), head, 1, 0, "b") == index
    assert index.rasters == {"mask.png": 9}


def test_records_of_rgb_do_not_speak_of_kinds() -> None:
    index = BlockIndex(1, 0, (), 5)
    text = Manifest((ROW,)).to_json() + HEAD.to_json() + index.to_json()
    for key in ("bands", "dtype", "mask", "crs", "transform"):
        assert f'"{key}'.encode() not in text
    assert Head.from_json(HEAD.to_json(), ROW, 1 << 20, "h").kind == ROW.kind == Kind(3, "uint8")
    assert max_tile_bytes(240) == 240 * 240 * 6 + (1 << 16)


@pytest.mark.parametrize(
    ("key", "value"),
    [("bands", 0), ("bands", 65), ("bands", True), ("bands", "3"), ("bands", None),
     ("dtype", "int16"), ("dtype", "object"), ("dtype", None), ("dtype", 3)],
)  # fmt: skip
def test_hostile_kind_in_a_row_is_named(key: str, value: object) -> None:
    data = json.loads(Manifest((ROW,)).to_json())
    data["images"][0][key] = value
    with pytest.raises(ValueError, match=rf"^m: images\[0\]: {key} is .*allowed is"):
        Manifest.from_json(json.dumps(data).encode(), "m")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bands", 4),
        ("dtype", "uint8"),
        ("encoding", "png"),
        ("encoding", "jpg"),
        ("masked", 1),
        ("masked", None),
        ("tile", 2048),
        ("crs", "x" * (1 << 15)),
        ("crs", "EPSG:1\n"),
        ("crs", 4326),
        ("transform", None),
        ("transform", [1, 2, 3]),
        ("transform", [1, 2, 3, 4, 5, "6"]),
        ("transform", [1, 2, 3, 4, 5, 1e301]),
        ("transform", [0] * 7),
    ],
)
def test_hostile_kind_in_a_head_is_named(key: str, value: object) -> None:
    row = replace(ROW, bands=64, dtype="float32")
    data = json.loads(replace(HEAD, bands=64, dtype="float32", encoding="tif").to_json())
    data |= {"crs": "EPSG:4326", "transform": [1, 0, 0, 0, 1, 0]}
    assert Head.from_json(json.dumps(data).encode(), row, 1 << 20, "h").crs == "EPSG:4326"
    data[key] = value
    with pytest.raises(ValueError, match=rf"^h: {key} is "):
        Head.from_json(json.dumps(data).encode(), row, 1 << 20, "h")


def test_hostile_tiles_and_masks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards whose checksums are all right, and whose members are not what they should be."""
    pixels = pixels_of(Kind(2, "float32"))
    pixels[3, 4] = np.nan
    with monkeypatch.context() as patch:
        patch.setattr(encode, "encode_tiff", lambda tile: encode_tiff(tile * np.float32(np.nan)))
        (tmp_path / "nan").mkdir()
        url = shards_of(tmp_path / "nan", pixels)
    with pytest.raises(ValueError, match=r"00\.tif: holds numbers that are not finite"):
        open_shards(url).read("0", 0, 0, 9, 9)
    for name, mask, message in (
        ("values", np.full((48, 80), 7, np.uint8), "holds other values than 0 and 255"),
        ("size", np.zeros((4096, 4096), np.uint8), r"is of shape \(4096, 4096, 1\) where \(48, 80"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(encode, "encode_png", lambda _, mask=mask: encode_png(mask))
            (tmp_path / name).mkdir()
            url = shards_of(tmp_path / name, pixels)
        with pytest.raises(ValueError, match=rf"mask\.png: {message}"):
            open_shards(url).read("0", 0, 0, 9, 9)


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    pixels = pixels_of(Kind(5, "float32"))
    pixels[:9, :9] = np.nan
    digests = set()
    for name in "ab":
        (tmp_path / name).mkdir()
        url = Path(shards_of(tmp_path / name, pixels))
        digests.add(hashlib.sha256((url / "shard-00000.tar").read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (Kind(1, "uint8"), {}),
        (Kind(1, "uint16"), {"mean": [0.25], "std": [0.1]}),
        (Kind(4, "uint16"), {}),
        (Kind(5, "uint16"), {"mean": [0.1, 0.2, 0.3, 0.4, 0.5], "std": 2}),
        (Kind(5, "uint8"), {"mean": 0.5, "std": [1, 2, 3, 4, 5]}),
        (Kind(2, "float32"), {"mean": [-1e4, 273.15], "std": [1e3, 0.5]}),
    ],
    ids=str,
)
def test_batches_are_normalised(tmp_path: Path, kind: Kind, config: dict[str, Any]) -> None:
    pixels = pixels_of(kind)
    if kind.dtype == "float32":
        pixels[2, 3] = np.nan
    batches = loader(shards_of(tmp_path, pixels), **config)
    (batch,) = batches.once()
    full = {"uint8": 255, "uint16": 65535, "float32": 1}[kind.dtype]
    mean, std = np.array(config.get("mean", 0.5)), np.array(config.get("std", 0.25))
    expected = (pixels.astype(np.float64) / full - mean) / std
    there = np.isfinite(expected).all(-1)
    assert batch.pixels.shape == (1, 48, 80, kind.bands)
    np.testing.assert_array_equal(batch.present[0].numpy(), there)
    got = batch.pixels[0].numpy()
    np.testing.assert_allclose(got, np.where(there[..., None], expected, 0), rtol=1e-5, atol=1e-5)


def test_mean_of_floats_may_be_anything_and_of_integers_not(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    url = shards_of(tmp_path / "f", pixels_of(Kind(2, "float32")))
    assert loader(url, mean=[-500, 800]).config.mean == [-500.0, 800.0]
    with pytest.raises(
        ValueError, match=r"^data\.mean is \[1.*allowed is a number, or a list of 2 "
    ):
        loader(url, mean=[1, 2, 3])
    url = shards_of(tmp_path, pixels_of(Kind(2, "uint16")))
    with pytest.raises(ValueError, match=r"^data\.mean is 800\.0, allowed is a number from 0 to 1"):
        loader(url, mean=800)


def test_images_of_a_set_must_be_of_one_kind(tmp_path: Path) -> None:
    url = shards_of(tmp_path, pixels_of(Kind(3, "uint16")), pixels_of(Kind(5, "uint16")))
    shards = open_shards(url)
    assert shards.region("1", Rect(0, 9, 0, 9)).pixels.shape == (9, 9, 5)
    message = (
        r"manifest\.json: image '1' has 5 bands of uint16 and '0' 3 bands of uint16, allowed is one"
    )
    for ask in (lambda: shards.bands, lambda: shards.dtype, lambda: loader(url)):
        with pytest.raises(ValueError, match=message):
            ask()
