"""Axial-ResNet (arXiv 2003.07853): a ResNet whose 3 x 3 convolutions are axial attention.

Modules are named as in the first public code. What surrounds the attention is token by token or
looks at neighbours (`models.conv`), and stays in tiles; attention gets whole columns, then whole
rows, of the channels between a block's 1 x 1 convolutions only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from axialtrain.grid import Layout, Place
from axialtrain.mesh.exchange import Exchange
from axialtrain.models.batch_norm import BatchNorm
from axialtrain.models.chance import Chance
from axialtrain.models.conv import AvgPool, Conv, MaxPool, cells_of
from axialtrain.models.conv_config import EXPANSION, STEM_STRIDE, AxialResNetConfig
from axialtrain.models.patches import check_pixels
from axialtrain.models.position_sensitive import PositionSensitiveAttention
from axialtrain.models.transformer import check_inputs


class AxialBlock(nn.Module):
    """1 x 1 convolution, attention along columns, then rows, 1 x 1 convolution, residual.

    spans: (of columns, of rows), see `PositionSensitiveAttention`. stride: of an average pooling
    behind the row attention, and of the shortcut. The last norm starts at zero.
    """

    def __init__(
        self, inputs: int, channels: int, heads: int, spans: tuple[int, int], stride: int
    ) -> None:
        super().__init__()
        out = EXPANSION * channels
        self.conv_down = _pointwise(inputs, channels)
        self.bn1 = BatchNorm(channels)
        self.height = PositionSensitiveAttention(channels, heads, spans[0], axis=1)
        self.width = PositionSensitiveAttention(channels, heads, spans[1], axis=2)
        self.pool = AvgPool(stride) if stride > 1 else None
        self.conv_up = _pointwise(channels, out)
        self.bn2 = BatchNorm(out, start=0.0)
        self.downsample = Shortcut(inputs, out, stride) if stride > 1 or inputs != out else None
        self.exchange = Exchange()

    def exit(self, place: Place) -> Place:
        """The grid of what comes out."""
        return place if self.pool is None else self.pool.exit(place)

    def forward(self, x: Tensor, place: Place, whole: Tensor | None) -> Tensor:
        """x: [B, h, w, C] of a tile -> [B, h', w', C'] under exit(place).

        whole: bool [B, H, W] of all tokens of the image, None where all are valid.
        """
        goal, columns, rows = self.exit(place), place.under(Layout.COLS), place.under(Layout.ROWS)
        out = self.bn1(self.conv_down(x), cells_of(whole, place)).relu()
        out = self.exchange(out, place, Layout.COLS)
        out = self.height(out, cells_of(whole, columns))
        out = self.exchange(out, columns, Layout.ROWS)
        out = self.width(out, cells_of(whole, rows))
        out = self.exchange(out, rows, Layout.TILE)
        if self.pool is not None:
            out = self.pool(out, place)
        valid = cells_of(whole, goal)
        out = self.bn2(self.conv_up(out.relu()), valid)
        shortcut = x if self.downsample is None else self.downsample(x, place, valid)
        return (out + shortcut).relu()


class Shortcut(nn.Module):
    """1 x 1 convolution of every stride-th cell, and its norm."""

    def __init__(self, inputs: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv = Conv(inputs, out, 1, stride=stride)
        self.bn = BatchNorm(out)

    def forward(self, x: Tensor, place: Place, valid: Tensor | None) -> Tensor:
        """x: [B, h, w, C] under `place`, valid: of the result -> [B, h', w', C']."""
        return self.bn(self.conv(x, place), valid)


class AxialResNet(nn.Module):
    """Backbone: pixels of this rank's tile in, the last feature map out: tokens of `patch` px."""

    def __init__(self, config: AxialResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = Conv(config.bands, config.stem, 7, stride=2)
        self.bn1 = BatchNorm(config.stem)
        self.maxpool = MaxPool(3, 2)
        inputs, stride, stages = config.stem, STEM_STRIDE, []
        for blocks, channels, after in zip(
            config.layers, config.channels, config.strides, strict=True
        ):
            stage = nn.ModuleList()
            for _ in range(blocks):
                # A block that strides does so behind its attention: its tables are the finer map's.
                spans = config.span_of(1, stride), config.span_of(2, stride)
                stage.append(
                    AxialBlock(inputs, channels, config.heads, spans, stride=after // stride)
                )
                inputs, stride = EXPANSION * channels, after
            stages.append(stage)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.exchange = Exchange()

    def forward(
        self,
        pixels: Tensor,
        valid: Tensor | None = None,
        place: Place | None = None,
        hidden: None = None,
        chance: Chance | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, h, w, dim] of this rank's tile, and a prefix of none, [B, 0, dim].

        pixels: [B, h * patch, w * patch, bands], zero where missing.
        place: of this tile, under TILE; that of the whole image where it is left out.
        valid: bool [B, h, w], or None where every token of the image counts. Others are zeroed, are
            no keys, count in no batch norm, and come out as zeros.
        hidden, chance: not used; what other backbones take.

        Raises ValueError where the image exceeds the tables, or is not of whole tokens.
        """
        maps, _, _ = self.maps(pixels, valid, place)
        tokens = maps[-1]
        return tokens, tokens.new_zeros(tokens.shape[0], 0, tokens.shape[-1])

    def maps(
        self, pixels: Tensor, valid: Tensor | None, place: Place | None
    ) -> tuple[list[Tensor], list[Place], Tensor | None]:
        """The feature map [B, h', w', C] behind each of the four stages, the grid of each, and the
        validity [B, H, W] of all tokens of the image, None where all are. For the rest see
        `forward`.
        """
        patch = self.config.patch
        if place is None:
            place = Place(pixels.shape[1] // patch, pixels.shape[2] // patch)
        check_pixels(pixels, place, patch, self.config.bands)
        self.config.check_grid(place.height, place.width)
        check_inputs(pixels.shape[0], place, valid, None, draws=False)
        whole = None if valid is None else self.exchange.everywhere(valid, place)
        if whole is not None and bool(whole.all()):
            whole = None  # nothing to leave out: no masks on maps of logits
        place = place.finer(patch)
        x = pixels.to(self.conv1.weight.dtype)
        cells = cells_of(whole, place)
        if cells is not None:
            # where, not a product: NaN * 0 is NaN, in its gradient too.
            x = torch.where(cells[..., None], x, 0.0)
        x, place = self.conv1(x, place), self.conv1.exit(place)
        x = self.bn1(x, cells_of(whole, place)).relu()
        x, place = self.maxpool(x, place), self.maxpool.exit(place)
        maps, places = [], []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                assert isinstance(block, AxialBlock)
                x, place = block(x, place, whole), block.exit(place)
            maps.append(x)
            places.append(place)
        return maps, places, whole


def _pointwise(inputs: int, out: int) -> nn.Linear:
    """A 1 x 1 convolution, token by token, which starts as `Conv` does."""
    linear = nn.Linear(inputs, out, bias=False)
    nn.init.normal_(linear.weight, std=math.sqrt(2 / out))
    return linear
