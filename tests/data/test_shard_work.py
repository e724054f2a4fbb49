"""`axialtrain shard` as work: killed and gone on with, by several processes, to other places."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import tifffile

from axialtrain.cli import main
from axialtrain.data import making
from axialtrain.data.encode import Run
from axialtrain.data.listing import entries_of
from axialtrain.data.region import open_shards
from axialtrain.data.scratch import Scratch
from axialtrain.data.shard import SCRATCH, _wanted, make_shards, prepare, shard_images
from axialtrain.data.sharding import Sharding
from axialtrain.data.store import BlockEntry
from axialtrain.data.verify import verify

KILLS = int(os.environ.get("AXIALTRAIN_KILLS", "3"))


def drawn(folder: Path, sides: list[int], tile: int = 16) -> list[Path]:
    """Square images of noise without JPEG."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, side in enumerate(sides):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
        paths.append(folder / f"image_{number}.tif")
        tifffile.imwrite(paths[-1], pixels, tile=(tile, tile), photometric="rgb")
    return paths


def files(out: Path) -> dict[str, bytes]:
    """All that must be the same for the same input: not the record, which has times."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "shard.json"
    }


def assert_same(whole: Path, out: Path) -> None:
    expected, found = files(whole), files(out)
    assert expected.keys() == found.keys()
    for name, data in expected.items():
        if name != "summary.md":  # which names its folder
            assert found[name] == data, name


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "axialtrain.cli", "shard", *map(str, arguments)]


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    images = drawn(tmp_path / "images", [1600, 1100, 1700, 900])
    began = time.monotonic()
    assert main(["shard", *map(str, images), "--out", str(tmp_path / "whole"), "--jobs", "1"]) == 0
    took = time.monotonic() - began
    rng = random.Random(int(os.environ.get("AXIALTRAIN_SEED", "0")))
    out, killed, working, resume = tmp_path / "out", 0, 0, []
    for _ in range(10 * KILLS + 1):
        process = subprocess.Popen(
            command(*images, "--out", out, "--jobs", 2, *resume),
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            while not (out / SCRATCH / "run.json").exists() and process.poll() is None:
                time.sleep(0.01)
            process.wait(timeout=rng.uniform(0.0, took / 2) if killed < KILLS else 120)
        except subprocess.TimeoutExpired:
            process.kill()  # it alone: those that it started end by themselves
            process.wait()
            at_work = (out / SCRATCH / "run.json").exists()
            if not (out / "manifest.json").exists() or at_work:
                killed += 1
                working += at_work
                resume = ["--resume"] if at_work else []
                continue
            # All was done, but for the process's end.
        else:
            assert process.stderr is not None
            assert process.returncode == 0, process.stderr.read()
        assert_same(tmp_path / "whole", out)
        if killed >= KILLS:
            break
        shutil.rmtree(out)  # it was faster than we
        killed, working, resume = 0, 0, []
    print(f"killed {killed} times, {working} of them at work")
    assert working >= KILLS - 1, "it ended before it could be killed"
    assert verify([str(out)], mode="deep").count == 0


def test_unfinished_work_is_gone_on_with_and_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = drawn(tmp_path / "images", [300, 200, 280])
    how, out = Sharding(shard_bytes=1), tmp_path / "out"  # a shard an image
    work = prepare(entries_of(images), how)
    make_shards(work, tmp_path / "whole", how, jobs=1, progress=False)

    made: list[str] = []
    write_run = making.write_run

    def counting(job, kept, number, file):  # type: ignore[no-untyped-def]
        if len(made) == 1 and "stop" not in made:
            made.append("stop")
            raise KeyboardInterrupt
        made.append(job.name)
        return write_run(job, kept, number, file)

    monkeypatch.setattr(making, "write_run", counting)
    with pytest.raises(KeyboardInterrupt):
        make_shards(work, out, how, jobs=1, progress=False)
    assert not (out / "manifest.json").exists()
    with pytest.raises(ValueError, match=r"holds the unfinished work of another run, .*--resume"):
        make_shards(work, out, how, jobs=1, progress=False)
    other = Sharding(shard_bytes=1, statistics=True)
    with pytest.raises(ValueError, match="the run that was begun here differs in statistics"):
        make_shards(prepare(entries_of(images), other), out, other, resume=True, progress=False)
    summary = make_shards(work, out, how, jobs=1, resume=True, progress=False)
    assert made == ["image_0", "stop", "image_1", "image_2"]
    assert [image.row.name for image in summary.images] == ["image_0", "image_1", "image_2"]
    assert files(out) == files(tmp_path / "whole")
    # The same, by two processes.
    make_shards(work, tmp_path / "two", how, jobs=2, progress=False)
    assert files(tmp_path / "two") == files(out)


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path) -> None:
    images = drawn(tmp_path / "images", [40])
    work, out = prepare(entries_of(images), Sharding()), tmp_path / "out"
    with (
        Scratch(out / SCRATCH).held(),
        pytest.raises(ValueError, match=rf"process {os.getpid()} on .* works here, allowed is one"),
    ):
        make_shards(work, out, Sharding(), progress=False)
    assert not (out / "manifest.json").exists()
    make_shards(work, out, Sharding(), progress=False)  # the lock went with its holder


def ended_after_one(images: list[Path], out: Path, monkeypatch, how: Sharding) -> None:  # type: ignore[no-untyped-def]
    """Unfinished work in `out`: the first shard at its place, and no more."""
    with monkeypatch.context() as patch:
        finish = Scratch.finish

        def ending(self: Scratch, *arguments: object) -> None:
            finish(self, *arguments)  # type: ignore[arg-type]
            raise KeyboardInterrupt

        patch.setattr(Scratch, "finish", ending)
        with pytest.raises(KeyboardInterrupt):
            make_shards(prepare(entries_of(images), how), out, how, jobs=1, progress=False)
    assert (out / "shard-00000.tar").exists()


def test_what_is_gone_is_made_again(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """A shard that was finished; a part that is not whole; parts of a run that nobody knows."""
    images = drawn(tmp_path / "images", [300, 200])
    how, out = Sharding(shard_bytes=1), tmp_path / "out"
    work = prepare(entries_of(images), how)
    make_shards(work, tmp_path / "whole", how, progress=False)
    ended_after_one(images, out, monkeypatch, how)
    (out / "shard-00000.tar").unlink()
    make_shards(work, out, how, resume=True, progress=False)
    assert files(out) == files(tmp_path / "whole")

    out = tmp_path / "cut"
    ended_after_one(images, out, monkeypatch, how)
    parts = Scratch(out / SCRATCH)
    with parts.part("image_1", 0) as file:
        file.write(b"half of it")
    parts.keep("image_1", 0, Run((BlockEntry(0, 0, 0, 99, 0),), 0, 0, 0, 0, False, None))
    make_shards(work, out, how, resume=True, progress=False)
    assert files(out) == files(tmp_path / "whole")

    out = tmp_path / "unknown"
    ended_after_one(images, out, monkeypatch, Sharding(shard_bytes=1, tile=32))
    (out / SCRATCH / "run.json").unlink()
    with pytest.raises(ValueError, match=r"holds no unfinished work, allowed to go on with"):
        make_shards(work, out, how, resume=True, progress=False)
    make_shards(work, out, how, progress=False)
    assert files(out) == files(tmp_path / "whole")


def test_other_work_is_left_alone(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    images = drawn(tmp_path / "images", [300, 200])
    how, out = Sharding(shard_bytes=1), tmp_path / "out"
    ended_after_one(images, out, monkeypatch, how)
    before = files(out)
    with pytest.raises(ValueError, match="holds the unfinished work of another run"):
        shard_images(images, out, progress=False)
    assert files(out) == before
    # A raster that was changed since is other work.
    labels = tmp_path / "labels.tif"
    tifffile.imwrite(labels, np.ones((90, 90), np.uint8), tile=(16, 16))
    image, out = drawn(tmp_path / "other", [90])[0], tmp_path / "labelled"
    work = prepare(entries_of([image], [labels]), how)
    with Scratch(out / SCRATCH).held():
        pass
    wanted = _wanted(work, how)
    tifffile.imwrite(labels, np.full((90, 90), 3, np.uint8), tile=(16, 16))
    assert _wanted(work, how)["images"] != wanted["images"]


def test_work_of_a_version_with_other_records_is_left_alone(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    images = drawn(tmp_path / "images", [300, 200])
    how, out = Sharding(shard_bytes=1), tmp_path / "out"
    ended_after_one(images, out, monkeypatch, how)
    record = out / SCRATCH / "run.json"
    wanted = json.loads(record.read_bytes())
    del wanted["records"]  # as before there was one
    record.write_text(json.dumps(wanted))
    with pytest.raises(
        ValueError, match=r"the run that was begun here differs in records, allowed"
    ):
        make_shards(prepare(entries_of(images), how), out, how, resume=True, progress=False)


def test_a_full_disk_is_no_fault_of_an_image(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    images = drawn(tmp_path / "images", [100, 90])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(making, "write_run", full)
    how = Sharding()
    with pytest.raises(ValueError, match=r"out/\.shard: cannot be written to \(.*No space left"):
        make_shards(
            prepare(entries_of(images), how), tmp_path / "out", how, jobs=1,
            skip_errors=True, progress=False,
        )  # fmt: skip


def test_names_of_strangers_are_text_everywhere(tmp_path: Path) -> None:
    """A name that is no UTF-8 and has an escape sequence, of an image that is skipped."""
    image = drawn(tmp_path / "images", [40])[0]
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/=a\xff\x1b[31m.tif")
    Path(odd).write_bytes(b"no image")
    out = tmp_path / "out"
    assert main(["shard", str(image), odd, "--out", str(out), "--skip-errors"]) == 0
    for name in ("skipped.csv", "summary.md", "shard.json"):
        text = (out / name).read_bytes().decode()
        assert "\x1b" not in text
        assert "udcff" in text


def test_a_url_is_as_good_as_a_folder(tmp_path: Path) -> None:
    images = drawn(tmp_path / "images", [300, 90])
    url, how = "memory://shards/one", Sharding(shard_bytes=1)
    work = prepare(entries_of(images), how)
    scratch = tmp_path / "scratch"
    make_shards(work, url, how, scratch=scratch, progress=False)
    assert not scratch.exists()
    make_shards(work, tmp_path / "out", how, progress=False)
    fs = fsspec.filesystem("memory")
    assert {Path(name).name: fs.cat_file(name) for name in fs.find("/shards/one")} == files(
        tmp_path / "out"
    )
    assert verify([url], mode="deep").count == 0
    with pytest.raises(ValueError, match=r"memory://shards/one: has a manifest\.json already"):
        make_shards(work, url, how, scratch=scratch, progress=False)


def test_a_damaged_image_is_left_out_and_said(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    images = drawn(tmp_path / "images", [100, 120, 140])
    broken = tmp_path / "images" / "broken.tif"
    broken.write_bytes(b"no image")
    # One whose damage only shows when its tiles are read.
    data = bytearray(images[1].read_bytes())
    compressed = tmp_path / "images" / "cut.tif"
    pixels = np.random.default_rng(9).integers(0, 256, (128, 128, 3), np.uint8)
    tifffile.imwrite(compressed, pixels, tile=(64, 64), photometric="rgb", compression="zlib")
    data = bytearray(compressed.read_bytes())
    with tifffile.TiffFile(compressed) as file:
        offset, size = file.pages[0].dataoffsets[2], file.pages[0].databytecounts[2]
    data[offset : offset + size] = bytes(size)
    compressed.write_bytes(data)
    given = [*map(str, images), str(broken), str(compressed)]
    out = tmp_path / "out"
    assert main(["shard", *given, "--out", str(out)]) == 2
    assert "broken.tif" in capsys.readouterr().err
    assert not out.exists()
    assert main(["shard", *given, "--out", str(out), "--skip-errors"]) == 0
    said = capsys.readouterr().out
    assert "2 images were skipped" in said
    lines = (out / "skipped.csv").read_text().splitlines()
    assert lines[0] == "image,reason"
    assert [line.split(",")[0] for line in lines[1:]] == [str(broken), str(compressed)]
    assert [row.name for row in open_shards(str(out)).images] == [f"image_{k}" for k in range(3)]
    assert verify([str(out)], mode="deep").count == 0
    record = json.loads((out / "shard.json").read_bytes())
    assert [entry["image"] for entry in record["skipped"]] == [str(broken), str(compressed)]
    assert not (out / SCRATCH).exists()


def test_a_dry_run_checks_everything_and_writes_nothing(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    images = drawn(tmp_path / "images", [100, 120])
    out = tmp_path / "out"
    before = sorted(tmp_path.rglob("*"))
    assert main(["shard", str(tmp_path / "images" / "*.tif"), "--out", str(out), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "image_0" in said
    assert "100 x 100" in said
    assert "49 of 16 px, as png" in said
    assert "2 images of 0.000 gigapixels would be stored" in said
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["shard", str(images[0]), "nothing*.tif", "--out", str(out), "--dry-run"]) == 2
    assert "nothing*.tif: no file has a name like this" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    images = drawn(tmp_path / "images", [1600, 1700])
    out = tmp_path / "out"
    process = subprocess.Popen(command(*images, "--out", out, "--jobs", 2))
    while not list(out.glob(f"{SCRATCH}/parts/*.blocks*")):
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while any(_lives(child) for child in children):
        assert time.monotonic() < end, "a process is left over"
        time.sleep(0.05)


def _lives(process: str) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
