"""The order in which single tiles come as samples.

A block is the least that is fetched, and holds up to 64 tiles. So the order goes from block to
block, and the tiles of some blocks at a time are mixed: they are read while their blocks are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.order import MAX_SEED, permutation

MAX_MIX = 1 << 10  # blocks; of 1 to 2 MB each


@dataclass
class TilesConfig:
    """Whether each stored tile is a sample: `data=tiles`.

    each: whether it is. mix: blocks whose tiles are mixed in the order, and kept in memory for it.
    """

    each: bool = False
    mix: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.mix <= MAX_MIX:
            raise ValueError(f"data.tiles.mix is {self.mix}, allowed is 1 to {MAX_MIX}")


class TileOrder:
    """order[i]: which tile is number i of an endless stream, for `counts` tiles in each block.

    A pure function of (seed, counts, mix): each epoch has every tile once. Blocks come in an order
    of their own, and the tiles of each `mix` of them in a row are permuted; with mix = 0 all come
    as they are stored, in every epoch. The same on any mesh, for any number of workers.
    """

    def __init__(self, counts: NDArray[np.int64], seed: int, mix: int) -> None:
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed is {seed}, allowed is 0 to {MAX_SEED}")
        if not 0 <= mix <= MAX_MIX:
            raise ValueError(f"mix is {mix}, allowed is 0 to {MAX_MIX}")
        self.size = int(counts.sum())
        self.seed = seed
        self.mix = mix
        self._counts = counts
        self._starts = np.cumsum(counts) - counts
        self._epoch = self._pool = -1

    def __getitem__(self, index: int) -> int:
        if index < 0:
            raise ValueError(f"index is {index}, allowed is 0 or more: the order has no end")
        epoch, at = divmod(index, self.size)
        if self.mix == 0:
            return at
        if epoch != self._epoch:
            self._blocks = permutation(len(self._counts), self.seed, epoch)
            ends = np.cumsum(self._counts[self._blocks])
            last = np.minimum(np.arange(self.mix, len(ends) + self.mix, self.mix), len(ends)) - 1
            self._pool_ends = ends[last]
            self._epoch, self._pool = epoch, -1
        pool = int(np.searchsorted(self._pool_ends, at, side="right"))
        if pool != self._pool:
            blocks = self._blocks[pool * self.mix : (pool + 1) * self.mix]
            tiles = np.concatenate(
                [np.arange(self._starts[b], self._starts[b] + self._counts[b]) for b in blocks]
            )
            # Part 0 of an epoch is the order of its blocks.
            self._tiles = tiles[permutation(len(tiles), self.seed, epoch, part=pool + 1)]
            self._pool = pool
        start = int(self._pool_ends[pool - 1]) if pool else 0
        return int(self._tiles[at - start])
