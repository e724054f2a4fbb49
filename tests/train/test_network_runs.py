"""Runs on shards behind a server that stalls, fails, and is gone for a while."""

from __future__ import annotations

from pathlib import Path

import pytest
from data.range_server import serving
from killed_runs import SMALL, assert_bit_equal, finish, going, saved_step

STEPS = 12
READ = ["data.read.timeout=0.5", "data.read.backoff=0.01", "data.read.retries=3"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def local(small_shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("local") / "run"
    finish(folder, *SMALL, f"data.shards={small_shards}", f"train.steps={STEPS}", "mesh=1x2")
    return folder


def test_what_passes_changes_nothing(local, small_shards, tmp_path):
    faults = ["stall", 503, "cut", "wrong", "reset", "short", 429]
    with serving(small_shards) as server:
        server.once["GET", "tar"] = [200, *(f for fault in faults for f in (fault, 200, 200))]
        said = finish(
            tmp_path / "run", *SMALL, *READ, f"data.shards={server.url}", f"train.steps={STEPS}",
            "mesh=1x2",
        )  # fmt: skip
        assert server.once["GET", "tar"] == [], "all of them came up"
    assert "came with a wrong checksum, fetched once more" in said
    assert_bit_equal(tmp_path / "run", local)


def test_a_server_that_is_gone_stops_the_run_which_goes_on_later(local, small_shards, tmp_path):
    """Masking what is missing would train on something else."""
    folder = tmp_path / "run"
    with serving(small_shards) as server:
        arguments = [
            *SMALL, *READ, f"data.shards={server.url}", f"train.steps={STEPS}", "mesh=1x2",
            "checkpoint.every=2",
        ]  # fmt: skip
        with going(folder, *arguments) as run:
            assert run.until(lambda: run.steps() >= 3, "step 3"), run.said
            server.always["GET", "tar"] = "stall"
            assert run.wait() == 2, run.said
            assert f"{server.url}/" in run.said
            assert "not to be had in 4 tries" in run.said
            assert "Traceback" not in run.said
        assert 2 <= saved_step(folder) < STEPS
        server.always.clear()
        assert "going on from step" in finish(folder, *arguments, "resume=auto")
    assert_bit_equal(folder, local)
