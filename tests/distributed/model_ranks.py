"""Rank functions: a model on the mesh, its output and every gradient, to hold against serial."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from axialtrain.attention.config import AxialConfig
from axialtrain.grid import Layout, Place
from axialtrain.mesh.mesh import Group, Mesh
from axialtrain.mesh.parallelize import parallelize, tensor_dims
from axialtrain.models.chance import Chance
from axialtrain.models.heads import Classifier, Segmenter
from axialtrain.models.transformer import AxialTransformer, AxialTransformerConfig

PATCH = 2


@dataclass(frozen=True)
class Case:
    """One model on one grid; `holes` leaves out tokens, a whole row and a whole column.

    holes None: there is no mask at all. span None: relative tables of the grid's extent.
    head: tokens (a Segmenter) or a pool of `Classifier`.
    """

    grid: tuple[int, int]
    pattern: tuple[str, ...] = ("row+col",)
    positions: str = "rope"
    depth: int = 2
    holes: bool | None = True
    fusion: str = "sequential"
    share: bool = True
    span: int | None = None
    window: int = 3
    prefix: int = 0
    skip_axis: float = 0.0
    drop_path: float = 0.0
    head: str = "tokens"


@dataclass
class Gradients:
    """Output, input gradient and parameter gradients of one rank (or of the serial run)."""

    rect: tuple[int, int, int, int]
    output: Tensor
    input: Tensor
    parameters: dict[str, Tensor]
    sharded: dict[str, int]
    sent: dict[str, int]


def build(case: Case) -> nn.Module:
    torch.manual_seed(0)
    backbone = AxialTransformer(
        AxialTransformerConfig(
            patch=PATCH,
            dim=16,
            depth=case.depth,
            heads=4,
            mlp_ratio=1.5,
            prefix_tokens=case.prefix,
            drop_path=case.drop_path,
            grid=list(case.grid),
            axial_config=AxialConfig(
                pattern=list(case.pattern),
                fusion=case.fusion,
                share_projections=case.share,
                positions=case.positions,
                window=case.window,
                span=case.span,
                skip_axis=case.skip_axis,
            ),
        )
    )
    model: nn.Module
    if case.head == "tokens":
        model = Segmenter(backbone, classes=3, cells=2).double()
    else:
        model = Classifier(backbone, classes=3, pool=case.head).double()
    for parameter in model.parameters():  # biases and norms too: a zero hides a wrong gradient
        nn.init.normal_(parameter, std=0.3)
    return model


def inputs(case: Case) -> tuple[Tensor, Tensor | None, Tensor]:
    """pixels [2, H p, W p, 3], valid [2, H, W] and the gradient of the output."""
    height, width = case.grid
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, height * PATCH, width * PATCH, 3, generator=generator).double()
    grad = torch.randn(2, height * 2, width * 2, 3, generator=generator).double()
    if case.head != "tokens":
        grad = grad[:, 0, 0]
    if case.holes is None:
        return pixels, None, grad
    valid = torch.ones(2, height, width, dtype=torch.bool)
    if case.holes:
        valid = torch.rand(2, height, width, generator=generator) < 0.8
        valid[1, height // 2] = False
        valid[0, :, width // 2] = False
    return pixels, valid, grad


def run(model: nn.Module, case: Case, place: Place) -> tuple[Tensor, Tensor]:
    """Forward and backward on this place's tile: (output, input gradient)."""
    pixels, valid, grad = inputs(case)
    rect = place.rect
    pixels = pixels[:, *rect.scaled(PATCH).slices(_ORIGIN)].clone().requires_grad_()
    if valid is not None:
        valid = valid[:, *rect.slices(_ORIGIN)]
    chance = Chance(seed=3, step=1, samples=(5, 6))
    output = model(pixels, valid, place, chance=chance)
    if case.head == "tokens":
        grad = grad[:, *rect.scaled(2).slices(_ORIGIN)]
    else:  # computed alike on every spatial rank, each of which has a share of the objective
        grad = grad / math.prod(place.shape)
    (output * grad).sum().backward()
    assert pixels.grad is not None
    return output.detach(), pixels.grad


def serial(case: Case) -> Gradients:
    model = build(case)
    place = Place(*case.grid)
    output, grad = run(model, case, place)
    return Gradients(_tuple(place), output, grad, _gradients(model), {}, {})


def sharded(
    case: Case, mesh: dict[str, int], exchange: str = "swap", swap: str = "auto"
) -> Gradients:
    grid = Mesh(**mesh, exchange=exchange, swap=swap)
    model = build(case)
    parallelize(model, grid)
    place = grid.place(*case.grid)
    output, grad = run(model, case, place)
    gradients = _gradients(model)
    for gradient in gradients.values():
        dist.all_reduce(gradient, group=grid.replicas.handle)
    dims = tensor_dims(model)
    groups = {"row": grid.row, "col": grid.col, "spatial": grid.spatial}
    return Gradients(
        _tuple(place),
        output,
        grad,
        {n: _join(g, dims[n], grid.tensor) if n in dims else g for n, g in gradients.items()},
        dims,
        {name: group.sent_bytes for name, group in groups.items()},
    )


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad
    return found


def _join(part: Tensor, dim: int, group: Group) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(group.size)]
    dist.all_gather(parts, part.contiguous(), group=group.handle)
    return torch.cat(parts, dim)


def _tuple(place: Place) -> tuple[int, int, int, int]:
    rect = place.under(Layout.TILE).rect
    return rect.top, rect.bottom, rect.left, rect.right


_ORIGIN = Place(1, 1).rect


def bad_tensor_degree(mesh: dict[str, int]) -> str:
    try:
        parallelize(build(Case((4, 4))), Mesh(**mesh))
    except ValueError as error:
        return str(error)
    return ""


def mesh_layout(mesh: dict[str, int]) -> dict[str, Any]:
    grid = Mesh(**mesh)
    names = ("data", "row", "col", "tensor", "spatial", "replicas")
    return {"coordinates": grid.coordinates} | {name: getattr(grid, name).ranks for name in names}


def wrong_size(mesh: dict[str, int]) -> str:
    try:
        Mesh(**mesh)
    except ValueError as error:
        return str(error)
    return ""
