"""timm's vision transformers become axial, in place, their weights kept.

Needs the extra timm.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from axialtrain.attention.config import AxialConfig
from axialtrain.attention.passes import AxialAttention
from axialtrain.attention.positions import extents, resampled
from axialtrain.attention.qkv import HeadProjection
from axialtrain.grid import Place, tokens_across
from axialtrain.mesh.exchange import Exchange
from axialtrain.models import transformer
from axialtrain.models.chance import Chance
from axialtrain.models.heads import mean_token
from axialtrain.models.layer import Layer
from axialtrain.models.patches import PatchEmbed, check_pixels
from axialtrain.models.recompute import Recompute
from axialtrain.models.timm_models import POOLS, check_model
from axialtrain.models.timm_weights import (
    axialize_state_dict,
    deaxialize_state_dict,
    pack_heads,
)

__all__ = ["axialize", "axialize_state_dict", "deaxialize_state_dict"]

_REFUSED = "is not supported by an axialized model"


def axialize(
    model: nn.Module,
    axial_config: AxialConfig | Mapping[str, Any],
    grid: tuple[int, int] | None = None,
) -> nn.Module:
    """Turn a timm ViT or DeiT into an axial one, in place, and return it.

    Weights are kept: a layer with shared projections has those of the block that it replaces;
    separate ones (`share_projections: False`) start as copies. Class, distillation and register
    tokens are the prefix of every layer. Images may have any size afterwards: the position
    embedding is resampled to each, as timm does, and a last partial patch is filled with zeros.

    axial_config: a dictionary or an `AxialConfig`. positions is "none" where a dictionary does not
        name it: the model's own embedding is added as before; "rope" and "relative" come on top.
    grid: (H, W), the token grid of images; the model's own by default. Relative tables are made for
        it, and windows must fit into it.

    The result is still an instance of its class, with timm's methods. Its forward takes timm's
    images [B, C, height, width], and, where they are spread over a mesh (`parallelize`), this
    rank's part of them with `valid` and `place`: see `Axialized.forward`.

    Raises ValueError where the model, the config or the grid is not supported, with the model as
    it was.
    """
    check_model(model)
    assert isinstance(model, VisionTransformer)
    config = _config_of(axial_config)
    rows, cols = model.patch_embed.grid_size
    made_for = (int(rows), int(cols))
    if grid is None:
        grid = made_for
    elif (
        not isinstance(grid, tuple | list)
        or len(grid) != 2
        or any(type(size) is not int or size < 1 for size in grid)
    ):
        raise ValueError(
            f"axialize: grid={grid}: allowed is (height, width) in tokens, each at least 1"
        )
    depth = len(model.blocks)
    passes = config.used(depth)
    config.check_grid(grid[0], grid[1], grid, passes)
    config.check_heads(model.embed_dim, model.blocks[0].attn.num_heads, passes)

    unused = config.unused_keys(depth)
    if unused:
        warnings.warn(f"axialize: set, and used by no layer: {', '.join(unused)}", stacklevel=2)

    # All that can fail comes first; then the model changes.
    packed = [
        [pack_heads(value.detach(), block.attn.num_heads) for value in block.attn.qkv.parameters()]
        for block in model.blocks
    ]
    layers = [_layer(block, i, config, grid) for i, block in enumerate(model.blocks)]
    embed = PatchEmbed.of_convolution(model.patch_embed.proj)
    embed.train(model.patch_embed.training)
    for block, values in zip(model.blocks, packed, strict=True):
        for parameter, value in zip(block.attn.qkv.parameters(), values, strict=True):
            parameter.data, parameter.grad = value, None
    weight = model.patch_embed.proj.weight
    weight.data, weight.grad = weight.data.flatten(1), None
    for layer, block in zip(layers, model.blocks, strict=True):
        _adopt(layer, block)
    model.embedded_grid = made_for
    model.axial_grid = (grid[0], grid[1])
    model.axial_config = config
    model.axial_heads = model.blocks[0].attn.num_heads
    model.blocks = nn.ModuleList(layers)
    model.patch_embed = embed
    model.exchange = Exchange()
    distilled = isinstance(model, VisionTransformerDistilled)
    model.__class__ = AxialVisionTransformerDistilled if distilled else AxialVisionTransformer
    return model


class Axialized(nn.Module):
    """What an axialized model does in place of timm's methods; mixed in before its class.

    Methods of timm that walk through blocks by themselves are refused.
    """

    axial_config: AxialConfig
    axial_grid: tuple[int, int]  # that of relative tables
    axial_heads: int
    embedded_grid: tuple[int, int]  # that of pos_embed
    exchange: Exchange
    blocks: nn.ModuleList  # of Layer
    # timm's
    patch_embed: PatchEmbed
    norm_pre: nn.Module
    norm: nn.Module
    pos_embed: Tensor | None
    cls_token: Tensor | None
    reg_token: Tensor | None
    dist_token: Tensor
    no_embed_class: bool
    num_prefix_tokens: int
    global_pool: str
    grad_checkpointing: bool
    forward_head: Callable[[Tensor], Tensor]

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        place: Place | None = None,
        chance: Chance | None = None,
    ) -> Tensor:
        """x: [B, C, height, width] -> timm's logits.

        On a mesh, x is this rank's tile, valid: bool [B, h, w] of its tokens (None where all
        count) and place its part of the grid. The logits are then alike on all ranks of an image.
        chance: draws of drop-path and left-out passes while training; a serial model draws its
        own from torch's generator.
        """
        tokens, prefix = self.forward_tokens(x, valid, place, chance)
        if isinstance(self, VisionTransformerDistilled) or self.global_pool == "token":
            # The tokens' way through the last layer ends here: its own tables get zeros, not None.
            return self.forward_head(prefix + tokens[:0].sum())
        # timm pools what it is given, after the prefix: one token is its own mean.
        mean = mean_token(tokens, valid, self.exchange)
        return self.forward_head(torch.cat((prefix, mean[:, None]), 1))

    def forward_features(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        place: Place | None = None,
        chance: Chance | None = None,
    ) -> Tensor:
        """Prefix and this rank's tokens, row by row, as timm has them: [B, n + h w, D]."""
        tokens, prefix = self.forward_tokens(x, valid, place, chance)
        return torch.cat((prefix, tokens.flatten(1, 2)), 1)

    def forward_tokens(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        place: Place | None = None,
        chance: Chance | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Normed tokens [B, h, w, D] of this rank's tile, zeros where invalid, and the prefix."""
        patch = self.patch_embed.patch
        height, width = (tokens_across(size, patch) for size in x.shape[2:])
        if place is None:
            place = Place(height, width)
        passes = self.axial_config.used(len(self.blocks))
        self.axial_config.check_grid(place.height, place.width, self.axial_grid, passes)
        draws = self.training and any(one.drop_path or one.skip_axis for one in self.blocks)
        if not draws:
            chance = None
        elif chance is None and self.exchange.mesh is None:
            chance = Chance(int(torch.randint(2**62, ())), 0, tuple(range(x.shape[0])))
        transformer.check_inputs(x.shape[0], place, valid, chance, draws=draws)
        x = F.pad(x, (0, width * patch - x.shape[3], 0, height * patch - x.shape[2]))
        pixels = rearrange(x, "B C h w -> B h w C")
        check_pixels(pixels, place, patch, self.patch_embed.bands)
        x = self.patch_embed(pixels, valid)
        whole = None if valid is None else self.exchange.everywhere(valid, place)
        x, prefix = self._positioned(x, place, whole)
        return transformer.encode(
            list(self.blocks),
            self.norm,
            self.exchange,
            self.norm_pre(x),
            self.norm_pre(prefix),
            place,
            valid,
            whole,
            chance,
            recompute=Recompute(int(self.grad_checkpointing and self.training)),
        )

    def timm_state_dict(self) -> dict[str, Tensor]:
        """The weights as timm loads them: see `deaxialize_state_dict`."""
        return deaxialize_state_dict(
            self.state_dict(), heads=self.axial_heads, patch=self.patch_embed.patch
        )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """timm's, for the pools that work over a mesh."""
        if global_pool not in (None, *POOLS):
            raise ValueError(f"global_pool={global_pool!r}: allowed are {', '.join(POOLS)}")
        super().reset_classifier(num_classes, global_pool)  # type: ignore[misc]

    def forward_intermediates(self, *args: Any, **options: Any) -> Any:
        raise ValueError(f"forward_intermediates: {_REFUSED}")

    def get_intermediate_layers(self, *args: Any, **options: Any) -> Any:
        raise ValueError(f"get_intermediate_layers: {_REFUSED}")

    def prune_intermediate_layers(self, *args: Any, **options: Any) -> Any:
        raise ValueError(f"prune_intermediate_layers: {_REFUSED}")

    def set_input_size(self, *args: Any, **options: Any) -> None:
        raise ValueError(f"set_input_size: {_REFUSED}; it takes images of any size")

    def _positioned(self, x: Tensor, place: Place, whole: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens and prefix with the position embedding added."""
        tokens = [self.cls_token]
        if isinstance(self, VisionTransformerDistilled):
            tokens.append(self.dist_token)
        else:
            tokens.append(self.reg_token)
        present = [token for token in tokens if token is not None]
        prefix = torch.cat(present, 1) if present else x.new_zeros(1, 0, x.shape[-1])
        if self.pos_embed is not None:
            count = 0 if self.no_embed_class else self.num_prefix_tokens
            table = self.pos_embed[0, count:].unflatten(0, self.embedded_grid)
            x = x + resampled(table, place, extents(place, whole, x))
            if count:
                prefix = prefix + self.pos_embed[:, :count]
        return x, prefix.to(x.dtype).expand(x.shape[0], -1, -1)


class AxialVisionTransformer(Axialized, VisionTransformer):
    """A `VisionTransformer` after `axialize`."""


class AxialVisionTransformerDistilled(Axialized, VisionTransformerDistilled):
    """A `VisionTransformerDistilled` after `axialize`."""


def _config_of(given: AxialConfig | Mapping[str, Any]) -> AxialConfig:
    config = given
    if not isinstance(config, AxialConfig):
        if not isinstance(config, Mapping):
            raise ValueError(f"axialize: axial_config={config!r}: allowed is a dictionary")
        config = AxialConfig.of({"positions": "none", **config})
    if config.positions == "axial":
        raise ValueError(
            "axialize: axial_config.positions='axial': the model has its own embedding, allowed "
            "are ['none', 'rope', 'relative']"
        )
    return config


def _layer(block: Block, index: int, config: AxialConfig, grid: tuple[int, int]) -> Layer:
    """Our layer in the size of the block; `_adopt` gives it the block's modules."""
    attn, path = block.attn, block.drop_path1
    with torch.random.fork_rng(devices=[]):  # what it draws is thrown away
        layer = Layer(
            attn.qkv.in_features,
            attn.num_heads,
            block.mlp.fc1.out_features,
            config,
            index=index,
            drop_path=float(path.drop_prob or 0.0) if isinstance(path, DropPath) else 0.0,
            grid=grid,
            qkv_bias=attn.qkv.bias is not None,
        )
    return layer.to(attn.qkv.weight.device, attn.qkv.weight.dtype).train(block.training)


def _adopt(layer: Layer, block: Block) -> None:
    """The block's own modules and parameters; passes with their own projections get copies."""
    attn = block.attn
    first, *others = layer.attn if isinstance(layer.attn, nn.ModuleList) else [layer.attn]
    assert isinstance(first, AxialAttention)
    first.qkv = HeadProjection.by_head(attn.qkv, first.head_dim)
    first.proj = attn.proj
    for other in others:
        other.qkv, other.proj = copy.deepcopy(first.qkv), copy.deepcopy(attn.proj)
    if isinstance(layer.norm1, nn.ModuleList):
        copies = [copy.deepcopy(block.norm1) for _ in layer.norm1[1:]]
        layer.norm1 = nn.ModuleList([block.norm1, *copies])
    else:
        layer.norm1 = block.norm1
    layer.norm2, layer.mlp, layer.ls1, layer.ls2 = block.norm2, block.mlp, block.ls1, block.ls2
