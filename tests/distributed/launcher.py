"""Runs a function on several gloo ranks, in processes that are kept alive between tests.

Importing torch and DeepSpeed costs more than most tests, so the processes stay, and begin as copies
of one that has imported them; each call makes its own process group and ends it. The first rank's
error is brought back; a rank that hangs is killed.
"""

from __future__ import annotations

import atexit
import gc
import inspect
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT = timedelta(seconds=60)
IMPORTED = ["axialtrain.train.run"]  # and with it most of what ranks import


class RankError(RuntimeError):
    """A rank raised; the message holds its number and traceback."""


class _Workers:
    def __init__(self) -> None:
        self.running: list[tuple[Any, Connection]] = []

    def at_least(self, count: int) -> list[tuple[Any, Connection]]:
        context = get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        while len(self.running) < count:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            # At the first start the server imports: with a GPU here, DeepSpeed would ask for it,
            # and copies could not use it. Ranks of tests are on the CPU.
            with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"):
                process.start()
            theirs.close()
            self.running.append((process, ours))
        return self.running[:count]

    def stop(self) -> None:
        for process, connection in self.running:
            connection.close()
            process.kill()
            process.join()
        self.running.clear()


_workers = _Workers()
atexit.register(_workers.stop)


def run_ranks(
    fn: Callable[..., Any], world_size: int, *, timeout: float = 300.0, **kwargs: Any
) -> list[Any]:
    """fn(**kwargs) on `world_size` ranks of one gloo group; returns what each rank returned.

    fn must be importable (a module's function); arguments and results are pickled by value.
    Raises RankError with the traceback of the first rank that failed, TimeoutError when the ranks
    have not all answered after `timeout` seconds. In both cases the processes are killed.
    """
    workers = _workers.at_least(world_size)
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        for rank, (_, connection) in enumerate(workers):
            store = str(Path(folder) / "store")
            connection.send_bytes(pickle.dumps((fn, kwargs, rank, world_size, store)))
        waiting = {connection: rank for rank, (_, connection) in enumerate(workers)}
        failed: list[tuple[float, str]] = []  # (when it was raised, what)
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if failed and not ready:
                break
            if not ready:
                _workers.stop()
                raise TimeoutError(
                    f"ranks {sorted(waiting.values())} gave no answer in {timeout} s"
                )
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answer, value = pickle.loads(connection.recv_bytes())
                except EOFError:
                    # It could not say when; the others mostly fail in its wake.
                    answer, value = "error", (0.0, "the process died")
                if answer == "error":
                    raised, text = value
                    failed.append((raised, f"rank {rank} of {world_size}:\n{text}"))
                    # The others fail in its wake: a moment to hear which one was first.
                    deadline = min(deadline, time.monotonic() + 1.0)
                else:
                    results[rank] = value
        if failed:
            _workers.stop()
            failed.sort()
            if failed[0][0] > 0.0:
                raise RankError(failed[0][1])
            # One died: what the others said may be the cause of it.
            raise RankError("\n".join(text for _, text in failed))
    return [results[rank] for rank in range(world_size)]


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    imported = 0
    while True:
        try:
            fn, kwargs, rank, world_size, store = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        # What was imported stays, and need not be searched for garbage each time. No oftener: what
        # a library still holds of the last test would stay for good.
        if len(sys.modules) > imported:
            gc.freeze()
            imported = len(sys.modules)
        connection.send_bytes(pickle.dumps(_run(fn, kwargs, rank, world_size, store)))


def _run(
    fn: Callable[..., Any], kwargs: dict[str, Any], rank: int, world_size: int, store: str
) -> tuple[str, Any]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    try:
        result = fn(**kwargs)
        if dist.is_initialized():
            # A rank that ends first closes connections that others may still be making.
            dist.barrier()
        return "ok", result
    except Exception:
        return "error", (time.monotonic(), traceback.format_exc())
    finally:
        dist.destroy_process_group()
        _forget_zero3()
        # Groups are in cycles of references. Each that is left has a thread of gloo's that wakes a
        # hundred times a second: some hundred of them took more than the tests.
        gc.collect()


def _forget_zero3() -> None:
    """A cache of DeepSpeed's, of a method, keeps each engine of ZeRO 3 that there ever was."""
    name = "deepspeed.runtime.zero.partitioned_param_coordinator"
    if name in sys.modules:
        coordinator = sys.modules[name].PartitionedParameterCoordinator
        wrapped = vars(coordinator)["_PartitionedParameterCoordinator__params_to_release"]
        inspect.getclosurevars(wrapped).nonlocals["func"].cache_clear()
