"""Runs that are told to end, that torchrun starts again, that go on with fewer ranks, and what
`resume` finds: each goes on where it was, or says why not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from killed_runs import (
    SMALL,
    TIMEOUT,
    assert_bit_equal,
    differing,
    finish,
    going,
    half_written,
    losses,
    saved_step,
)

from axialtrain.train.checkpoint import newest

STEPS = 60
TORCHRUN = [
    "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2",
    "-m", "axialtrain.cli",
]  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given(small_shards) -> list[str]:
    return [*SMALL, f"data.shards={small_shards}", f"train.steps={STEPS}", "mesh=1x2"]


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "whole"
    finish(folder, *given)
    return folder


def test_told_to_end_it_saves_and_goes_on(given, whole, tmp_path):
    """By Slurm's warning, by Slurm or another launcher, by Ctrl-C: with no other checkpoint."""
    folder, before = tmp_path / "told", 0
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        with going(folder, *given, "checkpoint.every=0", "resume=auto") as run:
            # Those taken before are in metrics.jsonl from the start.
            taken = before + 5
            assert run.until(lambda taken=taken: run.steps() >= taken, f"step {taken}"), run.said
            if number == signal.SIGINT:
                os.killpg(run.command.pid, number)  # a terminal's goes to all in the foreground
            else:
                os.kill(run.command.pid, number)
            assert run.wait() == 75, run.said
            step = saved_step(folder)
            assert before < step == run.steps() < STEPS
            assert run.said.count("told to end by") == 1
            said = f"told to end by {number.name}: Step {step} is saved in {folder}/checkpoints"
            assert said in run.said
            assert "Traceback" not in run.said
            assert before == 0 or f"going on from step {before} of" in run.said
            before = step
    assert f"going on from step {before} of" in finish(
        folder, *given, "checkpoint.every=0", "resume=auto"
    )
    assert_bit_equal(folder, whole)


def test_torchrun_starts_it_again(given, whole, tmp_path):
    folder = tmp_path / "again"
    # Its workers have sessions of their own: should this test fail, they end by themselves.
    arguments = [*given, "checkpoint.every=3", "resume=auto", "launcher.timeout=60"]
    with going(folder, *arguments, module=TORCHRUN) as run:
        assert run.until(lambda: run.steps() >= 8, "step 8"), run.said
        os.kill(workers(run.command.pid)[1], signal.SIGKILL)
        assert run.wait() == 0, run.said
        assert run.said.count("going on from step") == 1
        step = int(run.said.split("going on from step ")[1].split()[0])
        assert 6 <= step < STEPS
    assert_bit_equal(folder, whole)
    assert half_written(folder) == []


def test_fewer_ranks_keep_the_batch_in_bf16(given, tmp_path):
    """Half of the ranks take twice as many micro-batches. In fp32 the losses stay the same to 1e-4
    (test_nothing_lost.py); here gradients are rounded to bf16 before they are added, in another
    order. Measured: 7e-4 at most, relative, in the 40 steps after the kill."""
    batch = ["train.batch=4", "train.micro_batch=1", "mesh=single", "train.precision=bf16"]
    arguments = [*given[:-1], *batch, "checkpoint.every=3"]
    finish(tmp_path / "whole", *arguments, "mesh.data=2")
    with going(tmp_path / "fewer", *arguments, "mesh.data=2") as run:
        assert run.until(lambda: run.steps() >= 20, "step 20"), run.said
        os.kill(run.ranks()[1], signal.SIGKILL)
        assert run.wait() == 1, run.said
    step = saved_step(tmp_path / "fewer")
    assert 0 < step <= STEPS - 20
    said = finish(tmp_path / "fewer", *arguments, "mesh.data=1", "resume=auto")
    assert f"going on from step {step} of" in said
    expected, got = losses(tmp_path / "whole"), losses(tmp_path / "fewer")
    assert len(got) == len(expected) == STEPS
    assert got[:step] == expected[:step]
    assert got == pytest.approx(expected, rel=5e-3)


def test_what_resume_finds(given, tmp_path):
    """Without hydra.run.dir, in turn; one process for all, so that imports are paid for once."""
    common = [*given[:-2], "mesh=single", "name=mine", "checkpoint.every=0"]
    runs = tmp_path / "runs" / "mine"
    other = f"hydra.run.dir={tmp_path}"
    with training(tmp_path) as train:
        # There is none yet, beside a folder that is no run.
        (runs / "notes").mkdir(parents=True)
        status, said = train(*common, "train.steps=6", "resume=auto")
        assert (status, "going on" in said) == (0, False), said
        folder = next(path for path in runs.iterdir() if path.name != "notes")
        # At its end.
        status, said = train(*common, "train.steps=6", "resume=auto")
        assert status == 0
        assert "there is nothing to do" in said
        assert str(folder) in said
        assert len(losses(folder)) == 6
        # Longer than it was to be; the newest of two runs of the name, and none of another.
        status, said = train(*common, "train.steps=9", "resume=auto", "schedule=constant")
        assert f"going on from step 6 of {folder}/checkpoints" in said
        assert (status, len(losses(folder))) == (0, 9), said
        assert len(list(runs.iterdir())) == 2
        status, said = train(*common, "name=another", "train.steps=1", "resume=auto")
        assert (status, "going on" in said) == (0, False), said
        # Another run's folder, and one checkpoint, into new folders.
        step = folder / "checkpoints" / "step-00000006"
        for name, where, at in (("of-run", folder, 9), ("of-step", step, 6)):
            status, said = train(
                *common, "train.steps=12", f"resume={where}", f"{other}/{name}", "schedule=constant"
            )
            assert f"going on from step {at} of {folder}/checkpoints" in said
            assert status == 0, said
            assert saved_step(tmp_path / name) == 12
        assert saved_step(folder) == 9
        assert differing(tmp_path / "of-run", tmp_path / "of-step") == []
        # Where the first save was cut short there is nothing to go on from.
        begun = tmp_path / "begun" / "checkpoints" / "step-00000003"
        begun.mkdir(parents=True)
        (begun / ".state.json.partial").write_text("{")
        status, said = train(*common, "train.steps=4", "resume=auto", f"{other}/begun")
        assert (status, "going on" in said) == (0, False), said
        assert len(losses(tmp_path / "begun")) == saved_step(tmp_path / "begun") == 4
        assert half_written(tmp_path / "begun") == []


MANY = """
import json, os, sys
from axialtrain.cli import main
for line in sys.stdin:
    os.environ.pop("DS_ACCELERATOR", None)
    try:
        status = main(["train", *json.loads(line)])
    except SystemExit as error:
        status = error.code
    sys.stderr.flush()
    print(f"status {status}", flush=True)
"""


@contextmanager
def training(folder: Path) -> Iterator[Callable[..., tuple[int, str]]]:
    """train(*overrides): exit status and output of `axialtrain train`, in one process that takes
    itself for the only rank of an outer launcher."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with subprocess.Popen(
        [sys.executable, "-c", MANY],
        cwd=folder,
        env=os.environ | rank | found | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        too_long = threading.Timer(TIMEOUT, process.kill)
        too_long.start()

        def train(*overrides: str) -> tuple[int, str]:
            process.stdin.write(json.dumps(overrides) + "\n")
            process.stdin.flush()
            said = []
            for line in process.stdout:
                if line.startswith("status "):
                    return int(line.split()[1]), "".join(said)
                said.append(line)
            raise AssertionError(f"it ended: {''.join(said)}")

        try:
            yield train
        finally:
            too_long.cancel()
            process.kill()


def workers(launcher: int) -> list[int]:
    """The process ids of torchrun's workers."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    return [child for child, command in commands.items() if b"axialtrain.cli" in command]


def test_begun_from_another_and_killed_before_its_first_save(given, tmp_path):
    """It is begun from there again: by the same command, as torchrun and Slurm give it, and by
    resume=auto; and goes on by itself where it has saved."""
    common = [*given[:-2], "mesh=single", "schedule=constant"]
    finish(tmp_path / "other", *common, "train.steps=3")
    begun = [*common, "train.steps=5", f"resume={tmp_path / 'other'}"]
    with going(tmp_path / "new", *begun) as run:
        there = tmp_path / "new" / "mesh.txt"
        assert run.until(there.exists, "its folder is there"), run.said
        os.killpg(run.command.pid, signal.SIGKILL)
        run.wait()
    assert saved_step(tmp_path / "new") == 0
    shutil.copytree(tmp_path / "new", tmp_path / "same")
    said = finish(tmp_path / "new", *begun, "resume=auto")
    assert f"{tmp_path / 'new'} has no checkpoint yet: begun again with {tmp_path}/other" in said
    assert f"going on from step 3 of {tmp_path}/other/checkpoints" in said
    said = finish(tmp_path / "same", *begun)
    assert f"going on from step 3 of {tmp_path}/other/checkpoints" in said
    assert differing(tmp_path / "new", tmp_path / "same") == []
    said = finish(tmp_path / "same", *begun, "train.steps=6")
    assert f"going on from step 5 of {tmp_path}/same/checkpoints" in said


def test_another_folder_goes_on_with_the_checkpoints_of_a_run(given, tmp_path):
    """As another machine does, that has nothing else of it; and then the first one again."""
    place = [*given[:-2], "mesh=single", f"checkpoint.folder={tmp_path / 'ck'}", "resume=auto"]
    for folder, steps in (("one", 2), ("two", 4), ("one", 6)):
        said = finish(tmp_path / folder, *place, f"train.steps={steps}", "schedule=constant")
        assert steps == 2 or f"going on from step {steps - 2} of {tmp_path}/ck" in said
        owner = newest(tmp_path / "ck").owner
        assert owner is not None
        assert owner.folder == str(tmp_path / folder)
        assert owner.identity == (tmp_path / "one" / ".run-id").read_text()


def test_a_second_run_with_the_same_checkpoints_is_refused(given, axialtrain, tmp_path):
    place = [*given[:-2], "mesh=single", f"checkpoint.folder={tmp_path / 'ck'}"]
    with going(tmp_path / "one", *place, "train.steps=100000", "checkpoint.every=0") as run:
        assert run.until(lambda: run.steps() >= 1, "step 1"), run.said
        half = tmp_path / "ck" / "step-00000001"
        half.mkdir()  # as it is while the first one saves
        for more in ([], ["resume=auto"]):
            done = axialtrain(
                "train", *place, *more, f"hydra.run.dir={tmp_path / 'two'}", cwd=tmp_path,
                timeout=60,
            )  # fmt: skip
            assert done.returncode == 2, done.stderr
            assert f"checkpoint.folder={tmp_path / 'ck'}: " in done.stderr
        said = f"another run writes there: the one in {tmp_path / 'one'}"
        assert done.stderr.count(said) == 1
        assert half.exists(), "nothing was cleared away"
        assert os.listdir(tmp_path / "two") == [".lock"]
        steps = run.steps()
        assert run.until(lambda: run.steps() > steps, "it goes on"), run.said


def test_a_second_run_in_the_folder_is_refused(given, axialtrain, tmp_path):
    with going(tmp_path / "one", *given[:-2], "mesh=single", "train.steps=100000") as run:
        assert run.until(lambda: run.steps() >= 1, "step 1"), run.said
        config = (tmp_path / "one" / "config.yaml").read_bytes()
        done = axialtrain(
            "train", *given[:-1], "mesh=1x2", "resume=auto",
            f"hydra.run.dir={tmp_path / 'one'}", cwd=tmp_path, timeout=60,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert f"hydra.run.dir={tmp_path / 'one'}: another run writes there" in done.stderr
        assert done.stderr.count("another run writes there") == 1
        assert "Traceback" not in done.stderr
        steps = run.steps()
        assert run.until(lambda: run.steps() > steps, "it goes on"), run.said
    assert (tmp_path / "one" / "config.yaml").read_bytes() == config
