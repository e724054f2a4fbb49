"""Heads: what a task reads off the tokens, where they are or pooled over all ranks of the image."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from axialtrain.attention.merge import attend_everywhere
from axialtrain.grid import Place
from axialtrain.mesh.exchange import Exchange
from axialtrain.models.axial_resnet import AxialResNet
from axialtrain.models.chance import Chance
from axialtrain.models.layer import Mlp, Norm
from axialtrain.models.transformer import AxialTransformer, AxialTransformerConfig

POOLS = ("mean", "prefix", "attention")


class Segmenter(nn.Module):
    """Backbone and per-token classifier of cells x cells cells of each patch.

    cells = 1 names a class per token, cells = patch one per pixel; between them the classes of a
    cell hold for all of its pixels.
    """

    def __init__(self, backbone: AxialTransformer | AxialResNet, classes: int, cells: int) -> None:
        super().__init__()
        patch = backbone.config.patch_px
        if cells < 1 or patch % cells:
            allowed = [n for n in range(1, patch + 1) if patch % n == 0]
            raise ValueError(
                f"task.cells={cells} does not divide model.patch={patch}: allowed are {allowed}"
            )
        self.cells = cells
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.dim, cells * cells * classes)

    def forward(
        self, pixels: Tensor, valid: Tensor | None, place: Place, chance: Chance | None = None
    ) -> Tensor:
        """-> logits [B, h * cells, w * cells, classes] of this rank's tile."""
        tokens, _ = self.backbone(pixels, valid, place, chance=chance)
        logits = self.head(tokens)
        return rearrange(logits, "B h w (p q C) -> B (h p) (w q) C", p=self.cells, q=self.cells)


class MaskedReconstructor(nn.Module):
    """Backbone that sees a learned token in place of hidden patches and predicts their pixels.

    SimMIM (arXiv 2111.09886): hidden tokens go through the encoder, a linear head predicts pixels.

    Raises ValueError for a backbone that has no tokens in front of its first layer.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        if not isinstance(backbone, AxialTransformer):
            raise ValueError(
                "task=reconstruction hides tokens in front of the first layer, where model "
                f"{type(backbone).__name__} has none: allowed are axial transformers"
            )
        config = backbone.config
        self.backbone = backbone
        self.mask_token = nn.Parameter(torch.zeros(config.dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.head = nn.Linear(config.dim, config.bands * config.patch_px**2)

    def forward(
        self,
        pixels: Tensor,
        valid: Tensor | None,
        hidden: Tensor,
        place: Place,
        chance: Chance | None = None,
    ) -> Tensor:
        """hidden: [B, h, w] -> values [B, h, w, bands * patch^2], ordered as `to_patches`."""
        tokens, _ = self.backbone(pixels, valid, place, (hidden, self.mask_token), chance)
        return self.head(tokens)


class Classifier(nn.Module):
    """Backbone and one prediction for a whole image, the same on every rank that has a part of it.

    pool: what the classes are read off. "mean" of the valid tokens; "prefix", the first prefix
    token; "attention", a learned query over the valid tokens (`AttentionPool`).
    distilled: read a second prediction off the second prefix token, as DeiT's distillation token
    (arXiv 2012.12877); pool is "prefix" then.

    Raises ValueError for another pool, prefix tokens that the backbone does not have, or a pool
    other than "mean" of an Axial-ResNet.
    """

    def __init__(
        self,
        backbone: AxialTransformer | AxialResNet,
        classes: int,
        pool: str = "mean",
        *,
        distilled: bool = False,
    ) -> None:
        super().__init__()
        config = backbone.config
        if pool not in POOLS:
            raise ValueError(f"pool={pool!r}: allowed are {list(POOLS)}")
        if isinstance(backbone, AxialResNet) and pool != "mean":
            raise ValueError(
                f"pool={pool!r}: an Axial-ResNet has no prefix tokens, and no MLP width for a "
                "learned query: allowed is 'mean'"
            )
        if distilled and pool != "prefix":
            raise ValueError(f"pool={pool!r}: allowed beside a distillation token is 'prefix'")
        needed = (1 + distilled) if pool == "prefix" else 0
        if config.prefix_tokens < needed:
            raise ValueError(
                f"the head reads {needed} prefix token(s), and model.prefix_tokens="
                f"{config.prefix_tokens}: allowed are numbers from {needed}"
                + ", or task.pool=mean, which reads none"
                * (not distilled)
            )
        self.backbone = backbone
        self.pool = pool
        self.attn_pool: AttentionPool | None = None
        if pool == "attention":
            assert isinstance(config, AxialTransformerConfig), "others have been refused"
            self.attn_pool = AttentionPool(config.dim, config.heads, config.mlp_width)
        self.head = nn.Linear(config.dim, classes)
        self.head_dist: nn.Linear | None = nn.Linear(config.dim, classes) if distilled else None
        self.exchange = Exchange()

    def forward(
        self,
        pixels: Tensor,
        valid: Tensor | None = None,
        place: Place | None = None,
        chance: Chance | None = None,
    ) -> Tensor:
        """-> logits [B, classes], from pooled sums: no factor row x col in its loss.

        While a distilled one trains, [B, 2, classes]: those of either head; in evaluation their
        mean, as in timm. place: that of the whole image where it is left out.
        """
        tokens, prefix = self.backbone(pixels, valid, place, chance=chance)
        if self.attn_pool is not None:
            return self.head(self.attn_pool(tokens, valid))
        if self.pool == "mean":
            return self.head(mean_token(tokens, valid, self.exchange))
        # The tokens' way through the last layer ends here: its own tables get zeros, not None.
        prefix = prefix + tokens[:0].sum()
        if self.head_dist is None:
            return self.head(prefix[:, 0])
        both = torch.stack((self.head(prefix[:, 0]), self.head_dist(prefix[:, 1])), 1)
        return both if self.training else both.mean(1)


def mean_token(tokens: Tensor, valid: Tensor | None, exchange: Exchange) -> Tensor:
    """Mean [B, D] of the valid tokens of the image, over all ranks that have a part of it.

    tokens: [B, h, w, D], zeros where they are not valid. valid: bool [B, h, w], None for all.
    An image without a valid token gives zeros.
    """
    wide = torch.promote_types(tokens.dtype, torch.float32)
    if valid is None:
        count = tokens.new_full(tokens.shape[:1], tokens.shape[1] * tokens.shape[2], dtype=wide)
    else:
        count = valid.sum((1, 2)).to(wide)
    total = exchange.sum(torch.cat((tokens.sum((1, 2), dtype=wide), count[:, None]), 1))
    return (total[:, :-1] / total[:, -1:].clamp_min(1)).to(tokens.dtype)


class AttentionPool(nn.Module):
    """A learned query attends to all valid tokens of the image (Set Transformer's pooling,
    arXiv 1810.00825, eq. 11), then an MLP with its residual. Parameter names and packing are those
    of timm's `AttentionPoolLatent`.
    """

    def __init__(self, dim: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads={heads} does not divide dim={dim}: allowed are its divisors")
        self.heads = heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.trunc_normal_(self.latent, std=dim**-0.5)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = Norm(dim)
        self.mlp = Mlp(dim, mlp_width)
        self.exchange = Exchange()

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x: [B, h, w, D], valid: bool [B, h, w] of this rank's part -> [B, D] of the image."""
        q = rearrange(
            self.q(self.latent.expand(x.shape[0], -1, -1)), "B n (N K) -> B n N K", N=self.heads
        )
        kv = rearrange(self.kv(x), "B h w (two N K) -> two B h w N K", two=2, N=self.heads)
        k, v = kv.unbind(0)
        out = attend_everywhere(q, k, v, self.exchange, key_mask=valid)
        out = self.proj(out.flatten(2))
        return (out + self.mlp(self.norm(out)))[:, 0]
