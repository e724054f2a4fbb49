"""Learned relative bias: of some queries and all keys, or of one pair of them.

Kernels take it as they can: products in chunks as a tensor of some queries, a fused kernel as a
function of head, query and key, which it calls for each logit. Both stand here, side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from axialtrain.attention.positions import by_distance, relative_bias, widened
from axialtrain.grid import Rect

# [N, stop - start, L] from the tables: of the queries start..stop of a line.
BiasOf = Callable[[tuple[Tensor, ...], int, int], Tensor]

# A share of the bias along one dim: what is learned of each distance, [N, D], and the coordinates
# of the Lq queries and of the L keys, such that key - query is where their distance stands.
Share = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Bias:
    """A learned bias that is the same for all lines, made from its tables where it is needed.

    of: a tensor of some queries, so that none of all of them need be kept.
    shares: for `bias_at`, from the tables, with gradient.
    """

    tables: tuple[Tensor, ...]
    of: BiasOf
    shares: Callable[[tuple[Tensor, ...]], tuple[Share, ...]]


def bias_at(shares: tuple[Share, ...], head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The bias of one query and key, by their numbers within the line, and a head's.

    Only what can be traced into a kernel, and each learned tensor is read once: FlexAttention takes
    its gradient no other way. No number is fixed in it, so that other sizes and places of a
    rectangle need no other kernel. Keys at -1 (of a prefix) have no bias.
    """
    out = None
    for learned, queries, keys in shares:
        at = keys[key]
        one = learned[head, (at - queries[query]).clamp_min(0)]
        one = torch.where(at < 0, 0.0, one)
        out = one if out is None else out + one
    assert out is not None, "a bias has one share at least"
    return out


def line_bias(table: Tensor, queries: tuple[int, int], keys: tuple[int, int]) -> Bias:
    """Of a line: its queries and keys at these half-open intervals of coordinates.

    table: [N, 2 S - 1], see `positions.relative_bias`.
    """

    def of(tables: tuple[Tensor, ...], start: int, stop: int) -> Tensor:
        return relative_bias(tables[0], (queries[0] + start, queries[0] + stop), keys)

    def shares(tables: tuple[Tensor, ...]) -> tuple[Share, ...]:
        every = partial(torch.arange, device=tables[0].device, dtype=torch.int32)
        return (
            _share(
                tables[0], queries, keys, every(queries[1] - queries[0]), every(keys[1] - keys[0])
            ),
        )

    return Bias((widened(table),), of, shares)


def area_bias(tables: tuple[Tensor, Tensor], queries: Rect, keys: Rect) -> Bias:
    """Of the tokens of two rectangles, taken row by row: of their vertical distance by the first
    table, plus of their horizontal one by the second."""
    tall, wide = (queries.top, queries.bottom), (queries.left, queries.right)
    key_tall, key_wide = (keys.top, keys.bottom), (keys.left, keys.right)

    def of(tables: tuple[Tensor, ...], start: int, stop: int) -> Tensor:
        index = torch.arange(start, stop, device=tables[0].device)
        vertical = relative_bias(tables[0], tall, key_tall)[:, index // queries.width]
        horizontal = relative_bias(tables[1], wide, key_wide)[:, index % queries.width]
        return (vertical[..., None] + horizontal[..., None, :]).flatten(2)

    def shares(tables: tuple[Tensor, ...]) -> tuple[Share, ...]:
        every = partial(torch.arange, device=tables[0].device, dtype=torch.int32)
        query, key = every(queries.area), every(keys.area)
        return (
            _share(tables[0], tall, key_tall, query // queries.width, key // keys.width),
            _share(tables[1], wide, key_wide, query % queries.width, key % keys.width),
        )

    return Bias((widened(tables[0]), widened(tables[1])), of, shares)


def _share(
    table: Tensor, queries: tuple[int, int], keys: tuple[int, int], query: Tensor, key: Tensor
) -> Share:
    """query, key: numbers of each query and key within these intervals."""
    # The smallest distance, which stands first, is that of the first key and the last query.
    return by_distance(table, queries, keys), query - (queries[1] - queries[0] - 1), key
