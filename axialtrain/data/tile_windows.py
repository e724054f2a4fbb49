"""`data=tiles`: each stored tile is a sample of training."""

from __future__ import annotations

from collections.abc import Sequence

from axialtrain.data.mixing import MixedShards
from axialtrain.data.order import short_digest
from axialtrain.data.region import Shards
from axialtrain.data.tile_order import TileOrder, TilesConfig
from axialtrain.data.tile_reader import StoredTiles, TileReader
from axialtrain.data.windows import Window


class TileWindows(Sequence[Window]):
    """The stored tiles as windows, of the size that they are stored in; made when asked for.

    reader: of their regions. plan: of their order, for its saved state. ValueError if `mesh_shape`
    is not 1 x 1, if there are several sets, and as `StoredTiles` has it.
    """

    def __init__(
        self, shards: Shards | MixedShards, config: TilesConfig, mesh_shape: tuple[int, int]
    ) -> None:
        if mesh_shape != (1, 1):
            raise ValueError(
                f"mesh is row={mesh_shape[0]} col={mesh_shape[1]}, allowed is 1 x 1 for "
                "data=tiles: a stored tile is read by one process"
            )
        if isinstance(shards, MixedShards):
            raise ValueError(
                f"data.shards has {len(shards.sets)} sets, allowed is one with data=tiles"
            )
        self._shards = shards
        self._tiles = StoredTiles(shards)
        self._mix = config.mix
        self.reader = TileReader(shards, keep=2 * config.mix)  # some are read ahead
        self.plan = {"data.tiles.mix": short_digest(str(config.mix).encode())}

    def __len__(self) -> int:
        return len(self._tiles)

    def __getitem__(self, number: int) -> Window:  # type: ignore[override]  # there are no slices
        place = self._tiles.place(number, self._shards)
        return Window(place.image, place.rect)

    def of_each_size(self) -> list[Window]:
        """A tile of each size that there is."""
        return [self[number] for number in self._tiles.of_each_size()]

    def order(self, seed: int) -> TileOrder:
        """Which of them is which number of the endless stream."""
        return TileOrder(self._tiles.counts, seed, self._mix)
