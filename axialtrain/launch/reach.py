"""Whether ranks reach each other over TCP, at the address that gloo would take, and whose clock
is off. Each rank answers on a port of its own, so that a pair that fails is known by its names."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from axialtrain.train.meet import address_of

PINGS = 3
THREADS = 32
MOST_SKEW = 2.0  # s; logs cannot be put side by side, and locks and certificates are misjudged
_SIOCGIFADDR = 0x8915
FIX = (
    "let all TCP ports through between the hosts, and name the interface that joins them in "
    "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
)

FIX_LOOPBACK = (
    "give the host's name its real address in /etc/hosts, or name the interface that joins the "
    "hosts in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
)


def own_address() -> str:
    """The address at which gloo on this rank tells others to find it.

    Raises OSError where GLOO_SOCKET_IFNAME names none.
    """
    named = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if named:
        return _address_on(named)
    return address_of(socket.gethostname()) or "127.0.0.1"  # as gloo does


def _address_on(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            answer = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, request)
        except OSError as error:
            raise OSError(f"GLOO_SOCKET_IFNAME={interface}: {error.strerror}") from error
    return socket.inet_ntoa(answer[20:24])


@dataclass(frozen=True)
class Reached:
    """One rank's try to reach another: error is None where it did.

    trip: seconds there and back; ahead: by how many seconds the other's clock is.
    """

    peer: int
    error: str | None
    trip: float = 0.0
    ahead: float = 0.0


class Answering:
    """A port of this rank at which it says who it is and what its clock says."""

    def __init__(self, rank: int) -> None:
        if socket.has_dualstack_ipv6():
            self._socket = socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=256
            )
        else:
            self._socket = socket.create_server(("", 0), backlog=256)
        self.port = int(self._socket.getsockname()[1])
        self._name = rank
        threading.Thread(target=self._accept, name="doctor-answers", daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                caller, _ = self._socket.accept()
                threading.Thread(target=self._answer, args=(caller,), daemon=True).start()

    def _answer(self, caller: socket.socket) -> None:
        with suppress(OSError), caller:
            caller.settimeout(30)
            while caller.recv(1):
                said = json.dumps({"rank": self._name, "time": time.time()})
                caller.sendall(f"{said}\n".encode())


def reach(
    peers: Sequence[int], addresses: Mapping[int, tuple[str, int]], seconds: float
) -> list[Reached]:
    """Try all of `peers` at once, for up to `seconds` each."""
    if not peers:
        return []
    with ThreadPoolExecutor(min(THREADS, len(peers))) as pool:
        return list(pool.map(lambda peer: _reach(peer, *addresses[peer], seconds), peers))


def _reach(peer: int, address: str, port: int, seconds: float) -> Reached:
    try:
        with socket.create_connection((address, port), timeout=seconds) as there:
            lines = there.makefile("rb")
            best: tuple[float, float] | None = None
            for _ in range(PINGS):
                before = time.time()
                there.sendall(b"?")
                said = json.loads(lines.readline(1000) or b"null")
                after = time.time()
                if said is None or said["rank"] != peer:
                    return Reached(peer, "somebody else answers there")
                # Of several the quickest tells best: what the network takes is split in half.
                ping = after - before, said["time"] - (before + after) / 2
                best = ping if best is None else min(best, ping)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error)
        return Reached(peer, said or type(error).__name__)
    assert best is not None
    return Reached(peer, None, *best)
