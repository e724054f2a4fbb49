"""Which of timm's models `axialize` takes, and those of timm's hub.

Needs the extra timm.
"""

from __future__ import annotations

import timm
from timm.layers import GELU, Attention, DropPath, LayerScale, PatchEmbed
from timm.layers import Mlp as TimmMlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from axialtrain.models.timm_weights import HEAD_DIM

POOLS = ("token", "avg")
SUPPORTED = (
    "timm's VisionTransformer and VisionTransformerDistilled (vit_*, deit_*, deit3_*) of plain "
    "blocks: layer norms, MLPs of two linear layers, no norm on queries and keys, no dropout, "
    "pooling by class token or mean"
)


def check_model(model: nn.Module) -> None:
    """ValueError where `axialize` does not know all that the model does."""
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        raise ValueError(
            f"axialize: a {type(model).__name__} is not supported: allowed are {SUPPORTED}"
        )
    assert isinstance(model, VisionTransformer)
    embed = model.patch_embed
    plain = {
        "patch_embed": type(embed) is PatchEmbed and isinstance(embed.norm, nn.Identity),
        "patch_embed.patch_size": len(set(embed.patch_size)) == 1,
        "pos_drop": model.pos_drop.p == 0,
        "patch_drop": isinstance(model.patch_drop, nn.Identity),
        "norm_pre": _is_norm(model.norm_pre),
        "norm": _is_norm(model.norm),
        "head_drop": model.head_drop.p == 0,
        "img_size (no multiple of the patch)": all(
            size % patch == 0
            for size, patch in zip(embed.img_size or (), embed.patch_size, strict=False)
        ),
        "depth=0": len(model.blocks) > 0,
        "blocks (one of them twice)": len(set(model.blocks)) == len(model.blocks),
        "global_pool": model.global_pool in POOLS,
        "pool_include_prefix": not model.pool_include_prefix,
    }
    for number, block in enumerate(model.blocks):
        where = f"blocks.{number}"
        plain[where] = type(block) is Block
        if not plain[where]:
            continue
        attn, mlp = block.attn, block.mlp
        plain[f"{where}.attn"] = (
            type(attn) is Attention
            and attn.gate is None
            and attn.attn_dim == attn.qkv.in_features
            and attn.num_heads == model.blocks[0].attn.num_heads
            and all(isinstance(norm, nn.Identity) for norm in (attn.q_norm, attn.k_norm, attn.norm))
            and attn.attn_drop.p == attn.proj_drop.p == 0
        )
        plain[f"{where}.mlp"] = (
            type(mlp) is TimmMlp
            and isinstance(mlp.norm, nn.Identity)
            and isinstance(mlp.fc1, nn.Linear)
            and mlp.drop1.p == mlp.drop2.p == 0
        )
        for scale in ("ls1", "ls2"):
            plain[f"{where}.{scale}"] = type(getattr(block, scale)) in (nn.Identity, LayerScale)
        paths = [
            float(path.drop_prob or 0.0) if type(path) is DropPath else 0.0
            for path in (block.drop_path1, block.drop_path2)
            if type(path) in (nn.Identity, DropPath)
        ]
        plain[f"{where}.drop_path1, drop_path2"] = len(paths) == 2 and paths[0] == paths[1]
        plain[f"{where}.norm1"] = isinstance(block.norm1, nn.LayerNorm)
        plain[f"{where}.norm2"] = isinstance(block.norm2, nn.LayerNorm)
    for what, known in plain.items():
        if not known:
            raise ValueError(
                f"axialize: {what} of this model is not supported: allowed are {SUPPORTED}"
            )


def pretrained(name: str, where: str) -> dict[str, Tensor]:
    """The state_dict of timm's pretrained model `name`, from its hub or cache.

    Raises ValueError, naming `where`, where there is none, it cannot be fetched, or it does
    something that its weights do not tell.
    """
    try:
        model = timm.create_model(name, pretrained=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{where}: cannot be had from timm's hub ({error})") from error
    try:
        check_model(model)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    standard = {
        "heads of 64 channels": model.embed_dim == HEAD_DIM * model.blocks[0].attn.num_heads,
        "GELU": all(type(block.mlp.act) in (nn.GELU, GELU) for block in model.blocks),
        "norms with eps=1e-6": model.norm.eps == 1e-6 if _is_norm(model.norm) else True,
        "class token pooling": model.global_pool == "token",
    }
    for what, found in standard.items():
        if not found:
            raise ValueError(f"{where}: is no standard ViT or DeiT: allowed are those with {what}")
    return model.state_dict()


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity | nn.LayerNorm)
