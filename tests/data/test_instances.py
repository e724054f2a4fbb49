"""Instance rasters all the way: image and rasters -> shards -> regions -> batches."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded import loader_of

from axialtrain.cli import main
from axialtrain.data import encode
from axialtrain.data.codec import encode_png
from axialtrain.data.config import DataConfig
from axialtrain.data.loader import Loader
from axialtrain.data.region import open_shards
from axialtrain.data.scene import draw_scene
from axialtrain.data.shard import shard_images
from axialtrain.data.store import MANIFEST, UNLABELLED
from axialtrain.grid import Rect

if TYPE_CHECKING:
    from conftest import Source


@pytest.fixture
def copy(numbered: Source, tmp_path: Path) -> Path:
    """The shards in a folder of the test's own, to be damaged."""
    return Path(shutil.copytree(numbered.url, tmp_path / "copy"))


def loader(url: str, window: list[int] | None = None, **changes: Any) -> Loader:
    return loader_of(DataConfig(url, window=window), **{"batch": 3, **changes})


def test_largest_instance_of_each_image_is_kept(numbered: Source) -> None:
    shards = open_shards(numbered.url)
    largest = {name: int(numbers.max()) for name, numbers in numbered.instances.items()}
    assert largest["wide"] == 65535
    assert {row.name: row.instances for row in shards.images} == largest
    assert {name: shards.head(name).instances for name in largest} == largest
    assert shards.has_instances


def test_instances_change_nothing_else(numbered: Source, source: Source) -> None:
    ours, theirs = open_shards(numbered.url), open_shards(source.url)
    assert (ours.classes, ours.has_labels, theirs.has_instances) == (6, True, False)
    for name in source.pixels:
        a, b = (shards.region(name, shards.head(name).rect) for shards in (ours, theirs))
        for field in ("pixels", "labels", "present"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
        assert b.instances is None
    with pytest.raises(ValueError, match="image 'wide' has no instances: shard it with `instance"):
        theirs.read_instances("wide", 0, 0, 9, 9)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["wide", "small", "tall"]),
    top=st.integers(-40, 280),
    left=st.integers(-40, 320),
    height=st.integers(0, 150),
    width=st.integers(0, 150),
)
def test_any_rectangle_is_the_source(
    numbered: Source, name: str, top: int, left: int, height: int, width: int
) -> None:
    rect = Rect(top, top + height, left, left + width)
    numbers = numbered.instances[name]
    whole = Rect(0, numbers.shape[0], 0, numbers.shape[1])
    inside = rect.intersect(whole)
    expected = np.zeros((height, width), np.uint16)
    if not inside.empty:
        expected[inside.slices(rect)] = numbers[inside.slices(whole)]
    shards = open_shards(numbered.url)
    got = shards.region(name, rect).instances
    assert got is not None
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(shards.read_instances(name, top, left, height, width), expected)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2), (1, 3), (3, 2)])
@pytest.mark.parametrize("window", [None, (70, 90)])
def test_batches_of_any_mesh_hold_the_source(
    numbered: Source, mesh: tuple[int, int], window: tuple[int, int] | None
) -> None:
    """Patches of 11 px divide neither images nor windows; micro-batches of 2 have fillers."""
    places = list(np.ndindex(mesh))
    size = None if window is None else list(window)
    ranks = [
        loader(numbered.url, size, patch=11, micro_batch=2, mesh_shape=mesh, at=at) for at in places
    ]
    windows = {window.id: window for window in ranks[0].windows}
    seen = []
    for parts in zip(*(rank.once() for rank in ranks), strict=True):
        place = parts[0].place
        joined = np.zeros((2, place.height * 11, place.width * 11), np.int32)
        for part in parts:
            assert part.instances is not None
            assert part.instances.dtype == torch.int32
            assert part.instances.shape == part.present.shape
            assert not part.instances[~part.present].any()
            rows, cols = part.place.rect.scaled(11).slices(Rect(0, 1 << 20, 0, 1 << 20))
            joined[:, rows, cols] = part.instances
        for got, id, weight in zip(joined, parts[0].ids, parts[0].weight, strict=True):
            expected = np.zeros_like(got)
            if weight:
                seen.append(id)
                rect, numbers = windows[id].rect, numbered.instances[windows[id].name]
                cut = numbers[rect.top : rect.bottom, rect.left : rect.right]
                expected[: cut.shape[0], : cut.shape[1]] = cut
            np.testing.assert_array_equal(got, expected)
    assert sorted(seen) == sorted(windows)


def test_steps_have_instances_too_and_take_them_to_the_device(
    numbered: Source, source: Source
) -> None:
    from axialtrain.train.loop import to_device

    for batch in next(loader(numbered.url).steps(0, 1)):
        assert batch.instances is not None
        name = batch.ids[0].split("@")[0]
        height, width = numbered.instances[name].shape
        np.testing.assert_array_equal(batch.instances[0, :height, :width], numbered.instances[name])
        moved = to_device(batch, torch.device("meta")).instances
        assert moved is not None
        assert moved.is_meta
    without = next(loader(source.url).once())
    assert without.instances is None
    assert to_device(without, torch.device("meta")).instances is None


def test_instances_of_some_images_only_do_not_reach_the_batches(
    numbered: Source, source: Source, tmp_path: Path
) -> None:
    """Shards put together by hand: two images with instances, and one without."""
    manifests = [json.loads(Path(url, MANIFEST).read_bytes()) for url in (numbered.url, source.url)]
    for number, url in enumerate((numbered.url, source.url)):
        shutil.copy(Path(url, "shard-00000.tar"), tmp_path / f"shard-{number:05d}.tar")
    with_them, without = (
        {row["name"]: row for row in manifest["images"]} for manifest in manifests
    )
    rows = [with_them["wide"], without["small"] | {"shard": "shard-00001.tar"}, with_them["tall"]]
    (tmp_path / MANIFEST).write_text(json.dumps(manifests[0] | {"images": rows}))
    shards = open_shards(str(tmp_path))
    assert (shards.has_labels, shards.has_instances) == (True, False)
    assert shards.region("wide", Rect(0, 9, 0, 9)).instances is not None
    assert shards.region("small", Rect(0, 9, 0, 9)).instances is None
    batches = list(loader(str(tmp_path)).once())
    assert len(batches) == 3
    assert all(batch.instances is None and batch.labels is not None for batch in batches)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_memory_of_instances_is_counted(
    numbered: Source, monkeypatch: pytest.MonkeyPatch, micro_batch: int
) -> None:
    options: dict[str, Any] = {"micro_batch": micro_batch, "mesh_shape": (2, 3)}
    largest = 0
    for at in np.ndindex(2, 3):
        batch = next(loader(numbered.url, [90, 120], at=at, **options).once())
        parts = (batch.pixels, batch.labels, batch.present, batch.instances)
        largest = max(largest, sum(part.nbytes for part in parts if part is not None))
    count = DataConfig(numbered.url).prefetch + 2
    monkeypatch.setattr("axialtrain.data.loader.memory_bytes", lambda: count * largest)
    loader(numbered.url, [90, 120], **options)
    monkeypatch.setattr("axialtrain.data.loader.memory_bytes", lambda: count * largest - 1)
    with pytest.raises(ValueError, match=r"micro-batches .* of this machine's memory"):
        loader(numbered.url, [90, 120], **options)


def test_damaged_instances_are_reported_with_their_place(copy: Path) -> None:
    tar = copy / "shard-00000.tar"
    data = bytearray(tar.read_bytes())
    at = data.index(b"wide/0/00000_00001.instances.png") + 512
    data[at + 60] ^= 0x10
    tar.write_bytes(data)
    place = rf"shard-00000\.tar: byte {at}: member wide/0/00000_00001\.instances\.png"
    shards = open_shards(str(copy))
    with pytest.raises(ValueError, match=f"{place}: is damaged"):
        shards.read_instances("wide", 0, 128, 9, 9)
    with pytest.raises(ValueError, match=f"{place}: is damaged"):
        list(loader(str(copy)).once())
    shards.read_instances("wide", 0, 0, 9, 9)  # another block


def test_any_flipped_bit_is_noticed(copy: Path) -> None:
    tar = copy / "shard-00000.tar"
    whole = tar.read_bytes()
    start = whole.index(b"small/0/00000_00000.instances.png")
    length = int(whole[start + 124 : start + 135], 8)
    rng = np.random.default_rng(0)
    for at in rng.integers(start, start + 512 + length, 100):
        data = bytearray(whole)
        data[at] ^= 1 << rng.integers(0, 8)
        tar.write_bytes(data)
        with pytest.raises(ValueError, match=r"shard-00000\.tar: byte \d+: "):
            open_shards(str(copy)).read_instances("small", 0, 0, 9, 9)


def test_instance_beyond_the_largest_in_the_manifest_is_refused(
    numbered: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = open_shards(numbered.url)
    head = replace(shards.head("small"), instances=198)
    monkeypatch.setattr(shards, "head", lambda name: head)
    message = (
        r"shard-00000\.tar: byte \d+: member small/0/00000_00000\.instances\.png: "
        r"has instance 199, allowed is up to the 198 in manifest"
    )
    for read in (
        lambda: shards.region("small", Rect(0, 70, 0, 50)),
        lambda: shards.read_instances("small", 0, 0, 1, 1),
    ):
        with pytest.raises(ValueError, match=message):
            read()
    np.testing.assert_array_equal(shards.read("small", 0, 0, 70, 50), numbered.pixels["small"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            encode_png(np.zeros((4096, 4096), np.uint16)),
            r"is of shape \(4096, 4096\) where \(70, 50",
        ),
        (encode_png(np.zeros((70, 50), np.uint8)), "is a PNG of 8 bits .*, not 16-bit grey"),
        (encode_png(np.zeros((70, 50, 3), np.uint8)), "is a PNG of 8 bits .*, not 16-bit grey"),
        (encode_png(np.ones((70, 50), np.uint16))[:60], "cannot be decoded"),
        (b"", "is no PNG"),
        (None, "is missing from its block"),
    ],
)
def test_hostile_member_is_refused_with_its_place(
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: bytes | None,
    message: str,
) -> None:
    """A shard whose checksums are all right, and whose instances are not what the head says."""
    raster = tmp_path / "raster.tif"
    tifffile.imwrite(raster, np.ones((70, 50), np.uint16), tile=(16, 16))
    if wrong is None:
        members = encode.members
        monkeypatch.setattr(
            encode,
            "members",
            lambda key, sample: members(
                key, {k: v for k, v in sample.items() if k != "instances.png"}
            ),
        )
    else:
        monkeypatch.setattr(
            encode,
            "encode_png",
            lambda pixels: wrong if pixels.dtype == np.uint16 else encode_png(pixels),
        )
    folder = Path(source.url).parent
    shard_images(
        [folder / "small.tif"],
        tmp_path / "out",
        labels=[folder / "small_labels.tif"],
        instances=[raster],
        progress=False,
    )
    shards = open_shards(str(tmp_path / "out"))
    with pytest.raises(
        ValueError, match=rf"member small/0/00000_00000\.instances\.png.* {message}"
    ):
        shards.region("small", Rect(0, 70, 0, 50))
    np.testing.assert_array_equal(shards.read("small", 0, 0, 70, 50), source.pixels["small"])


def test_commands_take_instances(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes, out = tmp_path / "scenes", tmp_path / "shards"
    command = ["scene", "--out", str(scenes), "--size", "512", "--seed", "3", "--bands", "2", "3"]
    assert main(command) == 0
    image, labels, instances = capsys.readouterr().out.split()
    command = ["shard", image, "--out", str(out), "--labels", labels, "--instances", instances]
    assert main(command) == 0
    scene = draw_scene(size=512, seed=3, bands=(2, 3))
    shards = open_shards(str(out))
    got = shards.read_instances("scene_0000", 0, 0, 512, 512)
    np.testing.assert_array_equal(got, scene.instances)
    assert shards.row("scene_0000").instances == scene.by_row.size
    np.testing.assert_array_equal(
        shards.read_labels("scene_0000", 0, 0, 512, 512) == UNLABELLED, got == 0
    )
    capsys.readouterr()
    assert main(["shard", image, "--out", str(tmp_path / "x"), "--instances", instances]) == 2
    said = capsys.readouterr().err
    assert said.startswith("axialtrain: instances has 1 paths and labels is missing, allowed")
    assert main(["scene", "--out", str(scenes), "--bands", "9", "9"]) == 2
    assert "bands is (9, 9), allowed is" in capsys.readouterr().err
