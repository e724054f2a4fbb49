"""`axialtrain bench checkpoint`: what it makes of the lines of a run, and what it refuses."""

import json

import pytest

from axialtrain.bench.checkpoint import _measured, bench_checkpoint


def a_run(folder, stalls):
    """Six steps of a second, the first of which took longer; stalls: by the step that tells."""
    lines = [{"step": step, "seconds": 9.0 if step == 1 else 1.0} for step in range(1, 7)]
    for line in lines:
        if line["step"] in stalls:
            line["save_seconds"] = stalls[line["step"]]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_stalls_are_counted_by_the_save(tmp_path):
    """Beside training a save is told of twice: the copy, and a step later the marker."""
    got = _measured(a_run(tmp_path / "run", {3: 0.5, 4: 0.25, 5: 0.5, 6: 0.25}), every=2)
    assert got == {
        "step_s": 1.0,
        "saves": 2,  # after the steps 2 and 4: the last one waits for itself
        "stall_s": 0.75,
        "largest_stall_s": 0.5,
        "share": 1.5 / 6.5,
    }


def test_a_run_that_does_not_save(tmp_path):
    got = _measured(a_run(tmp_path / "run", {}), every=0)
    assert (got["saves"], got["stall_s"], got["share"]) == (0, 0.0, 0.0)


@pytest.mark.parametrize("name", ["there.json", "folder.json", "bench.txt"])
def test_only_a_new_file_is_written(tmp_path, name):
    (tmp_path / "there.json").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"--out .*: allowed is a new file, NAME\.json"):
        bench_checkpoint([], tmp_path / name, every=5)


@pytest.mark.slow
def test_a_run_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(ValueError, match="none: the run ended with status 2"):
        bench_checkpoint(["data.shards=nowhere"], tmp_path / "bench.json", every=5)
    assert not (tmp_path / "bench.json").exists()
