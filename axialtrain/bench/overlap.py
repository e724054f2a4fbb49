"""What `mesh.overlap` gains: a layer on several ranks whose swaps travel at once, or in bands.

Measured on ranks that exist already: whoever starts them calls `measure_overlap` on each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch

from axialtrain.attention.config import AxialConfig
from axialtrain.bench.plain import drawn
from axialtrain.bench.timing import Clock, Way
from axialtrain.bench.together import in_turns_together
from axialtrain.grid import Layout
from axialtrain.mesh.collectives import gather_objects
from axialtrain.mesh.exchange import Exchange
from axialtrain.mesh.mesh import Mesh
from axialtrain.models.layer import Layer


@dataclass(frozen=True)
class Overlap:
    """A layer with its swaps in `bands` bands. bands_s: seconds of its forward and backward on the
    slowest rank, the median of the rounds; once_s: of the same with swaps at once. ratio: of the
    two, the median of the rounds' own. sent_bytes: counted, in a forward and backward of all ranks.
    """

    bands: int
    bands_s: float
    once_s: float
    ratio: float
    sent_bytes: int


def measure_overlap(
    shape: tuple[int, int],
    overlaps: Sequence[int],
    *,
    height: int,
    width: int,
    dim: int,
    heads: int,
    dtype: torch.dtype,
    rounds: int,
    limit: float = math.inf,
    device_type: str = "cpu",
    timeout: timedelta = timedelta(minutes=10),
    clock: Clock = time.perf_counter,
) -> list[Overlap]:
    """Rows, columns and MLP, from whole columns, where the layer before leaves the tokens.

    shape: (row, col) of the mesh, all of whose ranks share the image of height x width tokens.
    overlaps: the values of `mesh.overlap` to be set beside 1. Collective; equal on all ranks.
    """
    device = torch.device(device_type)
    meshes = {
        count: Mesh(
            row=shape[0], col=shape[1], overlap=count, device_type=device_type, timeout=timeout
        )
        for count in (1, *overlaps)
    }
    ways = {
        str(count): _layer(mesh, height, width, dim, heads, device, dtype)
        for count, mesh in meshes.items()
    }
    sent = {}
    for count, mesh in meshes.items():
        before = _sent(mesh)
        ways[str(count)]()
        sent[count] = sum(gather_objects(_sent(mesh) - before, mesh.world))
    taken = in_turns_together(ways, meshes[1], device, rounds=rounds, limit=limit, clock=clock)
    return [
        Overlap(
            count,
            taken.median(str(count)),
            taken.median("1"),
            taken.ratio(str(count), "1"),
            sent[count],
        )
        for count in overlaps
    ]


def _sent(mesh: Mesh) -> int:
    return sum(group.sent_bytes for group in (mesh.row, mesh.col, mesh.spatial))


def _layer(
    mesh: Mesh,
    height: int,
    width: int,
    dim: int,
    heads: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Way:
    """Forward, and backward to the tokens and all parameters, of this rank's part."""
    torch.manual_seed(0)
    layer = Layer(dim, heads, 4 * dim, AxialConfig(["row+col"])).to(device, dtype)
    for module in layer.modules():
        if isinstance(module, Exchange):
            module.attach(mesh)
    place = mesh.place(height, width, Layout.COLS)
    x = drawn(1, place.rect.height, place.rect.width, dim, device=device, dtype=dtype)
    weight = torch.ones_like(x)
    inputs = (x, *layer.parameters())

    def run() -> None:
        out, _ = layer(x, x.new_zeros(1, 0, dim), place)
        torch.autograd.grad(out, inputs, weight)

    return run
