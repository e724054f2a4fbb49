"""Rank functions: layers that look at neighbours, one by one and behind one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from axialtrain.grid import Place, Rect
from axialtrain.mesh.mesh import Mesh
from axialtrain.mesh.parallelize import parallelize
from axialtrain.models.batch_norm import BatchNorm
from axialtrain.models.conv import AvgPool, Conv, MaxPool, Upsample

CHANNELS = 4


class Chain(nn.Module):
    """Layers behind one another."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def exit(self, place: Place) -> Place:
        for one in self.layers:
            place = one.exit(place)
        return place

    def forward(self, x: Tensor, place: Place) -> Tensor:
        for one in self.layers:
            x, place = one(x, place), one.exit(place)
        return x


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv 1 x 1, stride 2": lambda: Conv(CHANNELS, 3, 1, stride=2),
    "conv 3 x 3": lambda: Conv(CHANNELS, 3, 3, bias=True),
    "conv 7 x 7, stride 2": lambda: Conv(CHANNELS, 3, 7, stride=2),
    "conv 3 x 3, stride 3": lambda: Conv(CHANNELS, 3, 3, stride=3),
    "conv 5 x 5 of each channel": lambda: Conv(CHANNELS, CHANNELS, 5, groups=CHANNELS),
    "conv 3 x 3, dilation 6": lambda: Conv(CHANNELS, 3, 3, dilation=6),
    "largest of 3 x 3, stride 2": lambda: MaxPool(3, 2),
    "largest of 7 x 7": lambda: MaxPool(7, 1),
    "mean of 2": lambda: AvgPool(2),
    "mean of 3": lambda: AvgPool(3),
    "enlarged by 4": lambda: Upsample(4),
    "down and up": lambda: Chain(
        Conv(CHANNELS, 5, 3, stride=2, bias=True),
        AvgPool(2),
        Conv(5, 3, 3, dilation=2, bias=True),
        Upsample(2),
        MaxPool(3, 1),
    ),
}


def image(name: str, grid: Rect, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(name))
    size = (2, grid.height, grid.width, channels)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def layer(name: str, place: Place, mesh: Mesh | None = None) -> dict[str, Any]:
    """Forward and backward of a layer on this place's part of an image of its grid."""
    torch.manual_seed(1)
    model = LAYERS[name]().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    if mesh is not None:
        parallelize(model, mesh)
    rect = place.rect
    x = image(name, place.grid, CHANNELS)[:, *rect.slices(place.grid)].clone().requires_grad_()
    out = model(x, place)
    goal = model.exit(place)
    sent = 0 if mesh is None else sum(g.sent_bytes for g in (mesh.row, mesh.col, mesh.spatial))
    grad = image(name, goal.grid, out.shape[-1])[:, *goal.rect.slices(goal.grid)]
    (out * grad).sum().backward()
    return {
        "out": out.detach(),
        "input": x.grad,
        "weights": {key: parameter.grad for key, parameter in model.named_parameters()},
        "entry": _edges(rect),
        "exit": _edges(goal.rect),
        "sent": sent,
    }


def sharded_layer(
    mesh: tuple[int, int], cases: list[tuple[str, tuple[int, int], int]]
) -> list[dict[str, Any]]:
    """Each case: name of the layer, grid of tokens, cells along each side of a token."""
    found = []
    axes = Mesh(row=mesh[0], col=mesh[1])
    for name, grid, unit in cases:
        for group in (axes.row, axes.col, axes.spatial):
            group.sent_bytes = 0
        found.append(layer(name, axes.place(*grid).finer(unit), axes))
    return found


def _edges(rect: Rect) -> tuple[int, int, int, int]:
    return rect.top, rect.bottom, rect.left, rect.right


def tile_of(edges: tuple[int, int, int, int]) -> tuple[slice, slice]:
    return slice(edges[0], edges[1]), slice(edges[2], edges[3])


# --- Batch norm -----------------------------------------------------------------------------------

IMAGES, GRID = 3, Place(5, 7)


def _norm(x: Tensor, valid: Tensor, grad: Tensor, mesh: Mesh | None) -> dict[str, Tensor]:
    torch.manual_seed(4)
    norm = BatchNorm(CHANNELS).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    if mesh is not None:
        parallelize(norm, mesh)
    x = x.clone().requires_grad_()
    out = norm(x, valid)
    (out * grad).sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    return {
        "out": out.detach(),
        "input": x.grad,
        "weight": norm.weight.grad,
        "bias": norm.bias.grad,
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
    }


def _norm_inputs(data: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of as many images as the data ranks hold together; those past the last are fillers."""
    count = -(-IMAGES // data) * data
    generator = torch.Generator().manual_seed(5)
    size = (count, GRID.height, GRID.width)
    x, grad = (
        torch.randn(*size, CHANNELS, generator=generator, dtype=torch.float64) * 2 + 1
        for _ in range(2)
    )
    valid = torch.rand(size, generator=generator) < 0.7
    valid[IMAGES:] = False
    return x, valid, grad


def whole_norm(data: int) -> dict[str, Tensor]:
    return _norm(*_norm_inputs(data), None)


def sharded_norm(mesh: tuple[int, int, int]) -> dict[str, Any]:
    axes = Mesh(*mesh)
    inputs = _norm_inputs(axes.data.size)
    images = len(inputs[0]) // axes.data.size
    first = axes.data.rank * images
    tile = axes.place(GRID.height, GRID.width).rect.slices(GRID.grid)
    where = (slice(first, first + images), *tile)
    return _norm(*(one[where] for one in inputs), axes) | {"where": where}
