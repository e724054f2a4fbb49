"""The training loop with a `Keeper`, on ranks, with batches that are spoiled at chosen steps."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import fsspec
import torch
import torch.distributed as dist
from distributed.task_ranks import ACCUMULATION, IMAGES, Case, Images, a_run
from torch import Tensor

from axialtrain.data.batch import Batch
from axialtrain.data.order import OrderState
from axialtrain.mesh.mesh import Mesh, MeshConfig
from axialtrain.mesh.parallelize import parallelize
from axialtrain.models.chance import Chance
from axialtrain.train import storage
from axialtrain.train.config import (
    CheckpointConfig,
    FaultsConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
    ZeroConfig,
)
from axialtrain.train.engine import Engine
from axialtrain.train.keep import Keeper
from axialtrain.train.loop import train
from axialtrain.train.progress import Progress
from axialtrain.train.resume import agreed, find, folder_of, take_over
from axialtrain.train.save import Checkpoints
from axialtrain.train.schedule import learning_rate
from axialtrain.train.storage import Folder
from axialtrain.train.track import LoggerConfig, Tracker

NAN, SPIKE, EMPTY = "nan", "spike", "empty"
OPTIM = OptimConfig("sgd", lr=0.5, momentum=0.9, weight_decay=0.02, clip=0.5)
CASE = Case("reconstruction", (7, 5))


def spoiled(pixels: Tensor, how: str | None) -> Tensor:
    """NaN in one pixel of one image, or all pixels far too large."""
    if how == SPIKE:
        return pixels * 30
    pixels = pixels.clone()
    pixels[0, 0, 0] = float("nan")
    return pixels


@dataclass
class Spoiled(Images):
    """Images of which those of the steps in `bad` are spoiled; a NaN is met by one rank alone.
    EMPTY: they have no target."""

    bad: dict[int, str] = field(default_factory=dict)
    before: Callable[[int], None] | None = None
    windows: tuple[int, ...] = tuple(range(IMAGES))

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        for step, batches in enumerate(super().steps(first, last), first):
            if self.before is not None:
                self.before(step)
            how = self.bad.get(step)
            if how == SPIKE or (how == NAN and dist.get_rank() == dist.get_world_size() - 1):
                batches = [replace(b, pixels=spoiled(b.pixels, how)) for b in batches]
            if how == EMPTY:
                batches = [replace(b, present=torch.zeros_like(b.present)) for b in batches]
            yield [replace(b, ids=tuple(f"{name} of {step}" for name in b.ids)) for b in batches]

    def state(self, step: int) -> OrderState:
        return OrderState(step * IMAGES, 0, "0" * 64)


@dataclass
class Kept:
    """What a rank has at the end. raised: what stopped it. warned: what it said meanwhile."""

    raised: str
    warned: list[str]
    weights: dict[str, Tensor]
    updates: int
    progress: dict[str, Any]


def train_with_faults(
    mesh: MeshConfig,
    stage: int,
    steps: int,
    folder: Path,
    bad: dict[int, str] | None = None,
    faults: FaultsConfig | None = None,
    checkpoint: CheckpointConfig | None = None,
    precision: str = "fp32",
    resume: bool = False,
    validate_every: int = 0,
    patience: int = 0,
    rate: float = OPTIM.lr,
    before: Callable[[int], None] | None = None,
    told_at: int | None = None,
    environment: dict[str, str] | None = None,
) -> Kept:
    """Train; with `resume`, go on from the newest checkpoint. before: called in each step, with its
    number; a function of a module, or a partial of one. told_at: in this step it is told to end.
    environment: of this process from now on.
    """
    if environment is not None:
        os.environ.update(environment)
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # of another server
    optim = replace(OPTIM, lr=rate)
    axes = Mesh(**mesh.degrees)
    micro_batch = Images(CASE.grid, CASE.model.patch, axes).micro_batch
    engine = Engine(
        parallelize(CASE.build(), axes),
        axes,
        optim=optim,
        zero=ZeroConfig(stage, persistence_threshold=0),
        micro_batch=micro_batch,
        accumulation=ACCUMULATION,
        precision=precision,
    )
    run = a_run(
        CASE,
        axes,
        engine,
        torch.float32,
        optim=optim,
        train=TrainConfig(
            steps, IMAGES, micro_batch, validate_every=validate_every, patience=patience
        ),
        faults=faults or FaultsConfig(),
        checkpoint=checkpoint or CheckpointConfig(every=2),
    )
    config = run.config
    signals: Any = SimpleNamespace(received=None)

    def begins(step: int) -> None:
        if step == told_at:
            signals.received = "SIGTERM"
        if before is not None:
            before(step)

    loader: Any = Spoiled(CASE.grid, CASE.model.patch, axes, bad=bad or {}, before=begins)
    run.loader = loader
    run.validation = loader if validate_every else None
    config.task = CASE.make_task().config
    where = folder_of(config, folder)
    saved = None
    if resume:
        saved, _ = agreed(lambda: find(where), axes.world)
        assert saved is not None
        take_over(saved, engine)
        run.progress = Progress.of_state(saved.state, saved.where)
    if axes.world.rank == 0:
        folder.mkdir(exist_ok=True)
        at = 0 if saved is None else saved.step
        run.tracker = Tracker(LoggerConfig("disabled"), folder, "run", "", resumed=at)
    checkpoints = Checkpoints(Folder(where), config.checkpoint, axes.world)
    checkpoints.start(None if saved is None else saved.step)
    run.keeper = Keeper(checkpoints, signals)
    raised, warned = "", _Warned()
    logging.getLogger("axialtrain").addHandler(warned)
    try:
        train(run)
    except (FloatingPointError, OSError) as error:
        raised = str(error)
    finally:
        logging.getLogger("axialtrain").removeHandler(warned)
    if run.tracker is not None:
        run.tracker.close()
    weights = dict(engine.weights())
    kept = Kept(raised, warned.said, weights, engine.updates, run.progress.to_state())
    engine.close()
    return kept


class _Warned(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


# --- What happens before a step -------------------------------------------------------------------


def fill(step: int, *, at: int, folder: Path, free_again: int | None = None) -> None:
    """From step `at` on, the file system of `folder` is full; until before step `free_again`."""
    ballast = folder / "ballast"
    if dist.get_rank() == 0 and step == at:
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"0" * 4096)
    if dist.get_rank() == 0 and step == free_again:
        ballast.unlink()
    dist.barrier()


def slow_writes(step: int, *, last: int) -> None:
    """From the first step to `last`, writing a file takes a while."""
    if step == 0:
        SLOW.start()
    if step == last:
        SLOW.stop()


def _slowly(folder: Folder, name: str, content: bytes) -> None:
    time.sleep(0.2)
    _write(folder, name, content)


_write = Folder.write
SLOW = mock.patch.object(Folder, "write", _slowly)


def die_in_upload(step: int, *, at: int, rank: int) -> None:
    """In the save after step `at` - 1, `rank` is killed as it begins its second file."""
    if step == at - 1 and dist.get_rank() == rank:
        mock.patch.object(storage.Folder, "write", _Dying(storage.Folder.write)).start()


class _Dying:
    """In place of `Folder.write`: the first call goes through, the second kills the process."""

    def __init__(self, write: Callable[..., None]) -> None:
        self._write = write
        self._calls = 0

    def __get__(self, folder: Folder, owner: type) -> Callable[..., None]:
        def write(name: str, content: bytes) -> None:
            self._calls += 1
            if self._calls > 1:
                os.kill(os.getpid(), signal.SIGKILL)
            self._write(folder, name, content)

        return write


def plain_with_faults(
    steps: int, left_out: Sequence[int], rollback: bool = False, every: int = 2
) -> dict[str, Tensor]:
    """The same steps in plain torch, in fp64, without those in `left_out`; with `rollback` the
    model is, after each of them, that of the last step which `every` divides."""
    model, task = CASE.build().double(), CASE.make_task()
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and n.endswith("weight")]
    others = [p for p in model.parameters() if not any(p is d for d in decayed)]
    groups = [
        {"params": decayed, "weight_decay": OPTIM.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, momentum=OPTIM.momentum)

    def copied() -> Any:
        tensors = [p.detach().clone() for p in model.parameters()]
        momenta = [
            optimizer.state[p].get("momentum_buffer", torch.zeros_like(p)).clone()
            for p in model.parameters()
        ]
        return tensors, momenta

    last = copied()
    for step in range(steps):
        if step in left_out:
            if rollback:
                with torch.no_grad():
                    for parameter, value, momentum in zip(model.parameters(), *last, strict=True):
                        parameter.copy_(value)
                        optimizer.state[parameter]["momentum_buffer"] = momentum.clone()
        else:
            batch = CASE.images(step, torch.float64)
            chance = Chance(0, step, tuple(batch.samples.tolist()))
            loss = CASE.plain_loss(model(*task.inputs(batch), chance=chance), batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, OPTIM.lr, ScheduleConfig())
            optimizer.step()
        if (step + 1) % every == 0:
            last = copied()
    return {name: value.detach() for name, value in model.named_parameters()}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stop_server(step: int, *, at: int, pid: int) -> None:
    """The server of that process dies before step `at`."""
    if step == at and dist.get_rank() == 0:
        os.kill(pid, signal.SIGKILL)
