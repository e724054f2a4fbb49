"""Ranks that save without an engine, and one of them that cannot."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from axialtrain.mesh.mesh import Group
from axialtrain.train.config import CheckpointConfig
from axialtrain.train.save import Checkpoints
from axialtrain.train.storage import Folder

NAMES = ("layer.weight", "layer.bias", "other")


class Stub:
    """Stands in for an Engine: what `Checkpoints` asks of one, with the values of `step`."""

    def __init__(self, step: int) -> None:
        self._tensors = {
            name: torch.arange(size).float() + step
            for name, size in zip(NAMES, (7, 3, 5), strict=True)
        }
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._tensors.items()

    def moments(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, tensor in self._tensors.items():
            yield name, "exp_avg", -tensor


def save(checkpoints: Checkpoints, step: int) -> None:
    engine: Any = Stub(step)
    checkpoints.begin(engine, step, {"step": step}, None)
    checkpoints.commit()


def save_together(folder: Path, asynchronous: bool) -> None:
    save(_checkpoints(folder, asynchronous), 1)


def save_that_fails_on_one(folder: Path, rank: int, name: str, asynchronous: bool) -> str:
    """Steps 1, 2 and 3, the second with a disk that is full for `rank` when it writes `name`....

    Returns what this rank raised."""
    checkpoints = _checkpoints(folder, asynchronous)
    write = Folder.write

    def full(self: Folder, file: str, content: bytes) -> None:
        if file.startswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, file, content)

    save(checkpoints, 1)
    said = ""
    with patch.object(Folder, "write", full if dist.get_rank() == rank else write):
        try:
            save(checkpoints, 2)
        except OSError as error:
            said = str(error)
    dist.barrier()
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    dist.barrier()
    save(checkpoints, 3)
    return said


def _checkpoints(folder: Path, asynchronous: bool) -> Checkpoints:
    world = Group(dist.group.WORLD, dist.get_rank(), tuple(range(dist.get_world_size())))
    config = CheckpointConfig(keep_last=9, asynchronous=asynchronous)
    checkpoints = Checkpoints(Folder(folder), config, world)
    checkpoints.start(None)
    return checkpoints
