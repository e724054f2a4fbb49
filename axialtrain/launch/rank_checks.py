"""What `axialtrain doctor` finds by putting ranks side by side: who is missing, who differs, who
cannot be reached, and whether all see the same folder."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from axialtrain.launch.findings import Found, shown
from axialtrain.launch.machine_checks import versions
from axialtrain.launch.meeting import Meeting, ring
from axialtrain.launch.reach import (
    FIX,
    FIX_LOOPBACK,
    MOST_SKEW,
    Answering,
    Reached,
    own_address,
    reach,
)
from axialtrain.launch.storage_checks import existing

ALL_PAIRS = 64  # ranks among whom each pair is tried; of more, the next one and the next host
SEEN = 5.0  # s until a file is seen on every host: file servers keep what a folder held for a while


@dataclass(frozen=True)
class Rank:
    """What a rank tells of itself. address: None where it has none, and `wrong` says why."""

    rank: int
    host: str
    versions: dict[str, str]
    address: str | None
    port: int
    wrong: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def check_missing(found: Found, meeting: Meeting, ranks: Mapping[int, Rank]) -> None:
    """On rank 0: who was started, or should have been, and did not come."""
    for rank in range(meeting.world):
        if rank in ranks:
            continue
        when = "in the middle of its checks" if rank in meeting.present else "at all"
        found.trouble(
            f"rank {rank} did not answer {when}, within {meeting.timeout:g} s",
            f"see that its process was started and what it printed, and that its host reaches "
            f"{meeting.address}:{meeting.port}",
            where=f"rank {rank}",
        )
    found.fact(f"{len(ranks)} of {meeting.world} ranks came")


def check_alike(found: Found, ranks: Mapping[int, Rank]) -> None:
    """On rank 0: whose packages are not rank 0's."""
    own = ranks[0].versions
    for other in ranks.values():
        for name in sorted(own.keys() | other.versions.keys()):
            here, there = own.get(name, "missing"), other.versions.get(name, "missing")
            if here != there:
                found.trouble(
                    f"{name} is {there}, on {ranks[0]} it is {here}",
                    "install the same everywhere (pip install --constraint constraints.txt, or one "
                    "image)",
                    where=str(other),
                )


def reach_others(meeting: Meeting) -> tuple[dict[int, Rank], dict[int, list[Reached]]]:
    """Each rank tells of itself and tries the others.

    Returns who told, on all ranks alike; and, on rank 0, what came of each one's tries.
    """
    wrong, address = "", None
    try:
        address = own_address()
    except OSError as error:
        wrong = str(error)
    with closing(Answering(meeting.rank)) as answering:
        own = Rank(meeting.rank, socket.gethostname(), versions(), address, answering.port, wrong)
        ranks: dict[int, Rank] = meeting.share("ranks", meeting.gather("rank", own))
        addresses = {one.rank: (one.address, one.port) for one in ranks.values() if one.address}
        there = sorted(ranks)
        peers: list[int] = []
        if meeting.rank in ranks:  # else rank 0 has given us up
            peers = ring(there, meeting.rank, [ranks[one].host for one in there], ALL_PAIRS)
        tries = reach([one for one in peers if one in addresses], addresses, meeting.timeout / 2)
        every = meeting.gather("tries", tries)
        meeting.share("tried", None)  # until then others may be asking here
    return ranks, every


def check_reach(
    found: Found, ranks: Mapping[int, Rank], tries: Mapping[int, Sequence[Reached]]
) -> bool:
    """On rank 0: whom somebody could not reach. Returns whether all were."""
    whole = True
    for one in ranks.values():
        if one.address is None:
            whole = False
            found.trouble(f"it has no address to be reached at ({one.wrong})", FIX, where=str(one))
    failed: dict[int, list[tuple[int, str]]] = {}
    trips = []
    for rank, mine in tries.items():
        for tried in mine:
            if tried.error is None:
                trips.append((tried.trip, rank, tried.peer))
            else:
                failed.setdefault(tried.peer, []).append((rank, tried.error))
    for peer, by in failed.items():
        whole = False
        who = ", ".join(str(ranks[rank]) for rank, _ in by[:4])
        who += f" and {len(by) - 4} more" if len(by) > 4 else ""
        address = ranks[peer].address or ""
        loopback = address.startswith(("127.", "::1"))
        found.trouble(
            f"{who} cannot reach it over TCP at {address}, where its host says it is ({by[0][1]})",
            FIX_LOOPBACK if loopback else FIX,
            where=str(ranks[peer]),
        )
    if trips:
        trip, rank, peer = max(trips)
        found.fact(
            f"{len(trips)} connections between ranks over TCP, there and back in up to "
            f"{trip * 1e3:.2f} ms ({ranks[rank]} and {ranks[peer]})"
        )
    return whole


def check_clocks(
    found: Found, ranks: Mapping[int, Rank], tries: Mapping[int, Sequence[Reached]]
) -> None:
    """On rank 0: hosts whose clocks are apart, as those saw it who reached each other."""
    worst: dict[frozenset[str], tuple[float, int, Reached]] = {}
    for rank, mine in tries.items():
        for one in mine:
            pair = frozenset((ranks[rank].host, ranks[one.peer].host))
            # What the network took is not told apart from the clock.
            sure = max(0.0, abs(one.ahead) - one.trip / 2)
            if one.error is None and len(pair) == 2 and sure >= worst.get(pair, (-1.0,))[0]:
                worst[pair] = sure, rank, one
    for sure, rank, one in worst.values():
        if sure > MOST_SKEW:
            side = "ahead of" if one.ahead > 0 else "behind"
            found.trouble(
                f"its clock is {abs(one.ahead):.1f} s {side} that of {ranks[rank].host}",
                "let both hosts set their clocks from the same time server (chrony, systemd-"
                "timesyncd)",
                where=ranks[one.peer].host,
            )
    if worst:
        found.fact(
            f"clocks of hosts are at most {max(sure for sure, _, _ in worst.values()):.3f} s apart"
        )


def folder_seen(meeting: Meeting, folder: Path) -> dict[int, str]:
    """Rank 0 writes a file where the run folder will be; on rank 0, by rank: "" where it was seen
    there, else why not. Nothing where it could not be written, which `check_folder` tells."""
    name, content = f".axialtrain-doctor-{secrets.token_hex(8)}", secrets.token_hex(16)
    file: Path | None = None
    try:
        if meeting.rank == 0:
            try:
                file = existing(folder) / name
                file.write_text(content)
            except OSError:
                file = None
        where, content = meeting.share("folder", (file, content))
        why = "" if where is None else _seen(where, content, SEEN)
        every = meeting.gather("seen", why)
    finally:
        if file is not None:
            file.unlink(missing_ok=True)
    return {} if where is None else every


def _seen(file: Path, content: str, seconds: float) -> str:
    end = time.monotonic() + seconds
    while True:
        try:
            if file.read_text() == content:
                return ""
            why = "another file has its name"
        except OSError as error:
            why = shown(error)
        if time.monotonic() > end:
            return why
        time.sleep(0.1)


def check_same_folder(
    found: Found, folder: Path, ranks: Mapping[int, Rank], seen: Mapping[int, str]
) -> None:
    """On rank 0: hosts that do not see rank 0's run folder."""
    for rank, why in seen.items():
        if why:
            found.trouble(
                f"a file that {ranks[0]} wrote into {existing(folder)} is not there ({why})",
                "put hydra.run.dir (or checkpoint.folder) on a file system that all hosts mount at "
                "the same path, or checkpoints into an object store",
                where=str(ranks[rank]),
            )
    if seen and not any(seen.values()):
        found.fact(f"all {len(seen)} ranks see a file that rank 0 wrote")
