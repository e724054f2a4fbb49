"""The device mesh: the only place that turns degrees of parallelism into process groups.

Ranks are laid out data-major, tensor innermost: tensor peers sit on neighbouring devices, then the
columns of one band of rows. "Axis" is always one of the mesh; a "dim" belongs to a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from math import prod

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from axialtrain.grid import Layout, Place
from axialtrain.mesh.placement import AXES, Placement

EXCHANGES = ("swap", "heads", "gather")
SWAPS = ("auto", "direct", "hierarchical")


@dataclass
class MeshConfig:
    """Degrees along the four mesh axes, and what travels along them.

    data: replicas that see different images.
    row, col: bands of rows and of columns of one image's token grid.
    tensor: parts of every attention head group and MLP.
    exchange: how row and column passes see whole lines, with the same numbers. "swap": tokens move
        to whole lines and stay there. "heads": tokens stay in tiles; Q, K, V and the output are
        exchanged against heads. "gather": tokens stay; each rank gets the keys and values of its
        lines.
    swap: how tokens get from whole rows to whole columns. "direct": one all-to-all among all ranks
        of the image. "hierarchical": two, one along each axis, through tiles. "auto": what
        `Placement.swap` says of the hosts; direct where nobody told the mesh (`Mesh.placed_on`).
    overlap: bands of lines in which a swap to whole rows or columns travels, so that one is
        attended to while the next ones are on their way; 1 waits for all.
    """

    data: int = 1
    row: int = 1
    col: int = 1
    tensor: int = 1
    exchange: str = "swap"
    swap: str = "auto"
    overlap: int = 1

    def __post_init__(self) -> None:
        for key, allowed in (("exchange", EXCHANGES), ("swap", SWAPS)):
            if getattr(self, key) not in allowed:
                raise ValueError(
                    f"mesh.{key}={getattr(self, key)!r}: allowed are {', '.join(allowed)}"
                )
        for axis, degree in self.degrees.items():
            if degree < 1:
                raise ValueError(f"mesh.{axis}={degree}: allowed are whole numbers from 1")
        if self.overlap < 1:
            raise ValueError(f"mesh.overlap={self.overlap}: allowed are whole numbers from 1")
        if self.overlap > 1 and self.exchange != "swap":
            raise ValueError(
                f"mesh.overlap={self.overlap}: only swaps travel in bands: allowed is 1 with "
                f"mesh.exchange={self.exchange}"
            )

    @property
    def degrees(self) -> dict[str, int]:
        return {"data": self.data, "row": self.row, "col": self.col, "tensor": self.tensor}

    @property
    def size(self) -> int:
        """Number of processes."""
        return prod(self.degrees.values())

    def __str__(self) -> str:
        return " x ".join(f"{axis}={degree}" for axis, degree in self.degrees.items())

    def placed_on(self, placement: Placement) -> MeshConfig:
        """The same, with what is auto chosen by the hosts of the ranks."""
        return replace(self, swap=placement.swap) if self.swap == "auto" else self

    def check_heads(self, heads: int, *, rows: bool, cols: bool) -> None:
        """Raise ValueError where exchange "heads" cannot deal out `heads` heads.

        rows, cols: whether there are row passes, column passes.
        """
        if self.exchange != "heads":
            return
        for used, what, axis in ((rows, "row", "col"), (cols, "column", "row")):
            parts = self.tensor * self.degrees[axis]
            if used and heads % parts:
                raise ValueError(
                    f"mesh.exchange=heads: {what} passes deal out the {heads} heads over tensor x "
                    f"{axis} = {self.tensor} x {self.degrees[axis]} ranks: allowed are multiples "
                    f"of {parts}, mesh.exchange=swap and mesh.exchange=gather"
                )


def check_divides(what: str, value: int, tensor: int) -> None:
    """Raise ValueError where `value` of `what` cannot be dealt out over `tensor` ranks."""
    if value % tensor:
        allowed = [n for n in range(1, value + 1) if value % n == 0]
        raise ValueError(
            f"mesh.tensor={tensor} does not divide {what}={value}: allowed are {allowed}"
        )


@dataclass
class Group:
    """The ranks among which a collective runs, and the bytes this rank has sent to the others.

    handle is None in a run of one process that has no process group.
    """

    handle: dist.ProcessGroup | None = None
    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    sent_bytes: int = field(default=0, compare=False)

    @property
    def size(self) -> int:
        return len(self.ranks)


class Mesh:
    """data x row x col x tensor ranks.

    Groups: one along each axis (`data`, `row`, `col`, `tensor`), `spatial` = row x col (the ranks
    that share an image) and `replicas` = data x row x col (the ranks that hold the same weights;
    what DeepSpeed is told is data-parallel); `world` holds all ranks.

    A process outside `torch.distributed` is the mesh 1 x 1 x 1 x 1, on the same code path.

    exchange, swap, overlap: see `MeshConfig`.
    Raises ValueError where the degrees do not multiply to the number of processes.
    """

    def __init__(
        self,
        data: int = 1,
        row: int = 1,
        col: int = 1,
        tensor: int = 1,
        *,
        exchange: str = "swap",
        swap: str = "auto",
        overlap: int = 1,
        device_type: str = "cpu",
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        self.config = MeshConfig(data, row, col, tensor, exchange, swap, overlap)
        world = dist.get_world_size() if dist.is_initialized() else 1
        if self.config.size != world:
            raise ValueError(
                f"mesh {self.config} needs {self.config.size} processes, {world} were started: "
                "change the mesh or the number of processes"
            )
        if not dist.is_initialized():
            self.coordinates = dict.fromkeys(AXES, 0)
            self.data, self.row, self.col, self.tensor = (Group() for _ in AXES)
            self.spatial, self.replicas, self.world = Group(), Group(), Group()
            return
        devices = init_device_mesh(device_type, (data, row, col, tensor), mesh_dim_names=AXES)
        coordinates = devices.get_coordinate()
        assert coordinates is not None, "every rank is in the mesh"
        self.coordinates = dict(zip(AXES, coordinates, strict=True))
        self.data, self.row, self.col, self.tensor = (
            _group(devices[axis], timeout) for axis in AXES
        )
        self.spatial = _group(devices["row", "col"]._flatten("spatial"), timeout)
        self.replicas = _group(devices["data", "row", "col"]._flatten("replicas"), timeout)
        self.world = Group(dist.group.WORLD, dist.get_rank(), tuple(range(world)))

    def placed_on(self, placement: Placement) -> None:
        """Choose what is auto by the hosts of the ranks, alike on all of them."""
        self.config = self.config.placed_on(placement)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols): over how many bands an image is spread."""
        return self.config.row, self.config.col

    @property
    def at(self) -> tuple[int, int]:
        """(row, col) of this rank."""
        return self.coordinates["row"], self.coordinates["col"]

    def place(self, height: int, width: int, layout: Layout = Layout.TILE) -> Place:
        """This rank's part of a grid of height x width tokens."""
        return Place(height, width, layout, self.shape, self.at)


def _group(submesh: DeviceMesh, timeout: timedelta) -> Group:
    handle = submesh.get_group()
    # A DeviceMesh gives its groups torch's default of 30 minutes: a lost rank must not hang a run.
    _set_pg_timeout(timeout, handle)
    return Group(handle, dist.get_rank(handle), tuple(dist.get_process_group_ranks(handle)))
