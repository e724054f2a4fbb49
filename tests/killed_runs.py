"""Real runs of the command line, and the processes of them to end at chosen moments."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from warm_command import Started, start

from axialtrain.train.checkpoint import MARKER, find, newest

# A run that is mostly start-up: 8 windows of 8 x 8 tokens.
SMALL = [
    "experiment=quickstart",
    "data.validation=null",
    "data.window=[256,256]",
    "model.dim=16",
    "model.depth=1",
    "model.heads=2",
]
TIMEOUT = 120.0  # s, of everything that is waited for
MOMENTS = ("in a step", "in a save", "while resuming")


@dataclass
class Going:
    """A run that has been started. command: the launcher's process."""

    folder: Path
    command: subprocess.Popen[bytes] | Started
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def ranks(self) -> list[int]:
        """The process ids of the launcher's ranks, in their order."""
        pid = self.command.pid
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            return []
        return [int(child) for child in children if _is_rank(child, pid)]

    def steps(self) -> int:
        """Lines of metrics.jsonl so far."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def until(self, holds: Callable[[], bool], what: str) -> bool:
        """Wait until `holds()`; False where the run ended before."""
        end = time.monotonic() + TIMEOUT
        while not holds():
            if self.command.poll() is not None:
                return False
            assert time.monotonic() < end, f"waited in vain until {what}:\n{self.said}"
            time.sleep(0.0005)
        return True

    def wait(self) -> int:
        try:
            return self.command.wait(TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"it did not end in {TIMEOUT:g} s:\n{self.said}") from error


@contextmanager
def going(folder: Path, *arguments: object, module: list[str] | None = None) -> Iterator[Going]:
    """`axialtrain train` with its run in `folder`, in a session of its own, with all of its
    processes gone afterwards. module: what Python runs instead, from its start; otherwise the
    command is a copy of a process that has imported everything."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    env = clean | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{folder.name}.log"
    words = ["train", *map(str, arguments), f"hydra.run.dir={folder}"]
    process: subprocess.Popen[bytes] | Started
    with log.open("wb") as output:
        if module is None:
            process = start(words, cwd=folder.parent, env=env, stdout=output, stderr=output)
        else:
            process = subprocess.Popen(
                [sys.executable, *module, *words],
                cwd=folder.parent,
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    try:
        yield Going(folder, process, log)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(TIMEOUT)


def finish(folder: Path, *arguments: object) -> str:
    """A whole run; what it said."""
    with going(folder, *arguments) as run:
        assert run.wait() == 0, run.said
        return run.said


@dataclass
class Trial:
    """What one SIGKILL did. step: lines in metrics.jsonl when it came. left: half-written files."""

    moment: str
    rank: int
    step: int
    status: int
    left: list[str] = field(default_factory=list)


def kill_a_rank(run: Going, moment: str, chance: random.Random) -> Trial | None:
    """SIGKILL a random rank at a random moment of that kind; None where the run ended before."""
    assert run.until(lambda: len(run.ranks()) > 1, "its ranks are there"), run.said
    if moment == "while resuming":
        time.sleep(chance.uniform(0.0, 3.0))  # imports and the rendezvous among it
        if chance.random() < 0.7:  # a checkpoint is read, the engine made, weights taken over
            ready = run.until(lambda: "going on from step" in run.said, "it goes on")
            time.sleep(chance.uniform(0.0, 0.5))
            if not ready:
                return None
    else:
        # Those of before are cut off only when the run goes on, so a time is waited for too.
        run.until(lambda: _began(run), "it begins")
        before = run.steps()
        wanted = before + chance.randint(1, 6)
        run.until(lambda: run.steps() >= wanted, f"step {wanted}")
        if moment == "in a save":
            if not run.until(lambda: bool(half_written(run.folder)), "it saves"):
                return None
            time.sleep(chance.uniform(0.0, 0.004))
        else:
            time.sleep(chance.uniform(0.0, 0.05))
    ranks = run.ranks()
    if len(ranks) < 2 or run.command.poll() is not None:
        return None
    rank = chance.randrange(len(ranks))
    os.kill(ranks[rank], signal.SIGKILL)
    trial = Trial(moment, rank, run.steps(), run.wait())
    trial.left = half_written(run.folder)
    return trial


def half_written(folder: Path) -> list[str]:
    """Files that are being written, and checkpoints without their marker."""
    left = [str(path.relative_to(folder)) for path in folder.rglob("*.partial")]
    for step in folder.glob("checkpoints/step-*"):
        try:
            if MARKER not in os.listdir(step):
                left.append(str(step.relative_to(folder)))
        except FileNotFoundError:  # removed at this moment
            continue
    return sorted(left)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """Of every step, each of which is there once and in order."""
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def saved_step(folder: Path) -> int:
    """Of the last complete checkpoint, of which every byte is read; 0 where there is none."""
    saved, problems = find(folder, verify=True)
    assert problems == []
    return 0 if saved is None else saved.step


def weights(folder: Path) -> dict[str, Tensor]:
    """At the end of a run."""
    return newest(folder).weights()


def tensors(folder: Path) -> dict[str, Tensor]:
    """Weights, buffers and the optimizer's moments at the end of a run."""
    saved = newest(folder)
    with saved.opened() as opened:
        moments = {}
        for full_name in opened.moment_names:
            key, name = full_name.split("/", 1)
            moments[full_name] = opened.moment(name, key)
    assert moments
    return saved.weights() | moments


def differing(one: Path, other: Path) -> list[str]:
    """The names of the tensors at the end of two runs that are not bit-equal."""
    left, right = tensors(one), tensors(other)
    names = sorted(left.keys() | right.keys())
    assert left.keys() == right.keys(), names
    return [name for name in names if not torch.equal(left[name], right[name])]


def assert_bit_equal(got: Path, expected: Path) -> None:
    """The tensors at the end of two runs, and the losses of all their steps."""
    assert losses(got) == losses(expected)
    assert differing(got, expected) == []


def _began(run: Going) -> bool:
    return "going on from step" in run.said or "s/step" in run.said or "step/s" in run.said


def _is_rank(child: str, pid: int) -> bool:
    """Whether it is a copy of that process, or, on a machine with GPUs, one that it has begun anew;
    and not a program that one of its libraries calls."""
    try:
        own, other = (Path(f"/proc/{each}/cmdline").read_bytes() for each in (child, pid))
    except OSError:
        return False
    return own == other or b"spawn_main" in own
