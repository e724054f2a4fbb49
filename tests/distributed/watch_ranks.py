"""Ranks of a small run, one of which meets with a fault in step 3. Also a script, for torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout

from axialtrain.launch.errors import EXPECTED, again, own_rank, say
from axialtrain.mesh.collectives import begin_all_to_all
from axialtrain.mesh.mesh import Group
from axialtrain.train.recorder import record_collectives
from axialtrain.train.signals import Interrupted, Signals
from axialtrain.train.watch import Watch

FAULT_STEP = 3
MEETING = timedelta(seconds=30)  # on a busy machine one rank has imported torch long before another


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ZeroDivisionError("planted")


def refuse() -> None:
    raise ValueError("planted")


def hang() -> None:
    time.sleep(60)


FAULTS = {fn.__name__: fn for fn in (stop, die, fail, refuse, hang)}


def small_run(
    fault: str,
    victim: int,
    timeout: float,
    folder: str,
    alone: bool = False,
    steps: int = 500,
    beside: bool = False,
) -> None:
    """Sums over all ranks, step by step; `victim` meets `fault` ("none": nobody does).

    alone: from the step of the fault on, the others compute and wait for nobody. beside: a message
    to each rank, sent beside, comes first. A signal ends the run as one that saves would end.
    """
    torch.set_num_threads(1)
    record_collectives(Path(folder))
    dist.init_process_group("gloo", timeout=MEETING)
    dist.barrier()
    _set_pg_timeout(timedelta(seconds=timeout))
    rank = dist.get_rank()
    everybody = Group(dist.group.WORLD, rank, tuple(range(dist.get_world_size())))
    signals = Signals()
    watch = Watch(
        _get_default_store(), rank, dist.get_world_size(), timeout=timeout, folder=Path(folder)
    )
    try:
        for step in range(steps):
            watch.at(step)
            if step == FAULT_STEP:
                time.sleep(1.0)  # the beat that tells the step
                print("there", flush=True)
                Path(folder, "there").touch()
                if rank == victim and fault != "none":
                    FAULTS[fault]()
                if alone:
                    time.sleep(60)
            if beside:
                begin_all_to_all(torch.zeros(2), [1, 1], [1, 1], everybody, beside=True).received()
            told = torch.tensor(float(signals.received is not None))
            dist.all_reduce(told)
            if told:
                raise Interrupted(f"told to end by {signals.received}: saved step {step}")
            time.sleep(0.02)
    except Interrupted:
        raise
    except Exception as error:
        lost = watch.failed(error)
        if lost is not None:
            raise lost from error
        raise
    finally:
        watch.close()
        signals.close()
        dist.destroy_process_group()


def apart(timeout_of_watch: float) -> str | None:
    """Rank 0 ends in good order, the others compute for longer than the timeout."""
    rank = dist.get_rank()
    watch = Watch(
        _get_default_store(), rank, dist.get_world_size(), timeout=timeout_of_watch, folder=None
    )
    dist.barrier()
    if rank != 0:
        time.sleep(2 * timeout_of_watch)
    watch.close()
    return watch.failure


def stopped_together(timeout_of_watch: float) -> str | None:
    """All ranks are stopped for longer than the timeout, as by Ctrl-Z, and go on."""
    watch = Watch(
        _get_default_store(),
        dist.get_rank(),
        dist.get_world_size(),
        timeout=timeout_of_watch,
        folder=None,
    )
    dist.barrier()
    # Rank 0 first and longest, so that the other has heard its last beat when both are stopped.
    late = 0.25 * timeout_of_watch * dist.get_rank()
    time.sleep(late)
    stopped = 2.25 * timeout_of_watch - 2 * late
    script = f"sleep {stopped}; kill -CONT {os.getpid()}"
    with subprocess.Popen(["sh", "-c", script]):
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(2 * timeout_of_watch)
    watch.close()
    return watch.failure


if __name__ == "__main__":
    name, number, seconds, where, *rest = sys.argv[1:]
    try:
        small_run(name, int(number), float(seconds), where, alone=rest == ["alone"])
    except Interrupted as error:
        sys.exit(again(error))
    except EXPECTED as error:
        sys.exit(say(error, rank=own_rank()))
