"""Backbones by name and by config: `create_model`, `list_models`, `build_backbone`."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import nn

from axialtrain.attention.config import AxialConfig
from axialtrain.models.axial_resnet import AxialResNet
from axialtrain.models.conv_config import AxialDeepLabConfig, AxialResNetConfig
from axialtrain.models.deeplab import AxialDeepLab, PanopticDeepLab
from axialtrain.models.heads import Classifier
from axialtrain.models.transformer import AxialTransformer, AxialTransformerConfig

ModelConfig = AxialTransformerConfig | AxialResNetConfig | AxialDeepLabConfig
Backbone = AxialTransformer | AxialResNet | AxialDeepLab
TRANSFORMER = "axial_transformer"  # the kind whose configs have no key "name"
KINDS: dict[str, type[ModelConfig]] = {
    TRANSFORMER: AxialTransformerConfig,
    "axial_resnet": AxialResNetConfig,
    "axial_deeplab": AxialDeepLabConfig,
}


def kind_of(config: ModelConfig) -> str:
    """Which of `KINDS` it is."""
    return next(name for name, kind in KINDS.items() if isinstance(config, kind))


# timm's vit_{tiny,small,base}: (D, N). All have 12 layers and heads of 64 channels.
_VIT = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
_VIT_SIDE = 224  # px, the images that the position embedding is made for


def _axial_vit(size: str, patch: int) -> AxialTransformerConfig:
    """timm's vit_{size}_patch{patch}_224: exactly that with `pattern: [global]`."""
    dim, heads = _VIT[size]
    return AxialTransformerConfig(
        patch=patch,
        dim=dim,
        depth=12,
        heads=heads,
        mlp_ratio=4.0,
        prefix_tokens=1,
        grid=[_VIT_SIDE // patch] * 2,
        grid_embedding=True,
        axial_config=AxialConfig(positions="none"),
    )


# layers, width: those of the published code (arXiv 2003.07853), 224 x 224 px.
_RESNET = {
    "26s": ([1, 2, 4, 1], 0.5),
    "50s": ([3, 4, 6, 3], 0.5),
    "50m": ([3, 4, 6, 3], 0.75),
    "50l": ([3, 4, 6, 3], 1.0),
}
_SPAN = 255  # cells, the reach of tables that are made for no image size


def _axial_resnet(size: str) -> AxialResNetConfig:
    layers, width = _RESNET[size]
    return AxialResNetConfig(layers=layers, width=width)


def _axial_deeplab(size: str) -> AxialDeepLabConfig:
    trunk = replace(_axial_resnet(f"50{size}"), image=None, span=_SPAN, output_stride=16)
    return AxialDeepLabConfig(trunk=trunk)


CONFIGS: dict[str, ModelConfig] = {
    **{
        f"axial_vit_{size}_patch{patch}": _axial_vit(size, patch)
        for size in _VIT
        for patch in (8, 16, 32)
    },
    **{f"axial_resnet{size}": _axial_resnet(size) for size in _RESNET},
    "conv_stem_axial_resnet50s": replace(_axial_resnet("50s"), image=None, span=_SPAN),
    **{f"axial_deeplab_{size}": _axial_deeplab(size) for size in "sml"},
}


def list_models(pattern: str = "*") -> list[str]:
    """The names that match `pattern` ("axial_vit_*"), in alphabetical order."""
    return sorted(fnmatch.filter(CONFIGS, pattern))


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """The config of the model `name`, with keys of it replaced.

    A group of keys (`axial_config`, `trunk`) may be a dictionary of those of it to replace.
    Raises ValueError for an unknown name or key.
    """
    if name not in CONFIGS:
        raise ValueError(f"model {name!r} is unknown: allowed are {list_models()}")
    return _replaced(CONFIGS[name], overrides, name)


def _replaced(config: Any, changes: Mapping[str, Any], where: str) -> Any:
    known = [field.name for field in fields(config)]
    for key in changes:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}: allowed are {known}")
    own = {key: getattr(config, key) for key in changes}
    return replace(
        config,
        **{
            key: _replaced(own[key], value, f"{where}.{key}")
            if is_dataclass(own[key]) and isinstance(value, Mapping)
            else value
            for key, value in changes.items()
        },
    )


def build_backbone(config: ModelConfig) -> Backbone:
    """The backbone of that config, on the CPU in fp32, built serially: `parallelize` spreads it."""
    if isinstance(config, AxialResNetConfig):
        return AxialResNet(config)
    if isinstance(config, AxialDeepLabConfig):
        return AxialDeepLab(config)
    return AxialTransformer(config)


def create_model(
    name: str, *, num_classes: int = 1000, pool: str | None = None, **overrides: Any
) -> nn.Module:
    """The model `name`, on the CPU in fp32, built serially: `parallelize` spreads it.

    num_classes: of a `Classifier` that reads them off `pool`, or, of an Axial-DeepLab, of a
        `PanopticDeepLab`; 0 gives the bare backbone.
    pool: "prefix" where it is left out, and "mean", which alone is allowed, of an Axial-ResNet.
    overrides: see `model_config`.

    Raises ValueError that names what is allowed.
    """
    if type(num_classes) is not int or num_classes < 0:
        raise ValueError(f"{name}: num_classes={num_classes!r}: allowed are whole numbers from 0")
    backbone = build_backbone(model_config(name, **overrides))
    if isinstance(backbone, AxialDeepLab):
        if pool is not None:
            raise ValueError(f"{name}: pool={pool!r}: it names a class for each pixel, pools none")
        return PanopticDeepLab(backbone, num_classes) if num_classes else backbone
    if pool is None:
        pool = "mean" if isinstance(backbone, AxialResNet) else "prefix"
    return Classifier(backbone, num_classes, pool) if num_classes else backbone
