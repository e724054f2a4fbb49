"""What every rank of a run does, from a checked config to the folder of results."""

from __future__ import annotations

import json
import logging
import os
import socket
import warnings
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from axialtrain.mesh.collectives import gather_objects
from axialtrain.mesh.mesh import Mesh
from axialtrain.mesh.parallelize import parallelize
from axialtrain.mesh.placement import placed
from axialtrain.models.recompute import Recompute
from axialtrain.models.registry import build_backbone
from axialtrain.models.transformer import AxialTransformer
from axialtrain.train.alike import RefusedError
from axialtrain.train.check import data_of, loader_of, task_of, with_statistics
from axialtrain.train.checkpoint import Saved
from axialtrain.train.compiled import check_compiler, compile_layers, compiles_passes
from axialtrain.train.config import RunConfig
from axialtrain.train.damages import Damages
from axialtrain.train.engine import Engine
from axialtrain.train.keep import Keeper
from axialtrain.train.loop import Run, picture, reading, report, train
from axialtrain.train.meet import meet
from axialtrain.train.mesh_text import NAME, mesh_text
from axialtrain.train.progress import Progress
from axialtrain.train.recorder import record_collectives
from axialtrain.train.resume import agreed, check_fits, folder_of, found, take_over, told
from axialtrain.train.save import Checkpoints
from axialtrain.train.signals import Interrupted, Signals
from axialtrain.train.start import pinned, start_of
from axialtrain.train.storage import Folder
from axialtrain.train.track import Tracker
from axialtrain.train.watch import Watch

LOG = logging.getLogger(__name__)
# In the run's folder: what torch remembers of the collectives of ranks that failed.
FLIGHT = "flight"


def run(
    config: RunConfig, folder: Path, run_yaml: str, device_type: str, threads: int
) -> dict[str, float]:
    """Train on this rank. Started once per rank with RANK, LOCAL_RANK, WORLD_SIZE and the
    rendezvous in the environment, as torchrun, deepspeed and the local launcher do.

    config: has passed `check`. device_type: "cpu" or "cuda", of DeepSpeed too (DS_ACCELERATOR).
    threads: of torch in this process.
    Returns the last metrics, equal on all ranks.
    Raises Interrupted where the run was told to end, and has saved.
    """
    timeout = timedelta(seconds=config.launcher.timeout)
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    torch.set_num_threads(threads)
    # torch renames its collectives; DeepSpeed still calls them by the old names, on every rank.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    with closing(Signals()) as signals:
        record_collectives(folder / FLIGHT)
        store, rank, world = meet(backend, timeout)
        watch = Watch(store, rank, world, timeout=config.launcher.timeout, folder=folder / FLIGHT)
        try:
            return _run(config, folder, run_yaml, device, signals, watch)
        except Interrupted:
            raise
        except Exception as error:  # whatever it is: the others wait for this rank
            lost = watch.failed(error)
            if lost is None:
                raise
            raise lost from error
        finally:
            watch.close()
            dist.destroy_process_group()


def _run(
    config: RunConfig,
    folder: Path,
    run_yaml: str,
    device: torch.device,
    signals: Signals,
    watch: Watch,
) -> dict[str, float]:
    timeout = timedelta(seconds=config.launcher.timeout)
    mesh = Mesh(
        **config.mesh.degrees,
        exchange=config.mesh.exchange,
        swap=config.mesh.swap,
        overlap=config.mesh.overlap,
        device_type=device.type,
        timeout=timeout,
    )
    # Each rank's ${now:} gives another folder: rank 0's is everybody's.
    folder = gather_objects(folder, mesh.world)[0]
    watch.folder = folder / FLIGHT
    hosts, devices = zip(
        *gather_objects((socket.gethostname(), str(device)), mesh.world), strict=True
    )
    placement = placed(config.mesh.degrees, hosts)
    mesh.placed_on(placement)
    if config.train.compile:
        check_compiler(device.type, mesh.world)
    saved, problems = agreed(lambda: found(config, folder, verify=True), mesh.world)
    first = mesh.world.rank == 0
    tracker, refused = None, ""
    if first:
        for problem in problems:
            LOG.warning("%s", problem)
        if placement.warning is not None:
            LOG.warning("%s", placement.warning)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            step = 0 if saved is None else saved.step
            tracker = Tracker(config.logger, folder, config.name, run_yaml, resumed=step)
            Folder(folder).write(NAME, mesh_text(placement, devices, mesh.config).encode())
        except (ValueError, OSError) as error:
            refused = str(error)
    refused = gather_objects(refused, mesh.world)[0]
    if refused:
        raise RefusedError(refused)
    if first and saved is not None:
        print(f"going on from step {saved.step} of {saved.where}", flush=True)

    shards_of = data_of(config)
    config = with_statistics(config, shards_of["data.shards"])
    loaders = {
        key: loader_of(
            config,
            shards,
            at=mesh.at,
            data_rank=mesh.data.rank,
            held_out=key == "data.validation",
            pin=device.type == "cuda",
        )
        for key, shards in shards_of.items()
    }
    loader = loaders["data.shards"]
    check_alike({key: one.state(0).to_json() for key, one in loaders.items()}, mesh)
    if saved is not None:
        check_fits(saved, config, loader)
    task = task_of(config)
    torch.manual_seed(config.seed)  # the whole model is built alike everywhere, then spread
    backbone = build_backbone(config.model)
    if isinstance(backbone, AxialTransformer):
        backbone.recompute = Recompute(
            config.train.recompute, config.train.offload, config.train.recompute_band
        )
    model = task.build(backbone)
    if saved is None:
        # A run that goes on may have a newer checkpoint for the next rank that looks.
        config = replace(config, init=told(lambda: pinned(config), mesh.world))
        given, fresh, unused = start_of(model, config, verify=False)
        model.load_state_dict(given, strict=False)
        del given  # a second model
        for names, what in ((fresh, "not in it, and drawn anew"), (unused, "in it, and not used")):
            if first and names:
                print(f"init={config.init}: {what}: {', '.join(names)}", flush=True)
    model = parallelize(model, mesh, timeout=timeout)
    if config.train.compile:
        by_pass = compiles_passes(config.model, config.mesh, config.train.recompute_band)
        compile_layers(model, by_pass=by_pass)
    task.prepare(mesh, device)
    engine = Engine(
        model.to(device),
        mesh,
        optim=config.optim,
        zero=config.zero,
        micro_batch=config.train.micro_batch,
        accumulation=loader.accumulation,
        precision=config.train.precision,
    )
    if saved is not None:
        take_over(saved, engine)
    checkpoints = Checkpoints(Folder(folder_of(config, folder)), config.checkpoint, mesh.world)
    progress = Progress() if saved is None else Progress.of_state(saved.state, saved.where)
    here = _resumed_here(saved, checkpoints.folder)
    if here is None:
        progress.forget_best()  # that of another run, if there is one, is not in this folder
    checkpoints.start(here, progress.best_step)
    parts = Run(
        config,
        mesh,
        task,
        engine,
        loader,
        loaders.get("data.validation"),
        tracker,
        device,
        Keeper(checkpoints, signals),
        watch,
        progress,
        Damages(config.data.damage, mesh, tracker, device),
    )
    # As the config says now, which may wait longer than that of the run that ended, or for another
    # metric.
    waits = progress.best_of == config.checkpoint.best
    progress.early = waits and 0 < config.train.patience <= progress.worse
    metrics = _train(parts, folder)
    engine.close()
    return metrics


def check_alike(states: dict[str, str], mesh: Mesh) -> None:
    """Raise RefusedError where ranks have other shards, or another order of them: a node's own copy
    of them, or of a table of weights, may be older. states: of the orders, by key."""
    every = gather_objects(states, mesh.world)
    for rank, theirs in enumerate(every):
        for key, state in theirs.items():
            if state != every[0][key]:
                raise RefusedError(
                    f"{key}: rank {rank} has other shards, or another order of them, than rank 0: "
                    f"{state} and {every[0][key]}. Allowed is the same on every host"
                )


def _train(run: Run, folder: Path) -> dict[str, float]:
    """The steps that are left, and what a run leaves at its end."""
    progress = run.progress
    before = progress.step
    done = run.tracker is not None and run.tracker.closed
    left = before < run.config.train.steps and not progress.early
    if gather_objects(done, run.mesh.world)[0] and not left:
        if run.tracker is not None:
            run.tracker.close()
            print(f"{folder}: is at its end, step {before}: there is nothing to do", flush=True)
        return progress.metrics
    if run.tracker is not None:
        run.tracker.reopen()
    metrics = train(run)
    reads = reading(run)
    panels = picture(run)
    if run.tracker is not None:
        assert panels is not None, "rank 0 puts the picture together"
        Folder(folder).write("reading.json", (json.dumps(reads, indent=1) + "\n").encode())
        run.tracker.prediction(panels, f"{run.config.name} after {progress.step} steps")
        run.tracker.close()
        print(report(folder, folder_of(run.config, folder), progress, run.damages), flush=True)
    return metrics


def _resumed_here(saved: Saved | None, folder: Folder) -> int | None:
    """The step of `saved`, where it is one of the checkpoints in `folder`."""
    if saved is None:
        return None
    return saved.step if saved.where.startswith(f"{folder.url.rstrip('/')}/") else None
