"""From what a panoptic model puts out to segments: one class and instance for each pixel.

Source: Panoptic-DeepLab (arXiv 1911.10194, section 3.3): peaks of the centre heat, things grouped
around the centre that their offset points at, a majority vote for the class of each, small stuff
left out. An image lies on all ranks of `mesh.spatial`, so peaks look over the border, centres are
those of the whole image, and votes and areas are counted over all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from axialtrain.data.batch import Batch
from axialtrain.grid import Place, Rect
from axialtrain.mesh.collectives import gather_objects, sum_over
from axialtrain.mesh.exchange import fetch
from axialtrain.mesh.mesh import Mesh
from axialtrain.tasks.instances import CHUNK, SEGMENTS, VOID
from axialtrain.tasks.objective import widened

MOST_NMS = 1024  # px, of the border that each rank then fetches from its neighbours
HEAT = 2.0**-12  # what counts as a difference of heat; that of a centre is 1
MOST = 2**14  # steps of HEAT that are told apart: 4 times the heat of a centre


@dataclass
class MergeConfig:
    """How segments are read off the model's output.

    threshold: centre heat that a centre must be above. nms: px, side of the square around a centre
    in which nothing is hotter. centres: at most so many in an image, the hottest. stuff_area: px
    that a class of stuff must have in an image, or it becomes void there.
    """

    threshold: float = 0.1
    nms: int = 7
    centres: int = 200
    stuff_area: int = 2048

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"task.merge.threshold={self.threshold}: allowed is 0 to below 1")
        if type(self.nms) is not int or not 1 <= self.nms < MOST_NMS or self.nms % 2 == 0:
            raise ValueError(
                f"task.merge.nms={self.nms}: allowed are odd numbers, 1 to {MOST_NMS - 1}"
            )
        if not 1 <= self.centres < SEGMENTS:
            raise ValueError(f"task.merge.centres={self.centres}: allowed are 1 to {SEGMENTS - 1}")
        if type(self.stuff_area) is not int or self.stuff_area < 0:
            raise ValueError(
                f"task.merge.stuff_area={self.stuff_area}: allowed are whole numbers from 0"
            )


@torch.no_grad()
def merged(
    output: Tensor, batch: Batch, things: list[int], config: MergeConfig, mesh: Mesh
) -> Tensor:
    """The segments of this rank's tile: int64 [B, h * p, w * p], class * SEGMENTS + instance.

    output: [B, h * p, w * p, classes + 3], semantic logits, centre heat, offset (dy, dx) in px.
    things: the classes that have instances. The instances of an image are numbered from 1, by their
    centre's heat; that of stuff is 0. VOID, -1: missing pixels and invalid tokens, stuff of too
    small an area, and things where the image has no centre.
    """
    output = widened(output)
    classes = output.shape[-1] - 3
    place = batch.place.finer(batch.pixels.shape[1] // batch.valid.shape[1])
    here = batch.present & _per_pixel(batch.valid, batch.place, place)
    semantic = output[..., :classes].argmax(-1)
    is_thing = among(things, classes, output.device)

    instance = torch.zeros_like(semantic)
    found = find_centres(output[..., classes].where(here, 0), place, config, mesh)
    for index, centres in enumerate(found):
        if len(centres):
            pixels = (is_thing[semantic[index]] & here[index]).nonzero()
            row, col = pixels.unbind(1)
            corner = torch.tensor((place.rect.top, place.rect.left))
            corner = corner.to(pixels.device, non_blocking=True)
            aims = (pixels + corner) + output[index, row, col, classes + 1 :]
            instance[index, row, col] = 1 + _nearest(aims, centres.to(aims))

    # How many pixels of each instance have each class; row 0 is of those without instance.
    rows = config.centres + 1
    images = torch.arange(len(output), device=output.device)[:, None, None]
    ballots = ((images * rows + instance) * classes + semantic)[here]
    votes = torch.bincount(ballots, minlength=len(output) * rows * classes)
    votes = sum_over(votes, mesh.spatial).view(len(output), rows, classes)
    winner = votes.argmax(-1).gather(1, instance.flatten(1)).view_as(instance)
    kept = (votes[:, 0] >= config.stuff_area) & ~is_thing
    stuff = kept.gather(1, semantic.flatten(1)).view_as(semantic)
    segments = torch.where(instance > 0, winner, semantic) * SEGMENTS + instance
    return segments.where(here & ((instance > 0) | stuff), VOID)


def among(classes: Sequence[int], count: int, device: torch.device) -> Tensor:
    """bool [count]: which of the first `count` numbers are among `classes`."""
    named = [number in classes for number in range(count)]
    return torch.tensor(named).to(device, non_blocking=True)  # the host need not wait for it


def find_centres(heat: Tensor, place: Place, config: MergeConfig, mesh: Mesh) -> list[Tensor]:
    """The centres of each image, on all of its ranks: B times int64 [N, 2], y and x in px.

    heat: [B, h, w] of this rank's part of the pixels, under `place`. They come hottest first, of
    equal heat from top to bottom, then from left to right; at most `config.centres`.

    Heats that differ by less than HEAT are equal, and of equal ones near each other the first is
    the centre. As published, all pixels of a plateau are; where enlargement makes plateaus, at the
    border, rounding would decide which those are, and that depends on the mesh.
    """
    reach = config.nms // 2
    steps = torch.where(heat > config.threshold, heat / HEAT, 0.0).double().round()
    # One number that no two pixels share, and whole up to 2^53: first by heat, then by coordinates.
    rect, area = place.rect, place.height * place.width
    rows = torch.arange(rect.top, rect.bottom, device=heat.device)
    cols = torch.arange(rect.left, rect.right, device=heat.device)
    behind = area - 1 - (rows[:, None] * place.width + cols)
    heat = torch.where(steps > 0, steps.clamp_max(MOST) * area + behind, 0.0)  # 0 outside, too

    def around(rect: Rect) -> Rect:
        return Rect(rect.top - reach, rect.bottom + reach, rect.left - reach, rect.right + reach)

    wide = fetch(heat, place, around, mesh, across_rows=True, across_cols=True)
    peaks = (heat > 0) & (heat == F.max_pool2d(wide, config.nms, stride=1))
    mine = []
    for values, peak in zip(heat, peaks, strict=True):
        row, col = peak.nonzero(as_tuple=True)  # from top to bottom, then from left to right
        order = values[row, col].argsort(descending=True)[: config.centres]
        row, col = row[order], col[order]
        y, x = row + place.rect.top, col + place.rect.left
        mine.append(list(zip((-values[row, col]).tolist(), y.tolist(), x.tolist(), strict=True)))
    found = []
    for parts in zip(*gather_objects(mine, mesh.spatial), strict=True):
        best = sorted(chain(*parts))[: config.centres]
        points = [(y, x) for _, y, x in best]
        found.append(torch.tensor(points, dtype=torch.int64).view(-1, 2))
    return [centres.to(heat.device, non_blocking=True) for centres in found]


def _nearest(aims: Tensor, centres: Tensor) -> Tensor:
    """Of each of [P, 2], which of the centres [N, 2] is the nearest; of equal ones the first."""
    parts = [torch.zeros(0, dtype=torch.int64, device=aims.device)]
    for part in aims.split(max(1, CHUNK // len(centres))):
        dy, dx = (part[:, dim, None] - centres[:, dim] for dim in (0, 1))
        parts.append((dy * dy + dx * dx).argmin(1))
    return torch.cat(parts)


def _per_pixel(valid: Tensor, tokens: Place, pixels: Place) -> Tensor:
    """[B, h, w] of tokens -> [B, h * p, w * p] of their pixels."""
    patch = pixels.height // tokens.height
    return valid.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
