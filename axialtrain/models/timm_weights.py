"""Weights of timm's ViT and DeiT in a backbone of ours, and what they say about their model.

Knows timm's names and shapes, not timm.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from axialtrain.attention.config import AxialConfig
from axialtrain.models.transformer import AxialTransformerConfig

PREFIX = ("cls_token", "dist_token", "reg_token")  # in their order in the sequence
HEADS = ("head", "head_dist")
# What unpickling makes of a damaged file.
_DAMAGED = (ValueError, EOFError, LookupError, AttributeError, TypeError)
HEAD_DIM = 64  # of every standard ViT and DeiT; the weights do not tell


def read_timm(source: str, where: str) -> dict[str, Tensor]:
    """The state_dict at `source`: "timm:NAME", pretrained from timm's hub, or a file.

    A file is safetensors, or what torch.save wrote (then read without running code in it), with
    the state_dict itself or, as DeiT's releases have it, under "model".
    Raises ValueError, naming `where` (the key that has the source), for what cannot be read.
    """
    if source.startswith("timm:"):
        try:
            from axialtrain.models.axialize import pretrained
        except ImportError as error:
            raise ValueError(f"{where}: needs timm: pip install 'axialtrain[timm]'") from error
        return pretrained(source.removeprefix("timm:"), where)
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"{where}: no such file: allowed are a file of weights and timm:NAME")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, *_DAMAGED) as error:
        raise ValueError(f"{where}: is no file of plain weights ({error})") from error
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        state = state["model"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{where}: holds no state_dict (names and tensors)")
    return dict(state)


def config_of(state: Mapping[str, Tensor], where: str) -> AxialTransformerConfig:
    """The ViT that these weights are of, with `pattern: [global]`: timm's own.

    Raises ValueError, naming `where`, for weights of another family.
    """
    _check_family(state, where)
    weight = state["patch_embed.proj.weight"]
    dim, bands, patch, _ = weight.shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    prefix = sum(state[name].shape[1] for name in PREFIX if name in state)
    side = round((state["pos_embed"].shape[1] - prefix) ** 0.5)
    scale = state.get("blocks.0.ls1.gamma")
    return AxialTransformerConfig(
        patch=patch,
        dim=dim,
        depth=depth,
        heads=dim // HEAD_DIM,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        bands=bands,
        prefix_tokens=prefix,
        grid=[side, side],
        grid_embedding=True,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        layer_scale=None if scale is None else 1.0,
        axial_config=AxialConfig(pattern=["global"], positions="none"),
    )


def from_timm(
    state: Mapping[str, Tensor], config: AxialTransformerConfig, where: str
) -> dict[str, Tensor]:
    """timm's weights under the names, and in the packing, of an `AxialTransformer`.

    Heads keep their names. config: of the model that takes them.
    Raises ValueError, naming `where`, the key and what it should be, where they do not fit.
    """
    _check_family(state, where)
    own = config_of(state, where)
    for key in ("patch", "dim", "depth", "mlp_width", "bands", "prefix_tokens", "grid", "qkv_bias"):
        found, wanted = getattr(own, key), getattr(config, key)
        if (list(found) if key == "grid" else found) != (
            list(wanted or []) if key == "grid" else wanted
        ):
            raise ValueError(f"{where}: has {key}={found}, and model.{key}={wanted}")
    if (own.layer_scale is None) != (config.layer_scale is None):
        raise ValueError(
            f"{where}: has {'no ' if own.layer_scale is None else ''}layer scale, and "
            f"model.layer_scale={config.layer_scale}"
        )
    if not config.axial_config.share_projections:
        raise ValueError(
            f"{where}: has one set of projections per layer: allowed is "
            "axial_config.share_projections=true"
        )
    ours = {}
    count = config.prefix_tokens
    for name, value in state.items():
        if name == "patch_embed.proj.weight":
            ours[name] = value.flatten(1)
        elif ".attn.qkv." in name:
            ours[name] = pack_heads(value, config.heads)
        elif name not in (*PREFIX, "pos_embed"):
            ours[name] = value
    if count:
        tokens = [state[name][0] for name in PREFIX if name in state]
        ours["prefix"] = torch.cat(tokens)
    positions = state["pos_embed"][0]
    if count:
        ours["prefix_embed"] = positions[:count]
    ours["grid_embed.table"] = positions[count:].unflatten(0, own.made_for)
    return ours


def matching(
    model: nn.Module, state: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Which weights of `from_timm` a model with a backbone takes, and what starts anew.

    Heads of another number of classes, and what timm has no place for (relative tables), start
    anew. Raises ValueError, naming `where`, for weights that are missing or of another shape.
    """
    inside = {
        name if name.split(".")[0] in HEADS else f"backbone.{name}": value
        for name, value in state.items()
    }
    taken, fresh = {}, []
    for name, value in model.state_dict().items():
        given = inside.get(name)
        tables = name.endswith((".bias_h", ".bias_w"))
        if given is not None and given.shape == value.shape:
            taken[name] = given
        elif name.startswith("backbone.") and not tables:
            shape = "none" if given is None else f"one of {tuple(given.shape)}"
            raise ValueError(f"{where}: has {shape} for {name}, allowed is {tuple(value.shape)}")
        else:
            fresh.append(name)
    return taken, fresh


def load_timm(model: nn.Module, state: Mapping[str, Tensor], where: str) -> list[str]:
    """Load weights of `from_timm` into a model with a backbone: names of what starts anew.

    See `matching`.
    """
    taken, fresh = matching(model, state, where)
    model.load_state_dict(taken, strict=False)
    return fresh


def pack_heads(qkv: Tensor, heads: int) -> Tensor:
    """Weight or bias [q, k, v][N][K] (timm) -> [N][q, k, v][K] (ours)."""
    return rearrange(qkv, "(three N K) ... -> (N three K) ...", three=3, N=heads)


def unpack_heads(qkv: Tensor, heads: int) -> Tensor:
    """The way back."""
    return rearrange(qkv, "(N three K) ... -> (three N K) ...", three=3, N=heads)


def _check_family(state: Mapping[str, Tensor], where: str) -> None:
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight", "norm.weight")
    for name in needed:
        if name not in state:
            raise ValueError(
                f"{where}: has no {name}: allowed are weights of timm's ViT and DeiT "
                "(vit_*, deit_*), with a position for each class and distillation token"
            )
    known = re.compile(
        r"(cls_token|dist_token|reg_token|pos_embed|patch_embed\.proj\.(weight|bias)"
        r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)"
        r"|blocks\.\d+\.ls[12]\.gamma|norm\.(weight|bias)|head(_dist)?\.(weight|bias))"
    )
    for name in state:
        if not known.fullmatch(name):
            raise ValueError(
                f"{where}: {name} is not supported: allowed are timm's vit_* and deit_*"
            )
    prefix = sum(state[name].shape[1] for name in PREFIX if name in state)
    side = (state["pos_embed"].shape[1] - prefix) ** 0.5
    if side != int(side) or state["pos_embed"].shape[1] <= prefix:
        raise ValueError(
            f"{where}: pos_embed has {state['pos_embed'].shape[1]} entries for {prefix} prefix "
            "tokens and a square grid: register tokens without positions are not supported here"
        )
