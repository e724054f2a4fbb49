"""What a run is made of, and what can be refused of it before anything expensive starts."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from axialtrain.attention.kernels import FLEX
from axialtrain.data.kinds import chosen
from axialtrain.data.loader import Loader
from axialtrain.data.mixing import MixedShards, lacking, open_sets
from axialtrain.data.normalise import normalisation
from axialtrain.data.region import Shards, open_shards
from axialtrain.models.registry import build_backbone
from axialtrain.models.transformer import FEATURES, AxialTransformerConfig
from axialtrain.tasks.classification import Classification, ClassificationConfig
from axialtrain.tasks.panoptic import Panoptic, PanopticConfig
from axialtrain.tasks.reconstruction import Reconstruction, ReconstructionConfig
from axialtrain.tasks.segmentation import Segmentation, SegmentationConfig
from axialtrain.train.checkpoint import FOLDER, all_steps_in
from axialtrain.train.config import RunConfig
from axialtrain.train.resume import check_fits, found
from axialtrain.train.start import start_of
from axialtrain.train.storage import Folder
from axialtrain.train.track import LOCK, METRICS


def task_of(config: RunConfig) -> Segmentation | Reconstruction | Classification | Panoptic:
    """The task that the group `task` chose."""
    if isinstance(config.task, SegmentationConfig):
        return Segmentation(config.task)
    if isinstance(config.task, ReconstructionConfig):
        return Reconstruction(config.task, config.seed)
    if isinstance(config.task, ClassificationConfig):
        return Classification(config.task)
    if isinstance(config.task, PanopticConfig):
        return Panoptic(config.task)
    raise ValueError(
        f"task={config.task!r}: allowed are task=segmentation, task=reconstruction, "
        "task=classification, task=panoptic"
    )


def data_of(config: RunConfig) -> dict[str, Shards | MixedShards]:
    """The shards that the run reads, by the key that names them."""
    shards = {"data.shards": open_sets(config.data.shards, config.data.read)}
    if config.data.validation is not None:
        shards["data.validation"] = open_shards(config.data.validation, config.data.read)
    return shards


def with_statistics(config: RunConfig, shards: Shards | MixedShards) -> RunConfig:
    """`config` with numbers for data.mean and data.std, of the training `shards` if it says so.

    Held-out images are normalised by them, too. Raises ValueError where `shards` have none.
    """
    mean, std = normalisation(shards, config.data)
    return replace(config, data=replace(config.data, mean=mean, std=std))


def loader_of(
    config: RunConfig,
    shards: Shards | MixedShards,
    at: tuple[int, int],
    data_rank: int,
    *,
    held_out: bool = False,
    pin: bool = False,
) -> Loader:
    """The batches of the rank at (row, col) = `at` of that data rank.

    held_out: whether the shards are those of validation. pin: see `Loader`.
    """
    lean = config.train.lean
    return Loader(
        shards,
        config.data.held_out if held_out else config.data,
        patch=config.model.patch_px,
        mesh_shape=(config.mesh.row, config.mesh.col),
        at=at,
        data_rank=data_rank,
        data_ranks=config.mesh.data,
        batch=config.train.batch,
        micro_batch=config.train.micro_batch,
        seed=config.seed,
        # Where pixels wait on the host, it holds them as the model will round them; and once, where
        # it has no room to read ahead: what is pinned is copied, and sizes are powers of two.
        pin=pin and not (lean and config.data.prefetch == 0),
        dtype=torch.bfloat16 if lean and config.train.precision == "bf16" else torch.float32,
        lean=lean,
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
    if config.resume != "auto":
        _check_new(folder)
    _check_writable("hydra.run.dir", folder)
    if config.checkpoint.folder is not None:
        _check_checkpoints(config)
    config.model.check_mesh(config.mesh)
    task = task_of(config)
    with torch.device("meta"):
        model = task.build(build_backbone(config.model))
    saved, _ = found(config, folder, verify=False)
    if saved is None:
        start_of(model, config, verify=False)
    if isinstance(task, Classification):
        task.check(config.model)
    _check_best(config, task.metrics)
    shards_of = data_of(config)
    config = with_statistics(config, shards_of["data.shards"])
    for key, shards in shards_of.items():
        url = getattr(config.data, key.removeprefix("data."))
        bands = chosen(shards.kind, config.data.bands).bands
        if config.model.bands != bands:
            who = "the shards hold" if config.data.bands is None else "data.bands names"
            raise ValueError(f"model.bands={config.model.bands}: {who} {bands} bands ({key}={url})")
        if config.model.patch == FEATURES and shards.dtype != "float32":
            raise ValueError(
                f"model.patch={FEATURES}: {key}={url} holds images of {shards.dtype}, allowed are "
                "feature grids, which are float32; for images, model.patch is a number of px"
            )
        if task.image_classes is not None:
            if not shards.has_image_labels:
                raise ValueError(
                    f"{key}={url}: its images have no class, which task={config.task.name} needs: "
                    f"shard them with --image-labels{lacking(shards, 'has_image_labels')}"
                )
            if (shards.image_classes or 0) > task.image_classes:
                raise ValueError(
                    f"task.classes={task.image_classes}: {key}={url} has images of class "
                    f"{(shards.image_classes or 0) - 1}; allowed are numbers from "
                    f"{shards.image_classes}"
                )
        if task.classes is not None:
            if not shards.has_labels:
                raise ValueError(
                    f"{key}={url}: has no labels, which task={config.task.name} needs"
                    f"{lacking(shards, 'has_labels')}"
                )
            if (shards.classes or 0) > task.classes:
                raise ValueError(
                    f"task.classes={task.classes}: {key}={url} has labels up to "
                    f"{(shards.classes or 0) - 1}; allowed are numbers from {shards.classes}"
                )
            one = os.environ.get("RANK", "0") == "0"  # of all that find it
            if one and key == "data.shards" and 0 < (shards.classes or 0) < task.classes:
                warnings.warn(
                    f"task.classes={task.classes}, and the largest label of {key}={url} is "
                    f"{(shards.classes or 0) - 1}: no pixel is of a class above",
                    stacklevel=2,
                )
        if task.instances and not shards.has_instances:
            raise ValueError(
                f"{key}={url}: its images have no instances, which task={config.task.name} needs: "
                f"shard them with --instances{lacking(shards, 'has_instances')}"
            )
        loader = loader_of(
            config, shards, at=(0, 0), data_rank=0, held_out=key == "data.validation"
        )
        for grid in loader.grids:
            try:
                config.model.check_grid(*grid)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
    if saved is not None:
        loader = loader_of(config, shards_of["data.shards"], at=(0, 0), data_rank=0)
        check_fits(saved, config, loader)


def check_kernel(config: RunConfig, device_type: str) -> None:
    """Raise ValueError where the model's attention has no kernel on this type of device."""
    if not isinstance(config.model, AxialTransformerConfig):
        return
    attention = config.model.axial_config
    if attention.kernel == "flex" and attention.positions == "relative" and device_type not in FLEX:
        raise ValueError(
            f"axial_config.kernel=flex: FlexAttention trains on {', '.join(FLEX)} alone, and this "
            f"run is on {device_type}: allowed are auto and chunks"
        )


def _check_best(config: RunConfig, metrics: tuple[str, ...]) -> None:
    best, every = config.checkpoint.best, config.train.validate_every
    if every and config.data.validation is None:
        raise ValueError(f"train.validate_every={every}: needs data.validation=SHARDS")
    if best is None:
        if config.train.patience:
            raise ValueError(
                f"train.patience={config.train.patience}: needs checkpoint.best, the metric to "
                "wait for"
            )
        return
    if best not in ("val_loss", *metrics):
        raise ValueError(f"checkpoint.best={best}: allowed are {', '.join(('val_loss', *metrics))}")
    if config.data.validation is None:
        raise ValueError(f"checkpoint.best={best}: needs data.validation=SHARDS")
    if config.train.patience and not every:
        raise ValueError(
            f"train.patience={config.train.patience}: counts validations: needs "
            "train.validate_every, and at 0 there is one, at the end"
        )


def _check_new(folder: Path) -> None:
    # A run that was killed at its very start has left no more than its lock.
    kept = folder / FOLDER
    saved = kept.exists() and not (kept.is_dir() and os.listdir(kept) == [LOCK])
    for name, there in ((METRICS, (folder / METRICS).exists()), (FOLDER, saved)):
        if there:
            raise ValueError(
                f"hydra.run.dir={folder}: holds the {name} of a run; allowed is a new folder, or "
                "resume=auto to go on with it"
            )


def _check_checkpoints(config: RunConfig) -> None:
    key = f"checkpoint.folder={config.checkpoint.folder}"
    if str(config.checkpoint.folder).startswith("memory://"):
        raise ValueError(
            f"{key}: is gone with the process, allowed are a path and a URL of what lasts"
        )
    try:
        folder = Folder(str(config.checkpoint.folder))
        steps = all_steps_in(folder)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"{key}: {error}") from error
    if folder.local is not None:
        _check_writable("checkpoint.folder", folder.local)
    if steps and config.resume != "auto":
        raise ValueError(
            f"{key}: holds checkpoints of a run; allowed is a new folder, or resume=auto to go on "
            "with it"
        )


def _check_writable(key: str, folder: Path) -> None:
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{key}={folder}: {above} is not a folder that can be written to")
