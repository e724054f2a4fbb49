"""What a user can do wrong, or a machine can run out of: said in a sentence, not as a traceback."""

from __future__ import annotations

import os
import sys
import time

from axialtrain.train.signals import AGAIN, Interrupted

# RankLostError of train/watch.py is an OSError: another rank ended this one, and is named.
EXPECTED = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)

PATIENCE = 15.0  # s that rank 0 has to say what every rank has found


def say(error: BaseException, *, rank: int | None = None) -> int:
    """Print `error` as one message, with the rank where only that one knows; returns status 2."""
    who = "axialtrain" if rank is None else f"axialtrain: rank {rank}"
    what = str(error) or type(error).__name__
    print(f"{who}: {what}", file=sys.stderr, flush=True)
    return 2


def say_once(error: BaseException) -> int:
    """Print what all ranks have found alike, on rank 0; returns status 2.

    The others wait to be ended by their launcher, as soon as rank 0 has spoken and ended: torchrun
    ends rank 0 when another one ends, be it before rank 0 has come so far. Where nobody ends them,
    only their host may have found it: then one rank of a host speaks.
    """
    if speaks():
        return say(error)
    time.sleep(PATIENCE)
    return say(error, rank=own_rank()) if os.environ.get("LOCAL_RANK") == "0" else 2


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
