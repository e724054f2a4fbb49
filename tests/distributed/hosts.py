"""Several "hosts" on this machine, made of namespaces: each with a network, a name, process ids,
`/etc/hosts`, `/run` and `/dev/shm` of its own, on a switch that is in a namespace too.

    with hosts(2, tmp_path) as (a, b):
        process = a.popen(["python", "-c", "..."])
        b.cut()

No namespace has a name: each lives as long as one holding process, which ends when its standard
input is closed. So the kernel takes everything down, every process and interface, when the test
ends and also when the test itself is killed; nothing of the machine's own network is touched.
Files are those of this machine, as on a shared file system. For root alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from system_tools import program, root

RELAY = Path(__file__).with_name("relay.py")
NETWORK = "10.213.7"  # of no interface that this machine has, and it could not be reached from here
SOON = 20.0  # s, of everything that is waited for
_OUTSIDE = Path("/proc/self/ns/pid").stat().st_ino  # the process ids of whoever makes hosts

# Process 1 of a host ignores SIGCHLD, so that what dies without a parent is reaped.
HOLD_HOST = """
set -e
hostname "$1"
mount --bind "$2/$1/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
echo ready
exec env --ignore-signal=CHLD cat
"""
HOLD_SWITCH = """
set -e
ip link add middle type bridge stp_state 0 forward_delay 0
ip link set middle up
echo ready
exec env --ignore-signal=CHLD cat
"""


@dataclass
class Space:
    """The namespaces that one process holds. pid: its id, as this machine counts."""

    name: str
    pid: int
    kinds: Sequence[str]

    def command(self, argv: Sequence[object], cwd: Path = Path("/")) -> list[str]:
        """What runs argv in here."""
        enter = [program("nsenter"), "--target", str(self.pid), *self.kinds, f"--wdns={cwd}"]
        return [*enter, "--", *map(str, argv)]

    def popen(
        self, argv: Sequence[object], *, cwd: Path = Path("/"), **options: Any
    ) -> subprocess.Popen[Any]:
        """argv, started in here. What it starts dies with the namespace; its own process here is
        one that waits for it, and ends as it does: end it by `Host.kill_all`."""
        return subprocess.Popen(self.command(argv, cwd), **options)

    def run(self, *argv: object, timeout: float = SOON) -> str:
        """What argv prints; it must succeed."""
        return _output(self.command(argv), timeout)

    def ip(self, *arguments: object) -> str:
        """`ip` on this network. It counts processes as this machine does."""
        enter = [program("nsenter"), "--target", str(self.pid), "--net", "--"]
        return _output([*enter, program("ip"), *map(str, arguments)], SOON)


@dataclass
class Host(Space):
    """One of several. address: in the network of the test. port: its end of the cable, at the
    switch. folder: of this host alone. own: environment variables that are others elsewhere."""

    address: str
    port: str
    switch: Space
    folder: Path

    @property
    def own(self) -> dict[str, str]:
        cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))  # made once for all
        home, tmp = str(self.folder / "home"), str(self.folder / "tmp")
        return {"HOME": home, "TMPDIR": tmp, "XDG_CACHE_HOME": cache}

    @property
    def environment(self) -> dict[str, str]:
        """This process's, without what another launcher has set, and with `own`."""
        launched = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "GLOO_", "NCCL_")
        clean = {key: value for key, value in os.environ.items() if not key.startswith(launched)}
        return clean | self.own | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}

    def cut(self) -> None:
        """Pull the cable; what is on its way is lost, and nobody is told."""
        self.switch.ip("link", "set", self.port, "nomaster")

    def join(self) -> None:
        """Put the cable back."""
        self.switch.ip("link", "set", self.port, "master", "middle")

    def kill_all(self) -> None:
        """SIGKILL to all processes on this host, as when its power fails; it can start others."""
        # -1 is every process of the namespace but its first and the one that sends. Should this
        # host be gone, and its id another process's, nobody is killed.
        script = (
            f"import os; assert os.stat('/proc/self/ns/pid').st_ino != {_OUTSIDE}; "
            f"os.kill(-1, {signal.SIGKILL:d})"
        )
        end = time.monotonic() + SOON
        while True:
            done = subprocess.run(
                self.command([sys.executable, "-S", "-c", script]),
                capture_output=True,
                text=True,
                timeout=SOON,
                check=False,
            )
            if "ProcessLookupError" in done.stderr:  # there was nobody left to send it to
                return
            assert time.monotonic() < end, f"{self.name} cannot be emptied: {done.stderr}"
            time.sleep(0.02)

    @contextmanager
    def slow(self, *, delay: float, loss: float, seed: int = 0) -> Iterator[dict[str, int]]:
        """For a while every frame from and to this host is late by `delay` s, and is lost with the
        chance `loss`. Afterwards the dict holds how many were `forwarded` and `lost`."""
        counts: dict[str, int] = {}
        far, here, there = (f"{kind}-{self.port}" for kind in ("far", "in", "out"))
        relay = self.switch.popen(
            [sys.executable, "-S", RELAY, here, there, delay, loss, seed],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert relay.stdout is not None
            assert relay.stdout.readline() == "ready\n"
            self.switch.ip("link", "add", far, "type", "bridge", "stp_state", 0, "forward_delay", 0)
            for device, bridge in ((here, "middle"), (there, far), (self.port, far)):
                self.switch.ip("link", "set", device, "master", bridge)
            for device in (far, here, there):
                self.switch.ip("link", "set", device, "up")
            yield counts
        finally:
            said, _ = relay.communicate(timeout=SOON)  # closes its input: the devices go
            self.join()
            self.switch.ip("link", "delete", far)
        counts.update(json.loads(said))


@contextmanager
def hosts(count: int, folder: Path, *, own_name: str | None = None) -> Iterator[list[Host]]:
    """`count` hosts named host0, host1, ..., who find each other by name. folder: for their files.

    own_name: the address that each takes its own name for; its own in the network without.

    Other users than root are skipped; in CI they fail.
    """
    root()
    for needed in ("ip", "unshare", "nsenter"):
        program(needed)
    addresses = [f"{NETWORK}.{number + 1}" for number in range(count)]
    (folder / "nsswitch.conf").write_text("hosts: files\n")  # there is nobody else to ask
    with ExitStack() as stack:
        hold = stack.enter_context
        switch = Space("switch", *hold(_held(["--net", "--pid"], HOLD_SWITCH)))
        made = []
        for number, address in enumerate(addresses):
            name, port = f"host{number}", f"port{number}"
            kinds = ["--net", "--pid", "--uts", "--mount"]
            for part in ("home", "tmp"):
                (folder / name / part).mkdir(parents=True)
            known = ["127.0.0.1 localhost", f"{own_name or address} {name}"]
            others = enumerate(addresses)
            known += [f"{other} host{k}" for k, other in others if k != number]
            (folder / name / "hosts").write_text("\n".join([*known, ""]))
            space = hold(_held(kinds, HOLD_HOST, name, str(folder)))
            host = Host(name, *space, address, port, switch, folder / name)
            veth = ["type", "veth", "peer", "name", "eth0", "netns", str(host.pid)]
            switch.ip("link", "add", port, *veth)
            switch.ip("link", "set", port, "master", "middle", "up")
            host.ip("address", "add", f"{address}/24", "dev", "eth0")
            host.ip("link", "set", "eth0", "up")
            made.append(host)
        yield made


def _output(command: Sequence[str], timeout: float) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def _held(kinds: Sequence[str], script: str, *arguments: str) -> Iterator[tuple[int, list[str]]]:
    """New namespaces of those kinds, held by a process that runs `script` first; its id and the
    kinds. They are gone afterwards, with all that is in them."""
    alive = ["--fork", "--kill-child", "--mount-proc"]
    process = subprocess.Popen(
        [program("unshare"), *kinds, *alive, "--", "sh", "-c", script, "sh", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said == "ready\n", said + process.stdout.read()
        child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield int(child[0]), [*kinds, "--mount"] if "--mount" not in kinds else list(kinds)
    finally:
        process.kill()  # and its child with it, the first of its process ids: so all of them
        process.communicate(timeout=SOON)
