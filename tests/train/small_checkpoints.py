"""Small models, and checkpoints of them without a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from safetensors.torch import save
from torch import Tensor, nn

from axialtrain.attention.config import AxialConfig
from axialtrain.data.config import DataConfig
from axialtrain.models.registry import build_backbone
from axialtrain.models.transformer import AxialTransformerConfig
from axialtrain.tasks.segmentation import SegmentationConfig
from axialtrain.train.check import task_of
from axialtrain.train.checkpoint import (
    FOLDER,
    FORMAT,
    MARKER,
    MOMENTS,
    STATE,
    WEIGHTS,
    Owner,
    folder_name,
    index_of,
)
from axialtrain.train.config import RunConfig
from axialtrain.train.storage import Folder


def a_run(init=None, task=None, axial_config=None, **model) -> RunConfig:
    """One with a small model; axial_config: keys that differ from rope in rows and columns."""
    options = {"patch": 4, "dim": 16, "depth": 2, "heads": 2, "mlp_ratio": 2.0} | model
    config = AxialTransformerConfig(**options, axial_config=AxialConfig.of(axial_config or {}))
    task = SegmentationConfig(classes=3) if task is None else task
    return RunConfig(DataConfig(shards="nowhere"), init=init, model=config, task=task)


def a_model(config: RunConfig, seed: int = 0) -> nn.Module:
    """The task's, drawn."""
    return drawn(task_of(config).build(build_backbone(config.model)), seed)


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """In evaluation, every parameter normal: outputs stay near 1, and nothing is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and "weight" in name else 0.4
        parameter.data = noise * scale + float(parameter.ndim == 1 and name.endswith("weight"))
    return model.eval()


def checkpointed(
    run: Path | str,
    config: RunConfig,
    tensors: Mapping[str, Tensor],
    *,
    step: int = 17,
    owner: Owner | None = None,
    **state: Any,
) -> str:
    """A checkpoint as the run in that folder would have written it; returns where it is.

    tensors: a state_dict. owner: the run. state: what its state.json says instead.
    """
    folder = Folder(run).within(FOLDER).within(folder_name(step))
    folder.make()
    said = {"step": step, "model": asdict(config.model), "task": asdict(config.task)}
    shard = "model-00001-of-00001.safetensors"
    index = {"weight_map": dict.fromkeys(tensors, shard)}
    contents = {
        shard: save(dict(tensors)),
        index_of(WEIGHTS): json.dumps(index).encode(),
        index_of(MOMENTS): b'{"weight_map": {}}',
        STATE: json.dumps(said | state).encode(),
    }
    files = {name: (len(one), google_crc32c.value(one)) for name, one in contents.items()}
    marker: dict[str, Any] = {"format": FORMAT, "step": step, "files": files}
    if owner is not None:
        marker["run"] = asdict(owner)
    for name, content in (*contents.items(), (MARKER, json.dumps(marker).encode())):
        folder.write(name, content)
    return folder.url
