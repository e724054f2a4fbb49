"""A bad line: what goes into one of two TAP devices comes out of the other, late or not at all.

Run as a script in the network namespace of the switch (`hosts.py`), by the standard library alone:
netem is not in every kernel, TAP devices are. Prints `ready`, forwards until its standard input is
closed, and prints how many frames it forwarded and lost.
"""

from __future__ import annotations

import fcntl
import heapq
import json
import os
import random
import select
import struct
import sys
import time
from contextlib import suppress

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
LARGEST_FRAME = 2**16  # bytes


def open_tap(name: str) -> int:
    """A new TAP device, which is gone when the descriptor is closed."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
    return tap


def relay(names: tuple[str, str], delay: float, loss: float, seed: int) -> dict[str, int]:
    """Forward until standard input ends; returns how many were forwarded, and lost by chance.

    delay: s, of each frame, in each direction; the order stays. loss: the chance to be lost."""
    chance = random.Random(seed)
    taps = [open_tap(name) for name in names]
    other = {taps[0]: taps[1], taps[1]: taps[0]}
    waiting: list[tuple[float, int, int, bytes]] = []  # (when it is due, its number, to, frame)
    counts = {"forwarded": 0, "lost": 0}
    print("ready", flush=True)
    number = 0
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select([sys.stdin, *taps], [], [], pause)
        if sys.stdin in readable:
            return counts  # what is under way is lost, as when a cable is changed
        for tap in readable:
            try:
                frame = os.read(tap, LARGEST_FRAME)
            except OSError:  # the device is not up yet
                continue
            number += 1
            if chance.random() < loss:
                counts["lost"] += 1
            else:
                heapq.heappush(waiting, (time.monotonic() + delay, number, other[tap], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, tap, frame = heapq.heappop(waiting)
            with suppress(OSError):  # the device is not up yet
                os.write(tap, frame)
                counts["forwarded"] += 1


if __name__ == "__main__":
    one, two, seconds, share, drawn = sys.argv[1:]
    print(json.dumps(relay((one, two), float(seconds), float(share), int(drawn))), flush=True)
