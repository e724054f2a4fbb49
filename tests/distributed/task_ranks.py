"""Tasks on ranks: batches of whole images, what a rank holds of them, what it computes there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axialtrain.attention import lines
from axialtrain.attention.config import AxialConfig
from axialtrain.data.batch import Batch
from axialtrain.data.config import DataConfig
from axialtrain.grid import Place, tokens_across
from axialtrain.mesh.mesh import Mesh, MeshConfig
from axialtrain.mesh.parallelize import parallelize
from axialtrain.models.transformer import AxialTransformer, AxialTransformerConfig
from axialtrain.tasks.objective import image_means, rank_loss, shown_loss
from axialtrain.tasks.panels import Panel
from axialtrain.tasks.reconstruction import (
    Reconstruction,
    ReconstructionConfig,
    hidden_tokens,
)
from axialtrain.tasks.segmentation import IGNORE, Segmentation, SegmentationConfig
from axialtrain.train.config import RunConfig, TrainConfig
from axialtrain.train.engine import Engine, OptimConfig, ZeroConfig
from axialtrain.train.loop import Run, Task, picture, train, validate
from axialtrain.train.schedule import ScheduleConfig

IMAGES = 5  # in an optimizer step
ACCUMULATION = 2
CLASSES = 5


# --- Images, and a rank's part of them ------------------------------------------------------------


def whole_images(
    grid: tuple[int, int], patch: int, *, step: int = 0, bands: int = 3, dtype=torch.float32
) -> Batch:
    """IMAGES images that differ in how many targets they have, whole.

    All there; smaller than the grid, and cut within a patch; few targets; no label at all; and
    nothing there. Which of them is which, `step` says.
    """
    height, width = grid[0] * patch, grid[1] * patch
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randn(IMAGES, height, width, bands, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (IMAGES, height, width), generator=generator)
    draws = torch.rand(IMAGES, height, width, generator=generator)
    everything, smaller, few, unlabelled, nothing = torch.arange(IMAGES).roll(step).tolist()
    present = torch.ones(IMAGES, height, width, dtype=torch.bool)
    present[smaller, height - patch - 1 :] = False
    present[smaller, :, width - 1 :] = False
    present[smaller, :patch, :patch] = torch.arange(patch * patch).view(patch, patch) % 3 > 0
    present[nothing] = False
    labels[draws < 0.1] = IGNORE
    labels[few] = labels[few].where(draws[few] > 0.97, IGNORE)
    labels[unlabelled] = IGNORE
    assert (labels[everything] != IGNORE).any()
    here = present.view(IMAGES, grid[0], patch, grid[1], patch)
    return Batch(
        pixels=pixels.where(present[..., None], 0).to(dtype),
        labels=labels.where(present, IGNORE).to(torch.uint8),
        present=present,
        valid=here.any(4).any(2),
        weight=torch.ones(IMAGES),
        place=Place(*grid),
        ids=tuple(f"image {index}" for index in range(IMAGES)),
        samples=torch.arange(IMAGES) + IMAGES * step,
    )


def part_of(whole: Batch, place: Place, slots: range) -> Batch:
    """The images of `slots` in the tile of `place`; a slot past the last image is a filler."""
    images = torch.tensor([slot % IMAGES for slot in slots])
    filler = torch.tensor([slot >= IMAGES for slot in slots])
    origin = whole.place.rect
    patch = whole.pixels.shape[1] // origin.height
    tokens = (images, *place.rect.slices(origin))
    here = (images, *place.rect.scaled(patch).slices(origin))
    labels = whole.labels[here].clone()
    labels[filler] = IGNORE
    return replace(
        whole,
        pixels=whole.pixels[here].where(~filler.view(-1, 1, 1, 1), 0),
        labels=labels,
        present=whole.present[here] & ~filler.view(-1, 1, 1),
        valid=whole.valid[tokens] & ~filler.view(-1, 1, 1),
        weight=whole.weight[images].where(~filler, 0),
        place=place,
        ids=tuple(whole.ids[image] for image in images.tolist()),
        samples=whole.samples[images],
    )


@dataclass
class Images:
    """Stands in for a Loader: the micro-batches of a rank of `mesh`."""

    grid: tuple[int, int]
    patch: int
    mesh: Mesh
    dtype: torch.dtype = torch.float32
    accumulation: int = ACCUMULATION

    @property
    def micro_batch(self) -> int:
        return tokens_across(IMAGES, self.accumulation * self.mesh.data.size)

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        for step in range(first, last):
            whole = whole_images(self.grid, self.patch, step=step, dtype=self.dtype)
            yield [self._part(whole, index) for index in range(self.accumulation)]

    def once(self) -> Iterator[Batch]:
        yield from next(self.steps(HELD_OUT, HELD_OUT + 1))

    def _part(self, whole: Batch, index: int) -> Batch:
        first = (index * self.mesh.data.size + self.mesh.data.rank) * self.micro_batch
        slots = range(first, first + self.micro_batch)
        return part_of(whole, self.mesh.place(*self.grid), slots)


HELD_OUT = 1000  # the step of the validation images


# --- What the losses should be, pixel by pixel ----------------------------------------------------


def per_pixel(cells: Tensor, side: int) -> Tensor:
    """[B, h, w, ...] -> [B, h * side, w * side, ...], the nearest."""
    return cells.repeat_interleave(side, 1).repeat_interleave(side, 2)


def plain_segmentation(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(summed cross-entropy [B], targets [B])."""
    side = batch.pixels.shape[1] // logits.shape[1]
    labels = batch.labels.long()
    upsampled = per_pixel(logits, side).movedim(-1, 1)
    errors = F.cross_entropy(upsampled, labels, ignore_index=IGNORE, reduction="none")
    return errors.sum((1, 2)), (labels != IGNORE).sum((1, 2))


def plain_reconstruction(output: Tensor, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(summed squared error [B], values that are targets [B]) of the hidden tokens [B, h, w]."""
    _, h, w, _ = output.shape
    bands = batch.pixels.shape[-1]
    patch = batch.pixels.shape[1] // h
    painted = torch.empty_like(batch.pixels, dtype=output.dtype)
    for y in range(h):
        for x in range(w):
            values = output[:, y, x].view(-1, bands, patch, patch).movedim(1, -1)
            painted[:, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch] = values
    target = batch.present & per_pixel(hidden, patch)
    errors = (painted - batch.pixels).square().sum(-1)
    return errors.where(target, 0).sum((1, 2)), bands * target.sum((1, 2))


def mean_over_images(sums: Tensor, targets: Tensor) -> Tensor:
    """The mean loss of each image, averaged; an image without targets counts 0."""
    return (sums / targets.clamp(min=1)).mean()


# --- The loss rule on ranks -----------------------------------------------------------------------


@dataclass
class Losses:
    """Of one rank: of each of its micro-batches, the loss, the gradient and where in the batch."""

    losses: list[float]
    gradients: list[Tensor]
    where: list[tuple[Any, ...]]  # index of (image, rows, columns), fillers left out
    of_fillers: list[Tensor]  # their gradients
    shown: Tensor
    replicas: int


def step_losses(mesh: MeshConfig, grid: tuple[int, int]) -> Losses:
    """One optimizer step on values [IMAGES, H, W] that stand for what a model puts out."""
    axes = Mesh(**mesh.degrees)
    images = Images(grid, 1, axes, torch.float64)
    result = Losses([], [], [], [], torch.zeros(()), axes.replicas.size)
    total = torch.zeros((), dtype=torch.float64)
    for batch in next(images.steps(0, 1)):
        values = batch.pixels[..., 0].clone().requires_grad_()
        sums, targets = square_errors(values, batch)
        means = image_means(sums, targets, batch.weight, axes)
        loss = rank_loss(means, axes, batch=IMAGES, accumulation=images.accumulation)
        loss.backward()
        total += means.sum().detach()
        real = batch.weight > 0
        result.losses.append(loss.item())
        result.gradients.append(values.grad[real])
        result.of_fillers.append(values.grad[~real])
        result.where.append((batch.samples[real], *batch.place.rect.slices(Place(*grid).rect)))
    result.shown = shown_loss(total.requires_grad_(), axes, batch=IMAGES)
    return result


def square_errors(values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """A loss of the targets among `values`, that tells their places apart."""
    target = batch.labels != IGNORE
    return (values.square() * target).sum((1, 2)), target.sum((1, 2))


# --- A model of ours, trained ---------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model for a task, on the images of a grid of tokens.

    attention: keys of axial_config. options: of the model, beside its size.
    """

    task: str
    grid: tuple[int, int]
    pattern: tuple[str, ...] = ("row+col",)
    attention: tuple[tuple[str, Any], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def model(self) -> AxialTransformerConfig:
        # Neither width nor depth of the one are the other's.
        size = {"patch": 4, "dim": 24} if self.task == "segmentation" else {"patch": 2, "dim": 16}
        if self.attention:  # half of a head for either axis
            size["dim"] = 32
        attention = AxialConfig(pattern=list(self.pattern), **dict(self.attention))
        sizes = {"depth": max(2, len(self.pattern)), "heads": 4, "mlp_ratio": 1.5} | size
        return AxialTransformerConfig(
            **sizes, grid=list(self.grid), **dict(self.options), axial_config=attention
        )

    def make_task(self) -> Task:
        if self.task == "segmentation":
            return Segmentation(SegmentationConfig(CLASSES, cells=2))
        return Reconstruction(ReconstructionConfig(), seed=3)

    def build(self) -> nn.Module:
        """The serial model; biases and norms too are random: a zero hides a wrong gradient."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make_task().build(AxialTransformer(self.model))
            for parameter in model.parameters():
                with torch.no_grad():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    def images(self, step: int, dtype: torch.dtype) -> Batch:
        return whole_images(self.grid, self.model.patch, step=step, dtype=dtype)

    def plain_loss(self, output: Tensor, batch: Batch) -> Tensor:
        """What a run should have as its loss, of the output for whole images."""
        return mean_over_images(*self._plain(output, batch))

    def plain_val_loss(self, output: Tensor, batch: Batch) -> Tensor:
        """And in validation: of the images that have a target."""
        losses, valid = self._plain(output, batch)
        labelled = (valid > 0).sum()
        assert 0 < labelled < IMAGES
        return mean_over_images(losses, valid) * IMAGES / labelled

    def _plain(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.task == "segmentation":
            return plain_segmentation(output, batch)
        hidden = hidden_tokens(batch.place, batch.samples.tolist(), share=0.6, seed=3)
        return plain_reconstruction(output, batch, hidden)


def a_run(case: Case, axes: Mesh, engine: Any, dtype: torch.dtype, **config: Any) -> Run:
    """The parts of a run, on images that `whole_images` makes."""
    loader: Any = Images(case.grid, case.model.patch, axes, dtype)
    run = RunConfig(data=DataConfig("unused"), mesh=axes.config, **config)
    tracker: Any = None
    if axes.world.rank == 0:
        logged: list[dict[str, float]] = []
        tracker = SimpleNamespace(
            logged=logged, log=lambda step, metrics: logged.append({"step": step, **metrics})
        )
    device = torch.device("cpu")
    return Run(run, axes, case.make_task(), engine, loader, loader, tracker, device)


@dataclass
class Validated:
    metrics: dict[str, float]
    picture: list[Panel] | None


def validated(case: Case, mesh: MeshConfig) -> Validated:
    """The metrics and the picture of a model that was not trained, in fp64."""
    axes = Mesh(**mesh.degrees)
    run = a_run(case, axes, parallelize(case.build().double(), axes), torch.float64)
    return Validated(validate(run), picture(run))


def mean_of_the_labelled(case: Case) -> tuple[float, int]:
    """By hand: the mean loss of the held-out images that have a target, and how many have none."""
    run = a_run(case, Mesh(), parallelize(case.build().double(), Mesh()), torch.float64)
    assert run.validation is not None
    run.engine.eval()
    losses, without = [], 0
    for batch in run.validation.once():
        with torch.no_grad():
            sums, valid = run.task.loss(run.engine(*run.task.inputs(batch)), batch)
        for one, count, weight in zip(sums, valid, batch.weight, strict=True):
            if weight and count:
                losses.append(float(one / count))
            without += int(weight > 0 and count == 0)
    return sum(losses) / len(losses), without


@dataclass
class Trained:
    """What `train` logged on rank 0, its result on every rank, and the weights afterwards."""

    logged: list[dict[str, float]]
    last: dict[str, float]
    weights: dict[str, Tensor]


def train_steps(
    case: Case,
    mesh: MeshConfig,
    stage: int,
    optim: OptimConfig,
    schedule: ScheduleConfig,
    steps: int,
    chunk: int | None = None,
) -> Trained:
    """The training loop on the mesh; it validates after every second step, and the last.

    chunk: how many logits are computed at a time, and again in backward, where there is a bias.
    """
    with mock.patch.object(lines, "CHUNK", chunk or lines.CHUNK):
        return _train_steps(case, mesh, stage, optim, schedule, steps)


def _train_steps(
    case: Case,
    mesh: MeshConfig,
    stage: int,
    optim: OptimConfig,
    schedule: ScheduleConfig,
    steps: int,
) -> Trained:
    axes = Mesh(**mesh.degrees, exchange=mesh.exchange, swap=mesh.swap)
    micro_batch = Images(case.grid, case.model.patch, axes).micro_batch
    engine = Engine(
        parallelize(case.build(), axes),
        axes,
        optim=optim,
        zero=ZeroConfig(stage, persistence_threshold=0),
        micro_batch=micro_batch,
        accumulation=ACCUMULATION,
    )
    length = TrainConfig(steps, IMAGES, micro_batch, validate_every=2)
    run = a_run(case, axes, engine, torch.float32, optim=optim, schedule=schedule, train=length)
    last = train(run)
    logged = run.tracker.logged if run.tracker is not None else []
    trained = Trained(logged, last, dict(engine.weights()))
    engine.close()
    return trained
