"""A clock that goes on when somebody sleeps, and not otherwise: no test waits for a machine."""

from __future__ import annotations


class Time:
    """Seconds, beginning at 0."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
