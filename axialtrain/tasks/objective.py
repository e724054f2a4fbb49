"""The loss rule: a mean over the images of an optimizer step, however they are spread.

The objective is the mean over all ranks outside the tensor axis of each rank's loss. So that this
mean is the mean over images, a dense loss on one rank and micro-batch is

    data * accumulation * row * col / train.batch * sum_i w_i * local_sum_i / valid_i

with valid_i, the image's valid targets, summed over row x col only; w_i is 0 for a filler.
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
    """This rank's part of each image's mean loss: w_i * local_sum_i / valid_i, [B].

    local_sum: [B] summed loss of this rank's targets; local_valid: [B] how many there are;
    weight: [B]. Summed over the spatial ranks, the result is each image's mean loss; an image
    without valid targets counts 0.
    """
    local_sum = widened(local_sum)  # so that no count is rounded to bf16
    valid = sum_over(local_valid.detach().to(local_sum), mesh.spatial)
    # where before the division: 0 / 0 would put a NaN into the gradient.
    return torch.where(valid > 0, weight * local_sum / valid.clamp_min(1), 0.0)


def rank_loss(means: Tensor, mesh: Mesh, *, batch: int, accumulation: int) -> Tensor:
    """The loss that this rank hands to the engine for one micro-batch, from `image_means`."""
    return means.sum() * (mesh.replicas.size * accumulation / batch)


def shown_loss(means: Tensor, mesh: Mesh, *, batch: int) -> Tensor:
    """What people see: the mean over the step's images, equal on all ranks, without gradient.

    means: the summed `image_means` of all micro-batches of this rank, a scalar.
    """
    return sum_over(means.detach().double(), mesh.replicas) / batch
