"""The axial transformer: patch embedding, layers of attention passes, a norm.

Source: axial attention of arXiv 1912.12180 and 2003.07853, in the layer of ViT (arXiv 2010.11929).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from axialtrain.attention.config import AxialConfig, Pass
from axialtrain.attention.masks import GridMask
from axialtrain.attention.positions import AxialEmbedding, GridEmbedding
from axialtrain.grid import Layout, Place
from axialtrain.mesh.exchange import Exchange
from axialtrain.mesh.mesh import MeshConfig, check_divides
from axialtrain.models.chance import Chance
from axialtrain.models.layer import Layer, Norm
from axialtrain.models.patches import PatchEmbed, check_pixels
from axialtrain.models.recompute import Recompute, run_layers

FEATURES = "features"  # model.patch where the pixels are vectors, each of which is a token


@dataclass
class AxialTransformerConfig:
    """Size of an axial transformer.

    patch: side of a token, in pixels, or "features": each pixel is a vector of `bands` numbers that
        an encoder made of a patch, and a token. dim: model width D. heads: N, dim / heads is K.
    mlp_ratio: MLP width over dim. bands: channels of the image.
    prefix_tokens: learned tokens beside the image (class, registers).
    drop_path: chance that a residual branch of the last layer is left out for an image while
        training; it grows linearly from 0 in the first, as in timm.
    grid: [H, W], the token grid that learned positions are made for; null where none need it.
    grid_embedding: whether each place of `grid` has a learned embedding, added once at the input
        and resampled to each image's extent, and each prefix token one too: ViT's.
    qkv_bias: whether Q, K and V have a bias. layer_scale: what a learned factor of each channel of
        the residual branches starts from; null for none.
    mlp_chunk: tokens of a rank's part that the MLP takes at a time where there are more; its hidden
        activations are then computed again in backward. null keeps those of all tokens.
    """

    patch: int | str = 16
    dim: int = 192
    depth: int = 12
    heads: int = 3
    mlp_ratio: float = 4.0
    bands: int = 3
    prefix_tokens: int = 0
    drop_path: float = 0.0
    grid: list[int] | None = None
    grid_embedding: bool = False
    qkv_bias: bool = True
    layer_scale: float | None = None
    mlp_chunk: int | None = 65536
    axial_config: AxialConfig = field(default_factory=AxialConfig)  # or a dictionary of its keys

    def __post_init__(self) -> None:
        if isinstance(self.axial_config, Mapping):
            self.axial_config = AxialConfig.of(self.axial_config)
        if not isinstance(self.axial_config, AxialConfig):
            raise ValueError(
                f"model.axial_config={self.axial_config!r}: allowed is a dictionary, or AxialConfig"
            )
        least = dict.fromkeys(("patch", "dim", "depth", "heads", "bands"), 1)
        for key, low in (least | {"prefix_tokens": 0}).items():
            value = getattr(self, key)
            if key == "patch" and value == FEATURES:
                continue
            if type(value) is not int or value < low:
                raise ValueError(
                    f"model.{key}={value!r}: allowed are whole numbers from {low}"
                    + f", and {FEATURES}" * (key == "patch")
                )
        for key in ("grid_embedding", "qkv_bias"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"model.{key}={getattr(self, key)!r}: allowed are true and false")
        if not _is_number(self.mlp_ratio) or not 1 / self.dim <= self.mlp_ratio <= 1024:
            raise ValueError(
                f"model.mlp_ratio={self.mlp_ratio!r}: allowed are numbers above 0, up to 1024, "
                f"that make an MLP of at least one channel of model.dim={self.dim}"
            )
        if not _is_number(self.drop_path) or not 0 <= self.drop_path < 1:
            raise ValueError(f"model.drop_path={self.drop_path!r}: allowed is 0 to below 1")
        if self.grid is not None and not (
            isinstance(self.grid, list | tuple)
            and len(self.grid) == 2
            and all(type(size) is int and size >= 1 for size in self.grid)
        ):
            raise ValueError(
                f"model.grid={self.grid!r}: allowed is [height, width] in tokens, each at "
                "least 1, or null"
            )
        if self.grid_embedding and self.grid is None:
            raise ValueError(
                "model.grid_embedding=true needs model.grid, [height, width] in tokens"
            )
        scale = self.layer_scale
        if scale is not None and not (_is_number(scale) and 0 < scale < math.inf):
            raise ValueError(f"model.layer_scale={scale!r}: allowed are null and numbers above 0")
        if self.mlp_chunk is not None and (type(self.mlp_chunk) is not int or self.mlp_chunk < 1):
            raise ValueError(
                f"model.mlp_chunk={self.mlp_chunk!r}: allowed are null and whole numbers from 1"
            )
        self.axial_config.check_heads(self.dim, self.heads, self.passes)
        self.axial_config.check_span(self.made_for, self.passes)
        unused = self.axial_config.unused_keys(self.depth)
        if self.grid is not None and not self.grid_embedding:
            positions = self.axial_config.positions
            if positions not in ("relative", "axial"):
                unused.append(f"grid={list(self.grid)} (positions={positions}, no grid_embedding)")
        if self.drop_path and self.depth == 1:
            unused.append(f"drop_path={self.drop_path} (it grows from 0 in the first layer)")
        if unused:
            warnings.warn(f"model: set, and used by no layer: {', '.join(unused)}", stacklevel=3)

    @property
    def patch_px(self) -> int:
        """px of a token along a side: of feature grids, whose pixels are tokens, 1."""
        return self.patch if isinstance(self.patch, int) else 1

    @property
    def passes(self) -> frozenset[Pass]:
        """Every pass that some layer has."""
        return self.axial_config.used(self.depth)

    def check_mesh(self, mesh: MeshConfig) -> None:
        """Raise ValueError where the model cannot be spread over `mesh`."""
        check_divides("model.heads", self.heads, mesh.tensor)
        check_divides("the MLP width of model", self.mlp_width, mesh.tensor)
        if mesh.overlap > 1 and self.prefix_tokens:
            raise ValueError(
                f"mesh.overlap={mesh.overlap}: prefix tokens attend to all tokens at once: allowed "
                f"is 1 with model.prefix_tokens={self.prefix_tokens}"
            )
        if mesh.overlap > 1 and self.axial_config.fusion == "sum":
            raise ValueError(
                f"mesh.overlap={mesh.overlap}: summed passes wait for all of a swap: allowed is 1 "
                "with model.axial_config.fusion=sum"
            )
        passes = self.passes
        if mesh.overlap > 1 and all(len(one.dims) == 2 for one in passes):
            raise ValueError(
                f"mesh.overlap={mesh.overlap}: no layer of model.axial_config.pattern="
                f"{self.axial_config.pattern} swaps to whole rows or columns: allowed is 1"
            )
        mesh.check_heads(self.heads, rows=Pass.ROW in passes, cols=Pass.COL in passes)

    def check_grid(self, height: int, width: int) -> None:
        """Raise ValueError where an image of height x width tokens cannot be attended to."""
        self.axial_config.check_grid(height, width, self.made_for, self.passes)

    @property
    def made_for(self) -> tuple[int, int] | None:
        """(H, W) that learned positions are made for."""
        return None if self.grid is None else (self.grid[0], self.grid[1])

    @property
    def batch_norm(self) -> bool:
        """Whether a step depends on how many images are seen at a time."""
        return False

    @property
    def mlp_width(self) -> int:
        return round(self.dim * self.mlp_ratio)


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


class AxialTransformer(nn.Module):
    """Backbone: pixels of this rank's tile in, one token per patch out.

    Attribute and parameter names are timm's (`patch_embed`, `blocks`, `norm`); `prefix` holds the
    learned tokens beside the image; `pos_embed` (factorised) and `grid_embed`, `prefix_embed` (one
    for each place) the embeddings that are added once, where there are any.
    """

    def __init__(self, config: AxialTransformerConfig) -> None:
        super().__init__()
        self.config = config
        attention, dim = config.axial_config, config.dim
        self.patch_embed = PatchEmbed(config.patch_px, config.bands, dim)
        self.pos_embed: AxialEmbedding | None = None
        if attention.positions == "axial":
            assert config.made_for is not None, "the config has been checked"
            self.pos_embed = AxialEmbedding(*config.made_for, dim)
        self.grid_embed: GridEmbedding | None = None
        self.prefix: nn.Parameter | None = None
        self.prefix_embed: nn.Parameter | None = None
        if config.prefix_tokens:
            self.prefix = _tokens(config.prefix_tokens, dim)
        if config.grid_embedding:
            assert config.made_for is not None, "the config has been checked"
            self.grid_embed = GridEmbedding(*config.made_for, dim)
            if config.prefix_tokens:
                self.prefix_embed = _tokens(config.prefix_tokens, dim)
        self.blocks = nn.ModuleList(
            Layer(
                dim,
                config.heads,
                config.mlp_width,
                attention,
                index=index,
                drop_path=config.drop_path * index / max(config.depth - 1, 1),
                grid=config.made_for,
                qkv_bias=config.qkv_bias,
                layer_scale=config.layer_scale,
                mlp_chunk=config.mlp_chunk,
            )
            for index in range(config.depth)
        )
        self.norm = Norm(dim)
        self.exchange = Exchange()
        self.recompute = Recompute()  # of a run, not of the model: the same numbers
        self.apply(init_linear)

    def forward(
        self,
        pixels: Tensor,
        valid: Tensor | None = None,
        place: Place | None = None,
        hidden: tuple[Tensor, Tensor] | None = None,
        chance: Chance | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, h, w, D] of this rank's tile, and the prefix [B, n, D], alike on all ranks.

        pixels: [B, h * patch, w * patch, bands], zero where missing.
        place: of this tile, under TILE; that of the whole image where it is left out.
        valid: bool [B, h, w], False where a token is padding or background, or None where every
            token of the image counts. Others are zeroed, are no keys, and come out as zeros.
        hidden: for masked modelling, (which [B, h, w], token [D]): what replaces those tokens.
        chance: the draws of this step, where something is left out while training.

        Raises ValueError where pixels are not those of the tile, in whole patches, the grid does
        not fit the attention (a window larger than it, or relative positions that do not reach),
        or training needs `chance` and has none.
        """
        if place is None:
            _, height, width, _ = pixels.shape
            place = Place(height // self.config.patch_px, width // self.config.patch_px)
        check_pixels(pixels, place, self.config.patch_px, self.config.bands)
        self.config.check_grid(place.height, place.width)
        draws = bool(self.config.drop_path or self.config.axial_config.skip_axis)
        chance = chance if self.training else None
        check_inputs(pixels.shape[0], place, valid, chance, draws=self.training and draws)
        chance = chance if draws else None
        x = self.patch_embed(pixels, valid, self.recompute.band)
        if hidden is not None:
            which, token = hidden
            x = torch.where(which[..., None], token.to(x.dtype), x)
        # The mask of the whole grid on every rank: a byte a token, exchanged once.
        whole = None if valid is None else self.exchange.everywhere(valid, place)
        for embed in (self.pos_embed, self.grid_embed):
            if embed is not None:
                x = embed(x, place, whole)
        prefix = x.new_zeros(x.shape[0], 0, x.shape[-1])
        if self.prefix is not None:
            own = self.prefix if self.prefix_embed is None else self.prefix + self.prefix_embed
            prefix = own.to(x.dtype).expand(x.shape[0], -1, -1)
        return encode(
            list(self.blocks),
            self.norm,
            self.exchange,
            x,
            prefix,
            place,
            valid,
            whole,
            chance,
            recompute=self.recompute if self.training else Recompute(band=self.recompute.band),
        )


def check_inputs(
    images: int, place: Place, valid: Tensor | None, chance: Chance | None, *, draws: bool
) -> None:
    """Raise ValueError where `valid` or `chance` do not belong to these images.

    draws: whether something is left out at random.
    """
    if draws and chance is None:
        raise ValueError(
            "training with drop_path or axial_config.skip_axis needs the draws of the step: give "
            "chance=Chance(seed, step, samples), or call eval()"
        )
    if chance is not None and len(chance.samples) != images:
        raise ValueError(
            f"chance.samples has {len(chance.samples)} entries: allowed is one for each of the "
            f"{images} images"
        )
    tile = (images, place.rect.height, place.rect.width)
    if valid is not None and (valid.dtype is not torch.bool or valid.shape != tile):
        raise ValueError(
            f"valid is {valid.dtype} {tuple(valid.shape)}: allowed is torch.bool {tile}, the "
            "tokens of this tile"
        )


def encode(
    layers: Sequence[nn.Module],
    norm: nn.Module,
    exchange: Exchange,
    x: Tensor,
    prefix: Tensor,
    place: Place,
    valid: Tensor | None,
    whole: Tensor | None,
    chance: Chance | None,
    *,
    recompute: Recompute | None = None,
) -> tuple[Tensor, Tensor]:
    """Embedded tokens [B, h, w, D] of a tile and prefix -> the same after `layers` and `norm`.

    valid: bool [B, h, w] of the tile; whole: [B, H, W] of the grid. Tokens that are not valid are
    zeroed before and after. recompute: what is kept for backward; None keeps everything.
    """
    # No mask where every token of the batch counts: a layer would be slower for nothing. Asked once
    # a forward, of the whole grid, which each rank has: all of them go the same way.
    if whole is not None and bool(whole.all()):
        valid = whole = None
    if valid is not None:
        x = torch.where(valid[..., None], x, 0.0)
    again = Recompute() if recompute is None else recompute
    # The layers share the mask, and with it what the first of them finds out of its lines.
    x, prefix, place = run_layers(layers, x, prefix, place, GridMask.of(whole), chance, again)
    x = exchange(norm(x), place, Layout.TILE)
    if valid is not None:
        x = torch.where(valid[..., None], x, 0.0)
    return x, norm(prefix) if prefix.shape[1] else prefix


def _tokens(count: int, dim: int) -> nn.Parameter:
    tokens = nn.Parameter(torch.empty(count, dim))
    nn.init.trunc_normal_(tokens, std=0.02)
    return tokens


def init_linear(module: nn.Module) -> None:
    """Truncated normal of deviation fan_in^-1/2, zero biases: outputs start at the inputs' scale.

    (timm's 0.02 suits D near 1024; at D = 64 tokens start too faint to be told apart.)
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
