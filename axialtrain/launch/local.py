"""As many local processes as the mesh needs, where no outer launcher started us."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NoReturn

import torch
from torch.distributed import Store, TCPStore
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

from axialtrain.launch.errors import EXPECTED, again, number_in, say
from axialtrain.train.alike import AlikeError
from axialtrain.train.beats import heard, in_step, watch_store
from axialtrain.train.signals import AGAIN, TOLD_BY, Interrupted
from axialtrain.train.watch import LOST, RankLostError

GRACE = 0.5  # s for the others, when one rank has failed, to write what they know
GRACE_LOST = 2.0  # the same where it failed because of another: somebody still prints who

# glibc gives large blocks back at once, and their pages are faulted in anew in every step. What it
# is told instead, as <malloc.h> numbers it; a name that stands in the environment decides itself.
# To see what keeping them saves, set all three to 131072 and compare `seconds` in metrics.jsonl.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": (-4, 0),  # M_MMAP_MAX: no block is mapped by itself
    "MALLOC_TRIM_THRESHOLD_": (-1, -1),  # M_TRIM_THRESHOLD: nothing goes back
    "MALLOC_TOP_PAD_": (-2, 2**28),  # M_TOP_PAD
}


def processes_of_outer_launcher() -> int | None:
    """WORLD_SIZE of torchrun or deepspeed; None where nobody started us as a rank."""
    return number_in("WORLD_SIZE")


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


def threads_each(choice: int | None, processes: int, own: int) -> int:
    """Threads of a process, from launcher.threads and the size of the mesh.

    own: torch's choice, which stands where OMP_NUM_THREADS has already decided.
    """
    if choice is not None:
        return choice
    if "OMP_NUM_THREADS" in os.environ:
        return own
    return max(1, len(os.sched_getaffinity(0)) // local_processes(processes))


def local_processes(processes: int) -> int:
    """How many ranks this machine has: as torchrun or deepspeed say, or all that we start."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    return next((int(os.environ[name]) for name in names if name in os.environ), processes)


def can_fork() -> bool:
    """Whether ranks may begin as copies of this process: where there is no CUDA that it may have
    touched. From here on torch uses one thread in it, for its others would not be in a copy, and
    OpenMP would wait for them. To be asked before torch has computed anything.
    """
    if sys.platform != "linux" or torch.cuda.device_count():
        return False
    torch.set_num_threads(1)
    return True


def start(
    fn: Callable[..., Any],
    arguments: tuple[Any, ...],
    processes: int,
    *,
    fork: bool = False,
    last: bool = False,
) -> int:
    """fn(*arguments) in `processes` new processes, which find each other through our store.

    fork: they begin as copies of this one, with all that it has imported, instead of anew. For a
    process that has started no threads and has not touched CUDA, neither of which outlives a fork.
    last: this process has nothing else to do. Where it was told to end, it ignores what it is told
    afterwards: the next signal of the same end must not take its exit status from it.
    Returns an exit status: 0; AGAIN where the ranks were told to end and have saved; else the
    failing rank's, 1 where it died or lost another, 128 + signal where a signal ended all of them
    before they could save. The message was printed. When one rank fails, the others are killed.
    SIGTERM, SIGUSR1 and SIGINT are forwarded. fn must be importable, its arguments picklable.
    """
    # The parent holds the store, as torchrun's agent does: no port is guessed and lost to a race.
    listener = socket.create_server(("127.0.0.1", 0), backlog=max(128, processes))
    port = listener.getsockname()[1]
    context = multiprocessing.get_context("fork" if fork else "spawn")
    inherited = listener.fileno() if fork else None
    ranks: list[BaseProcess] = [
        context.Process(target=_rank, args=(rank, processes, port, inherited, fn, arguments))  # type: ignore[attr-defined]
        for rank in range(processes)
    ]
    forward = _Forward(ranks)
    if not fork:
        resource_tracker.ensure_running()  # on the way it would unblock what is blocked here
    # A signal that comes now waits for us until all have begun, and for each rank, which inherits
    # this, until it is in _rank: not in the middle of its imports.
    held = signal.pthread_sigmask(signal.SIG_BLOCK, TOLD_BY)
    try:
        try:
            for process in ranks:
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        # Only now, for it has a thread. What ranks have asked of it until now has waited.
        store = TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        failed = _first_failure(ranks, forward.woken)
    finally:
        for process in ranks:
            if process.pid is not None:
                process.kill()  # only SIGKILL ends a rank that is stopped, or that notes a SIGTERM
                process.join()
        forward.close(ignore=last)
    if forward.killed:
        return _unsaved(forward, "killed by a second signal after")
    codes = [process.exitcode for process in ranks]
    if failed is None:
        return AGAIN if AGAIN in codes else 0  # rank 0 has said what was saved
    told, code = forward.received, codes[failed]
    if told is not None and code in (-told, 128 + told):
        return _unsaved(forward, "interrupted by")
    return _failed(failed, code, store)


class _Forward:
    """Hands on to the ranks the first signal that tells us to end; they save and end by
    themselves. A second SIGTERM or SIGINT kills them.

    woken: a file descriptor that can be read once a signal came. The kernel may give it to a thread
    of torch's: that interrupts no system call of the main thread, which alone handles it.
    """

    def __init__(self, ranks: Sequence[BaseProcess]) -> None:
        self.received: signal.Signals | None = None
        self.killed = False
        self._ranks = ranks
        self._urgent = 0  # how often SIGTERM or SIGINT came
        self.woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._woken_before = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._hand_on) for number in TOLD_BY}

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        # Slurm's warning (SIGUSR1) and then its SIGTERM are no impatience.
        self._urgent += number != signal.SIGUSR1
        if self.received is None:
            self.received = signal.Signals(number)
            self._send(number)
        elif self._urgent > 1:
            self.killed = True
            self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        for process in self._ranks:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, number)

    def close(self, *, ignore: bool) -> None:
        """Restore the handlers that were there before. ignore: what comes now, if one has come."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if ignore and self.received else handler)
        signal.set_wakeup_fd(self._woken_before)
        os.close(self.woken)
        os.close(self._wake)


def _first_failure(ranks: Sequence[BaseProcess], woken: int) -> int | None:
    """Wait for all ranks, or for the first that fails and GRACE for the others; returns its number.

    woken: see `_Forward`; the handler runs when the wait has ended.
    A rank that the others wait for in vain is named by their `train.watch`, within its timeout.
    One that failed through another is not the first, even if it ended before that one.
    """
    waiting = {process.sentinel: rank for rank, process in enumerate(ranks) if process.pid}
    while waiting:
        for sentinel in connection.wait([*waiting, woken]):
            assert isinstance(sentinel, int)
            if sentinel == woken:
                os.read(woken, 512)
                continue
            rank = waiting.pop(sentinel)
            ranks[rank].join()
            if ranks[rank].exitcode not in (0, AGAIN):
                lost = ranks[rank].exitcode == LOST
                end = time.monotonic() + (GRACE_LOST if lost else GRACE)
                for process in ranks:
                    if process.pid is not None:
                        process.join(max(0.0, end - time.monotonic()))
                own = [k for k, process in enumerate(ranks) if _failed_by_itself(process)]
                return own[0] if lost and own else rank
    return None


def _failed_by_itself(process: BaseProcess) -> bool:
    return process.pid is not None and process.exitcode not in (None, 0, AGAIN, LOST)


def _unsaved(forward: _Forward, how: str) -> int:
    """The exit status of a run that was told to end and could not save first: AGAIN where a
    machine told it once, 128 + signal where a person did, or anybody insisted."""
    told = forward.received
    assert told is not None
    print(
        f"axialtrain: {how} {told.name}: nothing was saved now, what was saved before is whole",
        file=sys.stderr,
    )
    return 128 + told if forward.killed or told == signal.SIGINT else AGAIN


def _failed(rank: int, code: int | None, store: Store) -> int:
    """The exit status of a run whose `rank` ended with `code`; names it where it could not."""
    assert code is not None, "it has been joined"
    if code == LOST:
        return 1  # it ended because of another, which it or that one has named
    beat = heard(watch_store(store), rank)
    step = None if beat is None else beat.step
    if code < 0:
        end = f"died {in_step(step)}: {signal.Signals(-code).name}"
    else:
        end = f"failed {in_step(step)}"
    if code != 2 or step is not None:  # what a user did wrong was said, and has no step
        host = socket.gethostname()
        print(f"axialtrain: rank {rank} on {host} {end}", file=sys.stderr)
    return max(code, 1)  # of a signal it is negative


def _rank(
    rank: int,
    processes: int,
    port: int,
    inherited: int | None,
    fn: Callable[..., Any],
    arguments: Any,
) -> None:
    """The body of a rank's process: fn, and the exit status of what it raises.

    inherited: the launcher's listening socket, where this process is a copy of it.
    """
    _prctl_pr_set_pdeathsig(signal.SIGINT)  # a parent that is killed takes its ranks along
    if inherited is not None:
        os.close(inherited)
    signal.set_wakeup_fd(-1)  # the launcher's, as are the handlers
    for number in TOLD_BY:
        own = _interrupt_once if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, own)
    keep_memory()
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
        signal.pthread_sigmask(signal.SIG_UNBLOCK, TOLD_BY)
        fn(*arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except Interrupted as error:
        sys.exit(again(error))
    except RankLostError as error:
        say(error, rank=rank)
        sys.exit(LOST)
    except AlikeError as error:
        sys.exit(say(error) if rank == 0 else LOST)
    except EXPECTED as error:
        sys.exit(say(error, rank=rank))
    except Exception:
        message = f"axialtrain: rank {rank} failed:\n{traceback.format_exc()}"
        print(message, file=sys.stderr, flush=True)
        sys.exit(1)


def _interrupt_once(number: int, frame: FrameType | None) -> NoReturn:
    """Python's own handler, for the first only: a terminal's comes with the launcher's, and the
    second must not interrupt the end that the first began. A parent that dies now still ends us."""
    signal.signal(number, signal.SIG_IGN)
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    raise KeyboardInterrupt


def keep_memory() -> None:
    """Tell glibc's malloc; others have nothing that could be told."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):
        return
    for name, (parameter, value) in KEEP_MEMORY.items():
        if name not in os.environ:
            mallopt(parameter, value)
