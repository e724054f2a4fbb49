"""What is kept of the layers for backward: everything, or tokens now and then."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from axialtrain.attention.masks import GridMask
from axialtrain.grid import Place
from axialtrain.models.chance import Chance
from axialtrain.models.layer import Layer


@dataclass(frozen=True)
class Recompute:
    """every: 0 keeps all activations; n keeps the tokens before every n-th layer, and computes
    those n layers again in backward.
    offload: the share of these tokens, from 0 to 1, that waits for backward in the host's memory,
    spread evenly over the depth.
    band: tokens of a band of lines (see `Layer`): a pass of rows or columns keeps its input alone,
    and is computed again in backward band by band. 0: a pass keeps all that its backward needs.
    """

    every: int = 0
    offload: float = 0.0
    band: int = 0

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"train.recompute={self.every}: allowed are whole numbers from 0")
        if self.band < 0:
            raise ValueError(
                f"train.recompute_band={self.band}: allowed are whole numbers from 0, tokens"
            )
        if not 0 <= self.offload <= 1:
            raise ValueError(f"train.offload={self.offload}: allowed are numbers from 0 to 1")
        if self.offload and not self.every:
            raise ValueError(
                f"train.offload={self.offload} is a share of what train.recompute keeps: allowed "
                "is 0 with train.recompute=0"
            )

    def groups(self, depth: int) -> int:
        """How often tokens are kept in a model of `depth` layers."""
        return -(-depth // self.every) if self.every else 0

    def on_host(self, group: int) -> bool:
        """Whether the tokens before group `group` of layers wait in the host's memory."""
        return int((group + 1) * self.offload) > int(group * self.offload)


def run_layers(
    layers: Sequence[nn.Module],
    x: Tensor,
    prefix: Tensor,
    place: Place,
    valid: GridMask | Tensor | None,
    chance: Chance | None,
    recompute: Recompute,
) -> tuple[Tensor, Tensor, Place]:
    """x: [B, h, w, D], prefix: [B, n, D] -> the same after `layers`, and where the tokens are then.

    valid: bool [B, H, W] of the whole grid, or None.
    """
    if not recompute.every:
        x, prefix = _through(layers, x, prefix, place, valid, chance, recompute.band)
        return x, prefix, _after(layers, place)
    for group, first in enumerate(range(0, len(layers), recompute.every)):
        some = layers[first : first + recompute.every]
        # torch keeps what goes into a checkpoint as it keeps any tensor, so its hooks see it.
        kept = save_on_cpu(pin_memory=x.is_cuda) if recompute.on_host(group) else nullcontext()
        with kept:
            x, prefix = checkpoint(
                _through, some, x, prefix, place, valid, chance, recompute.band, use_reentrant=False
            )
        place = _after(some, place)
    return x, prefix, place


def _through(
    layers: Sequence[nn.Module],
    x: Tensor,
    prefix: Tensor,
    place: Place,
    valid: GridMask | Tensor | None,
    chance: Chance | None,
    band: int,
) -> tuple[Tensor, Tensor]:
    for layer in layers:
        assert isinstance(layer, Layer)
        x, prefix = layer(x, prefix, place, valid, chance, band)
        place = layer.exit(place)
    return x, prefix


def _after(layers: Sequence[nn.Module], place: Place) -> Place:
    for layer in layers:
        assert isinstance(layer, Layer)
        place = layer.exit(place)
    return place
