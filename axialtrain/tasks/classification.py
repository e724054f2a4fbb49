"""Classification of whole images: cross-entropy, top-1 and top-5, and DeiT's distillation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axialtrain.data.batch import Batch
from axialtrain.data.config import PerBand
from axialtrain.mesh.exchange import Exchange
from axialtrain.mesh.mesh import Mesh
from axialtrain.models.deeplab import AxialDeepLab
from axialtrain.models.heads import POOLS, Classifier
from axialtrain.models.registry import Backbone, ModelConfig
from axialtrain.models.timm_weights import HEADS, config_of, from_timm, load_timm, read_timm
from axialtrain.models.transformer import AxialTransformer, AxialTransformerConfig
from axialtrain.tasks.objective import widened
from axialtrain.tasks.panels import Panel, image_panel

KINDS = ("hard", "soft")
MAX_CLASSES = 2**16


@dataclass
class DistillConfig:
    """What the distillation token learns (DeiT, arXiv 2012.12877, section 4).

    teacher: timm:NAME, or a file of weights of a timm ViT or DeiT, of the same classes; null: the
        token learns the labels. It sees the image whole, at the student's resolution.
    kind: "hard", the teacher's decision (eq. 3), or "soft", its distribution (eq. 2).
    weight: of the teacher beside the labels, lambda; eq. 3 has 0.5. temperature: tau, of "soft".
    """

    teacher: str | None = None
    kind: str = "hard"
    weight: float = 0.5
    temperature: float = 3.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"task.distill.kind={self.kind!r}: allowed are {', '.join(KINDS)}")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"task.distill.weight={self.weight}: allowed is 0 to 1")
        if not 0 < self.temperature < 1e6:
            raise ValueError(
                f"task.distill.temperature={self.temperature}: allowed are numbers above 0"
            )


@dataclass
class ClassificationConfig:
    """classes: number of classes, of the images' labels 0..classes-1.

    pool: what they are read off, see `Classifier`. smoothing: of the labels. distilled: whether
    the second prefix token has a head of its own; see `DistillConfig` for what it learns.
    """

    classes: int = 2
    pool: str = "prefix"
    smoothing: float = 0.0
    distilled: bool = False
    distill: DistillConfig = field(default_factory=DistillConfig)
    name: str = "classification"

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= MAX_CLASSES:
            raise ValueError(f"task.classes={self.classes}: allowed are 2 to {MAX_CLASSES}")
        if self.pool not in POOLS:
            raise ValueError(f"task.pool={self.pool!r}: allowed are {', '.join(POOLS)}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"task.smoothing={self.smoothing}: allowed is 0 to below 1")
        if self.distill.teacher is not None and not self.distilled:
            raise ValueError(
                f"task.distill.teacher={self.distill.teacher} teaches a distillation token: give "
                "task.distilled=true, and model.prefix_tokens=2"
            )
        taught, plain = self.distill.teacher is not None, DistillConfig()
        for key, read, needs in (
            ("weight", self.distilled, "task.distilled=true"),
            ("kind", taught, "task.distill.teacher"),
            ("temperature", taught, "task.distill.teacher"),
        ):
            value = getattr(self.distill, key)
            if value != getattr(plain, key) and not read:
                raise ValueError(f"task.distill.{key}={value} says nothing without {needs}")


class Classification:
    """A class for each sample: that of the image which it is cut from."""

    def __init__(self, config: ClassificationConfig) -> None:
        self.config = config
        self.metrics: tuple[str, ...] = ("accuracy", "top5")  # of `summary`, the higher the better
        self.classes: int | None = None  # it needs no label rasters
        self.image_classes: int | None = config.classes
        self.instances = False
        self._teacher: nn.Module | None = None

    def build(self, backbone: Backbone) -> nn.Module:
        """Raises ValueError for a model that does not name a class for an image, or not so."""
        config = self.config
        if isinstance(backbone, AxialDeepLab):
            raise ValueError(
                "task=classification names a class for each image, and model=axial_deeplab one for "
                "each pixel: allowed are task=segmentation and task=panoptic, or another model"
            )
        return Classifier(backbone, config.classes, config.pool, distilled=config.distilled)

    def check(self, model: ModelConfig) -> None:
        """Raise ValueError where the teacher cannot be had, or cannot teach a student like that."""
        if self.config.distill.teacher is not None:
            self._teacher_weights(model)

    def _teacher_weights(
        self, model: ModelConfig | None = None
    ) -> tuple[AxialTransformerConfig, dict[str, Tensor]]:
        key = f"task.distill.teacher={self.config.distill.teacher}"
        state = read_timm(str(self.config.distill.teacher), key)
        config = config_of(state, key)
        classes = {state[f"{head}.weight"].shape[0] for head in HEADS if f"{head}.weight" in state}
        if classes != {self.config.classes} or "head.weight" not in state:
            raise ValueError(
                f"{key}: tells {sorted(classes)} classes apart, allowed are those of task.classes="
                f"{self.config.classes}"
            )
        for name in ("patch", "bands") if model is not None else ():
            if getattr(config, name) != getattr(model, name):
                raise ValueError(
                    f"{key}: has {name}={getattr(config, name)}, allowed is the student's, "
                    f"model.{name}={getattr(model, name)}"
                )
        return config, from_timm(state, config, key)

    def teacher(self) -> nn.Module | None:
        """The teacher, built serially: a ViT with `pattern: [global]`, which is timm's own.

        Raises ValueError where it cannot be had, or names other classes.
        """
        if self.config.distill.teacher is None:
            return None
        config, state = self._teacher_weights()
        with torch.random.fork_rng(devices=[]):
            model = Classifier(
                AxialTransformer(config),
                self.config.classes,
                "prefix",
                distilled="head_dist.weight" in state,
            )
        fresh = load_timm(model, state, "task.distill.teacher")
        assert not fresh, "all of it has been checked"
        return model.eval().requires_grad_(False)

    def prepare(self, mesh: Mesh, device: torch.device) -> None:
        """Put the teacher on this rank. It sees the whole image over the mesh, as the student."""
        teacher = self.teacher()
        if teacher is None:
            return
        for module in teacher.modules():
            if isinstance(module, Exchange):
                module.attach(mesh)
        self._teacher = teacher.to(device)

    def inputs(self, batch: Batch) -> tuple[object, ...]:
        """What the model of `build` takes."""
        return batch.pixels, batch.valid, batch.place

    def loss(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss [B], ones [B]): alike on every rank of an image, each of which counts one target.

        output: logits [B, classes], or those of either head, [B, 2, classes], while a distilled
        model trains.
        """
        targets, output = _targets(batch), widened(output)
        smoothing = self.config.smoothing
        one = torch.ones(len(targets), device=output.device)
        if output.ndim == 2:
            losses = F.cross_entropy(output, targets, reduction="none", label_smoothing=smoothing)
            return losses, one
        by_label, by_teacher = output.unbind(1)
        losses = F.cross_entropy(by_label, targets, reduction="none", label_smoothing=smoothing)
        weight = self.config.distill.weight
        return (1 - weight) * losses + weight * self._distillation(by_teacher, batch), one

    def _distillation(self, output: Tensor, batch: Batch) -> Tensor:
        """[B]: the loss of the distillation token."""
        if self._teacher is None:
            assert self.config.distill.teacher is None, "prepare() comes before training"
            smoothing = self.config.smoothing
            return F.cross_entropy(
                output, _targets(batch), reduction="none", label_smoothing=smoothing
            )
        with torch.no_grad():
            taught = self._teacher(batch.pixels, batch.valid, batch.place)
        if self.config.distill.kind == "hard":
            return F.cross_entropy(output, taught.argmax(1), reduction="none")
        heat = self.config.distill.temperature
        ours, theirs = F.log_softmax(output / heat, 1), F.log_softmax(taught / heat, 1)
        return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1) * heat**2

    def scores(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Statistics that add up over batches and ranks: images, hits among 1 and 5 best."""
        targets = _targets(batch)
        best = output.topk(min(5, output.shape[1]), dim=1).indices == targets[:, None]
        counts = torch.stack((torch.ones_like(targets), best[:, 0], best.any(1)))
        return {"counts": (counts * batch.weight).sum(1, dtype=torch.float64)}

    def summary(self, scores: dict[str, Tensor]) -> dict[str, float]:
        """Accuracy, and how often the class is among the five best. Ranks of an image count alike,
        which the quotients do not see."""
        images, first, five = scores["counts"].tolist()
        return {"accuracy": first / max(images, 1), "top5": five / max(images, 1)}

    def panels(self, output: Tensor, batch: Batch, *, mean: PerBand, std: PerBand) -> list[Panel]:
        """The first image, under its class and the predicted one."""
        side = batch.pixels.shape[1] // max(batch.valid.shape[1], 1)
        side = next(n for n in (4, 2, 1) if side % n == 0)
        said = f"class {int(_targets(batch)[0])}, predicted {int(output[0].argmax())}"
        return [image_panel(batch.pixels[0], side, said, mean=mean, std=std)]


def _targets(batch: Batch) -> Tensor:
    assert batch.targets is not None, "checked before the run started"
    return batch.targets
