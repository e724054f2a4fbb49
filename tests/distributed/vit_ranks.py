"""Rank functions: ViTs turned axial, ours of their names, and what is learned with them, on a mesh.

Beside them what makes small ViTs of timm, in which nothing is zero. timm comes with torchvision,
which needs `torchvision_ops` before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torchvision_ops  # isort: skip  # noqa: F401 (before timm)
import torch
import torch.distributed as dist
from distributed.task_ranks import ACCUMULATION, IMAGES, Images, whole_images
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from axialtrain.data.batch import Batch
from axialtrain.data.config import DataConfig
from axialtrain.grid import Place, tokens_across
from axialtrain.mesh.mesh import Group, Mesh, MeshConfig
from axialtrain.mesh.parallelize import parallelize, tensor_dims
from axialtrain.models.axialize import axialize
from axialtrain.models.chance import Chance
from axialtrain.models.heads import Classifier
from axialtrain.models.registry import create_model, model_config
from axialtrain.models.transformer import AxialTransformer
from axialtrain.tasks.classification import Classification, ClassificationConfig, DistillConfig
from axialtrain.train.config import OptimConfig, RunConfig, TrainConfig, ZeroConfig
from axialtrain.train.engine import Engine
from axialtrain.train.loop import Run, train
from axialtrain.train.schedule import ScheduleConfig

PATCH = 2
HEADS = 12  # so many can be dealt out, by rows, columns and tensor ranks
CLASSES = 6  # more than five, or every class is among the five best
CHANCE = Chance(seed=1, step=0, samples=(5, 6))
_ORIGIN = Place(1, 1).rect

# --- ViTs of timm ---------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "class": {},
    "registers": {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.1},
    "mean": {"class_token": False, "reg_tokens": 1, "global_pool": "avg"},
    "bare": {"class_token": False, "global_pool": "avg", "fc_norm": False, "pos_embed": "none"},
    "clip": {"pre_norm": True, "qkv_bias": False, "proj_bias": False, "final_norm": False},
    "distilled": {},
}


@torch.no_grad()
def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, at a scale that keeps the outputs near 1: nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator).to(value.dtype)
        scale = value[0].numel() ** -0.5 if name.endswith("weight") and value.ndim > 1 else 0.4
        value.copy_(scale * noise + (name.endswith("weight") and value.ndim == 1))
    return model


def small_vit(kind: str, **options: Any) -> VisionTransformer:
    """A ViT of timm for images of 4 x 4 patches: its tokens and pooling are those of `kind`."""
    make = VisionTransformerDistilled if kind == "distilled" else VisionTransformer
    size = {"img_size": 4 * PATCH, "patch_size": PATCH, "embed_dim": 4 * HEADS, "depth": 2}
    shape = {"num_heads": HEADS, "mlp_ratio": 1.5, "num_classes": CLASSES}
    model = randomised(make(**(size | shape | KINDS[kind] | options)))
    assert isinstance(model, VisionTransformer)
    return model.eval()


# --- One forward and backward on a mesh -----------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model on one grid. kind: a key of KINDS, or of ours, `create_model`'s Classifier.

    partial: the last row and column of patches are cut. holes: tokens that do not count, and
    whole rows and columns of them; None for no mask. chance: whether it trains with drop-path.
    recompute: whether layers are computed again in backward.
    """

    kind: str
    grid: tuple[int, int] = (13, 10)
    pattern: tuple[str, ...] = ("row+col",)
    attention: tuple[tuple[str, Any], ...] = ()
    partial: bool = True
    holes: bool | None = None
    chance: bool = False
    recompute: bool = False

    @property
    def ours(self) -> bool:
        return self.kind.startswith("our")


@dataclass
class Result:
    """Of one rank, or of the serial run. sharded: parameters that were joined over tensor ranks."""

    rect: tuple[int, int, int, int]
    logits: Tensor
    pixels: Tensor
    parameters: dict[str, Tensor | None]
    sharded: set[str]


def build(case: Case) -> nn.Module:
    attention = {"pattern": list(case.pattern), "window": 3, **dict(case.attention)}
    drop = 0.5 if case.chance else 0.0
    if not case.ours:
        model: nn.Module = small_vit(case.kind, drop_path_rate=drop)
        if case.kind == "distilled":
            model.set_distilled_training(True)
        model = axialize(model, attention)
        model.set_grad_checkpointing(case.recompute)
    else:
        pool = {"ours, distilled": "prefix"}.get(case.kind, case.kind.removeprefix("our "))
        options = small_options(case.kind) | {"axial_config": attention, "drop_path": drop}
        if case.kind == "ours, distilled":
            backbone = AxialTransformer(model_config("axial_vit_tiny_patch8", **options))
            model = Classifier(backbone, CLASSES, pool, distilled=True)
        else:
            model = create_model("axial_vit_tiny_patch8", num_classes=CLASSES, pool=pool, **options)
    return randomised(model).double().train()


def small_options(kind: str = "ours") -> dict[str, Any]:
    """What makes an axial_vit as small as `small_vit`."""
    size = {"patch": PATCH, "dim": 4 * HEADS, "depth": 2, "heads": HEADS, "mlp_ratio": 1.5}
    return size | {"grid": [4, 4], "prefix_tokens": 2 if "distilled" in kind else 1}


def inputs(case: Case) -> tuple[Tensor, Tensor | None, Tensor]:
    """pixels [2, 3, height, width], valid [2, H, W] and the gradient of the logits."""
    height, width = case.grid
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, height * PATCH - case.partial, width * PATCH - case.partial)
    pixels = torch.randn(shape, generator=generator, dtype=torch.float64)
    grad = torch.randn(2, 2, CLASSES, generator=generator, dtype=torch.float64)
    if "distilled" not in case.kind:
        grad = grad[:, 0]
    if case.holes is None:
        return pixels, None, grad
    valid = torch.ones(2, height, width, dtype=torch.bool)
    if case.holes:
        valid = torch.rand(2, height, width, generator=generator) < 0.8
        valid[1, height // 2] = False
        valid[0, :, width // 2] = False
        valid[1, -2:] = False  # an image of another extent: its embedding is resampled apart
        valid[0, :, -1] = False
    return pixels, valid, grad


def run(case: Case, model: nn.Module, place: Place) -> tuple[Tensor, Tensor]:
    """Forward and backward on this place's tile: (logits, gradient of its pixels)."""
    whole, valid, grad = inputs(case)
    pixels = whole[:, :, *place.rect.scaled(PATCH).slices(_ORIGIN)].clone().requires_grad_()
    mine = None if valid is None else valid[:, *place.rect.slices(_ORIGIN)]
    tile = pixels
    if case.ours:  # channels last, whole patches: as the loader gives them
        pad = [place.rect.width * PATCH - tile.shape[3], place.rect.height * PATCH - tile.shape[2]]
        tile = nn.functional.pad(tile, (0, pad[0], 0, pad[1])).movedim(1, -1)
    output = model(tile, mine, place, CHANCE if case.chance else None)
    logits = torch.stack(output, 1) if isinstance(output, tuple) else output
    # Computed alike on every spatial rank, each of which has a share of the objective.
    (logits * grad / math.prod(place.shape)).sum().backward()
    assert pixels.grad is not None
    return logits.detach(), pixels.grad


def serial(case: Case) -> Result:
    model, place = build(case), Place(*case.grid)
    logits, pixels = run(case, model, place)
    gradients = {name: value.grad for name, value in model.named_parameters()}
    return Result(_rect(place), logits, pixels, gradients, set())


def sharded(case: Case, mesh: dict[str, int], exchange: str, swap: str) -> Result:
    axes = Mesh(**mesh, exchange=exchange, swap=swap)
    model = parallelize(build(case), axes)
    place = axes.place(*case.grid)
    logits, pixels = run(case, model, place)
    dims, gradients = tensor_dims(model), {}
    for name, value in model.named_parameters():
        if value.grad is not None:
            dist.all_reduce(value.grad, group=axes.replicas.handle)
        gradients[name] = value.grad
        if name in dims:
            assert value.model_parallel
            gradients[name] = _join(value.grad, dims[name], axes.tensor)
    return Result(_rect(place), logits, pixels, gradients, set(dims))


def _join(part: Tensor, dim: int, group: Group) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(group.size)]
    dist.all_gather(parts, part.contiguous(), group=group.handle)
    return torch.cat(parts, dim)


def _rect(place: Place) -> tuple[int, int, int, int]:
    rect = place.rect.scaled(PATCH)
    return rect.top, rect.bottom, rect.left, rect.right


def refused_without_chance() -> str:
    """What a model with drop-path says that trains on a mesh without the draws of the step."""
    mesh = Mesh(col=2)
    model = parallelize(build(Case("class", (4, 4), chance=True)), mesh)
    try:
        model(torch.zeros(2, 3, 8, 4).double(), None, mesh.place(4, 4))
    except ValueError as error:
        return str(error)
    return ""


# --- Steps of an axialized model under DeepSpeed --------------------------------------------------


def engine_steps(
    case: Case, mesh: dict[str, int], stage: int, steps: int, lr: float
) -> tuple[list[float], dict[str, Tensor]]:
    """(gradient norms, weights afterwards) of SGD, as a script would have it that uses `Engine`."""
    axes = Mesh(**mesh)
    model = parallelize(build(case).float(), axes)
    optim = OptimConfig("sgd", lr=lr, weight_decay=0.0, momentum=0.0, clip=0.0)
    zero = ZeroConfig(stage, persistence_threshold=0)
    engine = Engine(model, axes, optim=optim, zero=zero, micro_batch=2, accumulation=1)
    place, norms = axes.place(*case.grid), []
    whole, _, grad = inputs(case)
    for _ in range(steps):
        tile = whole[:, :, *place.rect.scaled(PATCH).slices(_ORIGIN)].float()
        output = engine(tile, None, place)
        logits = torch.stack(output, 1) if isinstance(output, tuple) else output
        engine.backward((logits * grad.float()).sum())
        norms.append(engine.step(lr))
    weights = dict(engine.weights())
    engine.close()
    return norms, weights


def plain_steps(case: Case, steps: int, lr: float) -> tuple[list[float], dict[str, Tensor]]:
    """The same by one process and torch alone, in fp64."""
    model, place, norms = build(case), Place(*case.grid), []
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        run(case, model, place)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), math.inf)))
        optimizer.step()
    return norms, {name: value.detach() for name, value in model.named_parameters()}


# --- Classification, through the loop -------------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    """A model for a task of classification, on the images of `whole_images`.

    teacher: a file of weights, for the second prefix token; then it is a distilled model.
    """

    grid: tuple[int, int] = (7, 5)
    pool: str = "prefix"
    smoothing: float = 0.0
    teacher: str | None = None
    kind: str = "hard"
    weight: float = 0.5
    drop_path: float = 0.0

    @property
    def config(self) -> ClassificationConfig:
        heat = 3.0 if self.teacher is None else 2.0
        distill = DistillConfig(self.teacher, self.kind, self.weight, heat)
        taught = self.teacher is not None
        return ClassificationConfig(CLASSES, self.pool, self.smoothing, taught, distill)

    def task(self, mesh: Mesh) -> Classification:
        task = Classification(self.config)
        task.prepare(mesh, torch.device("cpu"))
        return task

    def build(self) -> nn.Module:
        options = small_options("distilled" if self.teacher else "ours")
        config = model_config("axial_vit_tiny_patch8", **options, drop_path=self.drop_path)
        return randomised(Classification(self.config).build(AxialTransformer(config)))


def targets_of(samples: Tensor) -> Tensor:
    """A class for each sample of the endless order, not in a row."""
    return samples * 5 % 11 % CLASSES


def whole_batch(grid: tuple[int, int], step: int, dtype: torch.dtype = torch.float32) -> Batch:
    batch = whole_images(grid, PATCH, step=step, dtype=dtype)
    return replace(batch, targets=targets_of(batch.samples))


class ClassImages(Images):
    """Images of which each has a class; a filler has that of the sample that it repeats."""

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        for batches in super().steps(first, last):
            yield [replace(batch, targets=targets_of(batch.samples)) for batch in batches]


@dataclass
class Learned:
    logged: list[dict[str, float]]
    last: dict[str, float]
    weights: dict[str, Tensor]


def learn(
    lesson: Lesson,
    mesh: MeshConfig,
    stage: int,
    optim: OptimConfig,
    schedule: ScheduleConfig,
    steps: int,
) -> Learned:
    """The training loop on the mesh; it validates after every second step, and the last."""
    axes = Mesh(**mesh.degrees, exchange=mesh.exchange)
    images: Any = ClassImages(lesson.grid, PATCH, axes)
    micro_batch = images.micro_batch
    assert micro_batch == tokens_across(IMAGES, ACCUMULATION * mesh.data)
    engine = Engine(
        parallelize(lesson.build(), axes),
        axes,
        optim=optim,
        zero=ZeroConfig(stage, persistence_threshold=0),
        micro_batch=micro_batch,
        accumulation=ACCUMULATION,
    )
    config = RunConfig(
        data=DataConfig("unused"),
        mesh=mesh,
        optim=optim,
        schedule=schedule,
        train=TrainConfig(steps, IMAGES, micro_batch, validate_every=2),
    )
    logged: list[dict[str, float]] = []
    tracker: Any = SimpleNamespace(log=lambda _, metrics: logged.append(dict(metrics)))
    first = tracker if axes.world.rank == 0 else None
    parts = Run(config, axes, lesson.task(axes), engine, images, images, first, torch.device("cpu"))
    last = train(parts)
    learned = Learned(logged, last, dict(engine.weights()))
    engine.close()
    return learned
