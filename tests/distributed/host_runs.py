"""Runs over several of the hosts of `hosts.py`, started as a person would, by launch/*.sh."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from distributed.hosts import Host
from distributed.ssh import ssh_between
from killed_runs import TIMEOUT, Going
from repository import REPOSITORY

# The model of the quickstart, on whole scenes of 512 px: 16 x 16 tokens.
GIVEN = ["experiment=quickstart", "data.validation=null"]
TORCHRUN = REPOSITORY / "launch" / "torchrun.sh"
DEEPSPEED = REPOSITORY / "launch" / "deepspeed.sh"


def start(
    host: Host, script: Path, folder: Path, *arguments: object, **environment: object
) -> Going:
    """script on `host`, with its run in `folder`, which all hosts have; a log of its own."""
    log = folder.parent / f"{folder.name}-{host.name}.log"
    with log.open("ab") as output:
        process = host.popen(
            [script, *arguments, f"hydra.run.dir={folder}"],
            cwd=folder.parent,
            env=host.environment
            | {"PYTHON": sys.executable}
            | {key: str(value) for key, value in environment.items()},
            stdout=output,
            stderr=output,
        )
    return Going(folder, process, log)


@contextmanager
def torchrun(
    machines: Sequence[Host],
    folder: Path,
    *arguments: object,
    processes: int = 1,
    **environment: object,
) -> Iterator[list[Going]]:
    """launch/torchrun.sh, once on each host; all processes of the hosts are gone afterwards."""
    given = {"NODES": len(machines), "PROCESSES": processes, "RENDEZVOUS": machines[0].name}
    try:
        yield [
            start(host, TORCHRUN, folder, *arguments, **(given | environment)) for host in machines
        ]
    finally:
        for host in machines:
            host.kill_all()


@contextmanager
def by_hostfile(
    script: Path,
    machines: Sequence[Host],
    folder: Path,
    *arguments: object,
    slots: int,
    **environment: object,
) -> Iterator[Going]:
    """script, once, on the first host, which logs in to all; all that was started is gone
    afterwards."""
    hostfile = folder.parent / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots={slots}\n" for host in machines))
    with ssh_between(machines, folder.parent / "ssh") as ssh:
        given = {"HOSTFILE": hostfile, "SSH_ARGS": ssh}
        yield start(machines[0], script, folder, *arguments, **(given | environment))


def finished(runs: Sequence[Going]) -> list[str]:
    """What each host said, when all have ended well."""
    for run in runs:
        assert run.wait() == 0, said(runs)
    return [run.said for run in runs]


def said(runs: Sequence[Going]) -> str:
    return "\n".join(f"--- {run.log.name}:\n{run.said}" for run in runs)


def until(runs: Sequence[Going], holds: Callable[[], bool], what: str) -> None:
    """Wait until `holds()`, while all of `runs` go on."""
    end = time.monotonic() + TIMEOUT
    while not holds():
        over = [run for run in runs if run.command.poll() is not None]
        assert not over, f"it ended before {what}:\n{said(runs)}"
        assert time.monotonic() < end, f"waited in vain until {what}:\n{said(runs)}"
        time.sleep(0.005)
