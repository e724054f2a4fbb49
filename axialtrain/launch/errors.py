"""What a user can do wrong, or a machine can run out of: said in a sentence, not as a traceback."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from axialtrain.train.signals import AGAIN, Interrupted

# RankLostError of train/watch.py is an OSError: another rank ended this one, and is named.
EXPECTED = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)


def say(error: BaseException, *, rank: int | None = None) -> int:
    """Print `error` as one message, with the rank where only that one knows; returns status 2."""
    who = "axialtrain" if rank is None else f"axialtrain: rank {rank}"
    what = str(error) or type(error).__name__
    print(f"{who}: {what}", file=sys.stderr, flush=True)
    return 2


def say_by_host(error: BaseException) -> int:
    """Print what every rank of a host has found alike, on its first; returns status 2."""
    if speaks():
        return say(error)
    return say(error, rank=own_rank()) if os.environ.get("LOCAL_RANK", "0") == "0" else 2


@contextmanager
def to_the_end() -> Iterator[None]:
    """Under a launcher, SIGTERM waits until this is left; it ends the process then.

    torchrun sends it as soon as another rank has ended. That one may only have been faster to find
    what this one is about to find and to say, for both.
    """
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if told:
            signal.raise_signal(signal.SIGTERM)


@contextmanager
def told_early() -> Iterator[None]:
    """Where SIGTERM or SIGUSR1 comes before a run has begun, this process ends with AGAIN.

    Later the run has handlers of its own. Not under a launcher, which does the same by its rules.
    """
    if "WORLD_SIZE" in os.environ:
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        os.write(2, f"axialtrain: told to end by {name}, before the run began\n".encode())
        os._exit(AGAIN)  # an exception could be caught on its way, in the midst of an import

    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is leave:
                signal.signal(number, handler)


def again(error: Interrupted) -> int:
    """Print, on rank 0 alone, what an interrupted run saved; returns AGAIN."""
    if own_rank() == 0:
        print(f"axialtrain: {error}", file=sys.stderr, flush=True)
    return AGAIN


def own_rank() -> int:
    """RANK, as every launcher sets it; 0 where none did. Raises ValueError as `number_in` does."""
    return number_in("RANK") or 0


def speaks() -> bool:
    """Whether this process says what all ranks have found alike: rank 0 does, or who is no rank."""
    rank = os.environ.get("RANK", "0")
    return "WORLD_SIZE" not in os.environ or not rank.isdecimal() or int(rank) == 0


def number_in(name: str) -> int | None:
    """The number that a launcher has put into the environment; None where there is none.

    Raises ValueError where it is something else.
    """
    value = os.environ.get(name)
    if value is not None and not (value.isascii() and value.isdecimal()):
        raise ValueError(f"{name}={value!r}: allowed is a whole number, as torchrun sets it")
    return None if value is None else int(value)
