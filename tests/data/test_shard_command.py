"""What `axialtrain shard` and `inspect` refuse before anything is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tifffile

from axialtrain.cli import main
from axialtrain.data import region

if TYPE_CHECKING:
    from conftest import Source


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--share", "0.9"], "share is 0.9, allowed is only together with keep nodata or tissue"),
        (["--quality", "50"], "quality is 50, allowed is only together with encode jpeg"),
        (["--seed", "3"], "seed is 3, allowed is only together with split"),
        (["--classes", "a=1"], "classes is ['a=1'], allowed is only together with labels that"),
        (["--background", "0"], "background is 0, allowed is only together with labels that are"),
        (["--background", "3", "--labels", "a.tif"], "background is 3, allowed is only together"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["shard", "none.tif", "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_same_options_with_what_they_need_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "a.tif"
    tifffile.imwrite(image, np.full((40, 50, 3), 7, np.uint8), tile=(16, 16), photometric="rgb")
    square = [[[0, 0], [20, 0], [20, 20], [0, 20], [0, 0]]]
    (tmp_path / "a.GEOJSON").write_text(
        json.dumps(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": square},
                "properties": {"class": "a"},
            }
        )
    )
    table = tmp_path / "images.csv"
    table.write_text("image,label\na.tif,a.GEOJSON\n")
    options = ["--classes", "a=1", "--background", "0", "--keep", "nodata", "--share", "0.5"]
    options += ["--encode", "jpeg", "--quality", "50", "--split", "train=1", "--seed", "3"]
    out = str(tmp_path / "out")
    assert main(["shard", str(table), "--out", out, "--dry-run", *options]) == 0
    assert "1 images" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["json", "png"])
def test_inspect_looks_at_its_output_first(
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str,
) -> None:
    monkeypatch.setattr(region.Shards, "head", lambda *_: pytest.fail("it was read"))
    command = ["inspect", source.url, "small", "--region", "0", "0", "8", "8"]
    command += [] if key == "png" else ["--png", str(tmp_path / "x.png")]
    for path in (tmp_path / "no" / "x", tmp_path):
        assert main([*command, f"--{key}", str(path)]) == 2
        assert f"{key} is {path}, allowed is a file in a folder that is" in capsys.readouterr().err
