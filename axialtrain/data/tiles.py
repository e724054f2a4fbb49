"""The tiles of shards as a pipeline of the `webdataset` library, for work on single tiles.

`tile_stream` gives what `webdataset.WebDataset` would, cut into tiles, but does not read tars with
it: that ends without an error at a cut or at a damaged header, and compares no checksum. Blocks
are read as training reads them, each held to its CRC-32C and to the directory of its image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import webdataset
from torch.utils.data import get_worker_info
from webdataset.compat import FluidInterface

from axialtrain.data.order import MAX_SEED
from axialtrain.data.reading import ReadConfig
from axialtrain.data.region import open_shards
from axialtrain.data.tile_order import MAX_MIX, TileOrder
from axialtrain.data.tile_reader import StoredTiles, TileReader

Sample = dict[str, Any]


class TileStream(webdataset.DataPipeline, FluidInterface):
    """A pipeline of tiles, an IterableDataset: one pass is one epoch of its rank and worker.

    It takes webdataset's stages: `.map(...)`, `.batched(...)`, `.compose(...)`.
    """

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next pass. Workers that live on, and copies with stages, see it too."""
        if not 0 <= epoch <= MAX_SEED:
            raise ValueError(f"epoch is {epoch}, allowed is 0 to {MAX_SEED}")
        self.pipeline[0].epoch.fill_(epoch)

    def tiles_each(self, workers: int = 0) -> int:
        """Tiles of one pass, for each of `workers` of a DataLoader, 0: without any."""
        each: int = self.pipeline[0].each(max(workers, 1))
        return each


def tile_stream(
    url: str,
    *,
    data_rank: int = 0,
    data_ranks: int = 1,
    seed: int = 0,
    shuffle: int = 8,
    read: ReadConfig | None = None,
) -> TileStream:
    """The tiles of the shards in the folder `url` as samples, those of one data rank.

    Each sample is a dictionary: `pixels` [tile, tile, bands] of the image's dtype, 0 where missing;
    `present` bool [tile, tile], false outside the image and where nothing is stored; `image`,
    `row`, `col` (of the tile grid), `level` (of the source's pyramid); `__key__`, `__url__`; and,
    if all images have them, `labels` uint8 [tile, tile] (255: no target), `instances` uint16
    [tile, tile] and `target`, the class of the image.

    seed, shuffle: blocks are permuted by (seed, epoch), and so are the tiles of each `shuffle` of
    them in a row; 0 takes all as they are stored. That is one order for all ranks and workers, of
    which each takes an interval: all as many tiles, and all tiles of the shards, whatever the
    number of shards is. To come out even the first tiles are repeated at the end, fewer than there
    are ranks x workers.

    read: how, over a network: tries, timeouts, a cache. A damaged block ends the pass with a
    ValueError that names shard and byte, one that does not come with an UnreachableError; the heads
    of all images are fetched at once.
    """
    if data_ranks < 1 or not 0 <= data_rank < data_ranks:
        raise ValueError(
            f"data_rank is {data_rank} of data_ranks={data_ranks}, allowed is 0 to data_ranks - 1"
        )
    if not 0 <= shuffle <= MAX_MIX:
        raise ValueError(f"shuffle is {shuffle}, allowed is 0 to {MAX_MIX} blocks")
    return TileStream(_Tiles(url, data_rank, data_ranks, seed, shuffle, read))


class _Tiles:
    """The first stage: the samples of one epoch. Shards are opened where it runs: file systems do
    not survive a fork."""

    def __init__(
        self,
        url: str,
        data_rank: int,
        data_ranks: int,
        seed: int,
        mix: int,
        read: ReadConfig | None,
    ) -> None:
        shards = open_shards(url, read)
        self.url, self.read, self.digest = url, read, shards.digest
        self.data_rank, self.data_ranks = data_rank, data_ranks
        self.seed, self.mix = seed, mix
        self.tiles = StoredTiles(shards)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        TileOrder(self.tiles.counts, seed, mix)  # refuses what it does not allow

    def each(self, workers: int) -> int:
        return -(-len(self.tiles) // (self.data_ranks * workers))

    def __call__(self) -> Iterator[Sample]:
        shards = open_shards(self.url, self.read)
        if shards.digest != self.digest:
            raise ValueError(f"{self.url}: has another manifest than when the stream was made")
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        order = TileOrder(self.tiles.counts, self.seed, self.mix)
        reader = TileReader(shards, keep=max(self.mix, 1))
        each, epoch = self.each(workers), int(self.epoch)
        first = (self.data_rank * workers + worker) * each
        for at in range(first, first + each):
            number = order[epoch * order.size + at % order.size]
            place = self.tiles.place(number, shards)
            region, row = reader.region(place.image, place.rect), shards.row(place.image)
            sample: Sample = {
                "__key__": f"{place.image}/{place.level}/{place.row:05d}_{place.col:05d}",
                "__url__": f"{self.url}/{row.shard}",
                "pixels": region.pixels,
                "present": region.present,
                "image": place.image,
                "row": place.row,
                "col": place.col,
                "level": place.level,
            }
            if shards.has_labels:
                sample["labels"] = region.labels
            if shards.has_instances:
                sample["instances"] = region.instances
            if shards.has_image_labels:
                sample["target"] = row.label
            yield sample
