"""What a training step of an axial transformer takes of a device's memory, by arithmetic.

Counted is what grows with the image, and the weights; not what kernels, allocators and the head
take beside it. M are the bytes of a rank's tokens once, [B, h, w, D].
"""

from __future__ import annotations

from dataclasses import dataclass

from axialtrain.attention.config import Pass
from axialtrain.models.recompute import Recompute
from axialtrain.models.transformer import AxialTransformerConfig

# Bytes of a parameter: in bf16 weight, gradient, fp32 master, two moments, and the gradient once
# more in fp32 where it is summed, which is less; in fp32 weight, gradient, moments and that sum.
PARAMETER = 20
# M kept for backward by a pass: the norm's input and output, q, k, v, and what goes into the output
# projection. By the MLP: the norm's input and output, and where it is not taken in chunks twice its
# width.
PASS, MLP = 6, 2
# M of gradients at a time, at most: of the residual stream, of what a pass adds to it, of q, k, v
# and of the norm's output.
GRADIENTS = 6


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the peak: the backward of the layers that were computed again last.

    weights: with gradients and moments. pixels: as they were read, and as patches. kept: tokens
    that wait on the device. layers: what is kept of the layers at hand. host: tokens that wait in
    the host's memory.
    """

    weights: int
    pixels: int
    kept: int
    layers: int
    gradients: int
    host: int

    @property
    def device(self) -> int:
        """All but what waits on the host."""
        return self.weights + self.pixels + self.kept + self.layers + self.gradients


def step_memory(
    config: AxialTransformerConfig,
    recompute: Recompute,
    *,
    tokens: int,
    parameters: int,
    value_bytes: int = 2,
) -> StepMemory:
    """tokens: B h w of one rank. parameters: of the model. value_bytes: 2 in bf16, 4 in fp32.

    Raises ValueError for passes that are not rows and columns, whose cost is another one.
    """
    others = config.passes - {Pass.ROW, Pass.COL}
    if others:
        raise ValueError(
            f"the memory of {sorted(which.value for which in others)} passes is not known: allowed "
            "are row and col"
        )
    of_tokens = tokens * config.dim * value_bytes
    # Means and deviations of the norms and the logarithms of attention, in fp32.
    of_pass = PASS * of_tokens + tokens * 4 * (2 + config.heads)
    of_mlp = MLP * of_tokens + tokens * 4 * 2
    if config.mlp_chunk is None or tokens <= config.mlp_chunk:
        of_mlp += 2 * tokens * config.mlp_width * value_bytes
    of_layer = [
        len(config.axial_config.passes(index)) * of_pass + of_mlp for index in range(config.depth)
    ]
    every = recompute.every or config.depth
    groups = recompute.groups(config.depth)
    hosted = sum(recompute.on_host(group) for group in range(groups))
    values = tokens * config.patch_px**2 * config.bands
    return StepMemory(
        weights=parameters * PARAMETER,
        pixels=values * (4 + value_bytes),
        kept=(groups - hosted) * of_tokens,
        layers=max(sum(of_layer[at : at + every]) for at in range(0, config.depth, every)),
        gradients=GRADIENTS * of_tokens,
        host=hosted * of_tokens,
    )
