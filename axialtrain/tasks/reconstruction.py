"""Masked reconstruction: hide tokens, predict their pixels (SimMIM, arXiv 2111.09886)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from axialtrain.data.batch import Batch
from axialtrain.data.config import PerBand
from axialtrain.grid import Place
from axialtrain.mesh.mesh import Mesh
from axialtrain.models.heads import MaskedReconstructor
from axialtrain.models.patches import to_patches
from axialtrain.models.registry import Backbone
from axialtrain.tasks.objective import widened
from axialtrain.tasks.panels import Panel, image_panel


@dataclass
class ReconstructionConfig:
    """hidden: share of the tokens that are hidden, drawn anew for each sample."""

    hidden: float = 0.6
    name: str = "reconstruction"

    def __post_init__(self) -> None:
        if not 0 < self.hidden < 1:
            raise ValueError(f"task.hidden={self.hidden}: allowed are numbers between 0 and 1")


def hidden_tokens(place: Place, samples: Sequence[int], share: float, seed: int) -> Tensor:
    """Which tokens of this rank's tile are hidden: bool [B, h, w].

    Drawn from counters (Philox) over (seed, sample, row of the grid), never from a rank's
    generator, so that the choice at a token is the same on every mesh.
    """
    rect = place.rect
    hidden = np.empty((len(samples), rect.height, rect.width), bool)
    for index, sample in enumerate(samples):
        for row in range(rect.top, rect.bottom):
            # The row is the high word of the counter: rows' streams cannot meet.
            bits = np.random.Philox(key=[seed, sample], counter=[0, 0, 0, row])
            draws = np.random.Generator(bits).random(rect.right)
            hidden[index, row - rect.top] = draws[rect.left :] < share
    return torch.from_numpy(hidden)


class Reconstruction:
    """Mean squared error at the pixels of hidden tokens; missing pixels are no targets."""

    def __init__(self, config: ReconstructionConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.metrics: tuple[str, ...] = ()  # of `summary`, the higher the better
        self.classes: int | None = None  # it needs no labels
        self.image_classes: int | None = None
        self.instances = False

    def build(self, backbone: Backbone) -> nn.Module:
        return MaskedReconstructor(backbone)

    def prepare(self, mesh: Mesh, device: torch.device) -> None:
        """Nothing beside the model has to be on this rank."""

    def inputs(self, batch: Batch) -> tuple[object, ...]:
        """What the model of `build` takes."""
        return batch.pixels, batch.valid, self._hidden(batch), batch.place

    def loss(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(summed squared error [B], number of target values [B]) of this rank's tile.

        output: [B, h, w, bands * patch^2].
        """
        bands = batch.pixels.shape[-1]
        patch = _patch(output, bands)
        target = to_patches(batch.pixels, patch)
        present = to_patches(batch.present[..., None], patch) & self._hidden(batch)[..., None]
        present = present.repeat(1, 1, 1, bands)  # `to_patches` puts bands outermost
        error = torch.where(present, (widened(output) - target) ** 2, 0.0)
        return error.sum((1, 2, 3)), present.sum((1, 2, 3))

    def scores(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {}  # the loss says it all

    def summary(self, scores: dict[str, Tensor]) -> dict[str, float]:
        return {}

    def panels(self, output: Tensor, batch: Batch, *, mean: PerBand, std: PerBand) -> list[Panel]:
        """Image, what the model saw, and its reconstruction of the hidden tokens."""
        pixels, bands = batch.pixels[0], batch.pixels.shape[-1]
        patch = _patch(output, bands)
        painted = rearrange(output[0], "h w (C p q) -> (h p) (w q) C", C=bands, p=patch, q=patch)
        hidden = self._hidden(batch)[0]
        hidden = hidden.repeat_interleave(patch, 0).repeat_interleave(patch, 1)[..., None]
        side = next(n for n in (4, 2, 1) if patch % n == 0)
        pictures = {
            "image": pixels,
            "seen": torch.where(hidden, 0.0, pixels),
            "reconstruction": torch.where(hidden, painted, pixels),
        }
        return [image_panel(p, side, t, mean=mean, std=std) for t, p in pictures.items()]

    def _hidden(self, batch: Batch) -> Tensor:
        samples = [int(sample) for sample in batch.samples]
        hidden = hidden_tokens(batch.place, samples, self.config.hidden, self.seed)
        return hidden.to(batch.pixels.device, non_blocking=True)


def _patch(output: Tensor, bands: int) -> int:
    return round((output.shape[-1] // bands) ** 0.5)
