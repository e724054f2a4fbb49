"""Weights of timm's ViT and DeiT in a backbone of ours, and what they say about their model.

Knows timm's names and shapes, not timm.
"""

from __future__ import annotations

import math
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
from axialtrain.models.resized import resized
from axialtrain.models.transformer import AxialTransformerConfig

PREFIX = ("cls_token", "dist_token", "reg_token")  # in their order in the sequence
HEADS = ("head", "head_dist")
_KINDS = ("weight", "bias")
# What unpickling makes of a damaged file.
_DAMAGED = (ValueError, EOFError, LookupError, AttributeError, TypeError)
# Weights do not tell how wide heads are: 64 channels in every ViT and DeiT from tiny to large;
# larger ones (huge, giant) have others.
HEAD_DIM, WIDEST = 64, 1024


def read_timm(source: str, where: str) -> dict[str, Tensor]:
    """The state_dict at `source`: "timm:NAME", pretrained from timm's hub, or a file.

    A file is safetensors, or what torch.save wrote (then read without running code in it), with
    the state_dict itself or, as DeiT's releases and timm's checkpoints have it, under "model",
    "state_dict_ema" or "state_dict", "module." before its names.
    Raises ValueError, naming `where` (the key that has the source), for what cannot be read.
    """
    if source.startswith("timm:"):
        try:
            from axialtrain.models.timm_models import pretrained
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{where}: needs timm: install the extra timm (launch/install.sh timm) ({error})"
            ) from error
        except (ImportError, RuntimeError) as error:  # timm is there, and imports torchvision
            raise ValueError(
                f"{where}: timm cannot be imported ({error}): mostly a torchvision that was not "
                f"built for torch {torch.__version__}: install both from one index, in the "
                "versions of constraints.txt"
            ) from error
        return pretrained(source.removeprefix("timm:"), where)
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"{where}: no such file: allowed are a file of weights and timm:NAME")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, *_DAMAGED) as error:
        # Not torch's own words: they advise to read it with code and all.
        raise ValueError(
            f"{where}: is no file of plain weights ({type(error).__name__}): allowed are "
            "safetensors, and tensors that torch.save wrote"
        ) from error
    for key in ("model", "state_dict_ema", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{where}: holds no state_dict (names and tensors)")
    return {name.removeprefix("module."): value for name, value in state.items()}


def config_of(state: Mapping[str, Tensor], where: str) -> AxialTransformerConfig:
    """The ViT that these weights are of, with `pattern: [global]`: timm's own.

    Raises ValueError, naming `where`, for weights of another family.
    """
    weight = state.get("patch_embed.proj.weight")
    if weight is None or weight.ndim != 4:
        found = "no" if weight is None else f"{tuple(weight.shape)} for"
        raise _foreign(where, f"{found} patch_embed.proj.weight [D, bands, patch, patch]")
    dim, bands, patch, _ = weight.shape
    if dim < HEAD_DIM or dim % HEAD_DIM or dim > WIDEST:
        raise _foreign(where, f"width {dim}, which is no multiple of {HEAD_DIM} up to {WIDEST}")
    layers = {name.split(".")[1] for name in state if re.match(r"blocks\.\d+\.", name)}
    first = state.get("blocks.0.mlp.fc1.weight")
    if first is None or first.ndim != 2:
        raise _foreign(where, "no blocks.0.mlp.fc1.weight [width, D]")
    if "cls_token" not in state:
        raise _foreign(where, "no cls_token")
    prefix = 0
    for name in PREFIX:
        if name in state:
            if state[name].ndim != 3:
                raise _foreign(where, f"{name} of {tuple(state[name].shape)}")
            prefix += state[name].shape[1]
    positions = state.get("pos_embed")
    places = -1 if positions is None or positions.ndim != 3 else positions.shape[1] - prefix
    side = math.isqrt(max(places, 0))
    if side**2 != places or side == 0:
        raise _foreign(
            where,
            f"no pos_embed with an entry for each of {prefix} prefix tokens and a square grid",
        )
    config = AxialTransformerConfig(
        patch=patch,
        dim=dim,
        depth=max(len(layers), 1),
        heads=dim // HEAD_DIM,
        mlp_ratio=first.shape[0] / dim,
        bands=bands,
        prefix_tokens=prefix,
        grid=[side, side],
        grid_embedding=True,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        layer_scale=1.0 if "blocks.0.ls1.gamma" in state else None,
        axial_config=AxialConfig(pattern=["global"], positions="none"),
    )
    _check_tensors(state, config, where)
    return config


def from_timm(
    state: Mapping[str, Tensor], config: AxialTransformerConfig, where: str
) -> dict[str, Tensor]:
    """timm's weights under the names, and in the packing, of an `AxialTransformer`.

    Heads keep their names. config: of the model that takes them; the position embedding is
    resampled to its grid, as timm does it.
    Raises ValueError, naming `where`, the key and what it should be, where they do not fit.
    """
    own = config_of(state, where)
    for key in (
        *("patch", "dim", "depth", "heads", "mlp_width", "bands"),
        *("prefix_tokens", "grid_embedding", "qkv_bias"),
    ):
        found, wanted = getattr(own, key), getattr(config, key)
        if found != wanted:
            key = {"mlp_width": "mlp_width (dim x mlp_ratio)"}.get(key, key)
            raise ValueError(f"{where}: has {key}={found}, and model.{key}={wanted}")
    if (own.layer_scale is None) != (config.layer_scale is None):
        raise ValueError(
            f"{where}: has {'no ' if own.layer_scale is None else ''}layer scale, and "
            f"model.layer_scale={config.layer_scale}"
        )
    if config.axial_config.positions == "axial":
        raise ValueError(
            f"{where}: axial_config.positions=axial: the weights bring an embedding of their own, "
            "allowed are none, rope and relative"
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
    assert own.made_for is not None, "both have a grid embedding"
    assert config.made_for is not None, "both have a grid embedding"
    table = positions[count:].unflatten(0, own.made_for)
    ours["grid_embed.table"] = resized("grid_embed.table", table, (*config.made_for, config.dim))
    return ours


def matching(
    model: nn.Module, state: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Which weights of `from_timm` a model with a backbone takes, what of it starts anew, and which
    weights it has no place for (a head of another task).

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
    return taken, fresh, [name for name in inside if name not in taken and name not in fresh]


def load_timm(model: nn.Module, state: Mapping[str, Tensor], where: str) -> list[str]:
    """Load weights of `from_timm` into a model with a backbone: names of what starts anew.

    See `matching`.
    """
    taken, fresh, _ = matching(model, state, where)
    model.load_state_dict(taken, strict=False)
    return fresh


def pack_heads(qkv: Tensor, heads: int) -> Tensor:
    """Weight or bias [q, k, v][N][K] (timm) -> [N][q, k, v][K] (ours)."""
    return rearrange(qkv, "(three N K) ... -> (N three K) ...", three=3, N=heads)


def unpack_heads(qkv: Tensor, heads: int) -> Tensor:
    """The way back."""
    return rearrange(qkv, "(N three K) ... -> (three N K) ...", three=3, N=heads)


def axialize_state_dict(state: Mapping[str, Tensor], *, heads: int) -> dict[str, Tensor]:
    """timm's weights as an axialized model has them: see `deaxialize_state_dict`."""
    return {name: _convert(name, value, heads, to_axial=True) for name, value in state.items()}


def deaxialize_state_dict(
    state: Mapping[str, Tensor], *, heads: int, patch: int
) -> dict[str, Tensor]:
    """Weights of an axialized model as timm loads them; there and back they are bit-equal.

    QKV is packed [q, k, v][N][K] again, and the patch projection is a convolution's. heads: N.
    patch: side of a patch in pixels. (A model knows both: `Axialized.timm_state_dict`.)
    Raises ValueError for what timm has no place for: relative tables, separate projections; and
    where heads or patch cannot be those of these weights.
    """
    flat = state.get("patch_embed.proj.weight")
    if flat is None or flat.ndim != 2:
        raise ValueError("deaxialize_state_dict: these are no weights of an axialized model")
    if patch < 1 or flat.shape[1] % patch**2:
        raise ValueError(
            f"deaxialize_state_dict: patch={patch}: a patch has {flat.shape[1]} values, allowed is "
            "a side whose square divides them"
        )
    if heads < 1 or flat.shape[0] % heads:
        raise ValueError(
            f"deaxialize_state_dict: heads={heads} does not divide the width {flat.shape[0]}"
        )
    for name in state:
        if name.endswith((".bias_h", ".bias_w")):
            raise ValueError(f"{name}: a timm model has no relative tables")
        if ".attn.0." in name:
            raise ValueError(f"{name}: a timm model has one set of projections per layer")
    timm = {name: _convert(name, value, heads, to_axial=False) for name, value in state.items()}
    weight = timm["patch_embed.proj.weight"]
    timm["patch_embed.proj.weight"] = rearrange(weight, "D (C p q) -> D C p q", p=patch, q=patch)
    return timm


def _convert(name: str, value: Tensor, heads: int, *, to_axial: bool) -> Tensor:
    if name == "patch_embed.proj.weight" and to_axial:
        return value.flatten(1)
    if ".attn.qkv." in name:
        return pack_heads(value, heads) if to_axial else unpack_heads(value, heads)
    return value


def _check_tensors(state: Mapping[str, Tensor], config: AxialTransformerConfig, where: str) -> None:
    """ValueError unless each tensor is one of a ViT of this config, of its shape, and all there.

    Nothing is reshaped before: a tensor of a stranger may claim any shape over a byte of storage.
    """
    dim, width, (rows, cols) = config.dim, config.mlp_width, config.made_for or (0, 0)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (dim, config.bands, config.patch_px, config.patch_px),
        "patch_embed.proj.bias": (dim,),
        "pos_embed": (1, config.prefix_tokens + rows * cols, dim),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    for layer in range(config.depth):
        block = {
            **{f"{norm}.{kind}": (dim,) for norm in ("norm1", "norm2") for kind in _KINDS},
            "attn.qkv.weight": (3 * dim, dim),
            "attn.proj.weight": (dim, dim),
            "attn.proj.bias": (dim,),
            "mlp.fc1.weight": (width, dim),
            "mlp.fc1.bias": (width,),
            "mlp.fc2.weight": (dim, width),
            "mlp.fc2.bias": (dim,),
        }
        if config.qkv_bias:
            block["attn.qkv.bias"] = (3 * dim,)
        if config.layer_scale is not None:
            block |= {"ls1.gamma": (dim,), "ls2.gamma": (dim,)}
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    for name in PREFIX:
        if name in state:
            shapes[name] = (1, state[name].shape[1], dim)
    for head in HEADS:
        if f"{head}.weight" in state:
            classes = state[f"{head}.weight"].shape[0] if state[f"{head}.weight"].ndim else 0
            shapes |= {f"{head}.weight": (classes, dim), f"{head}.bias": (classes,)}
    for name, shape in shapes.items():
        value = state.get(name)
        if value is None:
            raise _foreign(where, f"no {name}")
        if value.shape != shape:
            raise _foreign(where, f"{name} of {tuple(value.shape)} for {shape}")
        if value.layout is not torch.strided or not value.is_floating_point() or value.is_meta:
            raise _foreign(where, f"{name} of {value.dtype}, {value.layout}")
        if value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise _foreign(where, f"{name} of {tuple(value.shape)} with fewer values than that")
    for name in state:
        if name not in shapes:
            raise _foreign(where, f"{name}")


def _foreign(where: str, what: str) -> ValueError:
    return ValueError(
        f"{where}: has {what}: allowed are weights of timm's ViT and DeiT (vit_*, deit_*) with "
        f"heads of {HEAD_DIM} channels, a class token, and a position for each of their tokens"
    )
