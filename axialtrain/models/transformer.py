"""The axial transformer: patch embedding, layers of row and column attention, a norm.

Source: axial attention of arXiv 1912.12180 and 2003.07853, in the layer of ViT (arXiv 2010.11929).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn

from axialtrain.attention.config import AxialConfig
from axialtrain.grid import Layout, Place
from axialtrain.mesh.exchange import Exchange
from axialtrain.models.layer import Layer


@dataclass
class AxialTransformerConfig:
    """Size of an axial transformer.

    patch: side of a token, in pixels. dim: model width D. heads: N, dim / heads is K.
    mlp_ratio: MLP width over dim. bands: channels of the image.
    """

    patch: int = 16
    dim: int = 192
    depth: int = 12
    heads: int = 3
    mlp_ratio: float = 4.0
    bands: int = 3
    axial_config: AxialConfig = field(default_factory=AxialConfig)

    def __post_init__(self) -> None:
        for key in ("patch", "dim", "depth", "heads", "bands"):
            if getattr(self, key) < 1:
                raise ValueError(
                    f"model.{key}={getattr(self, key)}: allowed are whole numbers from 1"
                )
        if not 1 / self.dim <= self.mlp_ratio <= 1024:
            raise ValueError(
                f"model.mlp_ratio={self.mlp_ratio}: allowed are numbers above 0, up to 1024, that "
                f"make an MLP of at least one channel of model.dim={self.dim}"
            )
        if self.dim % self.heads:
            raise ValueError(f"model.heads={self.heads} does not divide model.dim={self.dim}")
        if self.axial_config.positions == "rope" and (self.dim // self.heads) % 2:
            raise ValueError(
                f"axial_config.positions=rope needs an even head width, got {self.dim} / "
                f"{self.heads} = {self.dim // self.heads}"
            )

    @property
    def mlp_width(self) -> int:
        return int(self.dim * self.mlp_ratio)


class PatchEmbed(nn.Module):
    """Each patch of pixels becomes a token: one projection of its bands * patch^2 values."""

    def __init__(self, patch: int, bands: int, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(bands * patch * patch, dim)

    def forward(self, pixels: Tensor, valid: Tensor) -> Tensor:
        """pixels: [B, h * patch, w * patch, bands], valid: [B, h, w] -> [B, h, w, D].

        Invalid patches count as zero, whatever they hold.
        """
        # where, not a product, and before the projection: NaN * 0 is NaN, in its gradient too.
        return self.proj(torch.where(valid[..., None], to_patches(pixels, self.patch), 0.0))


def to_patches(pixels: Tensor, patch: int) -> Tensor:
    """[B, h * patch, w * patch, C] -> [B, h, w, C * patch * patch], in timm's order."""
    return rearrange(pixels, "B (h p) (w q) C -> B h w (C p q)", p=patch, q=patch)


class AxialTransformer(nn.Module):
    """Backbone: pixels of this rank's tile in, one token per patch out.

    Attribute and parameter names are timm's (`patch_embed`, `blocks`, `norm`).
    """

    def __init__(self, config: AxialTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.patch, config.bands, config.dim)
        self.blocks = nn.ModuleList(
            Layer(
                config.dim,
                config.heads,
                config.mlp_width,
                config.axial_config.passes(index),
                positions=config.axial_config.positions,
            )
            for index in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.exchange = Exchange()
        self.apply(init_linear)

    def forward(
        self,
        pixels: Tensor,
        valid: Tensor,
        place: Place,
        hidden: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Tokens [B, h, w, D] of this rank's tile.

        pixels: [B, h * patch, w * patch, bands], zero where missing; place is under TILE.
        valid: [B, h, w], False where a token lies outside the image: zeroed, and no key. What
            comes out there means nothing, and influences no other token.
        hidden: for masked modelling, (which [B, h, w], token [D]): what replaces those tokens.
        """
        x = self.patch_embed(pixels, valid)
        if hidden is not None:
            which, token = hidden
            x = torch.where(which[..., None], token.to(x.dtype), x)
        x = torch.where(valid[..., None], x, 0.0)
        keys = self._valid_per_layout(valid, place)
        for block in self.blocks:
            assert isinstance(block, Layer)
            x = block(x, place, tuple(keys[which.layout] for which in block.passes))
            place = block.exit(place)
        x = self.norm(x)
        return self.exchange(x, place, Layout.TILE)

    def _valid_per_layout(self, valid: Tensor, place: Place) -> dict[Layout, Tensor]:
        """The validity mask under every layout in use: exchanged once each, not per pass."""
        layouts = {which.layout for block in self.blocks for which in block.passes}  # type: ignore[union-attr]
        return {layout: self.exchange(valid, place, layout) for layout in sorted(layouts, key=str)}


def init_linear(module: nn.Module) -> None:
    """Truncated normal of deviation fan_in^-1/2, zero biases: outputs start at the inputs' scale.

    (timm's 0.02 suits D near 1024; at D = 64 tokens start too faint to be told apart.)
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
