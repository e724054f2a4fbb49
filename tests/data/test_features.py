"""Tables of patch features: HDF5 or .npz -> shards -> regions, bit by bit; and what is refused."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile

from axialtrain.cli import main
from axialtrain.data.checked import Record
from axialtrain.data.config import DataConfig
from axialtrain.data.kinds import Kind
from axialtrain.data.loader import Loader
from axialtrain.data.readers import hdf5, npz, open_image
from axialtrain.data.readers.features import tile_side
from axialtrain.data.region import open_shards
from axialtrain.data.shard import shard_images
from axialtrain.data.verify import verify
from axialtrain.grid import Rect

RNG = np.random.default_rng(11)
HEIGHT, WIDTH, STEP, D = 37, 45, 224, 9
ORIGIN = np.array([448, 1000])  # px of level 0, x and y
# A slide's tissue: all but a corner, a hole of more than a tile, and single cells.
TISSUE = RNG.random((HEIGHT, WIDTH)) > 0.05
TISSUE[:20, 30:], TISSUE[0, 0], TISSUE[-1, -1] = False, True, True
ROW, COL = np.nonzero(TISSUE)
COORDS = np.stack([COL, ROW], axis=1) * STEP + ORIGIN
GRID = np.where(TISSUE[..., None], RNG.normal(size=(HEIGHT, WIDTH, D)), 0).astype(np.float32)
VECTORS = GRID[ROW, COL]


def write_hdf5(
    path: Path, coords: Any = COORDS, features: Any = VECTORS, **attributes: Any
) -> Path:
    """As TRIDENT does: each row a chunk of its own, what is known on `coords`."""
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("coords", data=coords)
        dataset.attrs["name"] = "slide"
        for name, value in attributes.items():
            dataset.attrs[name] = value
        features = np.asarray(features)
        chunk = (1, *features.shape[1:]) if features.size and features.ndim == 2 else None
        file.create_dataset("features", data=features, chunks=chunk)
    return path


def check(path: Path, out: Path, expected: np.ndarray = GRID, there: np.ndarray = TISSUE) -> Any:
    """Shard `path`, and hold what is read back to `expected`. Returns the head."""
    shard_images([path], out, progress=False)
    assert verify([out], mode="deep", jobs=1, progress=False).count == 0
    shards = open_shards(str(out))
    head = shards.head(path.stem)
    assert shards.kind == Kind(expected.shape[2], "float32") == head.kind
    region = shards.region(path.stem, head.rect)
    assert region.pixels.tobytes() == np.ascontiguousarray(expected).tobytes()
    np.testing.assert_array_equal(region.present, there)
    part = shards.region(path.stem, Rect(-2, 20, 15, 50))
    np.testing.assert_array_equal(part.pixels[2:, : WIDTH - 15], expected[:20, 15:])
    return head


def test_trident_file_becomes_a_grid(tmp_path: Path) -> None:
    path = tmp_path / "slide.h5"
    write_hdf5(path, patch_size=256, patch_size_level0=STEP, mpp=0.25, overlap=0)
    with open_image(path) as image:
        assert (image.name, image.why) == ("features", "HDF5")
        assert (image.height, image.width, image.bands) == (HEIGHT, WIDTH, D)
    head = check(path, tmp_path / "out")
    assert (head.mpp, head.downsample, head.masked, head.tile) == (STEP / 4, STEP, True, 128)


@pytest.mark.parametrize(
    ("width", "side"), [(8, 128), (512, 16), (1024, 16), (2560, 16), (4096, 16)]
)
def test_tiles_are_small_where_vectors_are_long(width: int, side: int) -> None:
    kind = Kind(width, "float32")
    assert tile_side(kind) == side
    assert side * side * kind.pixel_bytes <= 4 << 20


@pytest.mark.parametrize("width", [1024, 4096])
def test_long_vectors_go_through_shards(tmp_path: Path, width: int) -> None:
    """Blocks of several tiles, whose TIFFs have a field of `width` numbers."""
    there = np.zeros((18, 33), np.bool_)
    there[:3, :4] = there[15:, 14:20] = there[17, 32] = True
    row, col = np.nonzero(there)
    grid = np.zeros((18, 33, width), np.float32)
    grid[there] = RNG.normal(size=(len(row), width))
    order = RNG.permutation(len(row))
    coords = np.stack([col, row], axis=1)[order] * 512
    path = write_hdf5(tmp_path / "slide.h5", coords, grid[row, col][order], patch_size=512)
    shard_images([path], tmp_path / "out", progress=False)
    assert verify([tmp_path / "out"], mode="deep", jobs=1, progress=False).count == 0
    region = open_shards(str(tmp_path / "out")).region("slide", Rect(0, 18, 0, 33))
    assert region.pixels.tobytes() == grid.tobytes()
    np.testing.assert_array_equal(region.present, there)
    assert region.tiles_decoded == 5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunks": (100, 4)},
        {"chunks": (64, D), "compression": "gzip"},
        {"chunks": (7, 5), "compression": "gzip", "shuffle": True},
        {"chunks": (2000, D), "compression": "lzf", "shuffle": True, "maxshape": (None, D)},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2"])
def test_every_layout_of_hdf5_is_read(
    tmp_path: Path, options: dict[str, Any], batch: bool, dtype: str
) -> None:
    path = tmp_path / "slide.hdf5"
    options = {"chunks": (10, 2), **options} if "maxshape" in options else dict(options)
    if batch:
        options |= {key: (1, *options[key]) for key in ("chunks", "maxshape") if key in options}
    vectors = VECTORS.astype(dtype)
    with h5py.File(path, "w") as file:
        data = vectors[None] if batch else vectors
        file.create_dataset("features", data=data, dtype=dtype, **options)
        file.create_dataset("coords", data=COORDS.astype(">i4"), chunks=(50, 1), compression="gzip")
    with open_image(path) as image:  # whose step is the greatest that all coords share
        got = image.read(Rect(0, HEIGHT, 0, WIDTH))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got[ROW, COL], vectors.astype(np.float32))
    np.testing.assert_array_equal(got[~TISSUE], 0)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_npz_becomes_the_same_grid(tmp_path: Path, save: Callable[..., None], dtype: str) -> None:
    path, vectors = tmp_path / "slide.npz", VECTORS.astype(dtype)
    order = RNG.permutation(len(vectors))
    features = np.asfortranarray(vectors[order])
    save(path, coords=COORDS[order], features=features, patch_size_level0=STEP, mpp=0.5)
    grid = np.zeros_like(GRID)
    grid[ROW, COL] = vectors
    head = check(path, tmp_path / "out", grid)
    assert head.mpp == STEP / 2


def test_numbers_that_are_not_finite_are_missing(tmp_path: Path) -> None:
    vectors = VECTORS.copy()
    vectors[5, 3], vectors[700, 0] = np.nan, np.inf
    grid, there = GRID.copy(), TISSUE.copy()
    for row in (5, 700):
        grid[ROW[row], COL[row]], there[ROW[row], COL[row]] = 0, False
    check(write_hdf5(tmp_path / "slide.h5", features=vectors), tmp_path / "out", grid, there)


def test_same_table_gives_the_same_bytes(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "slide.h5")
    digests = set()
    for name in "ab":
        shard_images([path], tmp_path / name, progress=False)
        data = (tmp_path / name / "shard-00000.tar").read_bytes()
        digests.add(hashlib.sha256(data).hexdigest())
    assert len(digests) == 1


def test_command_takes_labels_and_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, labels = write_hdf5(tmp_path / "slide.h5"), tmp_path / "labels.tif"
    raster = RNG.integers(0, 4, (HEIGHT, WIDTH), np.uint8)
    tifffile.imwrite(labels, raster, tile=(16, 16))
    arguments = ["shard", path, "--out", tmp_path / "out", "--labels", labels]
    arguments += ["--image-labels", 3, "--reader", "features"]
    assert main(list(map(str, arguments))) == 0
    assert "1 read with features: asked for" in capsys.readouterr().out
    shards = open_shards(str(tmp_path / "out"))
    assert (shards.classes, shards.image_classes) == (4, 4)
    region = shards.region("slide", Rect(0, HEIGHT, 0, WIDTH))
    np.testing.assert_array_equal(region.labels, np.where(TISSUE, raster, 255))
    loader = Loader(
        shards,
        DataConfig(str(tmp_path / "out"), mean=[0.5] * D, std=2),
        patch=1,
        mesh_shape=(1, 2),
        at=(0, 1),
        data_rank=0,
        data_ranks=1,
        batch=1,
        micro_batch=1,
        seed=0,
    )
    (batch,) = loader.once()
    here = np.s_[:, batch.place.rect.left :]
    np.testing.assert_array_equal(batch.valid[0].numpy(), TISSUE[here])
    expected = np.where(TISSUE[..., None], (GRID - 0.5) / 2, 0)[here]
    np.testing.assert_allclose(batch.pixels[0].numpy(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("attributes", "step"),
    [
        ({}, STEP),
        ({"patch_size": STEP}, STEP),
        ({"patch_size": float(STEP // 4), "downsample": (4.0002, 4.0001)}, STEP),
        ({"patch_size": 256, "patch_size_level0": STEP // 2}, STEP // 2),
        ({"patch_size": "large"}, STEP),
    ],
    ids=str,
)
def test_step_is_what_the_file_says(tmp_path: Path, attributes: dict[str, Any], step: int) -> None:
    with open_image(write_hdf5(tmp_path / "slide.h5", **attributes)) as image:
        assert image.downsample == step
        assert image.height == (HEIGHT - 1) * STEP // step + 1
        assert image.mpp is None


def moved(row: int, x: int, y: int) -> np.ndarray:
    """COORDS with a patch elsewhere."""
    coords = COORDS.copy()
    coords[row] = x, y
    return coords


X, Y = COORDS[7]
OFF = r"row {} of its coords is x=\d+, y=\d+, which is not on the grid of {} px"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "off the grid": (
        {"coords": moved(7, X, Y + 1), "patch_size": STEP}, OFF.format(7, STEP)
    ),
    "overlap": ({"patch_size": 2 * STEP}, OFF.format(r"\d", 2 * STEP)),
    "twice": (
        {"coords": moved(9, X, Y), "patch_size": STEP},
        r"row 9 of its coords is .*, the same as row 7, allowed is each patch once",
    ),
    "negative": ({"coords": moved(7, -STEP, Y)}, "row 7 of its coords is x=-224, .*0 or more"),
    "far": ({"coords": moved(3, 1 << 50, Y)}, "row 3 of its coords is x=.*allowed is up to"),
    "unsigned": (
        {"coords": moved(3, -1, Y).astype(np.uint64)}, "row 3 of its coords is x=18446744073709551"
    ),
    "too large a grid": (
        {"coords": moved(3, X + (STEP << 21), Y), "patch_size": STEP}, "px, allowed is up to"
    ),
    "several grids": ({"coords": moved(7, X + 3, Y)}, "does not say its patch_size, and no two"),
    "one patch": ({"coords": COORDS[:1], "features": VECTORS[:1]}, "a common step of 0 px"),
    "none": ({"coords": COORDS[:0], "features": VECTORS[:0]}, "holds 0 patches, allowed is 1 to"),
    "floats": ({"coords": COORDS / 2}, "its coords are float64, allowed are integers"),
    "NaN": ({"coords": COORDS * np.nan}, "its coords are float64, allowed are integers"),
    "three": ({"coords": np.c_[COORDS, COL]}, r"its coords are of shape .* allowed is \[n, 2\]"),
    "flat": ({"coords": COORDS.ravel()}, r"its coords are of shape .* allowed is \[n, 2\]"),
    "batch": ({"features": np.stack([VECTORS] * 2)}, r"its features are of shape \(2, "),
    "fewer": ({"features": VECTORS[1:]}, r"has \d+ features and \d+ coords, allowed is as many"),
    "integers": ({"features": VECTORS.astype(int)}, "its features are int64, allowed is float32"),
    "doubles": ({"features": VECTORS.astype(float)}, "its features are float64, allowed is"),
    "no channel": ({"features": VECTORS[:, :0]}, "have 0 channels, allowed is 1 to 4096"),
    "too wide": (
        {"coords": COORDS[:2], "features": np.zeros((2, 4097), np.float32)},
        "have 4097 channels, allowed is 1 to 4096",
    ),
    "half a px": ({"patch_size": 0.5}, r"patch_size is 0\.5, which makes .* from 1 to 65536"),
    "huge patches": ({"patch_size": 1e300}, "patch_size is 1e"),
    "no size": ({"patch_size_level0": np.nan}, "patch_size_level0 is nan"),
    "no downsample": ({"patch_size": 256, "downsample": 0.0}, r"downsample is 0\.0, allowed is 1"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("kind", ["h5", "npz"])
def test_bad_tables_are_named(tmp_path: Path, kind: str, what: str) -> None:
    arrays, message = BAD[what]
    path = tmp_path / f"slide.{kind}"
    if kind == "h5":
        write_hdf5(path, **arrays)
    else:
        np.savez(path, **{"coords": COORDS, "features": VECTORS, **arrays})
    with pytest.raises(ValueError, match=rf"slide\.{kind}: .*{message}"):
        shard_images([path], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_names_and_levels_that_are_not_there(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "a.h5")
    with pytest.raises(ValueError, match=r"a\.h5: level is 1, allowed is 0 to 0"):
        open_image(path, level=1)
    with h5py.File(path, "a") as file:
        del file["features"]
    with pytest.raises(ValueError, match=r"a\.h5: has no dataset 'features', allowed are coords"):
        open_image(path)
    np.savez(tmp_path / "a.npz", coords=COORDS)
    with pytest.raises(ValueError, match=r"a\.npz: has no array 'features', allowed are coords"):
        open_image(tmp_path / "a.npz")
    (tmp_path / "a.txt").write_text("coords")
    with pytest.raises(ValueError, match=r"a\.txt: is no HDF5 and no \.npz"):
        open_image(tmp_path / "a.txt", reader="features")


def test_hdf5_opens_no_other_file(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "other.h5")
    VECTORS.tofile(tmp_path / "raw")
    source = h5py.VirtualSource(tmp_path / "other.h5", "features", VECTORS.shape)
    layout = h5py.VirtualLayout(VECTORS.shape, np.float32)
    layout[:] = source
    for put, message in (
        (lambda f: f.__setitem__("features", h5py.ExternalLink("other.h5", "features")), "a link"),
        (lambda f: f.__setitem__("features", h5py.SoftLink("/coords")), "a link"),
        (lambda f: f.create_group("features"), "no dataset"),
        (lambda f: f.create_virtual_dataset("features", layout), "lies in other files"),
        (
            lambda f: f.create_dataset(
                "features", VECTORS.shape, "f4", external=[("raw", 0, VECTORS.nbytes)]
            ),
            "lies in other files",
        ),
    ):
        path = tmp_path / "a.h5"
        with h5py.File(path, "w") as file:
            file["coords"] = COORDS
            put(file)
        with pytest.raises(ValueError, match=rf"a\.h5: its 'features' (is )?{message}"):
            open_image(path)


def test_hdf5_cannot_ask_for_more_than_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.h5"

    def table(shape: tuple[int, ...] = VECTORS.shape, **options: Any) -> h5py.File:
        file = h5py.File(path, "w")
        file["coords"] = COORDS
        file.create_dataset("features", shape, "f4", **options)
        return file

    bomb = zlib.compress(bytes(1 << 26), 9)
    with table(chunks=(len(VECTORS), D), compression="gzip") as file:
        file["features"].id.write_direct_chunk((0, 0), bomb)
    with open_image(path) as image, pytest.raises(ValueError, match=r"rows .* cannot be read"):
        image.tile_at(0, 0)
    with table(chunks=(len(VECTORS), D)) as file:
        file["features"].id.write_direct_chunk((0, 0), bytes(1 << 20))
    with open_image(path) as image, pytest.raises(ValueError, match=r"rows .* cannot be read"):
        image.tile_at(0, 0)
    table(chunks=(16, D)).close()  # nothing was ever written
    with open_image(path) as image, pytest.raises(ValueError, match=r"rows .* cannot be read"):
        image.tile_at(0, 0)
    table().close()
    with pytest.raises(ValueError, match=r"take 0 bytes, which is not their size"):
        open_image(path)
    with table(chunks=(16, D), compression="gzip", fletcher32=True):
        pass
    with pytest.raises(ValueError, match=r"filter 'fletcher32', allowed are gzip, lzf, shuffle"):
        open_image(path)
    monkeypatch.setattr(hdf5, "_MAX_CHUNK", 4 * D * 100)
    table(chunks=(101, D)).close()
    with pytest.raises(ValueError, match=r"chunks of its features are \(101, 9\), allowed is up"):
        open_image(path)
    with h5py.File(path, "w") as file:
        file.create_dataset("coords", (1 << 40, 2), "i8", chunks=(1 << 10, 2))
        file["features"] = VECTORS
    with pytest.raises(ValueError, match=r"holds 1099511627776 patches, allowed is 1 to 4194304"):
        open_image(path)


@pytest.mark.parametrize(("bands", "dtype"), [(4097, "float32"), (65, "uint16"), (65, "uint8")])
def test_only_floats_may_have_many_bands(bands: int, dtype: str) -> None:
    record = Record.of({"bands": bands, "dtype": dtype}, "m")
    with pytest.raises(ValueError, match=rf"^m: bands is {bands}, allowed is an integer from 1 to"):
        Kind.from_record(record)
    assert Kind.from_record(Record.of({"bands": 4096, "dtype": "float32"}, "m")).bands == 4096


def npy(descr: str, shape: str, data: bytes = b"") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data


def zipped(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return path


def test_hostile_npz_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = io.BytesIO()
    np.save(good, COORDS)
    coords = good.getvalue()
    n, path = len(COORDS), tmp_path / "a.npz"
    evil = pickle.dumps(np.array([print], dtype=object))
    for features, message in (
        (npy("'|O'", f"({n}, {D})", evil), "its features are object, allowed are numbers"),
        (npy("'<f4'", f"({n}, {1 << 40})"), r"which take \d+ bytes, and it holds 0"),
        (npy("'<f4'", f"({n}, {D})", bytes(n * D * 4 + 1)), r"which take \d+ bytes, and it holds"),
        (npy("'<f4'", f"(-{n}, -{D})", bytes(n * D * 4)), "allowed are numbers"),
        (npy("'<f4'", "(" * 3000), "not an .npz that can be read"),
        (npy("[('a', '<f4')]", f"({n}, {D})", bytes(n * D * 4)), "are .*, allowed is float32"),
        (npy("'<f4'", f"({n}, {D})")[:20], "not an .npz that can be read"),
        (b"", "not an .npz that can be read"),
        (evil, "not an .npz that can be read"),
    ):
        zipped(path, coords=coords, features=features)
        with pytest.raises(ValueError, match=rf"a\.npz: .*{message}"):
            open_image(path)
    zipped(path, coords=npy("'<i8'", f"({1 << 28}, 2)"), features=b"")
    with pytest.raises(ValueError, match=r"a\.npz: its coords are of shape"):
        open_image(path)
    monkeypatch.setattr(npz, "MAX_BYTES", VECTORS.nbytes - 1)
    np.savez_compressed(path, coords=COORDS, features=np.zeros_like(VECTORS))  # a bomb
    with pytest.raises(ValueError, match=r"a\.npz: its features take \d+ bytes, allowed in an"):
        open_image(path)


def test_zip_that_lists_too_much_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.npz", **{f"member_{n}": b"" for n in range(2000)})
    with pytest.raises(ValueError, match=r"a\.npz: lists more than 65536 bytes"):
        open_image(path)


@pytest.mark.parametrize("kind", ["h5", "npz"])
def test_damaged_and_cut_tables_are_a_value_error(tmp_path: Path, kind: str) -> None:
    whole, path = tmp_path / f"whole.{kind}", tmp_path / f"a.{kind}"
    coords, vectors = COORDS[:40], VECTORS[:40]
    if kind == "h5":
        write_hdf5(whole, coords, vectors, patch_size=STEP)
    else:
        np.savez_compressed(whole, coords=coords, features=vectors)
    data, rng, wrong = whole.read_bytes(), np.random.default_rng(2), 0
    for case in range(120):
        changed = bytearray(data[: rng.integers(8, len(data))] if case % 4 == 0 else data)
        for at in rng.integers(4, len(changed), 3):
            changed[at] = rng.integers(0, 256)
        path.write_bytes(changed)
        try:
            with open_image(path, reader="features") as image:
                image.read(Rect(0, min(image.height, 50), 0, min(image.width, 50)))
        except ValueError as error:
            assert str(error).startswith(str(path))
            wrong += 1
    assert wrong > 30


def test_h5py_that_is_absent_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.delitem(sys.modules, "axialtrain.data.readers.hdf5")
    write = tmp_path / "a.h5"
    write.write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"the extra features \(launch/install\.sh features\)"):
        open_image(write)
    np.savez(tmp_path / "a.npz", coords=COORDS, features=VECTORS)
    with open_image(tmp_path / "a.npz") as image:  # which needs none
        assert image.height == HEIGHT
