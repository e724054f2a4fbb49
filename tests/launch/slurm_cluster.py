"""A real Slurm on loopback: one slurmctld and two nodes of this machine, in a folder of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from repository import REPOSITORY
from system_tools import program

SCRIPT = REPOSITORY / "launch" / "slurm.sbatch"
TIMEOUT = 180.0  # s, of everything that is waited for
# Both names are of this machine, for torchrun looks its endpoint up.
CONFIG = """
ClusterName=axialtrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdParameters=config_overrides
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=60
NodeName=127.0.0.1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Slurm:
    """A cluster that runs. folder: of its files, and of the jobs' logs."""

    folder: Path
    environment: dict[str, str]

    def call(self, name: str, *arguments: object) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(
            [program(name), *map(str, arguments)], cwd=self.folder, env=self.environment,
            capture_output=True, text=True, timeout=TIMEOUT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{name} {arguments}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, options: list[str], *arguments: object) -> int:
        """The id of a job of launch/slurm.sbatch. options: of sbatch. arguments: of the script."""
        return int(self.call("sbatch", "--parsable", *options, SCRIPT, *arguments))

    def state(self, job: int | str) -> str:
        """What squeue and scontrol call it: PENDING, RUNNING, COMPLETED, ..."""
        shown = self.call("scontrol", "--oneliner", "show", "job", job)
        return shown.split("JobState=")[1].split()[0]

    def until(self, holds: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + TIMEOUT
        while not holds():
            assert time.monotonic() < end, f"waited in vain until {what}:\n{self.said()}"
            time.sleep(0.05)

    def begin_now(self, job: int) -> None:
        """Slurm lets a requeued job wait for two minutes, in case that a node is ill. A node also
        refuses it in the second in which the job has ended there ("credential revoked")."""
        self.until(lambda: self.state(job) == "PENDING", f"job {job} is in the queue again")
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now+3")

    def said(self) -> str:
        """What jobs wrote, and the last of what slurmctld and slurmd did."""
        logs = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        texts = [(log.name, log.read_text(errors="replace")) for log in logs]
        return "\n".join(f"{name}:\n{text[-6000:]}" for name, text in texts)


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """A cluster with two nodes of four slots each, gone afterwards with all of its jobs.

    Where the tests are killed, the kernel kills its daemons; a job that runs then ends by itself.
    """
    host = socket.gethostname()
    with_us = [program("setpriv"), "--pdeathsig", "KILL"]
    daemons = [[*with_us, program("slurmctld"), "-D"]]
    daemons += [[*with_us, program("slurmd"), "-D", "-N", name] for name in ("127.0.0.1", host)]
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=host, folder=folder, ports=_free_ports(3)))
    (folder / "state").mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {
        "SLURM_CONF": str(config),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",  # its service is a process of the step, and gets the signals too
    }
    cluster = Slurm(folder, environment)
    started = []
    try:
        for number, command in enumerate(daemons):
            with (folder / f"daemon-{number}.log").open("wb") as output:
                started.append(
                    subprocess.Popen(
                        command, env=environment, stdout=output, stderr=subprocess.STDOUT
                    )
                )
        cluster.until(lambda: _idle(cluster), "both nodes are idle")
        yield cluster
    finally:
        with suppress(AssertionError, subprocess.TimeoutExpired):
            cluster.call("scancel", "--signal=KILL", "--full", "--user=root")
        _end_all(f"SLURM_CONF={config}")
        for daemon in started:
            daemon.wait(TIMEOUT)


def _idle(cluster: Slurm) -> bool:
    try:
        return cluster.call("sinfo", "--noheader", "--format=%T", "--partition=normal") == "idle"
    except AssertionError:  # slurmctld does not listen yet
        return False


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [free.getsockname()[1] for free in sockets]


def _end_all(mark: str) -> None:
    """End every process with `mark`, which names our folder, in its environment: the daemons, the
    steps that slurmd has let go of, and what jobs started."""
    end = time.monotonic() + TIMEOUT
    while left := _marked(mark):
        assert time.monotonic() < end, f"these do not end: {left}"
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _marked(mark: str) -> list[int]:
    """Their process ids, without those that have ended and wait for their parent."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found
