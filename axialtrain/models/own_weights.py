"""Weights of a model of ours: under timm's names and back, and in a model of another image size.

What a file says of its model is data from anyone: it is read within bounds, and builds nothing.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch
from einops import rearrange
from torch import Tensor, nn

from axialtrain.models.conv_config import AxialDeepLabConfig, AxialResNetConfig
from axialtrain.models.registry import KINDS, TRANSFORMER, ModelConfig, kind_of
from axialtrain.models.resized import TABLES, resized
from axialtrain.models.timm_weights import PREFIX, pack_heads, unpack_heads
from axialtrain.models.transformer import AxialTransformerConfig

BACKBONE = "backbone."  # before the backbone's names, in the model of every task
DECODERS = ("semantic.", "instance.")  # of an Axial-DeepLab: their sizes are the model's keys
# What a description of a stranger may claim; nothing near it is allocated or walked through.
LARGEST, DEEPEST, LONGEST = 2**20, 2**12, 256  # number, layers, characters of a string

_QKV = re.compile(r"blocks\.\d+\.attn\.qkv\.(weight|bias)")
_OF_BACKBONE = ("patch_embed", "pos_embed", "blocks", "norm")  # timm's names start with these
_TIMMS = re.compile(  # names that timm's VisionTransformer has a place for
    r"(patch_embed\.proj|blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)|norm|head"
    r"|head_dist)\.(weight|bias)|blocks\.\d+\.ls[12]\.gamma|attn_pool\..*|pos_embed|"
    + "|".join(PREFIX)
)


def described(values: object, where: str) -> ModelConfig:
    """The config of a model, from the JSON that came with its weights.

    Its key "name" says of which kind it is; axial transformers have none.
    Raises ValueError, naming `where`, for what describes no model, and for unknown keys: they may
    change what the weights mean.
    """
    if not isinstance(values, Mapping) or not _bounded(values):
        raise ValueError(f"{where}: does not describe its model: allowed is a model's config")
    name = values.get("name", TRANSFORMER)
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"{where}: has model.name={name!r}: allowed are {list(KINDS)}")
    known = [one.name for one in fields(KINDS[name])]
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: describes its model by {key!r}: allowed are {known}")
    depth = values.get("depth")
    if isinstance(depth, int) and depth > DEEPEST:
        raise ValueError(f"{where}: has model.depth={depth}: allowed is up to {DEEPEST}")
    if "trunk" in values:
        trunk = described(values["trunk"], f"{where}: trunk")
        if not isinstance(trunk, AxialResNetConfig):
            raise ValueError(
                f"{where}: has a trunk of {kind_of(trunk)}: allowed is one of axial_resnet"
            )
        values = {**values, "trunk": trunk}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that do nothing, in another's config
            return KINDS[name](**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: does not describe its model: {error}") from error


def to_timm(
    state: Mapping[str, Tensor], config: ModelConfig, where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of a task's model under the names, and in the packing, of timm's VisionTransformer;
    and the names of those that timm has no place for, which keep theirs (without `backbone.`) and
    their packing: relative tables, factorised positions, projections of a pass of its own, and
    what the task adds.

    config: of the model that they are of. Learned tokens become cls_token, dist_token (where there
    is a head for it) and reg_token, in this order. Heads keep their names.
    Raises ValueError, naming `where`, where no layer is a ViT's, or the config is another model's.
    """
    if not isinstance(config, AxialTransformerConfig):
        raise ValueError(
            f"{where}: --names timm: no model of timm's is an {kind_of(config)}: allowed is "
            "--names axialtrain"
        )
    separate = [n for n in range(config.depth) if _separate(config, n)]
    if len(separate) == config.depth:
        raise ValueError(
            f"{where}: --names timm: each layer has projections for each of its passes (model."
            "axial_config.share_projections=false), which no layer of timm's has: allowed is "
            "--names axialtrain"
        )
    ours = {name.removeprefix(BACKBONE): value for name, value in state.items()}
    tokens, dim = config.prefix_tokens, config.dim
    timm = {}
    for name, value in ours.items():
        if name == "patch_embed.proj.weight":
            _expect(name, value, (dim, config.bands * config.patch_px**2), where)
            side = config.patch_px
            timm[name] = rearrange(value, "D (C p q) -> D C p q", p=side, q=side)
        elif _QKV.fullmatch(name):
            _expect(name, value, (3 * dim, dim)[: 2 if name.endswith("weight") else 1], where)
            timm[name] = unpack_heads(value, config.heads)
        elif name == "prefix":
            _expect(name, value, (tokens, dim), where)
            timm["cls_token"], rest = value[None, :1], value[None, 1:]
            if "head_dist.weight" in ours:
                timm["dist_token"], rest = rest[:, :1], rest[:, 1:]
            if rest.shape[1]:
                timm["reg_token"] = rest
        elif name == "grid_embed.table":
            _expect(name, value, (*(config.made_for or ()), dim), where)
            places = value.flatten(0, 1)
            if "prefix_embed" in ours:
                _expect("prefix_embed", ours["prefix_embed"], (tokens, dim), where)
                places = torch.cat((ours["prefix_embed"], places))
            timm["pos_embed"] = places[None]
        elif name != "prefix_embed" or "grid_embed.table" not in ours:
            timm[name] = value
    return timm, [name for name in timm if not _TIMMS.fullmatch(name)]


def of_timm(config: ModelConfig, where: str) -> AxialTransformerConfig:
    """The config, of a model that can have weights of timm's. Raises ValueError for another."""
    if not isinstance(config, AxialTransformerConfig):
        raise ValueError(
            f"{where}: has the names of timm's ViTs, and the model is an {kind_of(config)}: "
            "allowed are weights with our names"
        )
    return config


def from_timm_names(
    state: Mapping[str, Tensor], config: ModelConfig, where: str
) -> dict[str, Tensor]:
    """The way back from `to_timm`; config: of the model that the weights are of.

    Raises ValueError, naming `where`, where they are not of such a model.
    """
    config = of_timm(config, where)
    dim, count = config.dim, config.prefix_tokens
    ours = {}
    for name, value in state.items():
        if name == "patch_embed.proj.weight":
            _expect(name, value, (dim, config.bands, config.patch_px, config.patch_px), where)
            ours[BACKBONE + name] = value.flatten(1)
        elif _QKV.fullmatch(name):
            _expect(name, value, (3 * dim, dim)[: 2 if name.endswith("weight") else 1], where)
            ours[BACKBONE + name] = pack_heads(value, config.heads)
        elif name == "pos_embed":
            rows, cols = config.made_for or (0, 0)
            _expect(name, value, (1, count + rows * cols, dim), where)
            if count:
                ours[f"{BACKBONE}prefix_embed"] = value[0, :count]
            ours[f"{BACKBONE}grid_embed.table"] = value[0, count:].unflatten(0, (rows, cols))
        elif name not in PREFIX:
            inside = name.split(".")[0] in _OF_BACKBONE
            ours[BACKBONE + name if inside else name] = value
    tokens = [name for name in PREFIX if name in state]
    for name in tokens:
        _expect(name, state[name], (1, *state[name].shape[1:2], dim), where)
    if tokens:
        ours[f"{BACKBONE}prefix"] = torch.cat([state[name][0] for name in tokens])
    return ours


def fitted(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    own: ModelConfig,
    config: ModelConfig,
    same_task: bool,
    where: str,
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Which weights of ours a model takes, what of it starts anew, and which it has no place for.

    own: what the weights are of. config: of the model, of the same kind. Learned positions of
    another grid or span are resampled, and the tables of an Axial-ResNet cut or extended, see
    `resized`; everything else of the backbone must be there and fit. Relative
    tables start anew where the weights have none. What the task adds starts anew where it has
    another shape, or, without `same_task`, altogether, but for the decoders of an Axial-DeepLab.

    Raises ValueError, naming `where`, and the first tensor or key that differs, both ways.
    """
    if type(own) is not type(config):
        raise ValueError(
            f"{where}: is of an {kind_of(own)}, and the model is an {kind_of(config)}: allowed are "
            "weights of the same kind"
        )
    taken, fresh = {}, []
    for name, value in model.state_dict().items():
        given = state.get(name)
        if not name.startswith(BACKBONE):
            same = same_task or name.startswith(DECODERS)
            if given is not None and same and given.shape == value.shape:
                taken[name] = _plain(name, given, value, where)
            else:
                fresh.append(name)
        elif given is None and name.endswith(TABLES):
            fresh.append(name)
        elif given is None:
            raise ValueError(f"{where}: has no {name}, and the model has one of {_shape(value)}")
        else:
            fits = resized(name, _plain(name, given, value, where), value.shape)
            if fits.shape != value.shape:
                raise ValueError(
                    f"{where}: has {name} of {_shape(given)}, and the model has one of "
                    f"{_shape(value)}"
                )
            taken[name] = fits
    unused = [name for name in state if name not in taken and name not in fresh]
    for name in sorted(unused):
        if name.startswith(BACKBONE):
            raise ValueError(
                f"{where}: has {name} of {_shape(state[name])}, and the model has none"
            )
    _check_meaning(own, config, where)
    return taken, fresh, unused


def _check_meaning(own: ModelConfig, config: ModelConfig, where: str) -> None:
    """What shapes do not show: how many heads share a width, whose projections are whose, how far
    apart the cells are that a convolution sees."""
    if isinstance(own, AxialDeepLabConfig) and isinstance(config, AxialDeepLabConfig):
        _check_same(own, config, ("aspp",), "", where)
        _check_same(own.trunk, config.trunk, ("heads", "bands"), "trunk.", where)
    elif isinstance(own, AxialResNetConfig):
        _check_same(own, config, ("heads", "output_stride", "bands"), "", where)
    elif isinstance(own, AxialTransformerConfig) and isinstance(config, AxialTransformerConfig):
        _check_same(own, config, ("heads", "patch", "bands"), "", where)
        _check_passes(own, config, where)


def _check_same(own: object, config: object, keys: Sequence[str], group: str, where: str) -> None:
    for key in keys:
        found, wanted = getattr(own, key), getattr(config, key)
        if found != wanted:
            raise ValueError(f"{where}: has {group}{key}={found}, and model.{group}{key}={wanted}")


def _check_passes(own: AxialTransformerConfig, config: AxialTransformerConfig, where: str) -> None:
    for layer in range(config.depth):
        passes = [
            "+".join(one.value for one in each.axial_config.passes(layer)) for each in (own, config)
        ]
        if _separate(config, layer) and passes[0] != passes[1]:
            raise ValueError(
                f"{where}: has the projections of {passes[0]} in layer {layer}, and model."
                f"axial_config.pattern has {passes[1]} there: allowed is the same, where each "
                "pass has its own"
            )


def _separate(config: AxialTransformerConfig, layer: int) -> bool:
    attention = config.axial_config
    return not attention.share_projections and len(attention.passes(layer)) > 1


def _plain(name: str, given: Tensor, value: Tensor, where: str) -> Tensor:
    if given.is_floating_point() != value.is_floating_point():
        raise ValueError(f"{where}: has {name} of {given.dtype}, and the model of {value.dtype}")
    return given


def _expect(name: str, value: Tensor, shape: tuple[int, ...], where: str) -> None:
    if value.shape != shape:
        raise ValueError(f"{where}: has {name} of {_shape(value)}, and describes one of {shape}")


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)


def _bounded(value: object, depth: int = 0) -> bool:
    """Whether plain JSON claims nothing absurd, so that its numbers may be reckoned with."""
    if isinstance(value, Mapping):
        return depth < 2 and all(_bounded(one, depth + 1) for pair in value.items() for one in pair)
    if isinstance(value, list):
        return depth < 3 and len(value) <= DEEPEST and all(_bounded(one, 3) for one in value)
    if isinstance(value, str):
        return len(value) <= LONGEST
    if isinstance(value, int | float):
        return not abs(value) > LARGEST  # NaN is for the config to refuse
    return value is None
