"""Being told to end is noted, and insisting works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from axialtrain.train.signals import TOLD_BY, Signals

INSIST = """
import os, signal
from axialtrain.train import signals
signals.SAME = {same}
noted = signals.Signals()
for number in ({numbers}):
    os.kill(os.getpid(), number)
print(noted.received, flush=True)
"""


@pytest.mark.parametrize("number", TOLD_BY)
def test_the_first_signal_is_noted(number):
    before = [signal.getsignal(each) for each in TOLD_BY]
    signals = Signals()
    try:
        assert signals.received is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == number.name
        signals.close()  # the process is ending: what comes late must not disturb it
        os.kill(os.getpid(), number)
    finally:
        for each, handler in zip(TOLD_BY, before, strict=True):
            signal.signal(each, handler)


def test_the_handlers_come_back_where_nothing_came():
    before = [signal.getsignal(each) for each in TOLD_BY]
    Signals().close()
    assert [signal.getsignal(each) for each in TOLD_BY] == before


def test_a_rank_of_the_local_launcher_leaves_a_second_one_to_it(monkeypatch):
    monkeypatch.setattr("multiprocessing.parent_process", object)
    monkeypatch.setattr("axialtrain.train.signals.SAME", 0.0)
    before = [signal.getsignal(each) for each in TOLD_BY]
    signals = Signals()
    try:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == "SIGINT"
    finally:
        for each, handler in zip(TOLD_BY, before, strict=True):
            signal.signal(each, handler)


@pytest.mark.parametrize(
    ("same", "numbers", "status", "said"),
    [
        (5.0, "signal.SIGINT, signal.SIGINT", 0, "SIGINT"),  # one Ctrl-C, from two sides
        (0.0, "signal.SIGTERM, signal.SIGTERM", -signal.SIGTERM, ""),
        (0.0, "signal.SIGTERM, signal.SIGINT", -signal.SIGINT, ""),
        (0.0, "signal.SIGUSR1, signal.SIGTERM", 0, "SIGUSR1"),  # Slurm's warning and its end
        (0.0, "signal.SIGUSR1, signal.SIGUSR1", 0, "SIGUSR1"),
    ],
    ids=["same", "insists", "insists otherwise", "slurm", "warned twice"],
)
def test_a_second_signal_takes_its_default_action(same, numbers, status, said):
    code = INSIST.format(same=same, numbers=numbers)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (status, said), done.stderr
