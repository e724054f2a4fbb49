"""What the bench of reading measures, counts and writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from axialtrain.bench import data as bench
from axialtrain.cli import main
from axialtrain.data.fetch import fetch_for
from axialtrain.grid import Rect


@pytest.mark.slow
def test_all_is_measured_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "DRAWN", 512)
    monkeypatch.setattr("axialtrain.bench.shard.DRAWN", 512)
    monkeypatch.setattr(bench, "STEP", 0.2)
    monkeypatch.setattr(bench, "IMAGES", 2)
    slide = tmp_path / "slide.tif"
    pixels = np.random.default_rng(0).integers(0, 256, (600, 500, 3), np.uint8)
    tifffile.imwrite(slide, pixels, tile=(240, 240), photometric="rgb", compression="jpeg")
    table = bench.bench_data(tmp_path / "a.json", slide=slide, side=512, rounds=2, steps=2)
    record = json.loads((tmp_path / "a.json").read_bytes())
    assert record["goals"] == bench.GOALS
    assert list(record["reading"]) == ["scene.tif", "slide.tif"]
    for result in record["reading"].values():
        for way in ("region", "bare", "reused", "openslide"):
            assert len(result["seconds"][way]) == len(result["cpu_seconds"][way]) == 2
        ways = (("of_bare", "bare"), ("of_reused", "reused"), ("over_openslide", "openslide"))
        for key, way in ways:
            ratios = np.divide(result["seconds"][way], result["seconds"]["region"])
            assert result[key]["wall"] == pytest.approx(np.median(ratios))
    assert record["reading"]["slide.tif"]["region"] == "525 x 437"
    assert len(record["waiting"]["waits"]) == 2
    assert 0 < record["waiting"]["share"] < 1
    assert all(result["two_threads"] > 0 for result in record["reading"].values())
    assert "of bare decoding" in table
    assert "times OpenSlide" in table
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "slide.tif"]


def test_bytes_read_for_a_byte_that_is_needed() -> None:
    rng = np.random.default_rng(0)
    head, sizes = bench._drawn_head(4096, 6000, rng)
    assert sizes.shape == (16, 24)
    whole = fetch_for(head, head.rect)
    assert whole.bytes == sizes.sum()
    assert fetch_for(head, Rect(0, 2048, 2048, 4096)).bytes == sizes[:8, 8:16].sum()
    assert bench._over_read_of(head, sizes, (1, 1)) == 1
    # Edges of blocks at 2048 px: nothing is read twice; elsewhere it is.
    assert bench._over_read_of(head, sizes, (2, 1)) == 1
    assert bench._over_read_of(head, sizes, (3, 1)) > 1.3


def test_over_read_is_what_the_design_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "IMAGES", 12)
    found = bench._over_read()
    assert found == bench._over_read()
    assert 1 < found["mean"] <= bench.GOALS["over_read"] < found["p95"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "a.txt"], "--out a.txt: allowed is a new file, NAME.json"),
        (["--out", "a.json", "--side", "100"], "--side 100: allowed are multiples of 2048 px"),
        (["--out", "a.json", "--rounds", "0"], "--rounds 0: allowed is at least 1"),
        (["--out", "a.json", "--steps", "0"], "--steps 0: allowed is at least 1"),
        (["--out", "a.json", "--slide", "x.svs"], "--slide x.svs: is not there"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, monkeypatch, capsys, arguments, message) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "data", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
