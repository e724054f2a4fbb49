"""The sizes of the convolutional members of the family: Axial-ResNet and Axial-DeepLab."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from axialtrain.mesh.mesh import MeshConfig

STAGES = (64, 128, 256, 512)  # channels between a block's 1 x 1 convolutions, at width 0.5
STEM_STRIDE = 4  # of the convolution and the pooling in front of the stages
EXPANSION = 2  # channels of a block's output over those between its 1 x 1 convolutions
DEEPEST, WIDEST = (
    512,
    16.0,
)  # blocks of a stage, and width: beyond any model, before memory is taken


def _check_mesh(mesh: MeshConfig) -> None:
    if mesh.overlap > 1:
        raise ValueError(
            f"mesh.overlap={mesh.overlap}: convolutional models wait for all of a swap: allowed "
            "is 1"
        )
    if mesh.exchange != "swap":
        raise ValueError(
            f"mesh.exchange={mesh.exchange}: convolutional models get whole lines by swapping "
            "tokens: allowed is swap"
        )
    if mesh.tensor > 1:
        raise ValueError(
            f"mesh.tensor={mesh.tensor}: convolutional models keep their weights whole: allowed is "
            "1; spread the image over mesh.row and mesh.col"
        )


def _check_whole(key: str, value: object, low: int) -> None:
    if type(value) is not int or value < low:
        raise ValueError(f"model.{key}={value!r}: allowed are whole numbers from {low}")


def _check_numbers(key: str, values: object, count: int | None, low: int, high: int) -> None:
    if (
        not isinstance(values, Sequence)
        or (count is not None and len(values) != count)
        or not all(type(value) is int and low <= value <= high for value in values)
    ):
        many = "a list of" if count is None else str(count)
        raise ValueError(f"model.{key}={values!r}: allowed are {many} numbers, {low} to {high}")


@dataclass
class AxialResNetConfig:
    """Size of an Axial-ResNet (arXiv 2003.07853): a ResNet whose 3 x 3 convolutions are attention
    along columns, then rows.

    layers: blocks of each of the four stages.
    width: s of the published code: 0.5 is S, 0.75 M, 1 L.
    heads: N of every attention.
    image: [H, W] in px that the tables of relative positions are made for: each has the span of
        its feature map, and larger images are refused. null needs span.
    span: reach of the tables in cells instead: 2 span - 1 entries, farther distances take the
        outermost, and images may be of any size. null: that of image.
    output_stride: px of the image to a cell of the output: 32, or 16, where the last stage keeps
        the resolution of the one before.
    bands: channels of the image.
    """

    layers: list[int] = field(default_factory=lambda: [3, 4, 6, 3])
    width: float = 0.5
    heads: int = 8
    image: list[int] | None = field(default_factory=lambda: [224, 224])
    span: int | None = None
    output_stride: int = 32
    bands: int = 3
    name: str = "axial_resnet"

    def __post_init__(self) -> None:
        if self.name != "axial_resnet":
            raise ValueError(f"model.name={self.name!r}: allowed is 'axial_resnet'")
        _check_numbers("layers", self.layers, 4, 1, DEEPEST)
        if type(self.width) not in (int, float) or not 0 < self.width <= WIDEST:
            raise ValueError(f"model.width={self.width!r}: allowed are numbers up to {WIDEST}")
        _check_whole("heads", self.heads, 1)
        _check_whole("bands", self.bands, 1)
        if self.span is not None:
            _check_whole("span", self.span, 1)
        if self.output_stride not in (16, 32):
            raise ValueError(f"model.output_stride={self.output_stride!r}: allowed are 16 and 32")
        if self.image is not None:
            _check_numbers("image", self.image, 2, 1, 1 << 20)
        if self.image is None and self.span is None:
            raise ValueError(
                "model.image=null needs model.span: the tables of relative positions have no size "
                "to be made for"
            )
        for channels in self.channels:
            if channels < 1 or channels % (2 * self.heads):
                raise ValueError(
                    f"model.width={self.width} makes {channels} channels in a stage, which "
                    f"model.heads={self.heads} deals out in halves: allowed are multiples of "
                    f"{2 * self.heads}"
                )

    @property
    def stem(self) -> int:
        """Channels behind the first convolution."""
        return int(64 * self.width)

    @property
    def channels(self) -> tuple[int, ...]:
        """Those between the 1 x 1 convolutions of the blocks, by stage."""
        return tuple(int(2 * channels * self.width) for channels in STAGES)

    @property
    def strides(self) -> tuple[int, ...]:
        """px of the image to a cell of each stage's output."""
        return 4, 8, 16, self.output_stride

    @property
    def patch(self) -> int:
        """px of a token, as tasks and the loader see it: a cell of the output."""
        return self.output_stride

    @property
    def patch_px(self) -> int:
        """`patch`, under the name that it has in every model's config."""
        return self.patch

    @property
    def dim(self) -> int:
        """Channels of the output."""
        return EXPANSION * self.channels[-1]

    @property
    def prefix_tokens(self) -> int:
        return 0

    @property
    def batch_norm(self) -> bool:
        """Whether a step depends on how many images are seen at a time."""
        return True

    def span_of(self, dim: int, stride: int) -> int:
        """Reach of a table for distances along `dim` (1 or 2) of a map of px `stride` a cell."""
        if self.span is not None:
            return self.span
        assert self.image is not None, "the config has been checked"
        # The map of the image as it is read: whole tokens.
        return math.ceil(self.image[dim - 1] / self.patch) * self.patch // stride

    def check_mesh(self, mesh: MeshConfig) -> None:
        """Raise ValueError where the model cannot be spread over `mesh`."""
        _check_mesh(mesh)

    def check_grid(self, height: int, width: int) -> None:
        """Raise ValueError where an image of height x width tokens (of `patch` px) is too large."""
        if self.span is not None:
            return
        assert self.image is not None, "the config has been checked"
        if any(
            size > math.ceil(m / self.patch)
            for size, m in zip((height, width), self.image, strict=True)
        ):
            raise ValueError(
                f"an image of up to {height * self.patch} x {width * self.patch} px exceeds "
                f"model.image={list(self.image)}, which the tables of relative positions are made "
                "for: allowed is up to that, or any size with model.span, beyond which distances "
                "are clipped"
            )


@dataclass
class AxialDeepLabConfig:
    """An Axial-ResNet at output stride 16 under Panoptic-DeepLab's decoders (arXiv 1911.10194).

    trunk: the Axial-ResNet.
    aspp: dilations of the 3 x 3 convolutions of atrous spatial pyramid pooling; [] leaves all of it
        out, as published for Axial-DeepLab, whose attention sees the whole image anyway.
    semantic, instance: channels of the two decoders; the pooling of both has `semantic`.
    low_semantic, low_instance: channels to which the trunk's maps at strides 8 and 4 are projected
        for them.
    head: channels of the instance heads.
    """

    trunk: AxialResNetConfig = field(
        default_factory=lambda: AxialResNetConfig(image=None, span=255, output_stride=16)
    )
    aspp: list[int] = field(default_factory=lambda: [6, 12, 18])
    semantic: int = 256
    instance: int = 128
    low_semantic: list[int] = field(default_factory=lambda: [64, 32])
    low_instance: list[int] = field(default_factory=lambda: [32, 16])
    head: int = 32
    name: str = "axial_deeplab"

    def __post_init__(self) -> None:
        if self.name != "axial_deeplab":
            raise ValueError(f"model.name={self.name!r}: allowed is 'axial_deeplab'")
        if not isinstance(self.trunk, AxialResNetConfig):
            raise ValueError(
                f"model.trunk={self.trunk!r}: allowed is a config of an axial_resnet, or a "
                "dictionary of its keys to replace"
            )
        if self.trunk.output_stride != 16:
            raise ValueError(
                f"model.trunk.output_stride={self.trunk.output_stride}: the decoders need 16"
            )
        _check_numbers("aspp", self.aspp, None, 1, 1 << 10)
        for key in ("semantic", "instance", "head"):
            _check_whole(key, getattr(self, key), 1)
        for key in ("low_semantic", "low_instance"):
            _check_numbers(key, getattr(self, key), 2, 1, 1 << 12)

    @property
    def bands(self) -> int:
        return self.trunk.bands

    @property
    def batch_norm(self) -> bool:
        """Whether a step depends on how many images are seen at a time."""
        return True

    @property
    def patch(self) -> int:
        """px of a token, as tasks and the loader see it: a cell of the trunk's output."""
        return self.trunk.patch

    @property
    def patch_px(self) -> int:
        """`patch`, under the name that it has in every model's config."""
        return self.patch

    def check_mesh(self, mesh: MeshConfig) -> None:
        """Raise ValueError where the model cannot be spread over `mesh`."""
        _check_mesh(mesh)

    def check_grid(self, height: int, width: int) -> None:
        """Raise ValueError where an image of height x width tokens (of `patch` px) is too large."""
        try:
            self.trunk.check_grid(height, width)
        except ValueError as error:
            raise ValueError(str(error).replace("model.", "model.trunk.")) from None
