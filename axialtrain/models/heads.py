"""Heads: what a task reads off the tokens. Token by token, so each runs where its tokens are."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from axialtrain.grid import Place
from axialtrain.models.transformer import AxialTransformer


class Segmenter(nn.Module):
    """Backbone and per-token classifier of cells x cells cells of each patch.

    cells = 1 names a class per token, cells = patch one per pixel; between them the classes of a
    cell hold for all of its pixels.
    """

    def __init__(self, backbone: AxialTransformer, classes: int, cells: int) -> None:
        super().__init__()
        patch = backbone.config.patch
        if cells < 1 or patch % cells:
            allowed = [n for n in range(1, patch + 1) if patch % n == 0]
            raise ValueError(
                f"task.cells={cells} does not divide model.patch={patch}: allowed are {allowed}"
            )
        self.cells = cells
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.dim, cells * cells * classes)

    def forward(self, pixels: Tensor, valid: Tensor, place: Place) -> Tensor:
        """-> logits [B, h * cells, w * cells, classes] of this rank's tile."""
        logits = self.head(self.backbone(pixels, valid, place))
        return rearrange(logits, "B h w (p q C) -> B (h p) (w q) C", p=self.cells, q=self.cells)


class MaskedReconstructor(nn.Module):
    """Backbone that sees a learned token in place of hidden patches and predicts their pixels.

    SimMIM (arXiv 2111.09886): hidden tokens go through the encoder, a linear head predicts pixels.
    """

    def __init__(self, backbone: AxialTransformer) -> None:
        super().__init__()
        config = backbone.config
        self.backbone = backbone
        self.mask_token = nn.Parameter(torch.zeros(config.dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.head = nn.Linear(config.dim, config.bands * config.patch**2)

    def forward(self, pixels: Tensor, valid: Tensor, hidden: Tensor, place: Place) -> Tensor:
        """hidden: [B, h, w] -> values [B, h, w, bands * patch^2], ordered as `to_patches`."""
        return self.head(self.backbone(pixels, valid, place, (hidden, self.mask_token)))
