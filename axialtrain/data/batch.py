"""A micro-batch as one rank holds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from axialtrain.data.damage import Damage
from axialtrain.grid import Place


@dataclass(frozen=True)
class Batch:
    """One micro-batch on one rank, B samples; p is the patch, h and w are this rank's tokens.

    pixels: float32, or what `Loader` was told, [B, h*p, w*p, bands], normalised, 0 where missing.
    labels: uint8 [B, h*p, w*p], 255 where there is no target or no pixel; None without labels.
    present: bool [B, h*p, w*p], where there is a pixel.
    valid: bool [B, h, w], whether a token has any present pixel.
    weight: float32 [B], 1, or 0 for a filler, which has neither pixels nor valid tokens.
    place: the whole token grid (the largest of the samples), and this rank's part of it.
    ids: names of the samples. samples: int64 [B], their index in the endless order (a filler has
    that of the sample whose size it repeats), to key random draws.
    targets: int64 [B], the class of the image that each sample is cut from (a filler has that of
    the sample whose size it repeats); None unless every image of the shards has one.
    instances: int32 [B, h*p, w*p], 0 where there is no instance or no pixel; None unless every
    image of the shards has an instance raster.
    faults: what this rank found damaged of each sample, and left out as missing; () where that is
    not done (`data.damage.policy` is raise).
    """

    pixels: Tensor
    labels: Tensor | None
    present: Tensor
    valid: Tensor
    weight: Tensor
    place: Place
    ids: tuple[str, ...]
    samples: Tensor
    targets: Tensor | None = None
    instances: Tensor | None = None
    faults: tuple[tuple[Damage, ...], ...] = ()


def moved(batch: Batch, move: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with `move` of each tensor that a model or a loss takes."""
    return replace(
        batch,
        pixels=move(batch.pixels),
        labels=None if batch.labels is None else move(batch.labels),
        present=move(batch.present),
        valid=move(batch.valid),
        weight=move(batch.weight),
        targets=None if batch.targets is None else move(batch.targets),
        instances=None if batch.instances is None else move(batch.instances),
    )


def pinned(batch: Batch) -> Batch:
    """The batch in pinned memory."""
    return moved(batch, Tensor.pin_memory)
