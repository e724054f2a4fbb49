"""Images of any size as shards, and each rank's own part of them.

scene -> readers -> shard -> (store: the format) -> region -> loader. Knows `axialtrain.grid` only,
and has no collective: what the ranks must agree on, they agree on in the training loop.

Shards are read in Python with `from axialtrain.data import open_shards`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from axialtrain.data.painting import Region
    from axialtrain.data.region import Shards, open_shards

__all__ = ["Region", "Shards", "open_shards"]


def __getattr__(name: str) -> object:
    """The names above, when they are first asked for: most of this room needs no codecs."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from axialtrain.data import region

    return getattr(region, name)
