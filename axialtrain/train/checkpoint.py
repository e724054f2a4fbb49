"""A model on disk, in one form that knows of no mesh and no ZeRO stage.

A folder of safetensors shards with the whole fp32 weights under the names of the serial model, an
index in Hugging Face's convention, and state.json. It appears under its name when all of it is
there, so whoever finds it may read it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:  # reading a model needs no DeepSpeed
    from axialtrain.train.engine import Engine

INDEX = "model.safetensors.index.json"
STATE = "state.json"
LARGEST_INDEX = 64 * 2**20  # bytes; ours are under 1 MB


def save_weights(engine: Engine, folder: Path, *, state: Mapping[str, Any]) -> Path:
    """Write the engine's weights and `state`, a JSON object, to `folder`. Collective.

    folder: on a file system that all ranks share; must not exist. Returns it.

    Each rank gathers every parameter, one at a time, and keeps and writes only those dealt out to
    it. If a rank fails, every rank raises and nothing is left: the rank itself what happened
    there, the others OSError. FileExistsError where the folder is already there.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    owners = _deal({name: shape.numel() for name, shape in engine.shapes.items()}, world)
    files = {name: _shard(owner, max(owners.values()) + 1) for name, owner in owners.items()}
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with _together(engine.device):
            if rank == 0:
                if folder.exists():
                    raise FileExistsError(f"{folder} is already there")
                # What a run that was killed left behind.
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)

        mine, total = {}, 0
        for name, tensor in engine.weights():
            total += tensor.nbytes
            if owners[name] == rank:
                mine[name] = tensor.contiguous()

        with _together(engine.device):
            if mine:
                path = partial / files[next(iter(mine))]
                save_file(mine, path, metadata={"format": "pt"})
                _sync(path)

        with _together(engine.device):
            if rank == 0:
                _write_json(
                    partial / INDEX, {"metadata": {"total_size": total}, "weight_map": files}
                )
                _write_json(partial / STATE, state)
                _sync(partial)
                partial.rename(folder)
                _sync(folder.parent)
    except Exception:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights that `save_weights` wrote, on the CPU, by their names in the serial model.

    Raises ValueError, naming the file, where one is missing or is not what the index says.
    """
    tensors: dict[str, Tensor] = {}
    names_in: dict[str, list[str]] = {}
    for name, file in _weight_map(folder / INDEX).items():
        names_in.setdefault(file, []).append(name)
    for file, names in names_in.items():
        path = folder / file
        try:
            with safe_open(path, framework="pt") as shard:
                tensors.update((name, shard.get_tensor(name)) for name in names)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: {error}") from error
    return tensors


def _deal(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Which rank writes which tensor: the largest first, each to the rank with the least so far.

    Ranks that write anything are the first ones.
    """
    load = [0] * ranks
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner = load.index(min(load))
        owners[name] = owner
        load[owner] += sizes[name]
    return owners


def _shard(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


@contextlib.contextmanager
def _together(device: torch.device) -> Iterator[None]:
    """Ends on all ranks at once, and on all with an exception if the body raised on one."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # whatever it is: the others are waiting, and it is raised below
        error = caught
    failed = torch.tensor(int(error is not None), device=device)
    dist.all_reduce(failed)
    if error is not None:
        raise error
    if failed.item():
        raise OSError("the checkpoint could not be written: another rank says why")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(content), indent=2) + "\n")
    _sync(path)


def _sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _weight_map(path: Path) -> dict[str, str]:
    """The file that each tensor is in, from an index that may come from anyone."""
    try:
        if path.stat().st_size > LARGEST_INDEX:
            raise ValueError(f"larger than {LARGEST_INDEX} bytes")
        index = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict):
        raise ValueError(f"{path}: has no weight_map")
    for file in files.values():
        # A bare name: what a checkpoint names stays in its folder.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or "\0" in file:
            raise ValueError(f"{path}: {file!r} is not the name of a file beside it")
        if not file.endswith(".safetensors"):
            raise ValueError(f"{path}: {file!r} is not a safetensors file")
    return files
