"""One run, from a checked config to its folder of results: first what can be refused at once
(`check`), then what every rank does (`run`)."""

from __future__ import annotations

import json
import os
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from axialtrain.data.loader import Loader
from axialtrain.data.region import Shards, open_shards
from axialtrain.mesh.collectives import gather_objects
from axialtrain.mesh.mesh import Mesh
from axialtrain.mesh.parallelize import check_divides, parallelize
from axialtrain.models.transformer import AxialTransformer
from axialtrain.tasks.reconstruction import Reconstruction, ReconstructionConfig
from axialtrain.tasks.segmentation import Segmentation, SegmentationConfig
from axialtrain.train.checkpoint import save_weights
from axialtrain.train.config import RunConfig
from axialtrain.train.engine import Engine
from axialtrain.train.loop import Run, Task, picture, reading, report, train
from axialtrain.train.track import Tracker


def task_of(config: object) -> Task:
    """The task that a task config describes."""
    if isinstance(config, SegmentationConfig):
        return Segmentation(config)
    if isinstance(config, ReconstructionConfig):
        return Reconstruction(config)
    raise ValueError(f"task={config!r}: allowed are task=segmentation and task=reconstruction")


def check(config: RunConfig, folder: Path, processes: int | None) -> None:
    """Refuse what cannot run before anything expensive starts; alike on every rank.

    processes: how many an outer launcher has started, None where we start them.
    Raises ValueError that names the key, the value and what is allowed.
    """
    if processes is not None and processes != config.mesh.size:
        raise ValueError(
            f"mesh {config.mesh} needs {config.mesh.size} processes, {processes} were started: "
            "change the mesh or the number of processes"
        )
    if (folder / "weights").exists():
        raise ValueError(f"hydra.run.dir={folder}: holds a finished run; allowed is a new folder")
    check_divides("model.heads", config.model.heads, config.mesh.tensor)
    check_divides("the MLP width of model", config.model.mlp_width, config.mesh.tensor)
    task = task_of(config.task)
    with torch.device("meta"):
        task.build(AxialTransformer(config.model))
    for key, shards in _data(config).items():
        url = getattr(config.data, key.removeprefix("data."))
        if task.needs_labels and not shards.has_labels:
            raise ValueError(f"{key}={url}: has no labels, which task={config.task.name} needs")
        _loader(config, shards, at=(0, 0), data_rank=0)


def run(config: RunConfig, folder: Path, run_yaml: str) -> dict[str, float]:
    """Train on this rank. Started once per rank with RANK, LOCAL_RANK, WORLD_SIZE and the
    rendezvous in the environment, as torchrun, deepspeed and the local launcher do.

    Returns the last metrics, equal on all ranks.
    """
    timeout = timedelta(seconds=config.launcher.timeout)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(_threads(config))
    # torch renames its collectives; DeepSpeed still calls them by the old names, on every rank.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout)
    try:
        return _run(config, folder, run_yaml, device, timeout)
    finally:
        dist.destroy_process_group()


def _run(
    config: RunConfig, folder: Path, run_yaml: str, device: torch.device, timeout: timedelta
) -> dict[str, float]:
    degrees = config.mesh.degrees
    mesh = Mesh(**degrees, device_type=device.type, timeout=timeout)
    # Each rank's ${now:} gives another folder: rank 0's is everybody's.
    folder = gather_objects(folder, mesh.world)[0]
    first = mesh.world.rank == 0
    tracker = None
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(run_yaml)
        tracker = Tracker(config.logger, folder, config.name, run_yaml)

    task = task_of(config.task)
    torch.manual_seed(config.seed)  # the whole model is built alike everywhere, then spread
    model = parallelize(task.build(AxialTransformer(config.model)), mesh, timeout=timeout)
    loaders = {
        key: _loader(config, shards, at=mesh.at, data_rank=mesh.data.rank)
        for key, shards in _data(config).items()
    }
    loader = loaders["data.shards"]
    engine = Engine(
        model.to(device),
        mesh,
        optim=config.optim,
        zero=config.zero,
        micro_batch=config.train.micro_batch,
        accumulation=loader.accumulation,
    )
    current = Run(
        config, mesh, task, engine, loader, loaders.get("data.validation"), tracker, device
    )
    metrics = train(current)
    panels = picture(current)
    save_weights(engine, folder / "weights", state={"step": config.train.steps})
    reads = reading(current)
    if tracker is not None:
        assert panels is not None, "rank 0 puts the picture together"
        (folder / "reading.json").write_text(json.dumps(reads, indent=1) + "\n")
        tracker.prediction(panels, f"{config.name} after {config.train.steps} steps")
        tracker.close()
        print(report(folder, metrics), flush=True)
    engine.close()
    return metrics


def _data(config: RunConfig) -> dict[str, Shards]:
    shards = {"data.shards": open_shards(config.data.shards)}
    if config.data.validation is not None:
        shards["data.validation"] = open_shards(config.data.validation)
    return shards


def _loader(config: RunConfig, shards: Shards, at: tuple[int, int], data_rank: int) -> Loader:
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


def _threads(config: RunConfig) -> int:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return config.launcher.threads or max(1, (os.cpu_count() or 1) // local)
