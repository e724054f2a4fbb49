"""The course of `axialtrain doctor` on one rank: what is looked at, in which order, until when.

Every check is done whatever the others find, and all of it ends within a bounded time.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from math import prod
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from axialtrain.launch import machine_checks as machine
from axialtrain.launch.bandwidth import measure, records, table
from axialtrain.launch.errors import own_rank
from axialtrain.launch.findings import Check, Found, Report, here, looked, shown
from axialtrain.launch.local import (
    device_type,
    local_processes,
    processes_of_outer_launcher,
    threads_each,
)
from axialtrain.launch.meeting import Meeting
from axialtrain.launch.rank_checks import (
    Rank,
    check_alike,
    check_clocks,
    check_missing,
    check_reach,
    check_same_folder,
    folder_seen,
    reach_others,
)
from axialtrain.launch.storage_checks import check_checkpoints, check_folder, check_store
from axialtrain.mesh.mesh import Mesh
from axialtrain.mesh.placement import AXES, placed
from axialtrain.train.mesh_text import axes_lines

STEPS = 20  # things that may not answer, one after the other, before all is given up
FOUND_LATE = 1  # exit status of a rank that is given up
LATER = 5.0  # s, which other ranks wait longer than rank 0


@dataclass(frozen=True)
class Plan:
    """What is looked at. degrees: of the mesh, None for all ranks along `data`.

    folder: of the run. timeout: seconds, of each thing that may not answer. stores: folders of
    shards, local or URLs. checkpoints: where they go, None for the run folder. device, threads: of
    `launcher`. json: a file for the record.
    """

    degrees: dict[str, int] | None
    folder: Path
    timeout: float
    stores: tuple[str, ...] = ()
    checkpoints: str | None = None
    device: str = "auto"
    threads: int | None = None
    json: Path | None = None


class _Deadline:
    """Ends the process when all takes too long: a collective may hang past its own timeout.

    What rank 0 has found until then is printed. at: what is being done.
    """

    def __init__(self, plan: Plan, report: Report, rank: int | None) -> None:
        self.at = "its own checks"
        self._plan, self._report, self._rank = plan, report, rank
        self._seconds = (STEPS + len(plan.stores)) * plan.timeout
        if rank:  # rank 0 is the one that says what was found
            self._seconds += LATER
        self._timer = threading.Timer(self._seconds, self._late)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()

    def _late(self) -> None:
        if self._rank:
            os._exit(FOUND_LATE)
        found = Found("ranks", here(self._rank))
        found.trouble(
            f"no end of {self.at} within {self._seconds:g} s",
            "see which rank printed nothing, or an error, and look at its host first",
        )
        self._report.found.append(found)
        _tell(self._report, self._plan, self._rank)
        os._exit(FOUND_LATE)


def examine(plan: Plan) -> int:
    """Look at everything on this rank; rank 0 prints it. Returns the exit status, of all alike."""
    world = processes_of_outer_launcher() or 1
    rank = own_rank() if world > 1 else None
    report = Report(world, [socket.gethostname()])
    with _Deadline(plan, report, rank) as deadline:
        if world == 1:
            report.found += _machine(plan, None, 1)
            return _tell(report, plan, rank)
        try:
            meeting = Meeting(plan.timeout)
            meeting.meet()
        except (OSError, ValueError, RuntimeError) as error:  # torch's DistError
            lost = Found("ranks", here(rank))
            lost.trouble(
                f"cannot meet the other ranks ({error})",
                "see that rank 0 runs, that MASTER_ADDR and MASTER_PORT name its host and a port "
                "that is free there, and that no firewall closes it",
            )
            report.found += [*_machine(plan, rank, world), lost]
            return _tell(report, plan, rank)
        try:
            _together(plan, meeting, report, deadline)
        except (OSError, RuntimeError) as error:  # rank 0, or the store, has ended
            lost = Found("ranks", here(rank))
            lost.trouble(
                f"lost the others in {deadline.at} ({shown(error)})", "see what they print"
            )
            report.found.append(lost)
            return _tell(report, plan, rank)
        return meeting.leave(_tell(report, plan, rank) if meeting.rank == 0 else 0)


def _tell(report: Report, plan: Plan, rank: int | None) -> int:
    """Print the report, write its record. Returns the exit status.

    A rank that has lost the others writes one beside that of rank 0.
    """
    print(report, flush=True)
    if plan.json is not None:
        own = plan.json
        if rank:
            own = own.with_name(f"{own.stem}-rank-{rank}{own.suffix}")
        report.write(own)
    return report.status


def _machine(plan: Plan, rank: int | None, world: int) -> list[Found]:
    """What needs nobody else. Of several ranks of a host one looks at what they share."""
    host = socket.gethostname()
    checks: list[tuple[str, str, Check]] = [
        ("versions", here(rank), machine.check_versions),
        ("environment", here(rank), machine.check_environment),
    ]
    if os.environ.get("LOCAL_RANK", "0") == "0":
        devices = partial(
            machine.check_devices, wanted=plan.device, processes=local_processes(world)
        )
        checks += [
            ("devices", host, devices),
            ("limits", host, partial(machine.check_limits, world=world)),
            ("build locks", host, machine.check_build_locks),
            ("run folder", host, partial(check_folder, folder=plan.folder)),
        ]
        checks += [
            ("shards", host, partial(check_store, url=url, seconds=plan.timeout / 2))
            for url in plan.stores
        ]
        if plan.checkpoints is not None:
            where: Check = partial(check_folder, folder=Path(plan.checkpoints))
            if "://" in plan.checkpoints:
                where = partial(check_checkpoints, url=plan.checkpoints)
            checks.append(("checkpoints", host, where))
    return [looked(name, who, check, seconds=plan.timeout) for name, who, check in checks]


def _together(plan: Plan, meeting: Meeting, report: Report, deadline: _Deadline) -> None:
    """The ranks that came go through the same steps; what is found is put together on rank 0.

    Raises OSError or RuntimeError where rank 0 is gone.
    """
    me = here(meeting.rank)
    first = meeting.rank == 0
    among = Found("ranks", me)
    deadline.at = "reaching the others"
    ranks, tries = reach_others(meeting)
    deadline.at = "the checks of each machine"
    longest = (8 + len(plan.stores)) * plan.timeout
    every = meeting.gather("machine", _machine(plan, meeting.rank, meeting.world), seconds=longest)
    folder: Path = meeting.share("run folder", plan.folder)
    seen = folder_seen(meeting, folder)
    if first:
        report.hosts = [one.host for one in ranks.values()]
        report.found += [one for its in every.values() for one in its]
        answered = {rank: one for rank, one in ranks.items() if rank in every}
        # Who comes late to one step may be in time for the next.
        tries = {rank: its for rank, its in tries.items() if rank in ranks}
        seen = {rank: why for rank, why in seen.items() if rank in ranks}
        check_missing(among, meeting, answered)
        check_alike(among, ranks)
        whole = check_reach(among, ranks, tries) and len(answered) == meeting.world
        check_clocks(among, ranks, tries)
        check_same_folder(among, folder, ranks, seen)
        report.found.append(among)
    else:
        whole = False
    if not meeting.share("whole", whole):
        among.fact("no group was made and nothing was measured, as not all ranks can be reached")
        return
    deadline.at = "making the process group"
    _groups(plan, meeting, report, ranks, deadline)


def _groups(
    plan: Plan,
    meeting: Meeting,
    report: Report,
    ranks: dict[int, Rank],
    deadline: _Deadline,
) -> None:
    """The collectives of training: gloo among all, NCCL where there are GPUs, then each axis."""
    device = _device(plan, meeting.world)
    torch.set_num_threads(threads_each(plan.threads, meeting.world, torch.get_num_threads()))
    found = Found("collectives", here(meeting.rank))
    report.found.append(found)
    made = _on_all(meeting, found, "group", partial(_make_group, meeting, device))
    if not made:
        return
    try:
        found.fact("gloo among all ranks" + (", and NCCL" if device.type == "cuda" else ""))
        deadline.at = "measuring the axes of the mesh"
        _on_all(meeting, found, "measure", partial(_measure, plan, meeting, report, ranks, device))
    finally:
        dist.destroy_process_group()


def _make_group(meeting: Meeting, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        store=dist.PrefixStore("group", meeting.store),
        rank=meeting.rank,
        world_size=meeting.world,
        timeout=timedelta(seconds=meeting.timeout),
    )
    count = torch.ones(1, device=device)
    dist.all_reduce(count)
    if int(count) != meeting.world:
        raise RuntimeError(f"the sum of 1 over {meeting.world} ranks is {count.item():g}")


def _on_all(meeting: Meeting, found: Found, name: str, do: Callable[[], None]) -> bool:
    """`do` on every rank; whether it went well on all. Rank 0 notes whose did not."""
    wrong = ""
    try:
        do()
    except Exception as error:  # whatever it is, all must learn of it
        wrong = shown(error)
    every = meeting.gather(name, (here(meeting.rank), wrong), seconds=4 * meeting.timeout)
    missing = set(meeting.present) - every.keys() if meeting.rank == 0 else set()
    for rank in missing:
        found.trouble(f"rank {rank} did not come to an end of it", _LOOK, where=f"rank {rank}")
    for where, why in every.values():
        if why:
            found.trouble(f"{_WHAT[name]} failed ({why})", _LOOK, where=where)
    return bool(meeting.share(f"{name} on all", not found.troubles))


_WHAT = {"group": "making the process group", "measure": "talking along the axes of the mesh"}
_LOOK = (
    "compare GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME of the hosts, and for NCCL start once more "
    "with NCCL_DEBUG=INFO"
)


def _measure(
    plan: Plan, meeting: Meeting, report: Report, ranks: dict[int, Rank], device: torch.device
) -> None:
    """The placement of the mesh, and how fast its axes are."""
    degrees = {"data": meeting.world}
    found = Found("mesh", ranks[0].host)
    if plan.degrees is not None and prod(plan.degrees.values()) == meeting.world:
        degrees = plan.degrees
    elif plan.degrees is not None:
        found.trouble(
            f"the mesh needs {prod(plan.degrees.values())} processes, {meeting.world} were started",
            "change the mesh or the number of processes",
        )
    placement = placed(degrees, [ranks[rank].host for rank in range(meeting.world)])
    for line in axes_lines(placement):
        found.fact(line)
    if placement.better is not None:
        found.trouble(placement.worse, f"better {placement.advice}")
    report.found.append(found)
    mesh = Mesh(
        *(placement.degrees[axis] for axis in AXES),
        device_type=device.type,
        timeout=timedelta(seconds=meeting.timeout),
    )
    measured = measure(mesh, placement, device)
    speeds = Found("speed", ranks[0].host)
    speeds.fact(table(measured, placement.hosts))
    report.found.append(speeds)
    report.records["mesh"] = placement.degrees
    report.records["speed"] = records(measured)


def _device(plan: Plan, world: int) -> torch.device:
    try:
        kind = device_type(plan.device, world)
    except ValueError:  # too few GPUs, which `check_devices` tells
        kind = "cpu"
    return (
        torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
    )
