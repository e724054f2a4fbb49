"""Panoptic segmentation on ranks: scenes, what a model could say of them, losses and segments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from distributed.task_ranks import IMAGES, Images, part_of, whole_images
from torch import Tensor

from axialtrain.data.batch import Batch
from axialtrain.grid import Rect
from axialtrain.mesh.mesh import Mesh, MeshConfig
from axialtrain.tasks.merge import MergeConfig
from axialtrain.tasks.objective import image_means, rank_loss
from axialtrain.tasks.panels import Panel
from axialtrain.tasks.panoptic import Panoptic, PanopticConfig, TermWeights

CLASSES, THINGS = 5, [0, 2, 4]
PATCH = 4
SIGMA = 1.5
VOID = 255


def a_config(**options: Any) -> PanopticConfig:
    merge = MergeConfig(threshold=0.3, nms=5, centres=6, stuff_area=40)
    size = {"classes": CLASSES, "things": THINGS, "sigma": SIGMA, "merge": merge}
    return PanopticConfig(**size | {"weights": TermWeights(1.0, 20.0, 0.1)} | options)


def a_scene(grid: tuple[int, int]) -> Batch:
    """IMAGES images of two kinds of stuff with discs of things on them, that are cut by any mesh.

    Some pixels have no label, some are missing; one disc is a crowd; stuff has ids that count for
    nothing; one image has no instance, and one no label.
    """
    batch = whole_images(grid, PATCH, dtype=torch.float64)
    height, width = batch.labels.shape[1:]
    draws = np.random.default_rng(5)
    rows, cols = np.arange(height)[:, None], np.arange(width)
    labels = np.where(rows + cols < width * 0.8, 1, 3)[None].repeat(IMAGES, 0)
    instances = np.zeros(labels.shape, np.int32)
    for image in range(IMAGES):
        for number in range(8):
            y, x, radius = draws.uniform((0, 0, 2), (height, width, 5))
            disc = (rows - y) ** 2 + (cols - x) ** 2 < radius**2
            labels[image][disc] = draws.choice(THINGS)
            instances[image][disc] = 0 if number == 5 else 3 * number + 2
    instances[0][labels[0] == 1] = 70
    instances[1] = 0
    labels[draws.random(labels.shape) < 0.05] = VOID
    labels[4] = VOID
    labels[~batch.present.numpy()] = VOID
    return replace(
        batch,
        labels=torch.from_numpy(labels.astype(np.uint8)),
        instances=torch.from_numpy(instances),
    )


@dataclass
class PlainTargets:
    """Of one image: fp64 [H, W] heat, [H, W, 2] offsets, bool [H, W] where they are learned."""

    heat: np.ndarray
    offsets: np.ndarray
    judged: np.ndarray
    inside: np.ndarray


def plain_targets(labels: np.ndarray, instances: np.ndarray, sigma: float) -> PlainTargets:
    """Instance by instance and pixel by pixel."""
    height, width = labels.shape
    heat, offsets = np.zeros((height, width)), np.zeros((height, width, 2))
    things = np.isin(labels, THINGS)
    inside = things & (instances > 0)
    for number in np.unique(instances[inside]):
        pixels = np.argwhere(inside & (instances == number))
        centre = pixels.sum(0) / len(pixels)
        y, x = (round(float(c)) for c in centre)
        for row in range(max(0, y - int(3 * sigma + 1)), min(height, y + int(3 * sigma + 1) + 1)):
            for col in range(
                max(0, x - int(3 * sigma + 1)), min(width, x + int(3 * sigma + 1) + 1)
            ):
                distance = (row - y) ** 2 + (col - x) ** 2
                heat[row, col] = max(heat[row, col], np.exp(-distance / (2 * sigma**2)))
        for row, col in pixels:
            offsets[row, col] = centre - (row, col)
    return PlainTargets(heat, offsets, (labels != VOID) & (inside | ~things), inside)


def an_output(scene: Batch) -> Tensor:
    """What a model that has learned something could say: the truth, noise, and an error."""
    generator = torch.Generator().manual_seed(3)
    size = (*scene.labels.shape, CLASSES + 3)
    output = torch.randn(size, generator=generator, dtype=torch.float64)
    for image in range(IMAGES):
        labels, instances = scene.labels[image].numpy(), scene.instances[image].numpy()
        targets = plain_targets(labels, instances, SIGMA)
        output[image, ..., :CLASSES] += (
            4 * torch.eye(256)[scene.labels[image].long()][..., :CLASSES]
        )
        output[image, ..., CLASSES] *= 0.2
        output[image, ..., CLASSES] += torch.from_numpy(targets.heat)
        output[image, ..., CLASSES + 1 :] += torch.from_numpy(targets.offsets)
    stuff = np.lib.stride_tricks.sliding_window_view(np.isin(scene.labels[1], (1, 3)), (4, 4))
    row, col = np.argwhere(stuff.all((2, 3)))[0]
    output[1, row : row + 4, col : col + 4, THINGS[2]] += 20  # a thing where there is none
    output[1, row + 1, col + 1, CLASSES] += 2
    return output


def tiles(scene: Batch, mesh: Mesh) -> Iterator[tuple[Batch, tuple[Any, ...]]]:
    """The micro-batches of a rank, each with where it lies in the scene: images, rows, columns."""
    images = Images((scene.place.height, scene.place.width), PATCH, mesh)
    for index in range(images.accumulation):
        first = (index * mesh.data.size + mesh.data.rank) * images.micro_batch
        slots = range(first, first + images.micro_batch)
        part = part_of(scene, mesh.place(scene.place.height, scene.place.width), slots)
        rect = part.place.rect.scaled(PATCH)
        here = (torch.tensor([slot % IMAGES for slot in slots]), *rect.slices(Rect(0, 0, 0, 0)))
        filler = (part.weight == 0).view(-1, 1, 1)
        yield replace(part, instances=scene.instances[here].where(~filler, 0)), here


@dataclass
class Learned:
    """Of one rank: of each of its micro-batches the loss, its gradient, the segments and panels,
    and where in the scene; its scores, summed."""

    losses: list[float]
    gradients: list[Tensor]
    segments: list[Tensor]
    where: list[tuple[Any, ...]]
    panels: list[list[Panel]]
    scores: dict[str, Tensor]
    replicas: int


def learned(mesh: MeshConfig, grid: tuple[int, int], config: PanopticConfig) -> Learned:
    """One optimizer step's losses on `an_output`, and what validation makes of it, in fp64."""
    axes = Mesh(**mesh.degrees)
    task = Panoptic(config)
    task.prepare(axes, torch.device("cpu"))
    scene = a_scene(grid)
    said = an_output(scene)
    result = Learned([], [], [], [], [], {}, axes.replicas.size)
    for batch, here in tiles(scene, axes):
        output = said[here].clone().requires_grad_()
        means = image_means(*task.loss(output, batch), batch.weight, axes)
        loss = rank_loss(means, axes, batch=IMAGES, accumulation=2)
        loss.backward()
        for name, value in task.scores(output, batch).items():
            result.scores[name] = result.scores.get(name, 0) + value
        result.losses.append(loss.item())
        result.gradients.append(output.grad)
        result.segments.append(task.segments(output, batch))
        result.panels.append(task.panels(output.detach(), batch, mean=0.4, std=0.1))
        real = batch.weight > 0
        result.where.append((here[0].where(real, -1), *here[1:]))
    return result


def ids_too_large(mesh: MeshConfig) -> str:
    """What a rank says where another has an id that is too large."""
    axes = Mesh(**mesh.degrees)
    task = Panoptic(a_config())
    task.prepare(axes, torch.device("cpu"))
    batch, here = next(tiles(a_scene((7, 5)), axes))
    if axes.spatial.rank == 0:
        thing = torch.isin(batch.labels, torch.tensor(THINGS, dtype=torch.uint8))
        batch.instances[thing] = 2**20
    try:
        task.loss(an_output(a_scene((7, 5)))[here], batch)
    except ValueError as error:
        return str(error)
    return "nothing"
