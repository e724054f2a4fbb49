"""What `from axialtrain.data import open_shards` gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tifffile

import axialtrain.data
from axialtrain.data import Region, Shards, open_shards
from axialtrain.data import region as region_module
from axialtrain.data.block import Block
from axialtrain.data.shard import shard_images
from axialtrain.grid import Rect

if TYPE_CHECKING:
    from conftest import Source


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_face_needs_no_torch_and_the_room_no_codecs() -> None:
    face = loaded_by("from axialtrain.data import Region, Shards, open_shards")
    assert "axialtrain.data.region" in face
    assert not face & {"torch", "webdataset", "rasterio", "zarr", "openslide", "matplotlib"}
    assert not loaded_by("import axialtrain.data") & {"numpy", "fsspec", "tifffile", "imagecodecs"}


def test_the_face_is_what_it_names() -> None:
    assert (open_shards, Shards, Region) == (
        region_module.open_shards,
        region_module.Shards,
        region_module.Region,
    )
    with pytest.raises(AttributeError, match="has no attribute 'open_shard'"):
        axialtrain.data.open_shard  # noqa: B018


def test_images_say_name_size_levels_and_kind(source: Source) -> None:
    shards = open_shards(source.url)
    assert [(row.name, row.levels) for row in shards.images] == [
        ("wide", ((200, 300),)),
        ("small", ((70, 50),)),
        ("tall", ((257, 97),)),
    ]
    assert {(row.bands, row.dtype, row.classes, row.label) for row in shards.images} == {
        (3, "uint8", 6, None)
    }
    sizes = {path.name: path.stat().st_size for path in Path(source.url).glob("*.tar")}
    assert shards.shard_sizes() == sizes


@pytest.mark.parametrize(("y", "x"), [(-9, -20), (180, 290), (400, 0), (10, 20)])
def test_outside_of_the_image_is_padding_and_the_mask_says_so(
    numbered: Source, y: int, x: int
) -> None:
    shards = open_shards(numbered.url)
    here = ("wide", y, x, 40, 50)

    def padded(raster: np.ndarray, fill: int) -> np.ndarray:
        around = [(100, 500), (100, 500)] + [(0, 0)] * (raster.ndim - 2)
        return np.pad(raster, around, constant_values=fill)[100 + y :, 100 + x :][:40, :50]

    pixels, mask = shards.read(*here), shards.read_mask(*here)
    assert (pixels.dtype, mask.dtype) == (np.uint8, np.bool_)
    np.testing.assert_array_equal(pixels, padded(numbered.pixels["wide"], 0))
    np.testing.assert_array_equal(mask, padded(np.ones((200, 300), bool), 0))
    np.testing.assert_array_equal(shards.read_labels(*here), padded(numbered.labels["wide"], 255))
    numbers = shards.read_instances(*here, level=0)
    np.testing.assert_array_equal(numbers, padded(numbered.instances["wide"], 0))
    assert shards.read_mask("wide", y, x, 0, 5).shape == (0, 5)


def test_only_stored_levels_are_read(source: Source, tmp_path: Path) -> None:
    shards = open_shards(source.url)
    np.testing.assert_array_equal(
        shards.read("small", 0, 0, 70, 50, level=0), source.pixels["small"]
    )
    for read in (shards.read, shards.read_mask, shards.read_labels, shards.read_instances):
        for level in (1, -1):
            with pytest.raises(
                ValueError,
                match=rf"level is {level}, allowed is what is stored of 'small': 0 \(70 x 50 px\)",
            ):
                read("small", 0, 0, 5, 5, level=level)
        with pytest.raises(ValueError, match="image is 'none', allowed are wide, small, tall"):
            read("none", 0, 0, 5, 5)
        with pytest.raises(ValueError, match="height, width is 5, -1, allowed is 0 or more"):
            read("small", 0, 0, 5, -1)
    # The coarser level of a pyramid that is stored is level 0 of the shards.
    pixels = np.zeros((64, 64, 3), np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(pixels, tile=(16, 16), photometric="rgb", subifds=1)
        tiff.write(pixels[::2, ::2] + 7, tile=(16, 16), photometric="rgb", subfiletype=1)
    shard_images([tmp_path / "a.tif"], tmp_path / "out", level=1, progress=False)
    coarse = open_shards(str(tmp_path / "out"))
    assert coarse.images[0].levels == ((32, 32),)
    assert coarse.head("a").level == 1
    assert (coarse.read("a", 0, 0, 32, 32) == 7).all()


def test_mask_of_a_masked_image_decodes_no_tile(
    masked: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = open_shards(masked.url)
    rect = Rect(-5, 300, -5, 310)
    expected = shards.region("a", rect).present
    assert 0 < expected.sum() < masked.pixels["a"][..., 0].size
    monkeypatch.setattr(Block, "paint_pixels", None)
    got = shards.read_mask("a", rect.top, rect.left, rect.height, rect.width)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("tail", [512, 1 << 10, 1 << 13, 1 << 30])
def test_indexes_are_those_in_the_blocks(
    numbered: Source, masked: Source, monkeypatch: pytest.MonkeyPatch, tail: int
) -> None:
    monkeypatch.setattr(region_module, "TAIL", tail)
    monkeypatch.setattr(region_module, "TAILS", 3 * tail)
    for url in (numbered.url, masked.url):
        shards = open_shards(url)
        for row in shards.images:
            head = shards.head(row.name)
            data = (Path(url) / row.shard).read_bytes()
            expected = [
                Block.parse(data[b.offset : b.offset + b.length], head, b, "p").index
                for b in head.blocks
            ]
            assert shards.indexes(row.name, head.blocks) == expected
            assert shards.indexes(row.name, head.blocks[::-1]) == expected[::-1]
            assert shards.indexes(row.name, []) == []
