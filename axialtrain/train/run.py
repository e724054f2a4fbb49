"""What every rank of a run does, from a checked config to the folder of results."""

from __future__ import annotations

import json
import os
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from axialtrain.mesh.collectives import gather_objects
from axialtrain.mesh.mesh import Mesh
from axialtrain.mesh.parallelize import parallelize
from axialtrain.models.transformer import AxialTransformer
from axialtrain.train.check import data_of, loader_of, start_of, task_of
from axialtrain.train.checkpoint import save_weights
from axialtrain.train.config import RunConfig
from axialtrain.train.engine import Engine
from axialtrain.train.loop import Run, picture, reading, report, train
from axialtrain.train.track import Tracker


def run(
    config: RunConfig, folder: Path, run_yaml: str, device_type: str, threads: int | None
) -> dict[str, float]:
    """Train on this rank. Started once per rank with RANK, LOCAL_RANK, WORLD_SIZE and the
    rendezvous in the environment, as torchrun, deepspeed and the local launcher do.

    config: has passed `check`. device_type: "cpu" or "cuda", of DeepSpeed too (DS_ACCELERATOR).
    threads: of this process; None leaves torch's own choice.
    Returns the last metrics, equal on all ranks.
    """
    timeout = timedelta(seconds=config.launcher.timeout)
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    # torch renames its collectives; DeepSpeed still calls them by the old names, on every rank.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timeout)
    try:
        return _run(config, folder, run_yaml, device, timeout)
    finally:
        dist.destroy_process_group()


def _run(
    config: RunConfig, folder: Path, run_yaml: str, device: torch.device, timeout: timedelta
) -> dict[str, float]:
    mesh = Mesh(
        **config.mesh.degrees,
        exchange=config.mesh.exchange,
        swap=config.mesh.swap,
        device_type=device.type,
        timeout=timeout,
    )
    # Each rank's ${now:} gives another folder: rank 0's is everybody's.
    folder = gather_objects(folder, mesh.world)[0]
    tracker = None
    if mesh.world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        tracker = Tracker(config.logger, folder, config.name, run_yaml)
        (folder / "config.yaml").write_text(run_yaml)

    task = task_of(config)
    torch.manual_seed(config.seed)  # the whole model is built alike everywhere, then spread
    model = task.build(AxialTransformer(config.model))
    given, fresh, unused = start_of(model, config)
    model.load_state_dict(given, strict=False)
    del given  # a second model
    if tracker is not None:
        for names, what in ((fresh, "not in it, and drawn anew"), (unused, "in it, and not used")):
            if names:
                print(f"init={config.init}: {what}: {', '.join(names)}", flush=True)
    model = parallelize(model, mesh, timeout=timeout)
    task.prepare(mesh, device)
    loaders = {
        key: loader_of(config, shards, at=mesh.at, data_rank=mesh.data.rank)
        for key, shards in data_of(config).items()
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
    validation = loaders.get("data.validation")
    parts = Run(config, mesh, task, engine, loader, validation, tracker, device)
    metrics = train(parts)
    state = {"step": config.train.steps, "seed": config.seed}
    data_state = json.loads(loader.state(config.train.steps).to_json())
    save_weights(engine, folder / "weights", state=state | {"data": data_state})
    reads = reading(parts)
    panels = picture(parts)
    if tracker is not None:
        assert panels is not None, "rank 0 puts the picture together"
        (folder / "reading.json").write_text(json.dumps(reads, indent=1) + "\n")
        tracker.prediction(panels, f"{config.name} after {config.train.steps} steps")
        tracker.close()
        print(report(folder, metrics), flush=True)
    engine.close()
    return metrics
