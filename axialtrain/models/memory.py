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
# Where passes are computed again in bands, M kept by a pass: its input, which the last one's MLP
# needs no other beside; and M of gradients: of a pass's result, and of its input, which is filled
# band by band. What a band keeps is what a pass and an MLP keep, of its tokens alone, and gradients
# of these.
PASS_IN_BANDS, GRADIENTS_IN_BANDS = 1, 2
# Where no layer is computed again, the last norm is gone back through while all is there that they
# keep: beside it M of its input, and of the gradients of that and of its result.
LAST_NORM = 3
PRESENT = 1  # bytes a pixel: whether it is there


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the peak: the backward of the layers that were computed again last.

    weights: with gradients and moments. pixels: as they were read, and as patches; where they wait
    on the host, which of them are there. kept: tokens that wait on the device. layers: what is kept
    of the layers at hand. band: of the band at hand, where passes are computed again in bands, or
    what the last norm takes beyond it. The plans of masks (`attention.masks`) are not counted.
    host: tokens that wait in the host's memory. host_pixels: pixels that do, of one micro-batch.
    """

    weights: int
    pixels: int
    kept: int
    layers: int
    gradients: int
    host: int
    band: int = 0
    host_pixels: int = 0

    @property
    def device(self) -> int:
        """All but what waits on the host."""
        return self.weights + self.pixels + self.kept + self.layers + self.gradients + self.band

    @property
    def of_host(self) -> int:
        """All that waits on the host."""
        return self.host + self.host_pixels


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
    in_bands = recompute.band > 0
    of_pass = _pass(config, tokens, value_bytes)
    of_mlp = _mlp(config, tokens, value_bytes)
    band = 0
    if in_bands:
        at_hand = min(recompute.band, tokens)
        band = _band(config, at_hand, value_bytes)
        of_pass, of_mlp = PASS_IN_BANDS * of_tokens, 0
        if not recompute.every:
            of_norm = (LAST_NORM - GRADIENTS_IN_BANDS) * of_tokens + tokens * 4 * 2
            band = max(band, of_norm)
    of_layer = [
        len(config.axial_config.passes(index)) * of_pass + of_mlp for index in range(config.depth)
    ]
    every = recompute.every or config.depth
    groups = recompute.groups(config.depth)
    hosted = sum(recompute.on_host(group) for group in range(groups))
    places = tokens * config.patch_px**2
    values = places * config.bands
    return StepMemory(
        weights=parameters * PARAMETER,
        pixels=places * PRESENT if in_bands else values * (4 + value_bytes),
        kept=(groups - hosted) * of_tokens,
        layers=max(sum(of_layer[at : at + every]) for at in range(0, config.depth, every)),
        gradients=(GRADIENTS_IN_BANDS if in_bands else GRADIENTS) * of_tokens,
        host=hosted * of_tokens,
        band=band,
        host_pixels=values * value_bytes + places * PRESENT if in_bands else 0,
    )


def _pass(config: AxialTransformerConfig, tokens: int, value_bytes: int) -> int:
    """Kept by a pass. Means and deviations of its norm and the logarithms of attention in fp32."""
    return tokens * (PASS * config.dim * value_bytes + 4 * (2 + config.heads))


def _mlp(config: AxialTransformerConfig, tokens: int, value_bytes: int) -> int:
    """Kept by an MLP, and by its norm."""
    width = MLP * config.dim
    if config.mlp_chunk is None or tokens <= config.mlp_chunk:
        width += 2 * config.mlp_width
    return tokens * (width * value_bytes + 4 * 2)


def _band(config: AxialTransformerConfig, tokens: int, value_bytes: int) -> int:
    """Of a band: what its last pass and its MLP keep, and of either the gradients at a time."""
    whole = config.mlp_chunk is None or tokens <= config.mlp_chunk
    hidden = 2 * config.mlp_width * value_bytes * (tokens if whole else config.mlp_chunk or 0)
    gradients = GRADIENTS * config.dim * value_bytes * tokens + hidden
    return _pass(config, tokens, value_bytes) + _mlp(config, tokens, value_bytes) + gradients
