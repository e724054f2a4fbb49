"""Backbones by name: `create_model`, `list_models`."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from axialtrain.attention.config import AxialConfig
from axialtrain.models.heads import Classifier
from axialtrain.models.transformer import AxialTransformer, AxialTransformerConfig

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


CONFIGS = {
    f"axial_vit_{size}_patch{patch}": _axial_vit(size, patch)
    for size in _VIT
    for patch in (8, 16, 32)
}


def list_models(pattern: str = "*") -> list[str]:
    """The names that match `pattern` ("axial_vit_*"), in alphabetical order."""
    return sorted(fnmatch.filter(CONFIGS, pattern))


def model_config(name: str, **overrides: Any) -> AxialTransformerConfig:
    """The config of the model `name`, with keys of `AxialTransformerConfig` replaced.

    axial_config: an `AxialConfig`, or a dictionary of the keys of it to replace.
    Raises ValueError for an unknown name or key.
    """
    if name not in CONFIGS:
        raise ValueError(f"model {name!r} is unknown: allowed are {list_models()}")
    config = CONFIGS[name]
    known = [field.name for field in fields(config)]
    for key in overrides:
        if key not in known:
            raise ValueError(f"{name}: unknown key {key!r}: allowed are {known}")
    attention = overrides.get("axial_config")
    if isinstance(attention, Mapping):
        plain = {key.name: getattr(config.axial_config, key.name) for key in fields(AxialConfig)}
        overrides["axial_config"] = AxialConfig.of({**plain, **attention})
    return replace(config, **overrides)


def create_model(
    name: str, *, num_classes: int = 1000, pool: str = "prefix", **overrides: Any
) -> AxialTransformer | Classifier:
    """The model `name`, on the CPU in fp32, built serially: `parallelize` spreads it.

    num_classes: of a `Classifier` that reads them off `pool`; 0 gives the bare backbone.
    overrides: see `model_config`.
    """
    backbone = AxialTransformer(model_config(name, **overrides))
    return Classifier(backbone, num_classes, pool) if num_classes else backbone
