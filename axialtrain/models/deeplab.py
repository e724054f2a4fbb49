"""Axial-DeepLab: an Axial-ResNet at output stride 16 under Panoptic-DeepLab's decoders.

Source: Axial-DeepLab (arXiv 2003.07853, section 3.3) and Panoptic-DeepLab (arXiv 1911.10194): two
decoders that share nothing but the trunk, one for classes, one for instances, each with atrous
spatial pyramid pooling (arXiv 1706.05587) and two fusions with finer maps of the trunk. Predictions
are made at a fourth of the image's resolution and enlarged to all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from axialtrain.grid import Place
from axialtrain.mesh.exchange import Exchange
from axialtrain.models.axial_resnet import AxialResNet
from axialtrain.models.batch_norm import BatchNorm
from axialtrain.models.chance import Chance
from axialtrain.models.conv import Conv, Upsample, cells_of
from axialtrain.models.conv_config import EXPANSION, AxialDeepLabConfig
from axialtrain.models.heads import mean_token

CENTRE, OFFSET = 1, 2  # channels of the instance heads
_AFTER = 4  # px of the image to a cell of the predictions


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self, inputs: int, out: int, size: int, *, dilation: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = Conv(inputs, out, size, dilation=dilation, groups=groups)
        self.bn = BatchNorm(out)

    def forward(self, x: Tensor, place: Place, valid: Tensor | None) -> Tensor:
        """x: [B, h, w, C], valid: bool [B, h, w] or None -> [B, h, w, C']."""
        return self.bn(self.conv(x, place), valid).relu()


class Separable(nn.Module):
    """A 5 x 5 convolution of each channel by itself, then a 1 x 1 one of all."""

    def __init__(self, inputs: int, out: int) -> None:
        super().__init__()
        self.depthwise = ConvNorm(inputs, inputs, 5, groups=inputs)
        self.pointwise = ConvNorm(inputs, out, 1)

    def forward(self, x: Tensor, place: Place, valid: Tensor | None) -> Tensor:
        """x: [B, h, w, C], valid: bool [B, h, w] or None -> [B, h, w, C']."""
        return self.pointwise(self.depthwise(x, place, valid), place, valid)


class Aspp(nn.Module):
    """Atrous spatial pyramid pooling: a 1 x 1 convolution, a 3 x 3 one for each dilation, and the
    mean of the whole image, side by side, then a 1 x 1 convolution. Without dilations, the last
    alone.

    The pooled branch has a bias in place of a batch norm, which would see a single value an image.
    """

    def __init__(self, inputs: int, out: int, dilations: list[int]) -> None:
        super().__init__()
        branches = [ConvNorm(inputs, out, 1)] if dilations else []
        branches += [ConvNorm(inputs, out, 3, dilation=dilation) for dilation in dilations]
        self.branches = nn.ModuleList(branches)
        self.pooled = nn.Linear(inputs, out) if dilations else None
        self.project = ConvNorm(out * (len(branches) + 1) if dilations else inputs, out, 1)
        self.exchange = Exchange()

    def forward(self, x: Tensor, place: Place, valid: Tensor | None) -> Tensor:
        """x: [B, h, w, C], valid: bool [B, h, w] or None -> [B, h, w, C']."""
        if self.pooled is not None:
            mean = self.pooled(mean_token(x, valid, self.exchange)).relu()
            branches = [branch(x, place, valid) for branch in self.branches]
            everywhere = mean[:, None, None].expand(*x.shape[:3], -1)
            x = torch.cat((*branches, everywhere), -1)
        return self.project(x, place, valid)


class Decoder(nn.Module):
    """Pooling at stride 16, then fused with the trunk's maps at strides 8 and 4.

    inputs: channels of the trunk's maps at strides 4, 8 and 16. low: those to which the maps at
    strides 8 and 4 are projected. out: channels of the result.
    """

    def __init__(
        self,
        inputs: tuple[int, int, int],
        low: list[int],
        out: int,
        aspp: tuple[int, list[int]],
    ) -> None:
        super().__init__()
        channels, dilations = aspp
        self.aspp = Aspp(inputs[2], channels, dilations)
        self.up = Upsample(2)
        self.project = nn.ModuleList(
            ConvNorm(inputs[1 - step], width, 1) for step, width in enumerate(low)
        )
        self.fuse = nn.ModuleList(
            Separable((channels, out)[step] + width, out) for step, width in enumerate(low)
        )

    def forward(self, maps: list[Tensor], places: list[Place], whole: Tensor | None) -> Tensor:
        """maps, places: of the trunk at strides 4, 8 and 16; whole: bool [B, H, W] or None.

        Returns [B, h, w, C] at stride 4.
        """
        place = places[2]
        x = self.aspp(maps[2], place, cells_of(whole, place))
        for step, finer in enumerate((1, 0)):
            x = self.up(x, place, cells_of(whole, place))
            place = places[finer]
            valid = cells_of(whole, place)
            low = self.project[step](maps[finer], place, valid)
            x = self.fuse[step](torch.cat((x, low), -1), place, valid)
        return x


class Predictor(nn.Module):
    """What a head says of each cell: a separable convolution, then a 1 x 1 one with a bias."""

    def __init__(self, inputs: int, between: int, out: int) -> None:
        super().__init__()
        self.conv = Separable(inputs, between)
        self.out = nn.Linear(between, out)
        nn.init.normal_(self.out.weight, std=0.001)  # as published
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, place: Place, valid: Tensor | None) -> Tensor:
        """x: [B, h, w, C], valid: bool [B, h, w] or None -> [B, h, w, out]."""
        return self.out(self.conv(x, place, valid))


class AxialDeepLab(nn.Module):
    """The trunk of Axial-DeepLab. What a task adds to it: `SemanticDeepLab`, `PanopticDeepLab`."""

    def __init__(self, config: AxialDeepLabConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = AxialResNet(config.trunk)

    def decoder(self, low: list[int], out: int) -> Decoder:
        """A decoder on this trunk."""
        first, second, _, last = (EXPANSION * channels for channels in self.config.trunk.channels)
        pooling = self.config.semantic, list(self.config.aspp)  # as wide in both, as published
        return Decoder((first, second, last), low, out, pooling)

    def forward(
        self, pixels: Tensor, valid: Tensor | None, place: Place | None
    ) -> tuple[list[Tensor], list[Place], Tensor | None]:
        """Maps at strides 4, 8 and 16, the grid of each, and the validity of all tokens.

        For the arguments see `AxialResNet.maps`.
        """
        maps, places, whole = self.trunk.maps(pixels, valid, place)
        return [maps[0], maps[1], maps[3]], [places[0], places[1], places[3]], whole


class SemanticDeepLab(nn.Module):
    """A class for each pixel."""

    def __init__(self, backbone: AxialDeepLab, classes: int) -> None:
        super().__init__()
        config = backbone.config
        self.backbone = backbone
        self.semantic = backbone.decoder(list(config.low_semantic), config.semantic)
        self.head = Predictor(config.semantic, config.semantic, classes)
        self.enlarge = Upsample(_AFTER)

    def forward(
        self,
        pixels: Tensor,
        valid: Tensor | None = None,
        place: Place | None = None,
        chance: Chance | None = None,
    ) -> Tensor:
        """-> logits [B, h * patch, w * patch, classes] of this rank's tile.

        pixels: [B, h * patch, w * patch, bands]. For the rest see `AxialResNet.forward`.
        """
        maps, places, whole = self.backbone(pixels, valid, place)
        here = cells_of(whole, places[0])
        x = self.head(self.semantic(maps, places, whole), places[0], here)
        return _enlarged(self.enlarge, x, places[0], here)


class PanopticDeepLab(nn.Module):
    """A class for each pixel, the heat of instances' centres, and the way to one's own centre."""

    def __init__(self, backbone: AxialDeepLab, classes: int) -> None:
        super().__init__()
        config = backbone.config
        self.backbone = backbone
        self.semantic = backbone.decoder(list(config.low_semantic), config.semantic)
        self.instance = backbone.decoder(list(config.low_instance), config.instance)
        self.head = Predictor(config.semantic, config.semantic, classes)
        self.centre = Predictor(config.instance, config.head, CENTRE)
        self.offset = Predictor(config.instance, config.head, OFFSET)
        self.enlarge = Upsample(_AFTER)

    def forward(
        self,
        pixels: Tensor,
        valid: Tensor | None = None,
        place: Place | None = None,
        chance: Chance | None = None,
    ) -> Tensor:
        """-> [B, h * patch, w * patch, classes + 3] of this rank's tile.

        Semantic logits, the heat of centres, and the offset (down, right) in px to the centre of
        the instance. pixels: [B, h * patch, w * patch, bands]. For the rest see
        `AxialResNet.forward`.
        """
        maps, places, whole = self.backbone(pixels, valid, place)
        here = cells_of(whole, places[0])
        semantic = self.semantic(maps, places, whole)
        instance = self.instance(maps, places, whole)
        said = [
            self.head(semantic, places[0], here),
            self.centre(instance, places[0], here),
            self.offset(instance, places[0], here),
        ]
        out = _enlarged(self.enlarge, torch.cat(said, -1), places[0], here)
        # Offsets are learned in cells, as the maps are, and are in px.
        return torch.cat((out[..., :-OFFSET], out[..., -OFFSET:] * _AFTER), -1)


def _enlarged(enlarge: Upsample, x: Tensor, place: Place, valid: Tensor | None) -> Tensor:
    """In fp32 at least: an offset of hundreds of px has no half of one in bf16."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if valid is not None:
        x = torch.where(valid[..., None], x, 0.0)  # the bias of the predictions
    return enlarge(x, place, valid)
