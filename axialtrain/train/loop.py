"""The training loop: batch, forward, backward, step, log, validate, save; then pictures."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from axialtrain.data.batch import Batch, moved
from axialtrain.data.config import PerBand
from axialtrain.data.loader import Loader
from axialtrain.mesh.collectives import gather_objects, sum_over
from axialtrain.mesh.mesh import Mesh
from axialtrain.models.chance import Chance
from axialtrain.models.registry import Backbone
from axialtrain.tasks.objective import image_means, judged, rank_loss, shown_loss
from axialtrain.tasks.panels import Panel
from axialtrain.train.alike import BadStepError
from axialtrain.train.config import RunConfig
from axialtrain.train.damages import Damages
from axialtrain.train.engine import Engine
from axialtrain.train.faults import NONFINITE, fault_of
from axialtrain.train.keep import Keeper
from axialtrain.train.progress import Progress
from axialtrain.train.schedule import learning_rate
from axialtrain.train.track import DAMAGES, Tracker
from axialtrain.train.watch import Watch

LOG = logging.getLogger(__name__)

PICTURE = 2048  # px, the longest side of prediction.png's panels


class Task(Protocol):
    """What the loop needs of a kind of label; see `axialtrain.tasks`.

    The module of `build` takes `inputs`, and, while training, `chance=` (`models.chance.Chance`).
    """

    metrics: tuple[str, ...]  # of `summary`, the higher the better
    classes: int | None  # of label rasters
    image_classes: int | None  # of labels of whole images
    instances: bool  # whether it needs instance rasters

    def build(self, backbone: Backbone) -> nn.Module: ...
    def prepare(self, mesh: Mesh, device: torch.device) -> None: ...
    def inputs(self, batch: Batch) -> tuple[object, ...]: ...
    def loss(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]: ...
    def scores(self, output: Tensor, batch: Batch) -> dict[str, Tensor]: ...
    def summary(self, scores: dict[str, Tensor]) -> dict[str, float]: ...
    def panels(
        self, output: Tensor, batch: Batch, *, mean: PerBand, std: PerBand
    ) -> list[Panel]: ...


@dataclass
class Run:
    """The parts of a run on this rank. validation is None where there is no held-out data;
    tracker is None on every rank but the first; keeper saves, and is None where nothing is kept;
    watch is None where nobody watches over the ranks; damages is None where data that is damaged is
    not left out."""

    config: RunConfig
    mesh: Mesh
    task: Task
    engine: Engine
    loader: Loader
    validation: Loader | None
    tracker: Tracker | None
    device: torch.device
    keeper: Keeper | None = None
    watch: Watch | None = None
    progress: Progress = field(default_factory=Progress)
    damages: Damages | None = None

    def taken(self, batch: Batch, *, held_out: bool = False) -> Batch:
        """The batch as it counts, on the run's device."""
        batch = to_device(batch, self.device, pixels=not self.config.train.lean)
        return batch if self.damages is None else self.damages.settle(batch, held_out=held_out)

    def agree(self) -> None:
        """All ranks, on what of the last batches was damaged."""
        if self.damages is not None:
            self.damages.agree(self.progress.step)


@dataclass(frozen=True)
class Taken:
    """An optimizer step, equal on all ranks. fault: why it was left out, None where it counts.
    samples: of this data rank."""

    loss: float
    norm: float
    pixels: float
    tokens: float
    fault: str | None
    samples: list[str]


def train(run: Run) -> dict[str, float]:
    """Run the optimizer steps that are left. Returns the metrics of the last one, equal on all
    ranks.

    Raises Interrupted where the run was told to end, and BadStepError for a fault that is to stop
    it, or for one too many.
    """
    config, progress = run.config, run.progress
    steps = config.train.steps
    if run.keeper is not None and not progress.early:
        run.keeper.begin(run)
    started, idle = time.perf_counter(), False  # whether a step without targets was told of
    with (
        tqdm(
            total=steps,
            initial=progress.step,
            unit="step",
            disable=run.tracker is None,
            mininterval=0.5,
        ) as bar,
        closing(run.loader.steps(progress.step, 0 if progress.early else steps)) as loading,
    ):
        for step, batches in enumerate(loading, progress.step):
            if run.watch is not None:
                run.watch.at(step + 1)
            lr = learning_rate(step, steps, config.optim.lr, config.schedule)
            taken = _step(run, step, batches, lr)
            progress.step = step + 1
            run.agree()
            now = time.perf_counter()
            seconds, started = now - started, now
            metrics = {
                "loss": taken.loss,
                "lr": lr,
                "grad_norm": taken.norm,
                "seconds": seconds,
                "mpx_per_s": taken.pixels / seconds / 1e6,
                "tokens_per_s": taken.tokens / seconds,
            }
            if taken.fault is None:
                if taken.loss:  # 0: no image of it had a target, and others are not judged by it
                    progress.losses = [*progress.losses, taken.loss][-config.faults.spike_window :]
                elif run.tracker is not None and not idle:
                    LOG.warning(
                        "step %s: none of its images has a target, so its loss is 0, and others "
                        "will be; data.sample.by=balanced data.sample.classes=labels draws those "
                        "that have (docs/windows.md)",
                        progress.step,
                    )
                idle = idle or not taken.loss
            elif run.keeper is not None:
                run.keeper.leave_out(run, taken.fault, taken.loss, taken.norm, taken.samples)
                metrics["left_out"] = progress.left_out
            else:
                raise BadStepError(f"step {step + 1}: {taken.fault}")
            every = config.train.validate_every
            last = progress.step == steps
            best = False
            if run.validation is not None and (last or (every and progress.step % every == 0)):
                metrics |= validate(run)
                if config.checkpoint.best is not None:
                    best = progress.judge(config.checkpoint.best, metrics[config.checkpoint.best])
                    patience = config.train.patience
                    progress.early = 0 < patience <= progress.worse
            if run.keeper is not None and (stalled := run.keeper.stalled()):
                metrics["save_seconds"] = stalled  # before this step
            progress.metrics = metrics
            if run.tracker is not None:
                run.tracker.log(progress.step, metrics)
                bar.set_postfix_str(
                    f"loss {taken.loss:.4f}, {metrics['mpx_per_s']:.1f} Mpx/s, "
                    f"{metrics['tokens_per_s']:.0f} tokens/s",
                    refresh=False,
                )
                bar.update()
            if run.keeper is not None:
                run.keeper.keep(run, best=best, last=last or progress.early)
            started = time.perf_counter()
            if progress.early:
                break
    return progress.metrics


def _step(run: Run, step: int, batches: Iterable[Batch], lr: float) -> Taken:
    """One optimizer step."""
    size, accumulation = run.config.train.batch, run.loader.accumulation
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    seen = torch.zeros(2, dtype=torch.float64, device=run.device)  # pixels, tokens
    # Names and weights of the images, read when the step is done: here the host would have to wait
    # for the device.
    images: list[tuple[tuple[str, ...], Tensor]] = []
    shown, fault = 0.0, None
    run.engine.train()
    left = accumulation
    for batch in batches:  # `enumerate` would keep one while the next is read
        batch = run.taken(batch)
        left -= 1
        chance = Chance(run.config.seed, step, tuple(batch.samples.tolist()))
        output = run.engine(*run.task.inputs(batch), chance=chance)
        means = image_means(*run.task.loss(output, batch), batch.weight, run.mesh)
        loss = rank_loss(means, run.mesh, batch=size, accumulation=accumulation)
        total += means.detach().sum()
        real = batch.weight > 0
        counts = torch.stack([batch.present.sum((1, 2)), batch.valid.sum((1, 2))])
        seen += (counts * real).sum(1)
        images.append((batch.ids, real))
        if not left:
            # Before the last backward, while the step can still be left out: the engine drops a
            # gradient that is not finite, at every ZeRO stage. That of the output: the loss hides
            # what has no target.
            shown = float(shown_loss(total, run.mesh, batch=size))
            fault = fault_of(shown, run.progress.losses, run.config.faults)
            if fault is not None:
                loss = output.float().sum() * float("nan")
        run.engine.backward(loss)
        del batch, output, means, loss  # before the next one is read
    norm = run.engine.step(lr)
    if fault is None and not math.isfinite(norm):
        fault = NONFINITE
    seen = sum_over(seen, run.mesh.replicas)
    samples = [
        name
        for ids, real in images
        for name, counted in zip(ids, real.tolist(), strict=True)
        if counted
    ]
    return Taken(shown, norm, float(seen[0]), float(seen[1]), fault, samples)


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """One pass over the held-out images: `val_loss` and the task's metrics, equal on all ranks.

    val_loss is the mean over images that have a target: in training one without counts 0.
    """
    assert run.validation is not None
    run.engine.eval()
    total = torch.zeros(2, dtype=torch.float64, device=run.device)  # loss, images with targets
    scores: dict[str, Tensor] = {}
    for batch in run.validation.once():
        batch = run.taken(batch, held_out=True)
        output = run.engine(*run.task.inputs(batch))
        sums, valid = run.task.loss(output, batch)
        means = image_means(sums, valid, batch.weight, run.mesh)
        total += torch.stack([means.sum().double(), judged(valid, batch.weight, run.mesh)])
        for name, value in run.task.scores(output, batch).items():
            scores[name] = scores[name] + value if name in scores else value
        del batch, output, sums, valid, means  # before the next one is read
    run.agree()
    total = sum_over(total, run.mesh.replicas)
    scores = {name: sum_over(value, run.mesh.replicas) for name, value in scores.items()}
    return {"val_loss": float(total[0] / total[1].clamp_min(1))} | run.task.summary(scores)


@torch.no_grad()
def picture(run: Run) -> list[Panel] | None:
    """The task's panels of the first held-out (or else training) image, whole, on rank 0."""
    run.engine.eval()
    loader = run.validation or run.loader
    with closing(loader.once()) as batches:
        batch = run.taken(next(batches), held_out=run.validation is not None)
    run.agree()
    output = run.engine(*run.task.inputs(batch))
    data = run.config.data
    panels = run.task.panels(output, batch, mean=data.mean, std=data.std)
    place, rect = batch.place, batch.place.rect
    scale = panels[0].pixels.shape[0] // rect.height
    # Every n-th line, counted over the whole image, so that a gigapixel fits on a screen.
    every = -(-max(place.height, place.width) * scale // PICTURE)
    mine = rect.scaled(scale)
    small = [
        replace(panel, pixels=panel.pixels[-mine.top % every :: every, -mine.left % every :: every])
        for panel in panels
    ]
    parts = gather_objects((-(-mine.top // every), -(-mine.left // every), small), run.mesh.spatial)
    if run.tracker is None:
        return None
    size = (-(-place.height * scale // every), -(-place.width * scale // every), 3)
    whole = [replace(panel, pixels=np.zeros(size, np.uint8)) for panel in panels]
    for top, left, tiles in parts:
        for canvas, tile in zip(whole, tiles, strict=True):
            height, width = tile.pixels.shape[:2]
            canvas.pixels[top : top + height, left : left + width] = tile.pixels
    return whole


def reading(run: Run) -> list[dict[str, int]]:
    """What every rank has read and decoded, in rank order."""
    loaders = [run.loader] + ([run.validation] if run.validation is not None else [])
    mine = {
        **run.mesh.coordinates,
        "bytes_read": sum(loader.bytes_read for loader in loaders),
        "tiles_decoded": sum(loader.tiles_decoded for loader in loaders),
        "head_bytes_read": sum(loader.shards.head_bytes_read for loader in loaders),
    }
    return gather_objects(mine, run.mesh.world)


def to_device(batch: Batch, device: torch.device, *, pixels: bool = True) -> Batch:
    """The batch with its tensors on `device`; from pinned memory while it computes.

    pixels: whether they go there as well, or are left for a model that fetches them in bands.
    """

    def move(x: Tensor) -> Tensor:
        return x if x is batch.pixels and not pixels else x.to(device, non_blocking=True)

    return moved(batch, move)


def report(
    folder: Path, checkpoints: str, progress: Progress, damages: Damages | None = None
) -> str:
    """The last words of a run: its figures, and what lies where."""
    figures = ", ".join(
        f"{name} {progress.metrics[name]:.4f}"
        for name in ("loss", "val_loss", "pq", "miou", "accuracy")
        if name in progress.metrics
    )
    if progress.early:
        figures += f"\nended early, at step {progress.step}: the best was step {progress.best_step}"
    if damages is not None and (damages.tiles or damages.images):
        figures += f"\ndamaged, and left out: {damages.tiles} tiles"
        figures += f", {damages.images} images, see {DAMAGES}"
    if progress.left_out:
        figures += f"\nbatches left out: {progress.left_out}, see faults.jsonl"
    files = {
        "config.yaml": "the composed config",
        "metrics.jsonl": "one line a step",
        "reading.json": "bytes read and tiles decoded by each rank",
        "loss.png": "the loss curve",
        "prediction.png": "pictures, side by side",
    }
    lines = [f"\n{figures}", f"in {folder}:"]
    lines += [f"  {name:<15} {what}" for name, what in files.items()]
    return "\n".join([*lines, f"weights and optimizer, at step {progress.step}: {checkpoints}"])
