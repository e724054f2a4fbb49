"""The loss rule: a mean over the images of an optimizer step, however they are spread.

The objective is the mean over all ranks outside the tensor axis of each rank's loss. So that this
mean is the mean over images, a dense loss on one rank and micro-batch is

    data * accumulation * row * col / train.batch * sum_i w_i * local_sum_i / valid_i

with valid_i, the image's valid targets, summed over row x col only; w_i is 0 for a filler.

A loss of several terms is the sum of them: each is such a mean over its own valid targets, with its
weight in the sums, and an image without targets of one term counts 0 for that term alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from axialtrain.mesh.collectives import sum_over
from axialtrain.mesh.mesh import Mesh


def widened(output: Tensor) -> Tensor:
    """A model's output in fp32 at least: losses are computed in that, whatever the model is in."""
    return output.to(torch.promote_types(output.dtype, torch.float32))


def image_means(local_sum: Tensor, local_valid: Tensor, weight: Tensor, mesh: Mesh) -> Tensor:
    """This rank's part of each image's mean loss: w_i * local_sum_i / valid_i, [B] or [B, T].

    local_sum: [B] summed loss of this rank's targets, or [B, T] of those of T terms, each with the
    term's weight in it; local_valid: alike, how many there are; weight: [B]. Summed over the
    spatial ranks (and the terms), the result is each image's loss; an image without valid targets
    of a term counts 0 there.
    """
    local_sum = widened(local_sum)  # so that no count is rounded to bf16
    valid = sum_over(local_valid.detach().to(local_sum), mesh.spatial)
    weight = weight.view(-1, *[1] * (local_sum.ndim - 1))
    # where before the division: 0 / 0 would put a NaN into the gradient.
    return torch.where(valid > 0, weight * local_sum / valid.clamp_min(1), 0.0)


def judged(local_valid: Tensor, weight: Tensor, mesh: Mesh) -> Tensor:
    """This rank's part of the number of images that have a target, of any term; fillers have none.

    Arguments as in `image_means`. Summed over the replicas, the result is their number: what the
    sum of `image_means` is divided by for a mean that images without targets do not lower.
    """
    valid = sum_over(local_valid.detach().double(), mesh.spatial).view(len(weight), -1).amax(1)
    return (weight * (valid > 0)).sum().double() / mesh.spatial.size


def rank_loss(means: Tensor, mesh: Mesh, *, batch: int, accumulation: int) -> Tensor:
    """The loss that this rank hands to the engine for one micro-batch, from `image_means`."""
    return means.sum() * (mesh.replicas.size * accumulation / batch)


def shown_loss(means: Tensor, mesh: Mesh, *, batch: int) -> Tensor:
    """What people see: the mean over the step's images, equal on all ranks, without gradient.

    means: the summed `image_means` of all micro-batches of this rank, a scalar.
    """
    return sum_over(means.detach().double(), mesh.replicas) / batch


@torch.no_grad()
def hardest(losses: Tensor, valid: Tensor, share: float, mesh: Mesh) -> Tensor:
    """Which targets a loss is over that is only over the hardest `share` of each image's.

    losses: [B, ...] of this rank's part, 0 or more, fp32 or fp64; valid: bool, alike.
    Returns weights like losses: 1 for the int(share * n), but at least one, of largest loss among
    the n valid targets that all ranks of the image have, 0 for the others; those tied at the limit
    share what is left, so that no order among them, which a mesh would change, says which count.
    No gradient goes through the choice (online hard example mining, arXiv 1604.03540).

    The limit is found by bisection: the bits of floats from 0 on are ordered as the floats are. So
    it is exact, and costs a sum of [B] counts over the spatial ranks for each bit (31 or 63).
    """
    kind = torch.int64 if losses.dtype is torch.float64 else torch.int32
    bits = losses.abs().contiguous().view(kind).where(valid, -1).flatten(1)
    targets = sum_over(valid.flatten(1).sum(1), mesh.spatial)
    wanted = (targets.double() * share).long().clamp_min(1).minimum(targets)
    low = torch.zeros_like(wanted)  # as many as are wanted have at least these bits,
    high = torch.full_like(wanted, torch.iinfo(kind).max)  # and fewer have these
    for _ in range(torch.iinfo(kind).bits - 1):
        middle = low + (high - low) // 2
        count = sum_over((bits >= middle[:, None].to(kind)).sum(1), mesh.spatial)
        low, high = (
            middle.where(count >= wanted, low),
            high.where(count >= wanted, middle),
        )
    limit = low[:, None].to(kind)
    above, tied = bits > limit, bits == limit
    counts = sum_over(torch.stack((above.sum(1), tied.sum(1))), mesh.spatial)
    part = (wanted - counts[0]) / counts[1].clamp_min(1).double()
    return (above + tied * part[:, None]).to(losses).view_as(losses)
