"""A real sshd on each host of `hosts.py`, with keys and settings of the test's own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from distributed.hosts import SOON, Host
from system_tools import program

SERVER = """\
ListenAddress {address}
HostKey {keys}/host
AuthorizedKeysFile {keys}/client.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
UseDNS no
PidFile none
SetEnv {own}
"""
# The passphrase-less key alone, no agent, no file of the person who runs the tests.
CLIENT = """\
IdentityFile {keys}/client
IdentitiesOnly yes
IdentityAgent none
UserKnownHostsFile {keys}/known_hosts
GlobalKnownHostsFile none
StrictHostKeyChecking yes
LogLevel ERROR
"""


@contextmanager
def ssh_between(machines: Sequence[Host], folder: Path) -> Iterator[str]:
    """The arguments of `ssh` with which each host reaches all, by name. folder: of keys, new."""
    folder.mkdir()
    for name in ("host", "client"):
        make = ["-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)]
        subprocess.run([program("ssh-keygen"), *make], check=True, timeout=SOON)
    key = (folder / "host.pub").read_text().rsplit(maxsplit=1)[0]
    names = ",".join(name for host in machines for name in (host.name, host.address))
    (folder / "known_hosts").write_text(f"{names} {key}\n")
    (folder / "config").write_text(CLIENT.format(keys=folder))
    arguments = f"-F {folder / 'config'}"
    for host in machines:
        settings = folder / f"sshd-{host.name}"
        own = " ".join(f"{key}={value}" for key, value in host.own.items())
        settings.write_text(SERVER.format(address=host.address, keys=folder, own=own))
        # It goes on in the background once it listens, and dies with its host.
        host.run(program("sshd"), "-f", settings, "-E", host.folder / "sshd.log")
    first = machines[0]
    for host in machines:
        said = first.run(program("ssh"), *arguments.split(), host.name, "hostname")
        assert said == f"{host.name}\n"
    try:
        yield arguments
    finally:
        for host in machines:
            host.kill_all()
