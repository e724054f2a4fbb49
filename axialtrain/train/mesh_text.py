"""`mesh.txt` of a run folder: which rank is where, what it holds, and which axes cross hosts."""

from __future__ import annotations

from collections.abc import Sequence

from axialtrain.mesh.mesh import MeshConfig
from axialtrain.mesh.placement import AXES, Placement

NAME = "mesh.txt"


def mesh_text(placement: Placement, devices: Sequence[str], config: MeshConfig) -> str:
    """What mesh.txt holds. devices: of each rank, as torch names them. config: of the mesh, in
    which nothing is auto any more."""
    degrees, hosts = placement.degrees, placement.hosts
    shape = " x ".join(f"{axis}={degree}" for axis, degree in degrees.items())
    rows: list[tuple[str, ...]] = [("rank", "host", "device", *AXES, "holds")]
    for rank, (host, device) in enumerate(zip(hosts, devices, strict=True)):
        at = placement.coordinates(rank)
        numbers = [str(at[axis]) for axis in AXES]
        rows.append((str(rank), host, device, *numbers, _holds(at, degrees)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    count = len(set(hosts))
    lines = [
        f"mesh {shape}: {_many(len(hosts), 'rank')} on {_many(count, 'host')}",
        "",
        *table,
        "",
        *axes_lines(placement),
        *_swap_lines(config),
        "",
        placement.warning or "No axis that talks much crosses hosts without need.",
    ]
    return "\n".join(lines) + "\n"


def _swap_lines(config: MeshConfig) -> list[str]:
    """How whole rows become whole columns, where more than one way leads there."""
    if config.exchange != "swap" or 1 in (config.row, config.col):
        return []
    ways = {
        "direct": "in one exchange among all ranks of an image",
        "hierarchical": "in two exchanges, along col and along row",
    }
    return [f"Whole rows become whole columns {ways[config.swap]} (mesh.swap={config.swap})."]


def axes_lines(placement: Placement) -> list[str]:
    """Of each axis its degree, and whether it crosses hosts."""
    return [
        f"{name:6} {placement.degrees[name]:>4}  {axis}" for name, axis in placement.axes.items()
    ]


def _holds(at: dict[str, int], degrees: dict[str, int]) -> str:
    """A rank's part, in words: bands and parts are counted from 1."""
    words = [
        _part(at["row"], degrees["row"], "band {} of {} of the rows", "all rows"),
        _part(at["col"], degrees["col"], "band {} of {} of the columns", "all columns"),
    ]
    if degrees["data"] > 1:
        words.append(f"of the images of replica {at['data'] + 1} of {degrees['data']}")
    if degrees["tensor"] > 1:
        words.append(f"part {at['tensor'] + 1} of {degrees['tensor']} of the weights")
    return ", ".join(words)


def _part(index: int, count: int, some: str, every: str) -> str:
    return every if count == 1 else some.format(index + 1, count)


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
