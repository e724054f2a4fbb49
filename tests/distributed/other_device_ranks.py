"""Layers, models, tasks and the training loop on a device that is not the CPU, and on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from distributed.other_device import DEVICE, Elsewhere, Tensors, elsewhere, home
from distributed.panoptic_ranks import a_config, a_scene, an_output
from distributed.task_ranks import CLASSES, IMAGES, Case, Images, a_run, whole_images
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from axialtrain.attention import kernels
from axialtrain.attention.config import AxialConfig
from axialtrain.bench.peak import Peak
from axialtrain.data.batch import Batch
from axialtrain.grid import Place
from axialtrain.mesh.mesh import Mesh
from axialtrain.models.chance import Chance
from axialtrain.models.conv_config import AxialDeepLabConfig, AxialResNetConfig
from axialtrain.models.deeplab import AxialDeepLab, PanopticDeepLab
from axialtrain.models.heads import Classifier
from axialtrain.models.layer import Layer
from axialtrain.models.recompute import Recompute
from axialtrain.models.transformer import AxialTransformer, AxialTransformerConfig
from axialtrain.tasks.classification import Classification, ClassificationConfig
from axialtrain.tasks.panoptic import Panoptic
from axialtrain.tasks.segmentation import Segmentation, SegmentationConfig
from axialtrain.train.config import TrainConfig
from axialtrain.train.loop import Task, picture, to_device, train

GRID = (7, 9)
STEPS = 2
Step = Callable[[nn.Module, list[Tensor]], Sequence[Tensor]]


# --- Layers and models ----------------------------------------------------------------------------


@dataclass
class Beside:
    """off: how far outputs and gradients of inputs and parameters are apart on the two devices, of
    the largest of each tensor. waits: see `Elsewhere`."""

    off: float
    waits: list[str]


def beside(module: nn.Module, inputs: Sequence[Tensor], run: Step) -> Beside:
    module = module.double()
    want = _step(copy.deepcopy(module), [_leaf(x) for x in inputs], run)
    with Elsewhere() as there:
        found = _step(elsewhere(module), [_leaf(Tensors(x.detach())) for x in inputs], run)
    assert len(found) == len(want)
    # What a softmax takes out behind it has a gradient of zero: see the others'.
    least = 1e-3 * max(float(one.abs().max()) for one in want if one.numel())
    off = 0.0
    for one, other in zip(found, want, strict=True):
        if other.numel():
            size = max(float(other.abs().max()), least)
            off = max(off, float((home(one) - other).abs().max()) / size)
    return Beside(off, there.waits)


def _leaf(x: Tensor) -> Tensor:
    return x.requires_grad_() if x.is_floating_point() else x


def _step(module: nn.Module, inputs: list[Tensor], run: Step) -> list[Tensor]:
    outs = run(module, inputs)
    loss = sum((out**2).sum() for out in outs)
    wanted = [x for x in (*inputs, *module.parameters()) if x.requires_grad]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [out.detach() for out in outs] + [grad for grad in grads if grad is not None]


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _mask(*shape: int, share: float = 0.5) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share


def a_layer(config: AxialConfig, *, masked: bool, prefix: int) -> Beside:
    torch.manual_seed(0)
    layer = Layer(32, 2, 64, config, grid=GRID, layer_scale=0.5)

    def run(module: nn.Module, given: list[Tensor]) -> Sequence[Tensor]:
        x, before, *valid = given
        out: tuple[Tensor, Tensor] = module(x, before, Place(*GRID), *valid)
        return out

    inputs = [_drawn(2, *GRID, 32), _drawn(2, prefix, 32, seed=1)]
    return beside(layer, inputs + [_mask(2, *GRID)] * masked, run)


def a_transformer(kept: Recompute, *, masked: bool) -> Beside:
    """While training; where `kept` has bands, the pixels are on the host."""
    torch.manual_seed(0)
    attention = AxialConfig(["row+col"], skip_axis=0.3)
    config = AxialTransformerConfig(
        patch=4, dim=32, depth=2, heads=2, drop_path=0.3, mlp_chunk=50, axial_config=attention
    )
    model = AxialTransformer(config)
    model.recompute = kept
    pixels, chance = _drawn(2, 28, 36, 3), Chance(3, 5, (7, 11))

    def run(module: nn.Module, given: list[Tensor]) -> Sequence[Tensor]:
        valid, *own = given
        tokens, _ = module(pixels if kept.band else own[0], valid, Place(*GRID), chance=chance)
        return (tokens,)

    valid = _mask(2, *GRID, share=0.3 if masked else 1.0)
    return beside(model, [valid] if kept.band else [valid, pixels], run)


def embedded(*, masked: bool) -> Beside:
    """A transformer with prefix tokens and embeddings of places."""
    torch.manual_seed(0)
    attention = AxialConfig(["row", "global"], positions="axial")
    config = AxialTransformerConfig(
        patch=4, dim=32, depth=2, heads=2, grid=list(GRID), prefix_tokens=2, axial_config=attention
    )
    inputs = [_drawn(2, 28, 36, 3)] + [_mask(2, *GRID)] * masked
    return beside(AxialTransformer(config), inputs, lambda module, given: module(*given))


def convolutional(*, masked: bool) -> Beside:
    """A panoptic Axial-DeepLab, and with it an Axial-ResNet."""
    torch.manual_seed(0)
    trunk = {"layers": [1, 1, 1, 1], "width": 0.125, "heads": 2, "image": None, "span": 9}
    few = {"semantic": 6, "instance": 5, "low_semantic": [3, 2], "low_instance": [2, 3], "head": 4}
    config = AxialDeepLabConfig(AxialResNetConfig(**trunk, output_stride=16), aspp=[2, 3], **few)
    model = PanopticDeepLab(AxialDeepLab(config), CLASSES)
    inputs = [_drawn(2, 64, 96, 3)] + [_mask(2, 4, 6, share=0.7)] * masked
    return beside(model, inputs, lambda module, given: (module(*given),))


def held_by_a_step(config: AxialTransformerConfig, kept: Recompute, side: int) -> tuple[int, int]:
    """Bytes at once of a step in bf16 on one image of side x side px that has a class, the weights
    apart: on the device, and on the host beside the pixels, which are there. There are sizes
    alone, and no numbers, so that it may be a gigapixel."""
    with torch.device("meta"):
        model = Classifier(AxialTransformer(config), CLASSES, "mean")
    model.backbone.recompute = kept
    across = side // config.patch_px
    limits = mock.patch.dict(kernels.LIMITS, {DEVICE.type: kernels.LIMITS["cuda"]})
    with FakeTensorMode(), mock.patch.object(F, "scaled_dot_product_attention", _flash), limits:
        for one in model.modules():
            for name, parameter in one._parameters.items():
                if parameter is not None:
                    own = torch.empty(parameter.shape, dtype=torch.bfloat16, device=DEVICE)
                    one._parameters[name] = nn.Parameter(own)
        pixels = torch.empty(1, side, side, config.bands, dtype=torch.bfloat16)
        with Peak(DEVICE.type) as peak, Peak("cpu") as host:
            logits = model(pixels, None, Place(across, across))
            target = torch.zeros(1, dtype=torch.long, device=DEVICE)
            F.cross_entropy(logits.float(), target).backward()
    return peak.bytes, host.bytes


def _flash(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: None, scale: float) -> Tensor:
    """What a GPU takes: elsewhere torch knows but the formula."""
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
    return out


# --- Tasks ----------------------------------------------------------------------------------------


@dataclass
class Judged:
    """numbers: loss and targets of each image, and the gradient of the output."""

    numbers: list[Tensor]
    summary: dict[str, float]
    pictures: list[Any]


def judged(name: str, *, there: bool) -> Judged:
    """What a task says of what a model could say."""
    task, batch, output = _said(name)
    with Elsewhere() if there else nullcontext():
        if there:
            batch, output = to_device(batch, DEVICE), Tensors(output)
        task.prepare(Mesh(), batch.weight.device)
        output.requires_grad_()
        sums, counts = task.loss(output, batch)
        (grad,) = torch.autograd.grad(sums.sum(), output)
        found, output = [sums.detach(), counts, grad], output.detach()
        summary, panels = task.summary(task.scores(output, batch)), []
        if name != "classification":
            panels = task.panels(output, batch, mean=[0.0] * 3, std=[1.0] * 3)
    own = [home(x) for x in found] if there else found
    return Judged(own, summary, [panel.pixels for panel in panels])


def _said(name: str) -> tuple[Task, Batch, Tensor]:
    """The task, whole images, and an output for them."""
    if name == "panoptic":
        scene = a_scene(GRID)
        return Panoptic(a_config()), scene, an_output(scene)
    batch = whole_images(GRID, 4, dtype=torch.float64)
    if name == "classification":
        batch = replace(batch, targets=torch.arange(IMAGES) % CLASSES)
        config = ClassificationConfig(CLASSES, smoothing=0.1)
        return Classification(config), batch, _drawn(IMAGES, CLASSES)
    cells = 4 if name == "segmentation of pixels" else 2  # of the patch, 4 px
    output = _drawn(IMAGES, GRID[0] * cells, GRID[1] * cells, CLASSES)
    return Segmentation(SegmentationConfig(CLASSES, cells=cells)), batch, output


# --- The training loop ----------------------------------------------------------------------------


class Plain:
    """Stands in for the engine, which knows no other device: SGD."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.model(*args, **kwargs)
        return out

    def train(self) -> None:
        self.model.train()

    def eval(self) -> None:
        self.model.eval()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        grads = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(torch.stack(grads).norm())


@dataclass
class Looped:
    """logged: of each step. waits: in the steps, see `Elsewhere`. panels: of the picture."""

    logged: list[dict[str, float]]
    waits: list[str]
    panels: int


def a_training(case: Case, kept: Recompute, *, there: bool) -> Looped:
    mesh = Mesh()
    images = Images(case.grid, case.model.patch, mesh)
    waits: list[str] = []
    with Elsewhere() if there else nullcontext() as device:
        model = case.build()
        model.backbone.recompute = kept
        length = TrainConfig(
            STEPS, IMAGES, images.micro_batch, recompute=kept.every, offload=kept.offload,
            recompute_band=kept.band,
        )  # fmt: skip
        engine = Plain(elsewhere(model) if there else model)
        run = a_run(case, mesh, engine, torch.float32, train=length)
        run.validation = None
        if device is not None:
            run.device = DEVICE
        train(run)
        if device is not None:
            waits = list(device.waits)
        panels = picture(run)
    assert panels is not None
    return Looped(run.tracker.logged, waits, len(panels))
