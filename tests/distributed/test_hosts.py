"""The hosts that other tests are made of: they reach each other by name, alone, and go away."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed.hosts import Host, hosts
from distributed.ssh import ssh_between

pytestmark = pytest.mark.slow

PORT = 4000
SERVE = f"""
import socket
with socket.create_server(("", {PORT})) as server:
    print("ready", flush=True)
    while True:
        connection, address = server.accept()
        with connection:
            while data := connection.recv(1):
                connection.sendall(address[0].encode() + b" " + socket.gethostname().encode())
"""
ASK = f"""
import socket, sys, time
with socket.create_connection((sys.argv[1], {PORT}), timeout=float(sys.argv[2])) as connection:
    before = time.monotonic()
    for _ in range(int(sys.argv[3])):
        connection.sendall(b"?")
        said = connection.recv(100)
print(said.decode(), time.monotonic() - before)
"""


@pytest.fixture
def pair(tmp_path):
    with hosts(2, tmp_path) as made:
        yield made


def serve(host: Host) -> subprocess.Popen[str]:
    server = host.popen([sys.executable, "-S", "-c", SERVE], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    return server


def ask(host: Host, name: str, *, timeout: float = 5, questions: int = 1) -> tuple[str, str, float]:
    """Who the server sees, who it says it is, and the seconds of all questions."""
    said = host.run(sys.executable, "-S", "-c", ASK, name, timeout, questions)
    seen, own, seconds = said.split()
    return seen, own, float(seconds)


def test_they_reach_each_other_by_name(pair):
    a, b = pair
    server = serve(b)
    seen, own, _ = ask(a, "host1")
    assert (seen, own) == (a.address, "host1")
    with pytest.raises(AssertionError, match="refused"):
        ask(b, "host0")  # nobody serves there: what listens on one host is not on the other
    assert a.ip("-o", "-4", "address").count("inet ") == 2  # its own, and the loopback
    b.kill_all()
    assert server.wait(5) == -signal.SIGKILL


def test_a_cut_host_is_alone_until_it_joins(pair):
    a, b = pair
    serve(b)
    b.cut()
    with pytest.raises(AssertionError, match=r"timed out|No route to host"):
        ask(a, "host1", timeout=0.5)
    assert ask(b, "host1")[1] == "host1"
    b.join()
    assert ask(a, "host1")[1] == "host1"


def test_a_slow_line_delays_and_loses(pair):
    a, b = pair
    serve(b)
    with b.slow(delay=0.02, loss=0.0) as counts:
        assert 5 * 0.04 < ask(a, "host1", questions=5)[2] < 1.0
    assert counts["lost"] == 0
    assert counts["forwarded"] >= 10
    with b.slow(delay=0.0, loss=0.1, seed=1) as counts:
        assert ask(a, "host1", timeout=10, questions=30)[1] == "host1"  # TCP sends it again
    assert 0 < counts["lost"] < counts["forwarded"]
    # Delayed they take 0.2 s. The machine may be busy with something else once, not five times.
    assert min(ask(a, "host1", questions=5)[2] for _ in range(5)) < 0.1


def test_nothing_of_them_is_left(tmp_path):
    """Though the test fails, and what runs there has a session of its own and ignores signals."""
    script = "import os, signal, time; os.setsid(); signal.signal(15, signal.SIG_IGN)\n"
    script += "print(os.getpid(), flush=True); time.sleep(100)"
    with pytest.raises(ZeroDivisionError):  # noqa: SIM117 - the hosts are left by an error
        with hosts(1, tmp_path) as (a,):
            sleeper = a.popen(
                [sys.executable, "-S", "-c", script], stdout=subprocess.PIPE, text=True
            )
            assert sleeper.stdout is not None
            assert int(sleeper.stdout.readline()) < 1000  # counted from 1 on that host
            held = [a.pid, a.switch.pid]
            raise ZeroDivisionError
    assert sleeper.wait(5) == -signal.SIGKILL
    end = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in held):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_they_log_in_by_ssh(pair, tmp_path):
    """With a home of their own, and by the test's key alone."""
    a, b = pair
    with ssh_between(pair, tmp_path / "ssh") as arguments:
        said = a.run("ssh", *arguments.split(), "host1", 'echo "$HOME $TMPDIR"')
        assert said.split() == [b.own["HOME"], b.own["TMPDIR"]]
        (tmp_path / "ssh" / "client.pub").write_text("")
        with pytest.raises(AssertionError, match="Permission denied"):
            a.run("ssh", *arguments.split(), "-o", "BatchMode=yes", "host1", "true")
