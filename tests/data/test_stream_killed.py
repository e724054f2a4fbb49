"""A stream that is killed at random moments and goes on otherwise is, in order, that of one go."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loaded import serial, small_shards
from repository import REPOSITORY
from stream_process import config_of

STEPS, BATCH, KILLS = 60, 4, 3
WAIT = 300.0  # s
MIX = {
    "window": [32, 40],
    "cut": {"stride": 20},
    "sample": {"by": "balanced"},
}
AUGMENTED = MIX | {
    "augment": {
        "vertical_flip": True, "quarter_turns": True, "shift": 9, "brightness": 0.2, "hue": 0.1,
        "noise": 0.1,
    },
}  # fmt: skip
LABELS = MIX | {"sample": {"by": "balanced", "classes": "labels"}}
ROWS_COLS = [[1, 1], [2, 1], [1, 2], [2, 2]]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, rng = tmp_path_factory.mktemp("killed"), np.random.default_rng(8)
    sizes = [
        {f"i{k}": (int(rng.integers(40, 90)), int(rng.integers(40, 90))) for k in range(count)}
        for count in (7, 4)
    ]
    return [
        small_shards(
            folder / str(n),
            some,
            seed=n,
            classes=4,
            image_labels=[k % 3 for k in range(len(some))],
        )
        for n, some in enumerate(sizes)
    ]


def begin(folder: Path, options: dict[str, Any]) -> subprocess.Popen[bytes]:
    tests = REPOSITORY / "tests"
    paths = [str(tests / "data"), str(tests), str(REPOSITORY)]
    return subprocess.Popen(
        [sys.executable, str(tests / "data" / "stream_process.py"), str(folder),
         json.dumps(options)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stderr=(folder / "errors.txt").open("ab"),
    )  # fmt: skip


def length(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mix", "labels", "augmented", "buckets"])
def test_a_killed_stream_goes_on_in_order(sets: list[str], tmp_path: Path, kind: str) -> None:
    rng = random.Random(kind)
    data: dict[str, Any] = {"shards": {sets[0]: 2, sets[1]: 1}}
    data |= {"mix": MIX, "labels": LABELS, "augmented": AUGMENTED, "buckets": {"buckets": 1}}[kind]
    lines = tmp_path / "stream.txt"
    total = STEPS * BATCH
    for attempt in range(KILLS + 1):
        options = {
            "data": data | {"workers": rng.randint(1, 3), "prefetch": rng.randint(0, 3)},
            "steps": STEPS,
            "mesh_shape": rng.choice(ROWS_COLS),
            "data_ranks": rng.randint(1, 3),
            "micro_batch": rng.randint(1, 3),
        }
        going = begin(tmp_path, options)
        if attempt == KILLS:
            assert going.wait(WAIT) == 0, (tmp_path / "errors.txt").read_text()
            break
        before, until = length(lines), time.monotonic() + WAIT
        enough = before + rng.randint(1, total // (2 * KILLS))  # also in the middle of a step
        while length(lines) < enough and going.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        assert going.poll() is None, (tmp_path / "errors.txt").read_text()
        going.send_signal(signal.SIGKILL)
        assert going.wait(WAIT) == -signal.SIGKILL
        assert before < length(lines) < total
    if kind == "augmented":  # whose numbers only a loader has
        whole = {"steps": STEPS, "mesh_shape": [1, 1], "data_ranks": 1, "micro_batch": 1}
        (tmp_path / "whole").mkdir()
        assert begin(tmp_path / "whole", {"data": data} | whole).wait(WAIT) == 0
        assert lines.read_text() == (tmp_path / "whole" / "stream.txt").read_text()
        return
    expected = serial(config_of(json.loads(json.dumps(data))), 0, STEPS)
    assert lines.read_text().splitlines() == [f"{i} {name} {crc:08x}" for i, name, crc in expected]
