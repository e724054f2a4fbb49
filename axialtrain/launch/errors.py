"""What a user can do wrong, or a machine can run out of: said in a sentence, not as a traceback."""

from __future__ import annotations

import os
import sys

from axialtrain.train.signals import AGAIN, Interrupted

# RankLostError of train/watch.py is an OSError: another rank ended this one, and is named.
EXPECTED = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)


def say(error: BaseException, *, rank: int | None = None) -> int:
    """Print `error` as one message, with the rank where only that one knows; returns status 2."""
    who = "axialtrain" if rank is None else f"axialtrain: rank {rank}"
    what = str(error) or type(error).__name__
    print(f"{who}: {what}", file=sys.stderr, flush=True)
    return 2


def again(error: Interrupted) -> int:
    """Print, on rank 0 alone, what an interrupted run saved; returns AGAIN."""
    if own_rank() == 0:
        print(f"axialtrain: {error}", file=sys.stderr, flush=True)
    return AGAIN


def own_rank() -> int:
    """RANK, as every launcher sets it; 0 where none did."""
    return int(os.environ.get("RANK", "0"))
