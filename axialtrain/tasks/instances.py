"""Instances of things as training targets: ids, centres of mass, centre heat, offsets, segments.

An instance may lie on several ranks. Its centre comes from sums over all of them, of whole numbers,
so it is the same on every mesh, and each rank draws what is near its own tile.

Source: Panoptic-DeepLab (arXiv 1911.10194, section 3) and the conventions of its public code: a
centre is rounded (half to even) before its heat is drawn, in a window of 6 sigma + 3 px; offsets
point to the centre that is not rounded; a thing without an instance id (a crowd) has neither.
"""

from __future__ import annotations

import torch
from torch import Tensor

from axialtrain.grid import Rect
from axialtrain.mesh.collectives import max_over, sum_over
from axialtrain.mesh.mesh import Mesh

SEGMENTS = 2**20  # a segment is class * SEGMENTS + instance; instance ids are below it
VOID = -1  # the segment of a pixel that has none
CHUNK = 2**20  # values that are made at a time where one for each pixel and centre would not fit


def instance_ids(instances: Tensor, things: Tensor, mesh: Mesh) -> tuple[Tensor, int]:
    """The ids of this rank's pixels, 0 where there is no instance, and the end of their range.

    instances: int [B, h, w], 0 or less: none. things: bool [B, h, w], where there is a thing: what
    is labelled as stuff or not at all is in no instance. The range is that of all spatial ranks.
    Raises ValueError, on all of them alike, where an id is too large.
    """
    ids = instances.clamp_min(0).where(things, 0)
    end = int(max_over(ids.amax().long(), mesh.spatial)) + 1
    if end > SEGMENTS:
        raise ValueError(
            f"an instance has id {end - 1}: allowed are 1 to {SEGMENTS - 1}, number the instances "
            "of each image from 1"
        )
    return ids, end


def centres_of_mass(ids: Tensor, end: int, rect: Rect, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Where the instances are: (fp64 [B, end, 2], y and x in px of the image; bool [B, end], which
    ids there are).

    ids: int [B, h, w] of the pixels of `rect`, below `end`.
    """
    image, row, col = ids.nonzero(as_tuple=True)
    index = image * end + ids[image, row, col]
    # In whole numbers, whose sums no order changes.
    values = torch.stack((torch.ones_like(row), row + rect.top, col + rect.left), 1)
    sums = torch.zeros(len(ids) * end, 3, dtype=torch.int64, device=ids.device)
    sums = sum_over(sums.index_add_(0, index, values), mesh.spatial).view(len(ids), end, 3)
    count = sums[..., :1]
    return sums[..., 1:].double() / count.clamp_min(1), count[..., 0] > 0


def centre_heat(centres: Tensor, exist: Tensor, rect: Rect, sigma: float) -> Tensor:
    """The largest of the Gaussians around the centres, fp64 [B, h, w] at the pixels of `rect`.

    centres: [B, N, 2] in px of the image; exist: bool [B, N]. sigma: in px.
    """
    reach = int(3 * sigma + 1)
    far = 2 * reach**2 + 1  # a squared distance that no pixel of a window has
    device = centres.device
    heat = torch.arange(far + 1, dtype=torch.float64, device=device).div(-2 * sigma**2).exp()
    heat[far] = 0
    image, index = exist.nonzero(as_tuple=True)
    y, x = centres[image, index].round().long().unbind(1)
    near = (y + reach >= rect.top) & (y - reach < rect.bottom)
    near &= (x + reach >= rect.left) & (x - reach < rect.right)
    windows = torch.stack((image, y - rect.top, x - rect.left), 1)[near]

    steps = torch.arange(-reach, reach + 1, device=device)
    squares = (steps[:, None] ** 2 + steps**2).int()
    size = (len(centres), rect.height, rect.width)
    nearest = torch.full(size, far, dtype=torch.int32, device=device).flatten()
    for part in windows.split(max(1, CHUNK // squares.numel())):
        i, top, left = part.unbind(1)
        rows, cols = top[:, None] + steps, left[:, None] + steps
        inside = ((rows >= 0) & (rows < rect.height))[:, :, None]
        inside = inside & ((cols >= 0) & (cols < rect.width))[:, None]
        pixels = (i[:, None] * rect.height + rows)[:, :, None] * rect.width + cols[:, None]
        distances = squares.expand_as(inside)[inside]
        nearest.scatter_reduce_(0, pixels[inside], distances, "amin")  # the largest is the nearest
    return heat[nearest.view(size)]


def offsets_to(centres: Tensor, ids: Tensor, rect: Rect) -> Tensor:
    """From each pixel to its instance's centre: fp64 [B, h, w, 2], (dy, dx) in px.

    centres: [B, N, 2] in px of the image; ids: int [B, h, w] below N, of the pixels of `rect`.
    """
    flat = ids.flatten(1).long()
    y, x = (centres[..., dim].gather(1, flat).view_as(ids) for dim in (0, 1))
    rows = torch.arange(rect.top, rect.bottom, device=ids.device)
    cols = torch.arange(rect.left, rect.right, device=ids.device)
    return torch.stack((y - rows[:, None], x - cols), -1)


def true_segments(labels: Tensor, known: Tensor, things: Tensor, ids: Tensor) -> Tensor:
    """The segments of the truth: int64 [B, h, w], VOID where nothing can be wrong.

    labels: [B, h, w]; known: bool, where there is one; things: bool, where it is of a thing; ids:
    of instances. A thing without id is VOID: nobody says how many it is.
    """
    return (labels.long() * SEGMENTS + ids).where(known & ~(things & (ids == 0)), VOID)
