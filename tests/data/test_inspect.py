from __future__ import annotations

import io
import itertools
import json
import shutil
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from forged import forge
from PIL import Image
from watched import WAYS, watched

from axialtrain.cli import main
from axialtrain.data import facts as facts_module
from axialtrain.data import open_shards, picture
from axialtrain.data.config import DataConfig
from axialtrain.data.inspect import inspect
from axialtrain.data.loader import Loader
from axialtrain.data.mesh_reads import MAX_RANKS, mesh_of
from axialtrain.data.region import Shards
from axialtrain.data.shard import shard_images
from axialtrain.data.speed import measure
from axialtrain.grid import Rect

if TYPE_CHECKING:
    from conftest import SIZES, Source
else:
    from conftest import SIZES

Json = dict[str, Any]


def record_of(*arguments: object, **options: Any) -> Json:
    """The record of `inspect`, as a machine gets it."""
    found: Json = json.loads(inspect(*map(str, arguments), **options).to_json())
    return found


def stored_tiles(url: str, name: str) -> dict[tuple[int, int], set[tuple[int, int]]]:
    """Which tiles each block has, from the names in the tar, by (row, col) of both."""
    blocks: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for shard in sorted(Path(url).glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar.getnames():
                image, _, rest = member.partition("/0/")
                if image != name:
                    continue
                place, number, *_ = rest.split(".")
                row, col = map(int, place.split("_"))
                tiles = blocks.setdefault((row, col), set())
                if number.isdigit():
                    tiles.add((row * 8 + int(number) // 8, col * 8 + int(number) % 8))
    return blocks


def test_a_set_is_told_from_its_manifest_and_heads(numbered: Source) -> None:
    found = record_of(numbered.url, patch=32)["set"]
    shards = open_shards(numbered.url)
    tokens = sum(-(-h // 32) * -(-w // 32) for h, w in SIZES.values())
    assert found == {
        "url": numbered.url,
        "digest": shards.digest,
        "images": 3,
        "shards": 1,
        "bytes": sum(path.stat().st_size for path in Path(numbered.url).glob("*.tar")),
        "pixels": sum(h * w for h, w in SIZES.values()),
        "patch": 32,
        "tokens": tokens,
        "kinds": [{"bands": 3, "dtype": "uint8", "images": 3}],
        "height": {"min": 70, "median": 200, "max": 257},
        "width": {"min": 50, "median": 97, "max": 300},
        "rasters": 3,
        "classes": 6,
        "instances": 3,
        "image_labels": {},
        "heads_seen": 3,
        "mpp": None,
        "mpp_unknown": 3,
        "tiles": {
            "blocks": 10,
            "blocks_seen": 10,
            "all": 13 * 19 + 5 * 4 + 17 * 7,
            "stored": 13 * 19 + 5 * 4 + 17 * 7,
            "empty_share": 0.0,
        },
    }


def test_empty_tiles_are_counted_in_all_blocks_or_in_some(
    masked: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = (masked.pixels["a"] != 7).any(-1)
    stored = sum(
        there[y : y + 16, x : x + 16].any() for y in range(0, 280, 16) for x in range(0, 300, 16)
    )
    blocks = stored_tiles(masked.url, "a")
    assert any(not tiles for tiles in blocks.values())
    assert sum(map(len, blocks.values())) == stored
    expected = {"blocks": 9, "blocks_seen": 9, "all": 18 * 19, "stored": stored}
    expected["empty_share"] = 1 - stored / (18 * 19)
    one = record_of(masked.url, "a")["image"]
    assert record_of(masked.url)["set"]["tiles"] == one["tiles"] == expected
    assert one["masked"]
    assert f"{18 * 19 - stored} of {18 * 19} empty" in str(inspect(masked.url))

    monkeypatch.setattr(facts_module, "MOST_BLOCKS", 4)
    head = open_shards(masked.url).head("a")
    some = [(b.row, b.col) for b in head.blocks[::3]]
    slots = sum(min(8, 18 - r * 8) * min(8, 19 - c * 8) for r, c in some)
    sampled = record_of(masked.url)["set"]["tiles"]
    assert sampled == record_of(masked.url, "a")["image"]["tiles"]
    assert (sampled["blocks"], sampled["blocks_seen"]) == (9, 3)
    assert (sampled["all"], sampled["stored"]) == (slots, sum(len(blocks[at]) for at in some))
    assert "in 3 of 9 blocks" in str(inspect(masked.url))
    assert record_of(masked.url, every=True)["set"]["tiles"] == expected
    assert record_of(masked.url, "a", every=True)["image"]["tiles"] == expected


def test_some_heads_of_many_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample_mpp: dict[str, float | None]
) -> None:
    paths = []
    for number, mpp in enumerate(sample_mpp.values()):
        paths.append(tmp_path / f"{number}.tif")
        description = "" if mpp is None else f"Aperio |AppMag = 20|MPP = {mpp}"
        pixels = np.full((32, 48, 3), number, np.uint8)
        tifffile.imwrite(
            paths[-1], pixels, tile=(16, 16), photometric="rgb", description=description
        )
    out = tmp_path / "out"
    shard_images(paths, out, image_labels=[3, 1, 3, 65535, 3], progress=False, shard_bytes=1)
    whole = record_of(out)["set"]
    assert (whole["shards"], whole["images"], whole["heads_seen"]) == (5, 5, 5)
    assert whole["mpp"] == {"min": 0.25, "median": 0.5, "max": 1.0}
    assert whole["mpp_unknown"] == 1
    assert whole["image_labels"] == {"1": 1, "3": 3, "65535": 1}
    assert whole["classes"] is None
    text = str(inspect(str(out)))
    assert "0.25 / 0.5 / 1 (min / median / max), unknown of 1" in text
    assert "of whole images: 1: 1, 3: 3, 65535: 1" in text
    monkeypatch.setattr(facts_module, "MOST_HEADS", 2)  # numbers 0 and 3
    some = record_of(out)["set"]
    assert (some["images"], some["heads_seen"], some["tiles"]["blocks"]) == (5, 2, 2)
    assert (some["mpp"], some["mpp_unknown"]) == ({"min": 0.5, "median": 0.5, "max": 0.5}, 1)
    assert some["image_labels"] == whole["image_labels"]
    assert "of 2 of 5 images" in str(inspect(str(out)))
    assert record_of(out, every=True)["set"] == whole


@pytest.fixture
def sample_mpp() -> dict[str, float | None]:
    return {"0": 0.5, "1": 0.25, "2": 1.0, "3": None, "4": 0.5}


def test_an_image_is_told_from_its_head(masked: Source) -> None:
    head = open_shards(masked.url).head("a")
    found = record_of(masked.url, "a", patch=7)["image"]
    assert found["tokens"] == [40, 43]
    assert found["bytes"] == sum(entry.length for entry in head.blocks)
    assert (found["tile_grid"], found["block_grid"]) == ([18, 19], [3, 3])
    assert found["shard"] == "shard-00000.tar"
    for key in (
        "name", "height", "width", "level", "downsample", "bands", "dtype", "mpp", "crs",
        "transform", "group", "classes", "instances", "label", "encoding", "masked", "tile",
        "source_sha256",
    ):  # fmt: skip
        assert found[key] == getattr(head, key), key
    text = str(inspect(masked.url, "a"))
    for words in ("'a' in", "280 x 300 px", "2 bands of uint16", "png", "some pixels are missing"):
        assert words in text


def test_what_a_stranger_wrote_is_escaped(source: Source, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(source.url, tmp_path / "copy"))
    crs = "LOCAL\u00e9 'x' \\x1b[31m " + "y" * 500  # printable, as all that is let in

    def head(record: Json) -> None:
        record |= {"crs": crs, "transform": [1, 0, 0, 0, 1, 0]}

    forge(copy, "small", head=head)
    text = str(inspect(str(copy), "small"))
    assert crs not in text
    assert all(line.isprintable() and len(line) < 120 for line in text.splitlines())
    forge(copy, "small", head=lambda record: record.update(crs="a\x1b[31mb"))
    with pytest.raises(ValueError, match=r"transform is \[1, 0, 0, 0, 1, 0\], allowed is 6"):
        inspect(str(copy), "small")


def rank_loader(url: str, mesh: tuple[int, int], at: tuple[int, int], **config: Any) -> Loader:
    return Loader(
        open_shards(url),
        DataConfig(url, prefetch=0, **config),
        patch=16,
        mesh_shape=mesh,
        at=at,
        data_rank=0,
        data_ranks=1,
        batch=1,
        micro_batch=1,
        seed=0,
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mesh", [(1, 1), (2, 2), (2, 3), (3, 4)])
@pytest.mark.parametrize(("fixture", "name"), [("numbered", "wide"), ("masked", "a")])
def test_ranks_read_what_is_told(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    mesh: tuple[int, int],
    fixture: str,
    name: str,
    way: str,
) -> None:
    """As a run's reading.json has it: what the loader of each rank counts for the whole image."""
    url = request.getfixturevalue(fixture).url
    monkeypatch.setattr("axialtrain.data.fetch.merge.__defaults__", (4096,))
    monkeypatch.setattr("axialtrain.data.fetch.fetch_for.__kwdefaults__", {"gap": 4096})
    fetched = watched(monkeypatch, way)
    reads = inspect(url, name, mesh=f"{mesh[0]}x{mesh[1]}").reads
    assert reads is not None
    places = list(itertools.product(range(mesh[0]), range(mesh[1])))
    assert [(rank.row, rank.col) for rank in reads.ranks] == places
    for rank, at in zip(reads.ranks, places, strict=True):
        loader = rank_loader(url, mesh, at)
        loader.shards.head(name)
        fetched.clear()
        next(loader.once())
        assert (rank.tiles, rank.bytes) == (loader.tiles_decoded, loader.bytes_read)
        ranges = list(itertools.chain(*fetched))
        if way == "afar":
            assert len(fetched) == (rank.ranges > 0)
            assert len(ranges) == rank.ranges
        assert sum(stop - start for start, stop in ranges) == rank.bytes
    rows, cols = open_shards(url).row(name).levels[0]
    covered = np.zeros((rows, cols), int)
    for rank in reads.ranks:
        covered[rank.rect.top : rank.rect.bottom, rank.rect.left : rank.rect.right] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("window", [(100, 150), (64, 64), (400, 90), (1000, 1000)])
def test_needs_of_a_window_by_other_arithmetic(masked: Source, window: tuple[int, int]) -> None:
    found = record_of(masked.url, "a", mesh="2x3", window=window)["mesh"]
    shards = open_shards(masked.url)
    blocks = stored_tiles(masked.url, "a")
    length = {(entry.row, entry.col): entry.length for entry in shards.head("a").blocks}
    height, width = window
    top, left = max(0, (280 - height) // 2), max(0, (300 - width) // 2)
    assert found["window"] == {
        "top": top, "bottom": top + height, "left": left, "right": left + width
    }  # fmt: skip
    high, wide = -(-height // 16), -(-width // 16)
    total = needed = 0
    tiles = []
    for rank, (row, col) in zip(found["ranks"], itertools.product(range(2), range(3)), strict=True):
        y0, y1 = (top + 16 * (high * i // 2) for i in (row, row + 1))
        x0, x1 = (left + 16 * (wide * i // 3) for i in (col, col + 1))
        y1, x1 = min(y1, top + height), min(x1, left + width)
        region = shards.region("a", Rect(y0, y1, x0, x1))
        assert rank["rect"] == {"top": y0, "bottom": y1, "left": x0, "right": x1}
        assert (rank["bytes"], rank["tiles"]) == (region.bytes_read, region.tiles_decoded)
        mine = 0
        for at, there in blocks.items():
            met = [
                (r, c) for r, c in there
                if r * 16 < min(y1, 280) and r * 16 + 16 > y0
                and c * 16 < min(x1, 300) and c * 16 + 16 > x0
            ]  # fmt: skip
            mine += length[at] * len(met) // max(1, len(there))
        assert rank["needed"] == mine
        total, needed = total + rank["bytes"], needed + mine
        tiles.append(rank["tiles"])
    assert found["bytes"] == total
    assert found["over_read"] == pytest.approx(total / needed)
    assert found["imbalance"] == pytest.approx(
        max(r["bytes"] for r in found["ranks"]) / (total / 6)
    )
    assert found["tile_imbalance"] == pytest.approx(max(tiles) / (sum(tiles) / 6))


def test_a_mesh_that_reads_nothing_has_no_quotients(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    pixels = np.full((256, 256), 7, np.uint16)
    pixels[0, 0] = 8
    tifffile.imwrite(path, pixels, tile=(16, 16), extratags=[(42113, "s", 0, "7", True)])
    shard_images([path], tmp_path / "out", progress=False)
    found = record_of(tmp_path / "out", "a", mesh="1x2", window=(32, 32))["mesh"]
    assert (found["over_read"], found["tile_imbalance"]) == (None, None)
    assert "no times" in str(inspect(str(tmp_path / "out"), "a", mesh="1x2", window=(32, 32)))


def test_picture_is_the_region(numbered: Source, tmp_path: Path) -> None:
    png = tmp_path / "a.png"
    record = record_of(numbered.url, "wide", region=(-10, 250, 60, 70), png=png)
    pixels = np.asarray(Image.open(png))
    expected = np.empty((60, 70, 3), np.uint8)
    expected[:] = (255, 0, 255)
    expected[10:, :50] = numbered.pixels["wide"][:50, 250:]
    np.testing.assert_array_equal(pixels, expected)
    assert record["picture"] == {
        "path": str(png),
        "rect": {"top": -10, "bottom": 50, "left": 250, "right": 320},
        "missing": 60 * 70 - 50 * 50,
        "stretched": False,
    }
    before = png.read_bytes()
    inspect(numbered.url, "wide", region=(-10, 250, 60, 70), png=png)
    assert png.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_picture_of_other_pixels_is_stretched_grey(masked: Source, tmp_path: Path) -> None:
    png = tmp_path / "a.png"
    found = inspect(masked.url, "a", region=(0, 0, 280, 300), png=png)
    there = (masked.pixels["a"] != 7).any(-1)
    first = masked.pixels["a"][..., 0].astype(float)
    low, high = np.percentile(first[there], (2, 98))
    grey = np.clip((first - low) / (high - low) * 255, 0, 255).astype(np.uint8)
    expected = np.where(there[..., None], grey[..., None], np.array((255, 0, 255), np.uint8))
    np.testing.assert_array_equal(imagecodecs.png_decode(png.read_bytes()), expected)
    missing = int((~there).sum())
    assert f"stretched to their own range, {missing} missing ones in magenta" in str(found)
    inspect(masked.url, "a", region=(10, 150, 100, 100), png=png)  # nothing is there
    assert (imagecodecs.png_decode(png.read_bytes()) == (255, 0, 255)).all()


def test_picture_beyond_the_bounds_is_refused_before_reading(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shards, "region", None)
    png = tmp_path / "a.png"
    for region, message in (
        ((0, 0, 1 << 14, 1 << 14), r"at most 89478485 px of 3 bands of uint8; it has 268435456$"),
        ((0, 0, 1 << 40, 1 << 40), "it has 1208925819614629174706176$"),
        ((200, 0, 10, 10), r"Y X HEIGHT WIDTH with pixels of 'wide', which has 200 x 300$"),
        ((0, 0, 0, 10), "Y X HEIGHT WIDTH"),
        ((9, 9, -5, 10), "Y X HEIGHT WIDTH"),
    ):
        with pytest.raises(ValueError, match=f"^region is {' '.join(map(str, region))}.*{message}"):
            inspect(source.url, "wide", region=region, png=png)
    with pytest.raises(ValueError, match=r"^png is .*none/a\.png, allowed is a file in a folder"):
        inspect(source.url, "wide", region=(0, 0, 9, 9), png=tmp_path / "none" / "a.png")
    monkeypatch.setattr(picture, "MAX_READ", 1000)
    with pytest.raises(ValueError, match="what lies in at most 1000 bytes; it lies in "):
        inspect(source.url, "wide", region=(0, 0, 9, 9), png=png)
    assert not list(tmp_path.iterdir())


def test_speed_is_the_median_of_the_same_regions_each_time(
    numbered: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    seen: list[tuple[str, Rect]] = []
    region = Shards.region

    def listening(self: Shards, name: str, rect: Rect) -> object:
        seen.append((name, rect))
        return region(self, name, rect)

    monkeypatch.setattr(Shards, "region", listening)
    shards = open_shards(numbered.url)
    first = measure(shards, seconds=3, clock=lambda: next(ticks) / 2)  # half a second each
    regions = list(seen)
    assert (first.regions, first.seconds) == (6, 3.0)
    assert len({name for name, _ in regions}) == first.images > 1
    took = [region(shards, name, rect) for name, rect in regions]
    assert first.tiles == sum(each.tiles_decoded for each in took)
    assert first.bytes == sum(each.bytes_read for each in took)
    assert first.tiles_per_second == np.median([each.tiles_decoded for each in took]) * 2
    assert first.bytes_per_second == np.median([each.bytes_read for each in took]) * 2
    for name, rect in regions:
        height, width = SIZES[name]
        assert rect.intersect(Rect(0, height, 0, width)) == rect
    seen.clear()
    assert measure(shards, seconds=3, clock=lambda: next(ticks) / 2) == first
    assert seen == regions
    assert measure(shards, "tall", seconds=0).regions == 1
    assert seen[-1][0] == "tall"


def test_the_command(source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.json"
    assert main(["inspect", source.url]) == 0
    assert capsys.readouterr().out == f"{inspect(source.url)}\n"
    more = ["--mesh", "2x2", "--window", "64", "96", "--patch", "8"]
    assert main(["inspect", source.url, "wide", *more, "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "mesh 2x2 of 64 x 96 px from (68, 102), in tokens of 8 px" in text
    assert main(["inspect", source.url, "wide", *more, "--json", "-"]) == 0
    assert capsys.readouterr().out.encode() == out.read_bytes()
    record = json.loads(out.read_bytes())
    assert list(record) == ["version", "image", "mesh"]
    assert len(record["mesh"]["ranks"]) == 4
    png = ["--region", "-5", "0", "20", "20", "--png", str(tmp_path / "a.png")]
    assert main(["inspect", source.url, "wide", *png]) == 0
    assert "a.png: 20 x 20 px, 100 missing ones in magenta" in capsys.readouterr().out
    assert Image.open(io.BytesIO((tmp_path / "a.png").read_bytes())).size == (20, 20)


def test_what_is_measured_is_in_the_record(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("axialtrain.data.speed.measure.__kwdefaults__", {"seconds": 0.0} | {
        "clock": measure.__kwdefaults__["clock"]
    })  # fmt: skip
    for arguments in ((source.url,), (source.url, "wide")):
        bench = record_of(*arguments, bench=True)["bench"]
        assert set(bench) == {
            "regions", "images", "bytes", "tiles", "seconds", "tiles_per_second",
            "bytes_per_second",
        }  # fmt: skip
        assert bench["regions"] == 1
        assert bench["tiles_per_second"] > 0
        assert "tiles/s" in str(inspect(*arguments, bench=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--patch", "0"], "patch is 0, allowed is at least 1"),
        (["--mesh", "2x2"], "mesh is 2x2, allowed is only together with an image"),
        (["wide", "--window", "9", "9"], "window is [9, 9], allowed is only together with mesh"),
        (["wide", "--mesh", "2x2", "--window", "0", "9"], "window is [0, 9], allowed is"),
        (["wide", "--mesh", "2"], "mesh is '2', allowed is RxC, like 2x3, of at most"),
        (["wide", "--mesh", "0x3"], "mesh is '0x3', allowed is RxC"),
        (["wide", "--mesh", "65x64"], f"of at most {MAX_RANKS} ranks"),
        (["wide", "--mesh", "14x1"], "a grid of 13 x 19 tokens is smaller than mesh row=14"),
        (["wide", "--region", "0", "0", "9", "9"], "only together with an image and png"),
        (["wide", "--png", "a.png"], "png is a.png, allowed is only together with an image and"),
        (["--region", "0", "0", "9", "9", "--png", "a.png"], "region is [0, 0, 9, 9], allowed"),
        (["wi\x1bde"], r"image is 'wi\x1bde', allowed are wide, small, tall"),
    ],
)
def test_wrong_arguments_are_named(
    source: Source, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["inspect", source.url, *options]) == 2
    assert message in capsys.readouterr().err


def test_where_there_are_no_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert "no shards here, allowed is a folder with a manifest.json" in capsys.readouterr().err


def test_mesh_is_read_as_training_reads_it() -> None:
    assert mesh_of("2x3") == (2, 3)
    assert mesh_of("1x4096") == (1, 4096)
