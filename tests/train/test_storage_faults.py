"""Checkpoints where they cannot be written, beside training, and which of them stay: through the
training loop, on ranks."""

from __future__ import annotations

import socket
import subprocess
from functools import partial

import pytest
import torch
from distributed.keep_ranks import SPIKE, fill, lines_of, slow_writes, train_with_faults
from distributed.launcher import run_ranks

from axialtrain.mesh.mesh import MeshConfig
from axialtrain.train.checkpoint import newest, steps_in
from axialtrain.train.config import CheckpointConfig
from axialtrain.train.save import kept
from axialtrain.train.storage import Folder

pytestmark = pytest.mark.slow

MESH = MeshConfig(row=2)
STEPS = 6


def run(folder, checkpoint, mesh=MESH, steps=STEPS, **options):
    return run_ranks(
        train_with_faults,
        mesh.size,
        mesh=mesh,
        stage=1,
        steps=steps,
        folder=folder,
        checkpoint=checkpoint,
        **options,
    )


# --- A full disk ----------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder],
        capture_output=True, text=True, timeout=10, check=False,
    )  # fmt: skip
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], timeout=10, check=True)


def saved_steps(folder):
    return steps_in(Folder(folder))


def assert_named(text, step):
    assert f"step {step} is not saved" in text
    assert f"rank 0 on {socket.gethostname()}" in text or "rank 1 on" in text
    assert "No space left on device" in text


def test_a_full_disk_is_warned_of_and_the_run_goes_on(small, tmp_path):
    full = partial(fill, at=3, folder=small, free_again=5)
    config = CheckpointConfig(every=2, folder=str(small / "c"))
    ranks = run(tmp_path / "run", config, before=full)
    assert [got.raised for got in ranks] == ["", ""]
    (warning,) = ranks[0].warned
    assert_named(warning, 4)
    assert "the checkpoint before it: step-00000002" in warning
    assert ranks[1].warned == []
    assert saved_steps(small / "c") == [2, 6]
    assert sorted(path.name for path in (small / "c").iterdir()) == [
        "step-00000002",
        "step-00000006",
    ]
    weights = newest(small / "c").weights()
    assert all(torch.equal(weights[name], value) for name, value in ranks[0].weights.items())


@pytest.mark.parametrize(
    ("asynchronous", "told_at"), [(False, None), (True, None), (False, STEPS - 1)], ids=str
)
def test_a_disk_that_stays_full_is_an_error_at_the_end(small, tmp_path, asynchronous, told_at):
    """Told to end in the last step or not."""
    full = partial(fill, at=3, folder=small)
    config = CheckpointConfig(every=2, folder=str(small / "c"), asynchronous=asynchronous)
    ranks = run(tmp_path / "run", config, before=full, told_at=told_at)
    for got in ranks:
        assert_named(got.raised, 6)
    assert_named(ranks[0].warned[0], 4)
    assert saved_steps(small / "c") == [2]
    assert newest(small / "c").step == 2
    assert [line["step"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")] == [
        *range(1, STEPS + 1)
    ]
    # With room again it goes on from there.
    (small / "ballast").unlink()
    after = run(tmp_path / "run", config, resume=True)
    assert [got.raised for got in after] == ["", ""]
    assert all(torch.equal(after[0].weights[n], value) for n, value in ranks[0].weights.items())


def test_a_full_disk_can_stop_the_run(small, tmp_path):
    full = partial(fill, at=3, folder=small)
    config = CheckpointConfig(every=2, folder=str(small / "c"), on_error="stop")
    ranks = run(tmp_path / "run", config, before=full)
    for got in ranks:
        assert_named(got.raised, 4)
    assert newest(small / "c").step == 2
    assert len(lines_of(tmp_path / "run" / "metrics.jsonl")) == 4


# --- Beside training ------------------------------------------------------------------------------


def test_saving_beside_training_saves_the_same_bits(tmp_path):
    """Although the next step changes the weights while they are written, and one save is still
    going when the next is due."""
    stay = {"every": 1, "keep_last": STEPS}
    run(tmp_path / "first", CheckpointConfig(**stay))
    slow = partial(slow_writes, last=STEPS - 1)
    run(tmp_path / "beside", CheckpointConfig(**stay, asynchronous=True), before=slow)
    for step in range(1, STEPS + 1):
        name = f"checkpoints/step-{step:08d}"
        first, beside = newest(tmp_path / "first" / name), newest(tmp_path / "beside" / name)
        tensors = {name for name in first.files if name.endswith(".safetensors")}
        assert len(tensors) == 4  # of weights and of moments, by either rank
        assert {name: first.files[name] for name in tensors} == {
            name: beside.files[name] for name in tensors
        }
        assert first.state == beside.state | {"metrics": first.state["metrics"]}
    lines = lines_of(tmp_path / "beside" / "metrics.jsonl")
    waited = [line.get("save_seconds", 0.0) for line in lines]
    assert waited[0] == 0.0
    assert waited[1] < 0.1  # only the copy
    assert min(waited[2:]) > 0.2  # for the one before


# --- Which of them stay ---------------------------------------------------------------------------


def test_the_last_and_every_nth_stay(tmp_path):
    run(tmp_path / "run", CheckpointConfig(every=1, keep_last=2, keep_every=3), steps=8)
    assert saved_steps(tmp_path / "run" / "checkpoints") == [3, 6, 7, 8]


def test_the_best_stays_and_is_found(tmp_path):
    config = CheckpointConfig(every=0, keep_last=1, best="val_loss")
    # Step 5 meets an image that is far too bright, and is not left out: it gets worse for a while.
    spike = {"bad": {5: SPIKE}, "rate": 1.0}
    ranks = run(tmp_path / "run", config, validate_every=1, steps=8, **spike)
    losses = [line["val_loss"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")]
    best = losses.index(min(losses)) + 1
    assert 1 < best < 8, "the last one would stay anyway"
    assert ranks[0].progress["best_step"] == best
    assert saved_steps(tmp_path / "run" / "checkpoints") == [best, 8]
    assert newest(tmp_path / "run", best=True).step == best
    assert newest(tmp_path / "run").step == 8
    assert newest(tmp_path / "run", best=True).state["best"] == min(losses)


def test_a_run_ends_early_and_a_resumed_one_counts_on(tmp_path):
    config = CheckpointConfig(every=1, keep_last=8, best="val_loss")
    options = {"validate_every": 1, "rate": 0.0, "steps": 9, "patience": 4}
    ranks = run(tmp_path / "whole", config, **options)
    assert ranks[0].progress["early"] is True
    assert ranks[0].progress["step"] == 5  # the first, and four that are no better
    run(tmp_path / "again", config, **(options | {"steps": 3}))
    again = run(tmp_path / "again", config, resume=True, **options)
    assert {key: again[0].progress[key] for key in ("step", "best_step", "worse", "early")} == {
        "step": 5,
        "best_step": 1,
        "worse": 4,
        "early": True,
    }


def test_what_stays_is_arithmetic():
    config = CheckpointConfig(keep_last=2, keep_every=4)
    assert kept([1, 2, 4, 5, 8, 9], config, best=2) == {2, 4, 8, 9}
    assert kept([3], config, best=None) == {3}
    assert kept([1, 2, 3], CheckpointConfig(keep_last=1), best=7) == {3}
