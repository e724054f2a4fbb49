from __future__ import annotations

import errno
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import pytest
import tifffile

from axialtrain.cli import main
from axialtrain.data import check_block
from axialtrain.data import faults as faults_module
from axialtrain.data import verify as verify_module
from axialtrain.data.quarantine import quarantine
from axialtrain.data.region import open_shards
from axialtrain.data.shard import shard_images
from axialtrain.data.verify import MODES, Report, verify

SIZES = {"a": (150, 140), "b": (70, 50), "c": (40, 130), "d": (130, 20), "e": (64, 64)}
MOST = 50  # faults of a shard that are kept, in one test
DAMAGES = 20  # of each kind: 200, and OTHERS
OTHERS = 5  # manifests of other data sets
Generator = np.random.Generator


def draw(folder: Path, seed: int, names: str = "abcde", shard_bytes: int = 110_000) -> Path:
    """A labelled data set with instances: noise in tiles of 16 px, in three shards."""
    rng = np.random.default_rng(seed)
    paths: dict[str, list[Path]] = {"image": [], "labels": [], "instances": []}
    folder.mkdir(parents=True)
    for name in names:
        size = SIZES[name]
        rasters = {
            "image": rng.integers(0, 256, (*size, 3), np.uint8),
            "labels": rng.integers(0, 6, size, np.uint8),
            "instances": rng.integers(0, 300, size, np.uint16),
        }
        for key, raster in rasters.items():
            path = folder / key / f"{name}.tif"
            path.parent.mkdir(exist_ok=True)
            colours = {"photometric": "rgb"} if key == "image" else {}
            tifffile.imwrite(path, raster, tile=(16, 16), **colours)
            paths[key].append(path)
    shard_images(
        paths["image"],
        folder / "shards",
        labels=paths["labels"],
        instances=paths["instances"],
        shard_bytes=shard_bytes,
        progress=False,
    )
    return folder / "shards"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = draw(tmp_path_factory.mktemp("verify") / "set", seed=0)
    assert len(list(shards.glob("*.tar"))) == 3
    return shards


@pytest.fixture
def copy(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "copy"))


@dataclass(frozen=True)
class Part:
    """A member of a tar: its header at `start`, data in [data, stop), padding up to `end`."""

    name: str
    start: int
    data: int
    stop: int
    end: int


def parts_of(shard: Path) -> list[Part]:
    with tarfile.open(shard) as tar:
        return [
            Part(
                m.name,
                m.offset,
                m.offset_data,
                m.offset_data + m.size,
                m.offset_data + -(-m.size // 512) * 512,
            )
            for m in tar.getmembers()
        ]


def check(folder: Path, mode: str = "full") -> Report:
    return verify([folder], mode=mode, jobs=1, progress=False)


# Each damages a shard, or the manifest, and returns the names of the members that are hit: of them
# one must be named. None where there is no such member any more.
Damage = Callable[[Path, Generator], tuple[str, set[str] | None]]


def some_shard(folder: Path, rng: Generator) -> Path:
    return Path(rng.choice(sorted(map(str, folder.glob("*.tar")))))


def some_part(shard: Path, rng: Generator) -> Part:
    parts = parts_of(shard)
    return parts[rng.integers(len(parts))]


def cut_at_a_member(folder: Path, rng: Generator) -> tuple[str, set[str] | None]:
    shard = some_shard(folder, rng)
    shard.write_bytes(shard.read_bytes()[: some_part(shard, rng).start])
    return shard.name, None


def cut_anywhere(folder: Path, rng: Generator) -> tuple[str, set[str] | None]:
    shard = some_shard(folder, rng)
    data = shard.read_bytes()
    shard.write_bytes(data[: rng.integers(len(data))])
    return shard.name, None


def flip(shard: Path, rng: Generator, start: int, stop: int) -> None:
    data = bytearray(shard.read_bytes())
    data[rng.integers(start, stop)] ^= 1 << rng.integers(8)
    shard.write_bytes(data)


def flipped_bit_in_a_header(folder: Path, rng: Generator) -> tuple[str, set[str] | None]:
    shard = some_shard(folder, rng)
    part = some_part(shard, rng)
    flip(shard, rng, part.start, part.data)
    return shard.name, {part.name}


def flipped_bit_in_a_payload(folder: Path, rng: Generator) -> tuple[str, set[str] | None]:
    shard = some_shard(folder, rng)
    part = some_part(shard, rng)
    flip(shard, rng, part.data, part.stop)
    return shard.name, {part.name}


def flipped_bit_in_padding(folder: Path, rng: Generator) -> tuple[str, set[str] | None]:
    shard = some_shard(folder, rng)
    part = some_part(shard, rng)
    if part.stop == part.end or rng.random() < 0.1:
        size = shard.stat().st_size
        flip(shard, rng, size - 1024, size)  # the end of the archive
        return shard.name, None
    flip(shard, rng, part.stop, part.end)
    return shard.name, {part.name}


def zeroed_run(folder: Path, rng: Generator) -> tuple[str, set[str] | None]:
    shard = some_shard(folder, rng)
    before = shard.read_bytes()
    while True:
        data = bytearray(before)
        start = int(rng.integers(len(data)))
        stop = min(start + int(rng.integers(1, 5000)), len(data))
        data[start:stop] = bytes(stop - start)
        if data != before:
            break
    hit = {
        part.name
        for part in parts_of(shard)
        if data[part.start : part.end] != before[part.start : part.end]
    }
    shard.write_bytes(data)
    return shard.name, hit


def two_members_swapped(folder: Path, rng: Generator) -> tuple[str, set[str] | None]:
    shard = some_shard(folder, rng)
    parts = parts_of(shard)
    i, j = sorted(rng.choice(len(parts), 2, replace=False))
    one, two = parts[i], parts[j]
    data = shard.read_bytes()
    shard.write_bytes(
        data[: one.start]
        + data[two.start : two.end]
        + data[one.end : two.start]
        + data[one.start : one.end]
        + data[two.end :]
    )
    return shard.name, {one.name, two.name}


def missing_shard(folder: Path, rng: Generator) -> tuple[str, set[str] | None]:
    shard = some_shard(folder, rng)
    shard.unlink()
    return shard.name, None


def extra_bytes(folder: Path, rng: Generator) -> tuple[str, set[str] | None]:
    shard = some_shard(folder, rng)
    data = shard.read_bytes()
    at = len(data) if rng.random() < 0.5 else int(rng.integers(len(data)))
    count = int(rng.choice([1, 512, 1024, 5000]))
    extra = bytes(count) if rng.random() < 0.5 else rng.bytes(count)
    shard.write_bytes(data[:at] + extra + data[at:])
    return shard.name, None


def wrong_manifest_row(folder: Path, rng: Generator) -> tuple[str, set[str] | None]:
    manifest = folder / "manifest.json"
    data = json.loads(manifest.read_bytes())
    row = data["images"][rng.integers(len(data["images"]))]
    shard = row["shard"]
    key = rng.choice(sorted([*row, "label", "row"]))
    if key == "row":
        data["images"].remove(row)
    elif key == "name":
        row["name"] = "another"
    elif key == "shard":
        row["shard"] = "shard-00007.tar"
    elif key == "head_sha256":
        row[key] = "0" * 64
    else:
        row[key] = row.get(key, 0) + int(rng.integers(1, 9))
    manifest.write_text(json.dumps(data))
    return shard, None


KINDS: list[Damage] = [
    cut_at_a_member,
    cut_anywhere,
    flipped_bit_in_a_header,
    flipped_bit_in_a_payload,
    flipped_bit_in_padding,
    zeroed_run,
    two_members_swapped,
    missing_shard,
    extra_bytes,
    wrong_manifest_row,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_damage_is_found_and_placed(clean: Path, tmp_path: Path, kind: Damage) -> None:
    for seed in range(DAMAGES):
        folder = Path(shutil.copytree(clean, tmp_path / f"{seed}"))
        shard, members = kind(folder, np.random.default_rng([KINDS.index(kind), seed]))
        faults = check(folder).faults
        found = {fault.shard for fault in faults}
        assert found - {"shard-00007.tar"} == {shard}, f"{kind.__name__} {seed}: {faults}"
        if members is not None:
            named = {fault.member for fault in faults}
            assert named & members, f"{kind.__name__} {seed}: {members} but {faults}"
        assert all(fault.remedy for fault in faults)
        shutil.rmtree(folder)


def test_manifest_of_another_data_set_is_found(clean: Path, tmp_path: Path) -> None:
    for seed in range(1, OTHERS + 1):
        folder = Path(shutil.copytree(clean, tmp_path / f"{seed}"))
        names = "abcde" if seed == 1 else "".join(np.random.default_rng(seed).permutation([*SIZES]))
        shutil.copy(draw(tmp_path / f"other{seed}", seed, names) / "manifest.json", folder)
        assert {fault.shard for fault in check(folder).faults} == {
            path.name for path in folder.glob("*.tar")
        }


@pytest.mark.parametrize("mode", MODES)
def test_clean_shards_have_no_fault(clean: Path, mode: str) -> None:
    report = verify([clean], mode=mode, jobs=3, progress=False)
    assert (report.faults, report.count) == ([], 0)
    (part,) = report.sets
    assert (part.images, part.shards, part.digest) == (5, 3, open_shards(str(clean)).digest)
    assert part.bytes == sum(path.stat().st_size for path in clean.glob("*.tar"))
    assert str(report).endswith(f"{mode}: clean")


def test_shards_are_verified_through_fsspec(clean: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in clean.iterdir():
        memory.pipe_file(f"/verified/{path.name}", path.read_bytes())
    try:
        for mode in MODES:
            assert verify(["memory://verified"], mode=mode, progress=False).count == 0
        memory.rm_file("/verified/shard-00001.tar")
        faults = verify(["memory://verified"], mode="quick", progress=False).faults
        assert [fault.shard for fault in faults] == ["shard-00001.tar"]
    finally:
        memory.rm("/verified", recursive=True)


def test_quick_sees_what_costs_nothing_to_see(copy: Path) -> None:
    shards = open_shards(str(copy))
    entry = shards.head("a").blocks[1]
    tar = copy / shards.row("a").shard
    data = bytearray(tar.read_bytes())
    data[entry.offset + 5] ^= 1
    data[entry.offset + 700] ^= 1  # a payload, which it leaves to the others
    tar.write_bytes(data)
    (copy / "shard-00002.tar").write_bytes((copy / "shard-00002.tar").read_bytes()[:-1024])
    first, second = check(copy, "quick").faults
    assert (first.offset, first.image) == (entry.offset, "a")
    assert first.member == f"a/0/{entry.row:05d}_{entry.col:05d}"
    assert second.shard == "shard-00002.tar"
    assert "end of the archive" in second.what


def test_faults_do_not_hide_each_other_and_are_bounded(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults_module, "MAX_FAULTS", MOST)
    parts = [part for part in parts_of(copy / "shard-00000.tar") if part.name.endswith(".png")]
    assert len(parts) > MOST
    tar = copy / "shard-00000.tar"
    data = bytearray(tar.read_bytes())
    for part in parts:
        data[part.stop - 1] ^= 4
    tar.write_bytes(data)
    report = check(copy)
    assert (len(report.faults), report.count) == (MOST, len(parts))
    assert f"and {len(parts) - MOST} more faults" in str(report)
    place = f"{tar}: byte {parts[0].data}: member '{parts[0].name}': is damaged"
    assert place in {str(fault)[: len(place)] for fault in report.faults}


def test_manifest_that_cannot_be_read_is_a_fault(copy: Path) -> None:
    (copy / "manifest.json").write_text("{")
    (fault,) = check(copy).faults
    assert "manifest.json: not JSON" in str(fault)
    with pytest.raises(ValueError, match="cannot be read, so none can be made"):
        quarantine(check(copy).sets[0], copy.parent / "aside")


def test_splits_must_not_share_a_group(clean: Path, tmp_path: Path) -> None:
    apart = draw(tmp_path / "apart", 5, "e")
    manifest = json.loads((apart / "manifest.json").read_bytes())
    assert manifest["images"][0]["name"] == "e"
    report = verify([clean, apart], mode="deep", progress=False)
    (fault,) = report.faults
    assert (fault.url, fault.shard, fault.image) == (str(apart), None, "e")
    assert f"its group 'e' is in {clean}, too" in fault.what
    assert verify([clean, apart], progress=False).count == 0  # only deep looks
    # The same source under another name.
    source = tmp_path / "apart" / "image" / "e.tif"
    shutil.copy(source, tmp_path / "z.tif")
    shard_images([tmp_path / "z.tif"], tmp_path / "z", progress=False)
    (fault,) = verify([apart, tmp_path / "z"], mode="deep", progress=False).faults
    assert "its source_sha256" in fault.what


def test_ends_with_a_status_and_a_record(
    clean: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "faults.json"
    assert main(["verify", str(clean), "--json", str(record)]) == 0
    assert capsys.readouterr().out.endswith("full: clean\n")
    assert json.loads(record.read_bytes())["clean"] is True
    flip(copy / "shard-00001.tar", np.random.default_rng(0), 600, 601)
    for mode in ("--full", "--deep"):
        assert main(["verify", mode, str(copy), "--json", str(record), "--jobs", "2"]) == 1
        out = capsys.readouterr().out
        assert "shard-00001.tar: byte 512: member 'b/0/00000_00000.00.png': is damaged" in out
        data = json.loads(record.read_bytes())
        assert (data["clean"], data["count"], data["mode"]) == (False, 1, mode[2:])
        (fault,) = data["faults"]
        assert (fault["shard"], fault["offset"]) == ("shard-00001.tar", 512)
        assert fault["member"] == "b/0/00000_00000.00.png"
        assert data["sets"][0]["images"] == 5
    assert [path.name for path in tmp_path.glob("*.tmp")] == []
    for wrong, message in (
        ([str(tmp_path / "nowhere")], "no shards here"),
        ([str(clean), "--jobs", "0"], "jobs is 0, allowed is at least 1"),
        ([str(clean), str(clean)], "each once"),
        ([str(clean), "--json", str(tmp_path / "no" / "f")], "allowed is a file in a folder"),
        ([str(clean), str(copy), "--quarantine", str(tmp_path / "q")], "is for one folder"),
    ):
        assert main(["verify", *wrong]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["verify", "--quick", "--deep", str(clean)])


def test_can_be_interrupted(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify_module, "as_completed", interrupted)
    assert main(["verify", str(clean)]) == 130


@pytest.mark.parametrize("other_file_system", [False, True])
def test_quarantine_leaves_a_clean_set(
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    other_file_system: bool,
) -> None:
    damaged = copy / "shard-00000.tar"
    flip(damaged, np.random.default_rng(0), 600, 601)
    (copy / "shard-00009.tar").write_bytes(b"nobody's")
    (copy / "shard-00002.tar").unlink()
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    rows = json.loads(before["manifest.json"])["images"]
    if other_file_system:

        def rename(self: Path, to: Path) -> None:
            raise OSError(errno.EXDEV, "another file system")

        monkeypatch.setattr(Path, "rename", rename)
    aside = tmp_path / "aside"
    assert main(["verify", str(copy), "--quarantine", str(aside)]) == 1
    out = capsys.readouterr().out
    for name in ("shard-00000.tar", "shard-00009.tar"):
        assert f"moved to {aside}: {name}" in out
        assert (aside / name).read_bytes() == before[name]
    assert "no longer in manifest.json: shard-00002.tar" in out
    assert sorted(path.name for path in copy.iterdir()) == ["manifest.json", "shard-00001.tar"]
    for mode in MODES:
        assert check(copy, mode).count == 0
    stay = {row["name"] for row in rows if row["shard"] == "shard-00001.tar"}
    assert {row.name for row in open_shards(str(copy)).images} == stay
    gone = json.loads((aside / "manifest.json").read_bytes())["images"]
    assert gone == [row for row in rows if row["name"] not in stay]


def test_quarantine_that_could_lose_data_is_refused(copy: Path, tmp_path: Path) -> None:
    flip(copy / "shard-00000.tar", np.random.default_rng(0), 600, 601)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    full = tmp_path / "full"
    full.mkdir()
    (full / "shard-00000.tar").write_bytes(b"older")
    (tmp_path / "link").symlink_to(copy)
    for folder, message in (
        (copy, "a folder that is not in"),
        (copy / "aside", "a folder that is not in"),
        (tmp_path / "link" / "aside", "a folder that is not in"),
        (full, "a new or an empty folder"),
        (full / "shard-00000.tar", "a new or an empty folder"),
        (full / "shard-00000.tar" / "x", "cannot be written to"),
    ):
        with pytest.raises(ValueError, match=message):
            quarantine(check(copy).sets[0], folder)
    report = check(copy).sets[0]
    manifest = json.loads((copy / "manifest.json").read_bytes())
    manifest["images"].pop()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="was changed while"):
        quarantine(report, tmp_path / "aside")
    (copy / "manifest.json").write_bytes(before["manifest.json"])
    for name in ("shard-00001.tar", "shard-00002.tar"):
        flip(copy / name, np.random.default_rng(0), 600, 601)
        before[name] = (copy / name).read_bytes()
    with pytest.raises(ValueError, match="nothing would stay"):
        quarantine(check(copy).sets[0], tmp_path / "aside")
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert not (tmp_path / "aside").exists()


def test_deep_decodes_and_compares_with_the_manifest(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_block, "count_classes", lambda raster: 5)
    faults = check(copy, "deep").faults
    assert {fault.image for fault in faults} == set(SIZES)
    assert all("classes is 6 in manifest.json, allowed is 5" in fault.what for fault in faults)
    assert check(copy, "full").count == 0
