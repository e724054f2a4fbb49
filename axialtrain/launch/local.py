"""As many local processes as the mesh needs, where no outer launcher started us."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.distributed import TCPStore
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from axialtrain.launch.errors import EXPECTED, say

# glibc gives large blocks back at once, and their pages are faulted in anew in every step. To see
# what keeping them saves, set the same names to 131072 in the environment and compare `seconds` in
# metrics.jsonl. Read when a process starts.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": 2**32,
    "MALLOC_TRIM_THRESHOLD_": 2**33,
    "MALLOC_TOP_PAD_": 2**28,
}


def processes_of_outer_launcher() -> int | None:
    """WORLD_SIZE of torchrun or deepspeed; None where nobody started us as a rank."""
    world = os.environ.get("WORLD_SIZE")
    return None if world is None else int(world)


def device_type(choice: str, processes: int) -> str:
    """The device type, cpu or cuda, from launcher.device and the size of the mesh.

    "auto" is cuda where each process of this machine has a GPU of its own.
    Raises ValueError where cuda is asked for and there are too few.
    """
    local = local_processes(processes)
    devices = torch.cuda.device_count()
    if choice == "cuda" and devices < local:
        raise ValueError(
            f"launcher.device=cuda: {local} local processes need as many GPUs, {devices} are here"
        )
    if choice == "auto":
        return "cuda" if devices >= local else "cpu"
    return choice


def threads_each(choice: int | None, processes: int) -> int | None:
    """Threads of a process, from launcher.threads and the size of the mesh.

    None, torch's own choice, where OMP_NUM_THREADS has already decided.
    """
    if choice is not None or "OMP_NUM_THREADS" in os.environ:
        return choice
    return max(1, len(os.sched_getaffinity(0)) // local_processes(processes))


def local_processes(processes: int) -> int:
    """How many ranks this machine has: as torchrun or deepspeed say, or all that we start."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    return next((int(os.environ[name]) for name in names if name in os.environ), processes)


def start(fn: Callable[..., Any], arguments: tuple[Any, ...], processes: int) -> int:
    """fn(*arguments) in `processes` new processes, which find each other through our store.

    Returns an exit status: 0, or the failing rank's, whose message was printed. When one rank
    fails, the others are ended. fn must be importable, its arguments picklable.
    """
    for name, size in KEEP_MEMORY.items():
        os.environ.setdefault(name, str(size))
    # The parent holds the store, as torchrun's agent does: no port is guessed and lost to a race.
    # torch reports each of the others that it ends when one fails: the one that failed says why.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.start_processes(
        _rank, (processes, store.port, fn, arguments), nprocs=processes, join=False
    )
    try:
        while not context.join():
            pass
    except ProcessExitedException as error:
        if error.signal_name is not None:
            print(
                f"axialtrain: rank {error.error_index} died: {error.signal_name}", file=sys.stderr
            )
        return max(error.exit_code, 1)  # of a signal it is negative
    except ProcessRaisedException as error:
        print(f"axialtrain: rank {error.error_index} failed:\n{error.msg}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        for process in context.processes:
            process.terminate()
        for process in context.processes:
            process.join()
        print(
            "axialtrain: interrupted: metrics.jsonl is whole up to the last step, and no weights "
            "were written",
            file=sys.stderr,
        )
        return 130
    return 0


def _rank(rank: int, processes: int, port: int, fn: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # env:// then connects to our store as a client
    )
    try:
        fn(*arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except EXPECTED as error:
        sys.exit(say(error, rank=rank))
