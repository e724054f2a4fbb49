"""Which axes of a mesh cross hosts, and the better mesh or order where a chatty one does.

Pure arithmetic on the degrees of the mesh and the host of each rank, no torch. `tensor` talks most:
two sums of the activations in each layer, forward and backward. `row` and `col` exchange tokens in
each pass, `data` sums gradients once a step. What talks most belongs inside a host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

AXES = ("data", "row", "col", "tensor")  # ranks are laid out so: data-major, tensor innermost
_WHY = {
    "tensor": "it sums activations twice in each layer",
    "col": "it exchanges tokens in each row pass",
    "row": "it exchanges tokens in each column pass",
}


@dataclass(frozen=True)
class AlongAxis:
    """The groups of ranks along one mesh axis. crossing: how many of them are on several hosts.

    apart: over all ranks, the partners along this axis that are on another host.
    """

    name: str
    groups: tuple[tuple[int, ...], ...]
    crossing: int
    apart: int

    def __str__(self) -> str:
        degree = len(self.groups[0])
        if degree == 1:
            return "of one rank"
        if self.crossing == 0:
            return "inside a host"
        if self.crossing == len(self.groups):
            return "crosses hosts"
        return f"crosses hosts in {self.crossing} of {len(self.groups)} groups"


@dataclass(frozen=True)
class Better:
    """What to change. degrees: of the better mesh, which may be the same.

    by_host: whether the ranks of each host should be given numbers in a row, which they have not.
    """

    degrees: dict[str, int]
    by_host: bool


@dataclass(frozen=True)
class Placement:
    """A mesh on hosts. degrees: by axis. hosts: the name of each rank's."""

    degrees: dict[str, int]
    hosts: tuple[str, ...]

    @cached_property
    def axes(self) -> dict[str, AlongAxis]:
        """By name, in the order of AXES."""
        return {name: _along(name, self.degrees, self.hosts) for name in AXES}

    @property
    def crossing(self) -> tuple[str, ...]:
        """The axes of which a group is on several hosts."""
        return tuple(name for name, axis in self.axes.items() if axis.crossing)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where `rank` is in the mesh."""
        found: dict[str, int] = {}
        for name in reversed(AXES):
            rank, found[name] = divmod(rank, self.degrees[name])
        return {name: found[name] for name in AXES}

    @cached_property
    def swap(self) -> str:
        """How tokens get from whole rows to whole columns where mesh.swap is auto.

        A rank of R x C holds M bytes. "direct" sends M / (R C) of them to each other rank of the
        image; "hierarchical" sends M / C to each along col, then M / R to each along row. Summed
        over the partners that are on another host, that never is less for hierarchical: tokens
        that change hosts do so in one of its hops at least. It is the same where the hosts' parts
        of the image are whole along one axis, as then one hop stays inside them; both then send,
        for each rank, M (1 - 1/H) between H hosts of equal parts, and hierarchical in messages
        that are C (or R) times as large and as few, for another hop inside the hosts.

        So: the fewer bytes between hosts, of as many the fewer messages, and else direct.
        """
        rows, cols = self.degrees["row"], self.degrees["col"]
        image = _along("row", self.degrees | {"row": rows * cols, "col": 1}, self.hosts)
        row, col = self.axes["row"].apart, self.axes["col"].apart
        # In units of M / (R C), and messages.
        direct = (image.apart, image.apart)
        hops = (col * rows + row * cols, col + row)
        return "hierarchical" if hops < direct else "direct"

    @cached_property
    def better(self) -> Better | None:
        """The better order of ranks or mesh; None where there is none.

        It has as many ranks and the same `data` (which is the user's choice of images at a time). A
        tensor group lies inside a host: what `tensor` loses, the bands of the image gain. Then rows
        and columns are chosen so that the fewest partners are on other hosts.
        """
        in_order = _by_host(self.hosts)
        degrees = _best(self.degrees, in_order)
        if _apart(degrees, in_order) < _apart(self.degrees, self.hosts):
            changed = _apart(degrees, self.hosts) > _apart(degrees, in_order)
            return Better(degrees, by_host=changed)
        return None

    @property
    def warning(self) -> str | None:
        """The axes that cross hosts without need, and what is better; None where none does."""
        return None if self.better is None else f"{self.worse}. Better {self.advice}"

    @property
    def worse(self) -> str:
        """Which axes cross hosts without need, and why that costs."""
        then = self._then()
        return "; ".join(
            f"{name} {axis}, and {_WHY[name]}"
            for name in ("tensor", "col", "row")
            if (axis := self.axes[name]).apart > then.axes[name].apart
        )

    @property
    def advice(self) -> str:
        """What to do instead."""
        then, steps = self._then(), []
        if then.hosts != self.hosts:
            steps.append("number the ranks host by host")
        if then.degrees != self.degrees:
            steps.append(f"take {arguments(then.degrees)}")
        left = " and ".join(name for name in then.crossing if name != "data")
        return (
            f"{' and '.join(steps)}: what then crosses hosts is "
            f"{left or 'none of tensor, row and col'}"
        )

    def _then(self) -> Placement:
        """What is better, or this one."""
        if self.better is None:
            return self
        hosts = _by_host(self.hosts) if self.better.by_host else self.hosts
        return Placement(self.better.degrees, hosts)


def placed(degrees: Mapping[str, int], hosts: Sequence[str]) -> Placement:
    """The mesh of `degrees` on the `hosts` of its ranks, in their order.

    An axis that `degrees` leaves out has degree 1. Raises ValueError where the degrees do not
    multiply to the number of ranks.
    """
    whole = {name: degrees.get(name, 1) for name in AXES}
    if prod(whole.values()) != len(hosts):
        raise ValueError(
            f"mesh {whole} has {prod(whole.values())} ranks: allowed is one for each of the "
            f"{len(hosts)} processes"
        )
    return Placement(whole, tuple(hosts))


def placed_on_nodes(degrees: Mapping[str, int], nodes: int, processes: int) -> Placement:
    """The mesh on `nodes` hosts of as many `processes` each, numbered host by host.

    Raises ValueError as `placed` does.
    """
    return placed(degrees, [f"node{node}" for node in range(nodes) for _ in range(processes)])


def arguments(degrees: Mapping[str, int]) -> str:
    """The mesh as it is asked for on the command line."""
    text = f"mesh={degrees['row']}x{degrees['col']}"
    for name in ("data", "tensor"):
        text += f" mesh.{name}={degrees[name]}"
    return text


def _along(name: str, degrees: Mapping[str, int], hosts: Sequence[str]) -> AlongAxis:
    groups = tuple(_groups(name, degrees))
    crossing = apart = 0
    for group in groups:
        on_host = Counter(hosts[rank] for rank in group)
        crossing += len(on_host) > 1
        apart += len(group) ** 2 - sum(count**2 for count in on_host.values())
    return AlongAxis(name, groups, crossing, apart)


def _groups(name: str, degrees: Mapping[str, int]) -> Iterator[tuple[int, ...]]:
    """The ranks that differ along axis `name` alone."""
    inner = prod(degrees.get(axis, 1) for axis in AXES[AXES.index(name) + 1 :])
    outer = inner * degrees.get(name, 1)
    for start in range(0, prod(degrees.values()), outer):
        for first in range(start, start + inner):
            yield tuple(range(first, first + outer, inner))


def _apart(degrees: Mapping[str, int], hosts: Sequence[str]) -> tuple[int, int]:
    """Partners on other hosts: along tensor, and along row and col. Less is better, in order."""
    tensor, row, col = (_along(name, degrees, hosts).apart for name in ("tensor", "row", "col"))
    return tensor, row + col


def _best(degrees: Mapping[str, int], hosts: Sequence[str]) -> dict[str, int]:
    """The mesh with the fewest partners on other hosts; of equal ones the most like `degrees`."""
    tensor = next(
        parts
        for parts in _divisors(degrees["tensor"])
        if not _along("tensor", {"row": len(hosts) // parts, "tensor": parts}, hosts).apart
    )
    bands = degrees["row"] * degrees["col"] * degrees["tensor"] // tensor
    meshes = [
        {"data": degrees["data"], "row": bands // col, "col": col, "tensor": tensor}
        for col in _divisors(bands)
    ]
    return min(
        meshes,
        key=lambda mesh: (
            _apart(mesh, hosts),
            mesh["col"] != degrees["col"],  # then `row`, the outer of the two, is what crosses
            mesh["row"],
        ),
    )


def _divisors(number: int) -> list[int]:
    """From the largest on."""
    return [part for part in range(number, 0, -1) if number % part == 0]


def _by_host(hosts: Sequence[str]) -> tuple[str, ...]:
    """The same hosts with the ranks of each in a row, the hosts in the order they came."""
    counts = Counter(hosts)
    return tuple(host for host, count in counts.items() for _ in range(count))
