"""What ranks tell of themselves through the store, and who is at fault when a run stands still."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FrameType

import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from axialtrain.mesh.collectives import Transfer

FAILURE = "failure"
SHOWN = 8  # ranks that a message names
PACKAGE = Path(__file__).resolve().parents[1]
# Frames that every rank has, and that say nothing of where it stands.
EVERYWHERE = (PACKAGE / "train/watch.py", PACKAGE / "train/beats.py", PACKAGE / "launch/local.py")
COLLECTIVES = dist.distributed_c10d.__file__
HANDLES_OF_ZERO = str(Path("deepspeed", "runtime", "zero", "partition_parameters.py"))


@dataclass(frozen=True)
class Beat:
    """What a rank last told of itself.

    count: grows with every beat; nobody compares clocks.
    step: the optimizer step it is in, None before the first.
    where: the innermost line of ours that it stands in; collective: whether it waits in one.
    asking: it is asking who is at fault, and so is not. gone: it has ended in good order.
    """

    rank: int
    host: str
    pid: int
    count: int
    step: int | None
    where: str
    collective: bool
    asking: bool = False
    gone: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}, {in_step(self.step)}, at {self.where}"


def in_step(step: int | None) -> str:
    return "before its first step" if step is None else f"in step {step}"


def watch_store(store: Store) -> Store:
    """A connection of one's own to the server of `store`, under a prefix of ours.

    A TCPStore holds a lock while it waits for an answer: the main thread must not wait for a
    watching thread's. torchrun may keep the store over a restart: the prefix counts them.
    """
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"axialtrain/watch/{restarts}", store.clone())  # type: ignore[attr-defined]


def tell(store: Store, beat: Beat) -> None:
    store.set(str(beat.rank), json.dumps(asdict(beat)))


def heard(store: Store, rank: int) -> Beat | None:
    """The last beat of `rank`; None before its first. Raises RuntimeError where the store fails."""
    key = str(rank)
    # get of a key that is not there would wait for it
    return Beat(**json.loads(store.get(key))) if store.check([key]) else None


def waits(code: CodeType) -> bool:
    """Whether a rank that has `code` among its frames waits for others: in a collective of torch,
    or for one that runs beside, where only the caller of its handle is Python: our transfers, and
    what ZeRO 3 gathers (known by its name, as importing DeepSpeed takes seconds)."""
    return (
        code.co_filename == COLLECTIVES
        or code is Transfer.received.__code__
        or (code.co_name == "wait" and code.co_filename.endswith(HANDLES_OF_ZERO))
    )


def position(own_threads: Sequence[int]) -> tuple[str, bool]:
    """Where this process's main thread stands ("file:line in function", the innermost of our
    package), and whether a thread of it, other than `own_threads`, is in a collective: under CUDA
    autograd calls the backward's from a thread of its own."""
    frames = sys._current_frames()
    collective = False
    for thread, top in frames.items():
        now = None if thread in own_threads else top
        while now is not None:
            collective |= waits(now.f_code)
            now = now.f_back
    innermost = frames[threading.main_thread().ident or 0]
    frame: FrameType | None = innermost
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if PACKAGE in file.parents and file not in EVERYWHERE:
            name = file.relative_to(PACKAGE.parent)
            return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}", collective
        frame = frame.f_back
    code = innermost.f_code
    return f"{Path(code.co_filename).name}:{innermost.f_lineno} in {code.co_name}", collective


def at_fault(before: Sequence[Beat | None], after: Sequence[Beat | None], me: int) -> str:
    """The sentence that names the ranks at fault, from two readings of all ranks' beats, several
    intervals apart: those that are silent; else those outside of the collective that others wait
    in; else those whose step is behind; else where all stand."""
    silent = [
        _silent(rank, beat)
        for rank, (was, beat) in enumerate(zip(before, after, strict=True))
        if rank != me
        and (beat is None or (was is not None and was.count == beat.count and not beat.gone))
    ]
    if silent:
        return _listed(silent)
    known = [beat for beat in after if beat is not None and beat.rank != me and not beat.asking]
    ended = [f"rank {beat.rank} on {beat.host} has ended" for beat in known if beat.gone]
    known = [beat for beat in known if not beat.gone]
    outside = [
        f"{beat}, outside of the collective that others wait in"
        for beat in known
        if not beat.collective
    ]
    steps = [-1 if beat.step is None else beat.step for beat in known]
    behind = [
        f"{beat}, behind others"
        for beat, step in zip(known, steps, strict=True)
        if step < max(steps)
    ]
    everyone = [f"{beat}, in a collective" for beat in known]
    return _listed(outside or behind or ended or everyone or ["every other rank has failed too"])


def _silent(rank: int, beat: Beat | None) -> str:
    if beat is None:
        return f"rank {rank} is silent: it never told where it stands"
    return (
        f"rank {rank} on {beat.host} is silent, last heard of {in_step(beat.step)}, at {beat.where}"
    )


def _listed(parts: list[str]) -> str:
    more = len(parts) - SHOWN
    return "; ".join(parts[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
