"""Rank functions: models and tasks in bf16, on batches in fp32, serial and on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from distributed.task_ranks import CLASSES, IMAGES, part_of, whole_images
from torch import Tensor, nn

from axialtrain.attention.config import AxialConfig
from axialtrain.data.batch import Batch
from axialtrain.mesh.exchange import fetch
from axialtrain.mesh.mesh import Mesh
from axialtrain.mesh.parallelize import parallelize, tensor_dims
from axialtrain.models.chance import Chance
from axialtrain.models.transformer import AxialTransformer, AxialTransformerConfig
from axialtrain.tasks.classification import Classification, ClassificationConfig
from axialtrain.tasks.objective import image_means, rank_loss
from axialtrain.tasks.reconstruction import Reconstruction, ReconstructionConfig
from axialtrain.tasks.segmentation import Segmentation, SegmentationConfig

PATCH = 2
GRID = (13, 10)
CHANCE = Chance(seed=1, step=0, samples=tuple(range(IMAGES)))
TASKS: dict[str, Callable[[], Any]] = {
    "segmentation": lambda: Segmentation(SegmentationConfig(CLASSES, cells=2)),
    "reconstruction": lambda: Reconstruction(ReconstructionConfig(0.5), seed=3),
    "mean": lambda: Classification(ClassificationConfig(CLASSES, "mean", smoothing=0.1)),
    "prefix": lambda: Classification(ClassificationConfig(CLASSES, "prefix")),
    "attention": lambda: Classification(ClassificationConfig(CLASSES, "attention")),
    "distilled": lambda: Classification(ClassificationConfig(CLASSES, distilled=True)),
}


@dataclass(frozen=True)
class Case:
    """A task (a key of TASKS), and what its model has beside the least: keys of both configs."""

    task: str
    attention: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {
    **{
        f"{passes} {positions}": Case("segmentation", {"pattern": [passes], "positions": positions})
        for passes in ("row", "col", "window", "shifted", "global", "row+col")
        for positions in ("rope", "relative")
    },
    "axial, summed, layer scale": Case(
        "reconstruction", {"positions": "axial", "fusion": "sum"}, {"layer_scale": 0.5}
    ),
    "left out at random, mean": Case(
        "mean",
        {"positions": "none", "share_projections": False, "skip_axis": 0.6},
        {"drop_path": 0.5, "grid_embedding": True},
    ),
    "a ViT": Case("prefix", {"pattern": ["global"]}, {"prefix_tokens": 1, "grid_embedding": True}),
    "summed, clipped, distilled": Case(
        "distilled",
        {"pattern": ["window+row"], "positions": "relative", "span": 3, "fusion": "sum"},
        {"prefix_tokens": 3},
    ),
    "registers, attention pooling": Case(
        "attention", {"share_projections": False}, {"prefix_tokens": 2}
    ),
}


@dataclass
class Trained:
    """What one forward and backward gave, on this rank; gradients: whole, as they would be summed.

    dtypes: of every floating tensor that a module gave, by the module's name.
    """

    loss: Tensor
    output: Tensor
    gradients: dict[str, Tensor]
    dtypes: dict[str, set[torch.dtype]]


def build(case: Case) -> nn.Module:
    """In fp32, with values that bf16 has too: what differs afterwards is the arithmetic."""
    torch.manual_seed(0)
    config = AxialTransformerConfig(
        patch=PATCH,
        dim=32,
        depth=2,
        heads=4,
        mlp_ratio=1.5,
        grid=list(GRID),
        axial_config=AxialConfig(**({"window": 4} | case.attention)),
        **case.model,
    )
    model: nn.Module = TASKS[case.task]().build(AxialTransformer(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or not name.endswith("weight"):  # zeros hide a wrong gradient
                parameter += 0.3 * torch.randn(parameter.shape)
    return model.bfloat16().float()


def batch_of(mesh: Mesh) -> Batch:
    whole = whole_images(GRID, PATCH)
    whole = replace(whole, targets=whole.samples * 2 % CLASSES)
    return part_of(whole, mesh.place(*GRID), range(IMAGES))


def trained(case: Case, dtype: torch.dtype, mesh: Mesh | None = None) -> Trained:
    mesh = Mesh() if mesh is None else mesh
    model = parallelize(build(case).to(dtype), mesh)
    dtypes: dict[str, set[torch.dtype]] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(_noting(dtypes.setdefault(name, set())))
    task, batch = TASKS[case.task](), batch_of(mesh)
    output = model(*task.inputs(batch), chance=CHANCE)
    means = image_means(*task.loss(output, batch), batch.weight, mesh)
    loss = rank_loss(means, mesh, batch=IMAGES, accumulation=1)
    loss.backward()
    gradients = {}
    for name, value in model.named_parameters():
        assert value.grad is not None, f"{name} has no gradient"
        gradients[name] = value.grad
    return Trained(loss.detach(), output.detach(), gradients, dtypes)


def _noting(seen: set[torch.dtype]) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        for value in output if isinstance(output, tuple) else (output,):
            if value.is_floating_point():
                seen.add(value.dtype)

    return hook


def trained_on(case: Case, mesh: Mesh) -> Trained:
    """In bf16 on the mesh, its gradients summed over ranks in fp32, as the engine does it."""
    found = trained(case, torch.bfloat16, mesh)
    dims = tensor_dims(parallelize(build(case), mesh))
    for name, gradient in found.gradients.items():
        gradient = gradient.float()
        dist.all_reduce(gradient, group=mesh.replicas.handle)
        gradient /= mesh.replicas.size  # the objective is the mean over ranks
        if name in dims:
            parts = [torch.empty_like(gradient) for _ in range(mesh.tensor.size)]
            dist.all_gather(parts, gradient.contiguous(), group=mesh.tensor.handle)
            gradient = torch.cat(parts, dims[name])
        found.gradients[name] = gradient
    return found


def all_on_four_ranks(cases: list[tuple[Case, dict[str, Any]]]) -> list[Trained]:
    """Each case on its mesh."""
    return [trained_on(case, Mesh(**options)) for case, options in cases]


def added_up() -> Tensor:
    """The gradient of tokens that each of four ranks fetched: 256 from the first, 1 from others."""
    mesh = Mesh(row=2, col=2)
    place = mesh.place(4, 4)
    x = torch.zeros(1, 2, 2, 3, dtype=torch.bfloat16, requires_grad=True)
    whole = fetch(x, place, lambda _: place.grid, mesh, across_rows=True, across_cols=True)
    whole.backward(torch.full_like(whole, 256.0 if mesh.spatial.rank == 0 else 1.0))
    assert x.grad is not None
    return x.grad
