"""Rank functions: the bytes that each layer of a few sends, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from axialtrain.attention.config import AxialConfig
from axialtrain.mesh.mesh import Mesh, MeshConfig
from axialtrain.mesh.parallelize import parallelize
from axialtrain.models.layer import Layer

BATCH, DIM, HEADS = 2, 24, 12


@dataclass(frozen=True)
class Layers:
    """Layers in a row, the first of which gets tiles; no mask, no prefix tokens."""

    size: tuple[int, int]
    passes: tuple[str, ...]
    exchange: str = "swap"
    swap: str = "auto"
    fusion: str = "sequential"
    share: bool = True
    window: int = 2
    dtype: torch.dtype = torch.float32


Sent = dict[str, int]  # over each group


def layers_send(mesh: dict[str, int], many: list[Layers]) -> list[list[tuple[Sent, Sent]]]:
    """What this rank sends in each layer: forward and backward."""
    grid = Mesh(**mesh)
    found = []
    for layers in many:  # on the same groups: to make them takes longer than all the rest
        grid.config = MeshConfig(**mesh, exchange=layers.exchange, swap=layers.swap)
        found.append(_each_sends(grid, layers))
    return found


def _each_sends(grid: Mesh, layers: Layers) -> list[tuple[Sent, Sent]]:
    config = AxialConfig(
        list(layers.passes),
        fusion=layers.fusion,
        share_projections=layers.share,
        window=layers.window,
        positions="none",
    )
    model = nn.ModuleList(
        Layer(DIM, HEADS, 2 * DIM, config, index=index) for index in range(len(layers.passes))
    )
    parallelize(model.to(layers.dtype), grid)
    place = grid.place(*layers.size)
    x = torch.randn(BATCH, place.rect.height, place.rect.width, DIM, dtype=layers.dtype)
    prefix = x.new_zeros(BATCH, 0, DIM)
    found = []
    for layer in model:
        assert isinstance(layer, Layer)
        start = _sent(grid)
        x = x.detach().requires_grad_()
        out, _ = layer(x, prefix, place)
        forward = _sent(grid)
        out.sum().backward()
        backward = _sent(grid)
        found.append((_less(forward, start), _less(backward, forward)))
        x, place = out, layer.exit(place)
        assert x.shape[1:3] == (place.rect.height, place.rect.width)
    return found


def _sent(grid: Mesh) -> Sent:
    groups = {"row": grid.row, "col": grid.col, "spatial": grid.spatial, "tensor": grid.tensor}
    return {name: group.sent_bytes for name, group in groups.items()}


def _less(left: Sent, right: Sent) -> Sent:
    return {name: left[name] - right[name] for name in left}
