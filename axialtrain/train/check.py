"""What a run is made of, and what can be refused of it before anything expensive starts."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from axialtrain.attention.config import Pass
from axialtrain.data.loader import Loader
from axialtrain.data.region import Shards, open_shards
from axialtrain.mesh.parallelize import check_divides
from axialtrain.models.transformer import AxialTransformer
from axialtrain.tasks.reconstruction import Reconstruction, ReconstructionConfig
from axialtrain.tasks.segmentation import Segmentation, SegmentationConfig
from axialtrain.train.config import RunConfig

BANDS = 3  # what shards hold


def task_of(config: RunConfig) -> Segmentation | Reconstruction:
    """The task that the group `task` chose."""
    if isinstance(config.task, SegmentationConfig):
        return Segmentation(config.task)
    if isinstance(config.task, ReconstructionConfig):
        return Reconstruction(config.task, config.seed)
    raise ValueError(f"task={config.task!r}: allowed are task=segmentation, task=reconstruction")


def data_of(config: RunConfig) -> dict[str, Shards]:
    """The shards that the run reads, by the key that names them."""
    shards = {"data.shards": open_shards(config.data.shards)}
    if config.data.validation is not None:
        shards["data.validation"] = open_shards(config.data.validation)
    return shards


def loader_of(config: RunConfig, shards: Shards, at: tuple[int, int], data_rank: int) -> Loader:
    """The batches of the rank at (row, col) = `at` of that data rank."""
    return Loader(
        shards,
        config.data,
        patch=config.model.patch,
        mesh_shape=(config.mesh.row, config.mesh.col),
        at=at,
        data_rank=data_rank,
        data_ranks=config.mesh.data,
        batch=config.train.batch,
        micro_batch=config.train.micro_batch,
        seed=config.seed,
    )


def check(config: RunConfig, folder: Path, processes: int | None) -> None:
    """Refuse what cannot run; alike on every rank, without a word between them.

    processes: how many an outer launcher has started, None where we start them.
    Raises ValueError that names the key, the value and what is allowed.
    """
    if processes is not None and processes != config.mesh.size:
        raise ValueError(
            f"mesh {config.mesh} needs {config.mesh.size} processes, {processes} were started: "
            "change the mesh or the number of processes"
        )
    _check_folder(folder)
    if config.model.bands != BANDS:
        raise ValueError(f"model.bands={config.model.bands}: the shards hold {BANDS} bands")
    check_divides("model.heads", config.model.heads, config.mesh.tensor)
    check_divides("the MLP width of model", config.model.mlp_width, config.mesh.tensor)
    attention = config.model.axial_config
    passes = {which for layer in range(config.model.depth) for which in attention.passes(layer)}
    config.mesh.check_heads(config.model.heads, rows=Pass.ROW in passes, cols=Pass.COL in passes)
    task = task_of(config)
    with torch.device("meta"):
        task.build(AxialTransformer(config.model))
    for key, shards in data_of(config).items():
        if task.classes is not None:
            url = getattr(config.data, key.removeprefix("data."))
            if not shards.has_labels:
                raise ValueError(f"{key}={url}: has no labels, which task={config.task.name} needs")
            if (shards.classes or 0) > task.classes:
                raise ValueError(
                    f"task.classes={task.classes}: {key}={url} has labels up to "
                    f"{(shards.classes or 0) - 1}; allowed are numbers from {shards.classes}"
                )
        for grid in loader_of(config, shards, at=(0, 0), data_rank=0).grids:
            try:
                attention.check_grid(*grid, config.model.made_for)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None


def _check_folder(folder: Path) -> None:
    for name in ("metrics.jsonl", "weights"):
        if (folder / name).exists():
            raise ValueError(
                f"hydra.run.dir={folder}: holds the {name} of a run; allowed is a new folder"
            )
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"hydra.run.dir={folder}: {above} is not a folder that can be written to")
