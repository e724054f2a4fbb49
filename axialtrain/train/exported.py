"""A file of `axialtrain export` as a model again, and pixels as it was given them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from axialtrain.data.config import DataConfig
from axialtrain.data.kinds import DTYPES, Kind, Raster
from axialtrain.data.normalise import Normalise
from axialtrain.grid import Place, tokens_across
from axialtrain.models.own_weights import described, from_timm_names
from axialtrain.models.registry import ModelConfig, build_backbone
from axialtrain.models.timm_weights import read_timm
from axialtrain.tasks.classification import ClassificationConfig
from axialtrain.tasks.panoptic import PanopticConfig
from axialtrain.tasks.reconstruction import ReconstructionConfig
from axialtrain.tasks.segmentation import SegmentationConfig
from axialtrain.train.check import task_of
from axialtrain.train.config import RunConfig
from axialtrain.train.start import NAMES, json_of, metadata_of

_LEAST_STD = 1e-30  # of which the inverse is a number in fp32
_LARGEST_DATA = 2**18  # characters of two numbers for each of 4,096 bands, with room
_TASKS: dict[str, type] = {
    "segmentation": SegmentationConfig,
    "reconstruction": ReconstructionConfig,
    "classification": ClassificationConfig,
    "panoptic": PanopticConfig,
}


@dataclass(frozen=True)
class Exported:
    """model: the task's, with its weights, on the CPU in fp32 and in evaluation. config: of its
    backbone. task: what the file says of its task: its name, its classes and other plain keys.
    step: optimizer steps that it has taken. data: how pixels became numbers (mean, std, bands);
    None where the file does not say.
    """

    model: nn.Module
    config: ModelConfig
    task: Mapping[str, Any]
    step: int
    data: DataConfig | None
    where: str

    def inputs(
        self, pixels: Raster, present: NDArray[np.bool_] | None = None
    ) -> tuple[Tensor, Tensor, Place]:
        """What `model` takes of one image: its pixels [1, h, w, bands], normalised as in training
        and filled up to whole tokens, which tokens are valid, and the place of their grid.

        pixels: as they are stored, [height, width, bands] of uint8, uint16 or float32, with all
            bands of which the run chose some. present: bool [height, width], where there is a
            pixel, which a region of a shard says; None for all. What is no number is none.
        Raises ValueError where they are not such, or the grid does not fit the model's attention.
        """
        if self.data is None:
            raise ValueError(
                f"{self.where}: does not say how pixels were normalised: allowed is a file of "
                "`axialtrain export` that says so: export the run again"
            )
        if pixels.ndim != 3 or str(pixels.dtype) not in DTYPES:
            raise ValueError(
                f"pixels are {pixels.dtype} {list(pixels.shape)}: allowed is "
                f"[height, width, bands] of {', '.join(DTYPES)}"
            )
        height, width, bands = pixels.shape
        if present is None:
            present = np.ones((height, width), np.bool_)
        if present.shape != (height, width) or present.dtype != np.bool_:
            raise ValueError(
                f"present is {present.dtype} {list(present.shape)}: allowed is bool "
                f"{[height, width]}, one for each pixel"
            )
        if pixels.dtype == np.float32:
            present = present & np.isfinite(pixels).all(-1)
        normalise = Normalise(
            Kind(bands, str(pixels.dtype)), self.data.mean, self.data.std, self.data.bands
        )
        if normalise.kind.bands != self.config.bands:
            raise ValueError(
                f"pixels have {bands} bands: allowed are the {self.config.bands} of the model"
            )
        p = self.config.patch_px
        place = Place(tokens_across(height, p), tokens_across(width, p))
        self.config.check_grid(place.height, place.width)
        filled = np.zeros((1, place.height * p, place.width * p, self.config.bands), np.float32)
        filled[0, :height, :width] = normalise(pixels, present)
        there = np.zeros((1, *filled.shape[1:3]), np.bool_)
        there[0, :height, :width] = present
        valid = there.reshape(1, place.height, p, place.width, p).any((2, 4))
        return torch.from_numpy(filled), torch.from_numpy(valid), place


def load_exported(path: str | Path) -> Exported:
    """The model of a file that `axialtrain export` wrote, under our names or timm's.

    The file is data from anyone: what it says of its model is held to its tensors before anything
    is built. Raises ValueError, naming it, where it is no such file.
    """
    where = str(path)
    if not Path(path).is_file():
        raise ValueError(f"{where}: no such file: allowed is one that `axialtrain export` wrote")
    said = metadata_of(where)
    if said is None or said["names"] not in NAMES:
        raise ValueError(
            f"{where}: does not say what its weights are of: allowed is a file that `axialtrain "
            "export` wrote"
        )
    config = described(json_of(said["model"], where), where)
    task = json_of(said.get("task", "null"), where)
    run = RunConfig(DataConfig(shards=where), model=config, task=_task(task, where))
    state = read_timm(where, where)
    if said["names"] == "timm":
        state = from_timm_names(state, config, where)
    with torch.device("meta"):  # takes no memory, whatever the file claims
        shapes = _built(run, where).state_dict()
    for name in sorted(shapes.keys() | state.keys()):
        found, wanted = state.get(name), shapes.get(name)
        if found is None or wanted is None or found.shape != wanted.shape:
            here, there = (
                "none" if one is None else str(list(one.shape)) for one in (found, wanted)
            )
            raise ValueError(f"{where}: has {name}: {here}, and describes a model with {there}")
    model = _built(run, where)
    model.load_state_dict(state)
    return Exported(
        model=model.eval(),
        config=config,
        task=task,
        step=_step(said.get("step", ""), where),
        data=_data(json_of(said.get("data", "null"), where, _LARGEST_DATA), where),
        where=where,
    )


def _built(run: RunConfig, where: str) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):  # the caller's draws stay as they were
            return task_of(run).build(build_backbone(run.model))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: describes no model: {error}") from error


def _task(said: Any, where: str) -> Any:
    """The config of the task. Its groups are not in the file, and build nothing."""
    name = said.get("name") if isinstance(said, Mapping) else None
    if not isinstance(name, str) or name not in _TASKS:
        raise ValueError(f"{where}: is of the task {name!r}: allowed are {', '.join(_TASKS)}")
    try:
        return _TASKS[name](**said)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: does not describe its task: {error}") from error


def _data(said: Any, where: str) -> DataConfig | None:
    if said is None:
        return None
    try:
        keys = {key: said[key] for key in ("mean", "std", "bands")}
        config = DataConfig(shards=where, **keys)
        if "manifest" in (config.mean, config.std):
            raise ValueError("data.mean and data.std are manifest, which only shards have")
        if np.min(np.asarray(config.std, np.float64)) < _LEAST_STD:
            raise ValueError(f"data.std is {config.std}, allowed are numbers from {_LEAST_STD}")
        return config
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: does not say how pixels were normalised: {error}") from error


def _step(said: str, where: str) -> int:
    if not said.isdecimal() or len(said) > 18:
        raise ValueError(f"{where}: is of step {said[:80]!r}: allowed is a whole number")
    return int(said)
