"""Pixels become tokens, one a patch."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from axialtrain.grid import Place
from axialtrain.mesh.projection import Projection
from axialtrain.models.by_band import in_bands


class PatchEmbed(nn.Module):
    """Each patch of pixels becomes a token: one projection of its bands * patch^2 values."""

    def __init__(self, patch: int, bands: int, dim: int) -> None:
        super().__init__()
        self.patch, self.bands = patch, bands
        self.proj = Projection(bands * patch * patch, dim)

    @classmethod
    def of_convolution(cls, conv: nn.Conv2d) -> PatchEmbed:
        """With the parameters of timm's projection [D, C, p, p]: the weight must be flattened."""
        dim, bands, patch, _ = conv.weight.shape
        with torch.random.fork_rng(devices=[]):  # what it draws is thrown away
            embed = cls(patch, bands, dim)
        embed.proj.weight = conv.weight
        embed.proj.bias = conv.bias  # type: ignore[assignment]
        return embed

    def forward(self, pixels: Tensor, valid: Tensor | None, band: int = 0) -> Tensor:
        """pixels: [B, h * patch, w * patch, bands], valid: [B, h, w] -> [B, h, w, D].

        Invalid patches count as zero, whatever they hold. Pixels come as they were read; the
        tokens, and with them all of the model, have the dtype of the weights, and are where these
        are. band: tokens at a time, or one row where it has more: the pixels are all that is kept
        for backward, wherever they are, and no patches. 0: all tokens at once.
        """
        if not band:
            return self._tokens(pixels, valid)
        images, height, width, _ = pixels.shape
        rows = max(1, band // (images * (width // self.patch)))
        tall = pixels.unflatten(1, (height // self.patch, self.patch))
        sizes = [part.shape[1] for part in tall.split(rows, 1)]
        masks = [None] * len(sizes) if valid is None else list(valid.split(rows, 1))

        def run(some: Tensor, index: int) -> Tensor:
            there = some.flatten(1, 2).to(self.proj.weight.device, non_blocking=True)
            return self._tokens(there, masks[index])

        return in_bands(run, tall, sizes, 1, [self])

    def _tokens(self, pixels: Tensor, valid: Tensor | None) -> Tensor:
        patches = to_patches(pixels.to(self.proj.weight.dtype), self.patch)
        if valid is not None:
            # where, not a product, and before the projection: NaN * 0 is NaN, in its gradient too.
            patches = torch.where(valid[..., None], patches, 0.0)
        return self.proj(patches)


def to_patches(pixels: Tensor, patch: int) -> Tensor:
    """[B, h * patch, w * patch, C] -> [B, h, w, C * patch * patch], in timm's order."""
    return rearrange(pixels, "B (h p) (w q) C -> B h w (C p q)", p=patch, q=patch)


def check_pixels(pixels: Tensor, place: Place, patch: int, bands: int) -> None:
    """Raise ValueError where `pixels`, [B, h, w, bands], are not whole tokens, those of `place`."""
    size = (place.rect.height * patch, place.rect.width * patch, bands)
    if tuple(pixels.shape[1:]) != size:
        raise ValueError(
            f"pixels are [B, {', '.join(map(str, pixels.shape[1:]))}]: allowed here is "
            f"[B, {', '.join(map(str, size))}]; pad images to multiples of {patch} px, and "
            "say in `valid` which tokens count"
        )
