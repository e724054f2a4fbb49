"""Being told to end: by Slurm before its limit, by a launcher, by a person. No torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from types import FrameType

AGAIN = 75  # the exit status EX_TEMPFAIL of sysexits.h: "start me again"
TOLD_BY = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME = 5.0  # s


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """The run was told to end. The message says by which signal, and what was saved where."""


class Signals:
    """Notes the first signal that tells this process to end; the loop looks when it can save.

    A second SIGTERM or SIGINT takes its default action. One Ctrl-C under a launcher reaches a rank
    from the terminal and from the launcher, and Python hands the second on when C code lets it:
    what follows within SAME is taken for the first. A rank of the local launcher leaves a second
    one to that launcher, which alone knows how often it was asked.
    Made and closed on the main thread, as Python demands.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._first = 0.0  # when the first SIGTERM or SIGINT came, 0 before
        self._launched = multiprocessing.parent_process() is not None
        self._before = {number: signal.signal(number, self._note) for number in TOLD_BY}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name
        if number == signal.SIGUSR1 or self._launched:
            return
        now = time.monotonic()
        if not self._first:
            self._first = now
        elif now - self._first > SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def close(self) -> None:
        """Restore the handlers that were there before; unless told to end, for the same signal may
        still come from the other side and must not break the end that it asked for."""
        if self.received is not None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
