"""What the bench of `axialtrain shard` draws, runs and writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from axialtrain.bench import shard as bench
from axialtrain.cli import main
from axialtrain.data.readers import open_image
from axialtrain.data.scene import draw_scene
from axialtrain.grid import Rect


@pytest.mark.slow
def test_each_way_is_run_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "WAYS", {k: bench.WAYS[k] for k in ("copied", "encoded as JPEG")})
    large = np.ones(1 << 30, np.uint8)  # of this process, which is none of those measured
    table = bench.bench_shard(tmp_path / "a.json", side=2048, jobs=1)
    assert large.all()
    record = json.loads((tmp_path / "a.json").read_bytes())
    results = record["results"]
    assert list(results) == ["copied", "encoded as JPEG"]
    assert results["copied"]["over_copied"] == 1
    assert results["encoded as JPEG"]["over_copied"] == pytest.approx(
        results["encoded as JPEG"]["seconds"] / results["copied"]["seconds"]
    )
    for result in results.values():
        assert 50 << 20 < result["bytes"] < 1 << 30
        assert result["seconds"] > 0
    assert "encoded as JPEG" in table
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]


def test_the_scene_is_repeated_at_every_level(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(bench, "DRAWN", 512)
    bench.write_scene(tmp_path / "a.tif", 1024)
    drawn = draw_scene(size=512, seed=0).pixels.astype(int)
    with open_image(tmp_path / "a.tif") as image:
        assert (image.height, image.width, image.levels, image.jpeg) == (1024, 1024, 3, True)
        pixels = image.read(Rect(0, 1024, 0, 1024)).astype(int)
        assert np.abs(pixels - np.tile(drawn, (2, 2, 1))).mean() < 6
    with open_image(tmp_path / "a.tif", 1) as image:
        pixels = image.read(Rect(0, 512, 0, 512)).astype(int)
        assert np.abs(pixels - np.tile(drawn[::2, ::2], (2, 2, 1))).mean() < 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "a.txt"], "--out a.txt: allowed is a new file, NAME.json"),
        (["--out", "a.json", "--side", "100"], "--side 100: allowed are multiples of 2048 px"),
        (["--out", "a.json", "--jobs", "0"], "--jobs 0: allowed is at least 1"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, monkeypatch, capsys, arguments, message) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "shard", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
