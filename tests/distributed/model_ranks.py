"""Rank functions: a model on the mesh, its output and every gradient, to hold against serial."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import get_model_parallel_group
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.distributed_c10d import _set_pg_timeout

from axialtrain.attention.config import AxialConfig
from axialtrain.grid import Layout, Place
from axialtrain.mesh.crossing import Crossing
from axialtrain.mesh.mesh import Group, Mesh, MeshConfig
from axialtrain.mesh.parallelize import parallelize, tensor_dims
from axialtrain.models.chance import Chance
from axialtrain.models.heads import Classifier, Segmenter
from axialtrain.models.recompute import Recompute
from axialtrain.models.transformer import AxialTransformer, AxialTransformerConfig
from axialtrain.train.beats import position
from axialtrain.train.compiled import compile_layers, compiles_passes
from axialtrain.train.watch import from_collective

PATCH = 2
CHANCE = Chance(seed=1, step=0, samples=(5, 6))


@dataclass(frozen=True)
class Case:
    """One model on one grid; `holes` leaves out tokens, whole rows and whole columns.

    holes None: there is no mask at all. span None: relative tables of the grid's extent.
    head: tokens (a Segmenter) or a pool of `Classifier`. compiled: passes or layers are graphs, as
    `train.compile` makes them, run as torch traced them.
    """

    grid: tuple[int, int]
    pattern: tuple[str, ...] = ("row+col",)
    positions: str = "rope"
    depth: int = 2
    dim: int = 16
    heads: int = 4
    mlp_ratio: float = 1.5
    holes: bool | None = True
    fusion: str = "sequential"
    share: bool = True
    span: int | None = None
    window: int = 3
    prefix: int = 0
    skip_axis: float = 0.0
    drop_path: float = 0.0
    head: str = "tokens"
    recompute: Recompute = field(default_factory=Recompute)
    mlp_chunk: int | None = None
    compiled: bool = False


@dataclass
class Gradients:
    """Output, input gradient and parameter gradients of one rank (or of the serial run).

    prefix: what the backbone made of its prefix tokens. norm: of all parameter gradients, as
    DeepSpeed computes it, from which parameters carry `model_parallel`. sharded: the dim along
    which a parameter is split over the tensor axis; `parameters` has its gradient joined. unused:
    parameters without a gradient, which is zero in `parameters`.
    """

    rect: tuple[int, int, int, int]
    output: Tensor
    prefix: Tensor
    input: Tensor
    parameters: dict[str, Tensor]
    unused: list[str]
    norm: float
    sharded: dict[str, int]
    sent: dict[str, int]


def _config(case: Case) -> AxialTransformerConfig:
    return AxialTransformerConfig(
        patch=PATCH,
        dim=case.dim,
        depth=case.depth,
        heads=case.heads,
        mlp_ratio=case.mlp_ratio,
        prefix_tokens=case.prefix,
        drop_path=case.drop_path,
        grid=list(case.grid),
        mlp_chunk=case.mlp_chunk,
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


def build(case: Case) -> nn.Module:
    torch.manual_seed(0)
    backbone = AxialTransformer(_config(case))
    backbone.recompute = case.recompute
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
        valid[1, -1] = False  # an image of another extent: axial embeddings are interpolated
        valid[0, :, -1] = False
    return pixels, valid, grad


def run(model: nn.Module, case: Case, place: Place) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward on this place's tile: (output, prefix tokens, input gradient)."""
    pixels, valid, grad = inputs(case)
    rect = place.rect
    pixels = pixels[:, *rect.scaled(PATCH).slices(_ORIGIN)].clone().requires_grad_()
    if valid is not None:
        valid = valid[:, *rect.slices(_ORIGIN)]
    prefixes: list[Tensor] = []
    backbone = model.get_submodule("backbone")
    backbone.register_forward_hook(lambda _module, _args, out: prefixes.append(out[1].detach()))
    output = model(pixels, valid, place, chance=CHANCE)
    if case.head == "tokens":
        grad = grad[:, *rect.scaled(2).slices(_ORIGIN)]
    else:  # computed alike on every spatial rank, each of which has a share of the objective
        grad = grad / math.prod(place.shape)
    (output * grad).sum().backward()
    assert pixels.grad is not None
    return output.detach(), prefixes[0], pixels.grad


def serial(case: Case) -> Gradients:
    model = build(case)
    place = Place(*case.grid)
    output, prefix, grad = run(model, case, place)
    gradients = _gradients(model)
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    return Gradients(_tuple(place), output, prefix, grad, gradients, _unused(model), norm, {}, {})


def sharded(
    case: Case, mesh: dict[str, int], exchange: str = "swap", swap: str = "auto", overlap: int = 1
) -> Gradients:
    grid = Mesh(**mesh, exchange=exchange, swap=swap, overlap=overlap)
    model = build(case)
    parallelize(model, grid)
    graphs = 0

    def backend(graph: torch.fx.GraphModule, given: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return aot_eager(graph, given)

    if case.compiled:
        by_pass = compiles_passes(_config(case), MeshConfig(**mesh), case.recompute.band)
        compile_layers(model, by_pass=by_pass, backend=backend)
    place = grid.place(*case.grid)
    output, prefix, grad = run(model, case, place)
    assert (graphs > 0) == case.compiled
    gradients = _gradients(model)
    for gradient in gradients.values():
        dist.all_reduce(gradient, group=grid.replicas.handle)
    dims = tensor_dims(model)
    groups = {"row": grid.row, "col": grid.col, "spatial": grid.spatial}
    return Gradients(
        _tuple(place),
        output,
        prefix,
        grad,
        {n: _join(g, dims[n], grid.tensor) if n in dims else g for n, g in gradients.items()},
        _unused(model),
        _norm(model, gradients, grid.tensor),
        dims,
        {name: group.sent_bytes for name, group in groups.items()},
    )


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def _unused(model: nn.Module) -> list[str]:
    """Where nothing of it is pooled, what the last layer makes of the image trains no table."""
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


def _norm(model: nn.Module, gradients: dict[str, Tensor], tensor: Group) -> float:
    """What DeepSpeed makes of `model_parallel`: such squares add up over the tensor axis."""
    squares = torch.zeros(2, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        squares[int(getattr(parameter, "model_parallel", False))] += gradients[name].square().sum()
    dist.all_reduce(squares[1:], group=tensor.handle)
    return math.sqrt(float(squares.sum()))


def _join(part: Tensor, dim: int, group: Group) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(group.size)]
    dist.all_gather(parts, part.contiguous(), group=group.handle)
    return torch.cat(parts, dim)


def _tuple(place: Place) -> tuple[int, int, int, int]:
    rect = place.under(Layout.TILE).rect
    return rect.top, rect.bottom, rect.left, rect.right


_ORIGIN = Place(1, 1).rect


def refusals(cases: list[Case], mesh: dict[str, int], exchange: str = "swap") -> list[str]:
    """What `parallelize` says to the model of each case, nothing where it takes it."""
    grid = Mesh(**mesh, exchange=exchange)
    found = []
    for case in cases:
        try:
            parallelize(build(case), grid)
            found.append("")
        except ValueError as error:
            found.append(str(error))
    return found


@dataclass
class Spread:
    """Of one rank: its parameters, which carry `model_parallel`, and what `tensor_dims` says."""

    parameters: dict[str, Tensor]
    marked: set[str]
    dims: dict[str, int]


def spread(case: Case, mesh: dict[str, int]) -> Spread:
    model = build(case)
    before = torch.get_rng_state()
    parallelize(model, Mesh(**mesh))
    assert torch.equal(before, torch.get_rng_state()), "a generator was used"
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        # A view would keep the whole matrix in memory.
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name
    marked = {name for name, one in named.items() if getattr(one, "model_parallel", False)}
    values = {name: parameter.detach() for name, parameter in named.items()}
    return Spread(values, marked, tensor_dims(model))


def still_trained(mesh: dict[str, int]) -> set[str]:
    """Of a model whose first layer is frozen."""
    model = build(Case((4, 4)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("blocks.0." not in name)
    parallelize(model, Mesh(**mesh))
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def per_head(mesh: dict[str, int], table: Tensor) -> tuple[Tensor, Tensor]:
    """The table's part that this rank has, and the gradient of `part.square().sum()`."""
    model = nn.Sequential(Crossing("heads"))
    parallelize(model, Mesh(**mesh))
    table = table.clone().requires_grad_()
    mine = model(table)
    mine.square().sum().backward()
    assert table.grad is not None
    return mine.detach(), table.grad


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


def left_alone_in_a_graph(backward: bool) -> tuple[bool, bool, str] | None:
    """Rank 0 runs a compiled model on a tensor axis, and no other does; or only its backward. Of
    its error and of where it stood meanwhile, whether both are known as those of a collective; and
    where that was."""
    grid = Mesh(tensor=2)
    model = build(Case((4, 4), depth=1))
    parallelize(model, grid)
    compile_layers(model, backend="aot_eager")
    place, pixels = grid.place(4, 4), torch.zeros(1, 8, 8, 3).double()
    out = model(pixels, None, place) if backward else None
    dist.barrier()
    _set_pg_timeout(timedelta(seconds=2), get_model_parallel_group())
    if grid.tensor.rank != 0:
        return None
    stood: list[tuple[str, bool]] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.2):
            stood.append(position([threading.get_ident()]))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        if out is None:
            with torch.no_grad():
                model(pixels, None, place)
        else:
            out.sum().backward()
    except RuntimeError as error:
        known = from_collective(error)
    else:
        raise AssertionError("nobody was there to add to the sum")
    finally:
        ended.set()
        looking.join()
    where, waited = stood[-1]
    return known, waited, where
