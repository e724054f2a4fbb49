"""Rank functions: batches in which some ranks have found damage."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from distributed.task_ranks import part_of, whole_images
from torch import Tensor

from axialtrain.data.batch import Batch
from axialtrain.data.damage import Damage, DamageConfig
from axialtrain.data.order import OrderState
from axialtrain.mesh.mesh import Mesh, MeshConfig
from axialtrain.train.damages import Damages
from axialtrain.train.run import check_alike
from axialtrain.train.track import LoggerConfig, Tracker

IMAGES = 3


@dataclass
class Settled:
    """What a rank has after each step. raised: what ended it, with its type's name."""

    weights: list[Tensor]
    valid: list[Tensor]
    counts: list[tuple[int, int]]
    raised: str
    empty: list[bool]  # whether what a sample of weight 0 holds is that of a filler


def settle_on_ranks(
    mesh: MeshConfig,
    config: DamageConfig,
    found: list[dict[int, dict[int, list[Damage]]]],
    folder: Path,
    resumed: int = 0,
) -> Settled:
    """found: for each step, by rank, by sample, what was found damaged."""
    logging.getLogger("axialtrain").setLevel(logging.ERROR)
    axes = Mesh(**mesh.degrees)
    tracker = None
    if dist.get_rank() == 0:
        folder.mkdir(exist_ok=True)
        tracker = Tracker(LoggerConfig("disabled"), folder, "run", "{}", resumed=resumed)
    damages = Damages(config, axes, tracker, torch.device("cpu"))
    settled = Settled([], [], [], "", [])
    try:
        for step, by_rank in enumerate(found, resumed + 1):
            faults = by_rank.get(dist.get_rank(), {})
            batch = damages.settle(_batch(axes, faults))
            damages.agree(step)
            settled.weights.append(batch.weight)
            settled.valid.append(batch.valid)
            settled.counts.append((damages.tiles, damages.images))
            settled.empty.append(_empty(batch))
    except ValueError as error:
        settled.raised = f"{type(error).__name__}: {error}"
    if tracker is not None:
        tracker.close()
    return settled


def _batch(mesh: Mesh, faults: dict[int, list[Damage]]) -> Batch:
    whole = whole_images((5, 7), 2)
    batch = part_of(whole, mesh.place(5, 7), range(IMAGES))
    return replace(batch, faults=tuple(tuple(faults.get(i, ())) for i in range(IMAGES)))


def _empty(batch: Batch) -> bool:
    out = batch.weight == 0
    assert batch.labels is not None
    return not (
        batch.pixels[out].any()
        or batch.present[out].any()
        or batch.valid[out].any()
        or (batch.labels[out] != 255).any()
    )


def settle_twice(folder: Path) -> tuple[int, int]:
    """The same damage in training and in validation; tiles and images that it counts as."""
    axes = Mesh()
    tracker = Tracker(LoggerConfig("disabled"), folder, "run", "{}")
    damages = Damages(DamageConfig("mask"), axes, tracker, torch.device("cpu"))
    batch = _batch(axes, {0: [Damage("a", "tile", 1, 2, 1, "damaged")]})
    damages.settle(batch)
    damages.settle(batch, held_out=True)
    damages.agree(1)
    tracker.close()
    return damages.tiles, damages.images


def states_differ() -> str:
    """What is said where the last rank has another order."""
    order = OrderState(0, 0, str(dist.get_rank()) * 64)
    try:
        check_alike({"data.shards": order.to_json()}, Mesh(row=2))
    except ValueError as error:
        return str(error)
    return ""
