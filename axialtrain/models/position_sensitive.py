"""The attention layer of Axial-ResNet: position-sensitive, along one axis, with its batch norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from axialtrain.attention.position_sensitive import (
    attend_with_positions,
    chunk_on,
    logit_moments,
)
from axialtrain.models.batch_norm import BatchNorm, LogitNorm


class PositionSensitiveAttention(nn.Module):
    """Attention along rows or columns as published (arXiv 2003.07853, eq. 4, and its public code).

    C channels in and out, N heads; queries and keys of C / 2N channels, values of C / N, packed
    head by head. No scale: batch norms stand behind the projection (2 C channels), on the three
    logits (3 N) and on what contents and positions give (2 C), before each sum. No output
    projection. `relative` holds the tables for queries, keys and values, shared by the heads.

    axis: the dim that is attended along, 2 (rows) or 1 (columns). span: S of the tables of 2 S - 1.
    Source of the start values: the public code.
    """

    def __init__(self, dim: int, heads: int, span: int, axis: int) -> None:
        super().__init__()
        assert dim % (2 * heads) == 0, "the config has been checked"
        self.dim, self.heads, self.span, self.axis = dim, heads, span, axis
        self.query = dim // (2 * heads)  # K, channels of a query
        self.chunk: int | None = None  # logits that exist at a time; None: as the device has it
        self.qkv = nn.Linear(dim, 2 * dim, bias=False)
        self.bn_qkv = BatchNorm(2 * dim)
        self.bn_similarity = LogitNorm(3 * heads)
        self.bn_output = BatchNorm(2 * dim)
        self.relative = nn.Parameter(torch.empty(4 * self.query, 2 * span - 1))
        nn.init.normal_(self.qkv.weight, std=dim**-0.5)
        nn.init.normal_(self.relative, std=(2 * self.query) ** -0.5)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x: [B, h, w, C], lines along the axis being whole -> the same, attended.

        valid: bool [B, h, w]; other cells are no keys, count in no norm, and get zeros.
        """
        qkv = self.bn_qkv(self.qkv(x), valid).unflatten(-1, (self.heads, -1))
        if self.axis == 1:
            qkv = qkv.transpose(1, 2)
        mask = valid if valid is None or self.axis == 2 else valid.transpose(1, 2)
        q, k, v = qkv.split((self.query, self.query, 2 * self.query), -1)
        table, chunk = self.relative, self.chunk or chunk_on(x.device)
        factors = self.bn_similarity(
            logit_moments(q, k, table, mask, chunk=chunk) if self.training else None
        )
        attended = attend_with_positions(q, k, v, table, factors, mask, chunk=chunk)
        both = torch.stack(attended, -1)
        if self.axis == 1:
            both = both.transpose(1, 2)
        return self.bn_output(both.flatten(3), valid).unflatten(-1, (-1, 2)).sum(-1)
