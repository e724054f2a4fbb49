"""Ranks on two hosts that know themselves by a loopback address, as Debian writes it, and others
by none: who cannot connect is told what to set, and setting it helps."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from distributed.hosts import Host, hosts

from axialtrain.train.meet import address_of, own_name_is_local

IN_VAIN = 5.0  # s that ranks try to find each other where they cannot
TIMEOUT = 30.0  # s, where they can: on a busy machine one starts long before the other
SUM = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from axialtrain.train.meet import meet
try:
    _, rank, world = meet("gloo", timedelta(seconds=float(sys.argv[1])))
except ConnectionError as error:
    sys.exit(str(error))
total = torch.tensor(rank + 1)
dist.all_reduce(total)
print("the sum is", int(total), "of", world)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("stands_for", "told"),
    [("192.0.2.7", ""), ("127.0.1.1", "stands for 127.0.1.1"), (None, "stands for no address")],
)
def test_what_a_name_stands_for(monkeypatch, stands_for, told):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr("axialtrain.train.meet.address_of", {"here": stands_for}.__getitem__)
    assert told in own_name_is_local("here")
    assert bool(told) == bool(own_name_is_local("here"))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert own_name_is_local("here") == ""


def test_the_address_of_a_name_is_one_of_this_host(monkeypatch):
    found = ["192.0.2.7", "127.0.1.1"]  # the first is of no host at all

    def lookup(host, port, **_):
        if not found:
            raise socket.gaierror("Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 0)) for one in found]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert address_of("here") == "127.0.1.1"
    found.pop()
    assert address_of("here") is None
    found.clear()
    assert address_of("here") is None


@pytest.mark.slow
def test_the_interface_is_needed_where_a_host_is_local_to_itself(tmp_path):
    with hosts(2, tmp_path, own_name="127.0.1.1") as pair:
        for rank, (status, said) in enumerate(summed(pair, IN_VAIN)):
            assert status == 1, said
            assert "the ranks that meet at host0:29500 could not all connect" in said
            assert f"the name host{rank} stands for 127.0.1.1" in said
            assert "set GLOO_SOCKET_IFNAME to the interface" in said
        for status, said in summed(pair, TIMEOUT, GLOO_SOCKET_IFNAME="eth0"):
            assert status == 0, said
            assert "the sum is 3 of 2\n" in said


def summed(pair: list[Host], timeout: float, **environment: str) -> list[tuple[int, str]]:
    """Status and output of a rank on each host."""
    given = {"MASTER_ADDR": "host0", "MASTER_PORT": "29500", "WORLD_SIZE": "2"}
    ranks = [
        host.popen(
            [sys.executable, "-c", SUM, timeout],
            cwd=Path.cwd(),
            env=host.environment | given | {"RANK": str(rank)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, host in enumerate(pair)
    ]
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]
