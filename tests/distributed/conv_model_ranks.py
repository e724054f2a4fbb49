"""Rank functions: an optimizer step's loss and gradients of a convolutional model and its task."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from axialtrain.data.batch import Batch
from axialtrain.grid import Place
from axialtrain.mesh.mesh import Mesh
from axialtrain.mesh.parallelize import parallelize
from axialtrain.models.axial_resnet import AxialResNet
from axialtrain.models.conv_config import AxialDeepLabConfig, AxialResNetConfig
from axialtrain.models.deeplab import AxialDeepLab
from axialtrain.tasks.classification import Classification, ClassificationConfig
from axialtrain.tasks.merge import MergeConfig
from axialtrain.tasks.objective import image_means, rank_loss, shown_loss
from axialtrain.tasks.panoptic import Panoptic, PanopticConfig
from axialtrain.tasks.segmentation import IGNORE, Segmentation, SegmentationConfig
from axialtrain.train.engine import Engine, OptimConfig, ZeroConfig

IMAGES, CLASSES = 3, 4
SIDE = 20  # px, of the squares that are instances


@dataclass(frozen=True)
class Case:
    """A model with its task, on images of a grid of tokens.

    task: classification (an Axial-ResNet), segmentation or panoptic (an Axial-DeepLab).
    holes: whether some tokens are left out, and one image ends inside the grid. span: of tables;
    None: that of the grid. training: or evaluation, with running statistics.
    """

    task: str
    grid: tuple[int, int]
    holes: bool = True
    span: int | None = None
    training: bool = True
    dtype: torch.dtype = torch.float64

    @property
    def patch(self) -> int:
        return 32 if self.task == "classification" else 16

    @property
    def config(self) -> AxialResNetConfig | AxialDeepLabConfig:
        trunk = AxialResNetConfig(
            layers=[1, 2, 1, 1],
            width=0.125,
            heads=2,
            image=[size * self.patch for size in self.grid],
            span=self.span,
            output_stride=self.patch,
        )
        if self.task == "classification":
            return trunk
        return AxialDeepLabConfig(
            trunk, [2, 5], semantic=6, instance=5, low_semantic=[3, 2], low_instance=[2, 3], head=4
        )

    def make_task(self) -> Classification | Segmentation | Panoptic:
        if self.task == "classification":
            return Classification(ClassificationConfig(CLASSES, pool="mean", smoothing=0.1))
        if self.task == "segmentation":
            return Segmentation(SegmentationConfig(CLASSES))
        merge = MergeConfig(threshold=0.5, centres=20, stuff_area=50)
        return Panoptic(PanopticConfig(CLASSES, things=[0, 2, 3], hard=0.6, merge=merge))

    def build(self) -> nn.Module:
        """Parameters and running statistics drawn: a zero hides a wrong gradient."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = self.config
            backbone: nn.Module
            if isinstance(config, AxialResNetConfig):
                backbone = AxialResNet(config)
            else:
                backbone = AxialDeepLab(config)
            model = self.make_task().build(backbone)  # type: ignore[arg-type]
            model.double()
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn_like(parameter)
                    parameter.add_(noise, alpha=0.3 / max(1, parameter[0].numel()) ** 0.5)
                for name, buffer in model.named_buffers():
                    buffer.copy_(torch.rand_like(buffer) + (0.5 if name.endswith("var") else -0.5))
        return model.to(self.dtype).train(self.training)

    def images(self, dtype: torch.dtype | None = None) -> Batch:
        """IMAGES whole images, with squares for instances, and of the rest a class each."""
        rows, cols = self.grid
        height, width = rows * self.patch, cols * self.patch
        generator = torch.Generator().manual_seed(3)
        size = (IMAGES, height, width)
        pixels = torch.randn(*size, 3, generator=generator, dtype=torch.float64)
        valid = torch.ones(IMAGES, *self.grid, dtype=torch.bool)
        if self.holes:
            valid &= torch.rand(valid.shape, generator=generator) < 0.8
            valid[1, rows // 2], valid[1, -1], valid[0, :, cols // 2] = False, False, False
            valid[0, 0, 0] = True
        present = valid.repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2)
        present = present & (torch.rand(size, generator=generator) < 0.98)
        y, x = torch.arange(height), torch.arange(width)
        squares = (y[:, None] // SIDE) * math.ceil(width / SIDE) + x // SIDE
        of_square = torch.randint(CLASSES, (IMAGES, int(squares.max()) + 1), generator=generator)
        labels = of_square[:, squares]
        labels[torch.rand(size, generator=generator) < 0.1] = IGNORE
        labels[~present] = IGNORE
        labels[2, :, : width // 3] = IGNORE
        return Batch(
            pixels=torch.where(present[..., None], pixels, 0.0).to(dtype or self.dtype),
            labels=labels.to(torch.uint8),
            present=present,
            valid=valid,
            weight=torch.ones(IMAGES),
            place=Place(*self.grid),
            ids=tuple(f"image {index}" for index in range(IMAGES)),
            samples=torch.arange(IMAGES),
            targets=torch.tensor([1, 3, 0]),
            instances=(squares + 1).expand(IMAGES, -1, -1).to(torch.int32),
        )


def part_of(whole: Batch, place: Place, slots: range) -> Batch:
    """The images of `slots` in the tile of `place`; a slot past the last image is a filler."""
    patch = whole.pixels.shape[1] // whole.place.height
    images = torch.tensor([slot % IMAGES for slot in slots])
    real = torch.tensor([slot < IMAGES for slot in slots])
    tokens = (images, *place.rect.slices(whole.place.grid))
    here = (images, *place.rect.scaled(patch).slices(whole.place.grid.scaled(patch)))
    there = real[:, None, None]
    assert whole.labels is not None
    assert whole.instances is not None
    assert whole.targets is not None
    return replace(
        whole,
        pixels=torch.where(there[..., None], whole.pixels[here], 0.0),
        labels=torch.where(there, whole.labels[here], IGNORE).to(torch.uint8),
        present=whole.present[here] & there,
        valid=whole.valid[tokens] & there,
        weight=whole.weight[images] * real,
        place=place,
        ids=tuple(whole.ids[image] for image in images.tolist()),
        samples=whole.samples[images],
        targets=whole.targets[images],
        instances=torch.where(there, whole.instances[here], 0),
    )


def step(case: Case, mesh: tuple[int, int, int] | None = None) -> dict[str, Any]:
    """One optimizer step's forward and backward, serial or on data x row x col ranks.

    Gradients are what the engine takes: the mean over the ranks.
    """
    axes = Mesh() if mesh is None else Mesh(*mesh)
    model, task = case.build(), case.make_task()
    task.prepare(axes, torch.device("cpu"))
    if mesh is not None:
        parallelize(model, axes)
    images = -(-IMAGES // axes.data.size)
    first = axes.data.rank * images
    place = axes.place(*case.grid)
    batch = part_of(case.images(), place, range(first, first + images))
    output = model(*task.inputs(batch), chance=None)
    means = image_means(*task.loss(output, batch), batch.weight, axes)
    rank_loss(means, axes, batch=IMAGES, accumulation=1).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name}: ZeRO 3 needs a gradient of everything"
        gradients[name] = parameter.grad
        if mesh is not None:
            dist.all_reduce(parameter.grad, group=axes.replicas.handle)
            parameter.grad /= axes.replicas.size
    pixels = place.rect.scaled(case.patch)
    real = slice(first, min(first + images, IMAGES))
    found = {
        "images": real,
        "tile": pixels.slices(case.images().place.grid.scaled(case.patch)),
        "output": output.detach()[: real.stop - real.start],
        "loss": shown_loss(means.sum(), axes, batch=IMAGES),
        "gradients": gradients,
        "buffers": dict(model.named_buffers()),
        "scores": task.scores(output.detach(), batch),
    }
    if isinstance(task, Panoptic):
        found["segments"] = task.segments(output.detach(), batch)[: real.stop - real.start]
    return found


STEPS, LR, CLIP = 3, 0.3, 0.1


def engine_steps(
    case: Case, mesh: tuple[int, int, int], stage: int, precision: str = "fp32"
) -> dict[str, Any]:
    """Optimizer steps on the same images under DeepSpeed, and the state afterwards."""
    axes = Mesh(*mesh)
    model, task = parallelize(case.build(), axes), case.make_task()
    task.prepare(axes, torch.device("cpu"))
    images = -(-IMAGES // axes.data.size)
    first = axes.data.rank * images
    batch = part_of(case.images(), axes.place(*case.grid), range(first, first + images))
    engine = Engine(
        model,
        axes,
        optim=OptimConfig("sgd", lr=LR, weight_decay=0.0, momentum=0.0, clip=CLIP),
        zero=ZeroConfig(stage, persistence_threshold=0),
        micro_batch=images,
        accumulation=1,
        precision=precision,
    )
    engine.train()
    norms, losses = [], []
    for _ in range(STEPS):
        output = engine(*task.inputs(batch), chance=None)
        means = image_means(*task.loss(output, batch), batch.weight, axes)
        engine.backward(rank_loss(means, axes, batch=IMAGES, accumulation=1))
        losses.append(float(shown_loss(means.sum(), axes, batch=IMAGES)))
        norms.append(engine.step(LR))
    engine.eval()
    with torch.no_grad():
        means = image_means(
            *task.loss(engine(*task.inputs(batch), chance=None), batch), batch.weight, axes
        )
    held_out = float(shown_loss(means.sum(), axes, batch=IMAGES))
    kinds = {buffer.dtype for buffer in model.buffers()}
    state = dict(engine.weights())
    engine.close()
    return {
        "norms": norms,
        "losses": losses,
        "held_out": held_out,
        "state": state,
        "buffers_are": kinds,
    }
