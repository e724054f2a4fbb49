"""Several sets of shards as one, and in which order their samples come, by weight.

The shares of a mix are kept at every moment: after any number of indices, the samples of a set are
within 1 of its share of them. Each set has an endless order of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.kinds import Kind
from axialtrain.data.order import Stream
from axialtrain.data.painting import Region
from axialtrain.data.reading import ReadConfig
from axialtrain.data.region import Shards, open_shards
from axialtrain.data.sets import ShardSet, sets_of
from axialtrain.data.store import Head, ImageRow
from axialtrain.grid import Rect

PERIOD = 10_000  # indices after which a mix repeats itself, at most: weights are rounded to that
_HAS = {
    "has_labels": "labels",
    "has_instances": "instances",
    "has_image_labels": "classes of images",
}
_OF_IMAGE = {"has_labels": "classes", "has_instances": "instances", "has_image_labels": "label"}


class MixedShards:
    """Several sets of shards, read as one. Safe to read from several threads.

    given: url and weight of each. sets: their shards. An image is named by the number of its set,
    from 0, and its own name: `1/slide`. images: those of all sets, set after set. digest: of all
    manifests. has_labels, has_instances, has_image_labels: whether all sets have them; where one
    has not, none counts as having them. classes, image_classes: the most of all sets.
    ValueError naming two sets where they are of the same images.
    """

    def __init__(self, sets: Sequence[Shards], given: Sequence[ShardSet]) -> None:
        self.given = tuple(given)
        self.sets = tuple(sets)
        self.images = tuple(
            replace(row, name=f"{number}/{row.name}")
            for number, shards in enumerate(sets)
            for row in shards.images
        )
        urls: dict[str, str] = {}
        for one, shards in zip(given, sets, strict=True):
            if shards.digest in urls:
                raise ValueError(
                    f"data.shards: {urls[shards.digest]} and {one.url} hold the same images, "
                    "allowed is each set once"
                )
            urls[shards.digest] = one.url
        self.digest = hashlib.sha256("".join(urls).encode()).hexdigest()
        self.has_labels = all(shards.has_labels for shards in sets)
        self.has_instances = all(shards.has_instances for shards in sets)
        self.has_image_labels = all(shards.has_image_labels for shards in sets)
        self.classes = _most([shards.classes for shards in sets])
        self.image_classes = _most([shards.image_classes for shards in sets])

    @property
    def head_bytes_read(self) -> int:
        """Of the heads of all sets."""
        return sum(shards.head_bytes_read for shards in self.sets)

    @property
    def kind(self) -> Kind:
        """Of all images' pixels; ValueError, naming two sets, where they are not of one kind."""
        kinds = [shards.kind for shards in self.sets]
        for one, kind in zip(self.given, kinds, strict=True):
            if kind != kinds[0]:
                raise ValueError(
                    f"data.shards: {one.url} has images of {kind} and {self.given[0].url} of "
                    f"{kinds[0]}, allowed is one kind for all sets"
                )
        return kinds[0]

    @property
    def bands(self) -> int:
        """Of every image; ValueError as `kind` has it."""
        return self.kind.bands

    @property
    def dtype(self) -> str:
        """Of every image: uint8, uint16 or float32; ValueError as `kind` has it."""
        return self.kind.dtype

    @property
    def shares(self) -> list[int]:
        """Of the samples, of each set, in whole numbers of their sum."""
        return shares_of([one.weight for one in self.given])

    def row(self, name: str) -> ImageRow:
        """The manifest's row of the image `name`, with the set's number before its name."""
        shards, own = self._of(name)
        return replace(shards.row(own), name=name)

    def head(self, name: str) -> Head:
        """As `Shards.head`; the head has the name that the image has in its set."""
        shards, own = self._of(name)
        return shards.head(own)

    def region(self, name: str, rect: Rect, *, spare: bool = False) -> Region:
        """As `Shards.region`; what is damaged has the image's name with the set's number, too."""
        shards, own = self._of(name)
        region = shards.region(own, rect, spare=spare)
        damaged = tuple(replace(one, image=name) for one in region.damaged)
        return replace(region, damaged=damaged)

    def _of(self, name: str) -> tuple[Shards, str]:
        number, _, own = name.partition("/")
        if not number.isdecimal() or int(number) >= len(self.sets):
            raise ValueError(
                f"image is {name!r}, allowed is the number of its set, from 0 to "
                f"{len(self.sets) - 1}, / and its name there"
            )
        return self.sets[int(number)], own


def open_sets(value: Any, read: ReadConfig | None = None) -> Shards | MixedShards:
    """The shards that `data.shards` names; errors as `sets_of` and `open_shards` have them.

    read: how, over a network.
    """
    given = sets_of(value)
    if len(given) == 1:
        return open_shards(given[0].url, read)
    return MixedShards([open_shards(one.url, read) for one in given], given)


def parts_of(shards: Shards | MixedShards) -> list[int]:
    """How many of `shards.images` are of each set, in their order."""
    if isinstance(shards, MixedShards):
        return [len(one.images) for one in shards.sets]
    return [len(shards.images)]


def lacking(shards: Shards | MixedShards, what: str) -> str:
    """For a message, where sets or images differ in `what`, a key of _HAS: who has it, who not."""
    if not isinstance(shards, MixedShards):
        key = _OF_IMAGE[what]
        without = [row.name for row in shards.images if getattr(row, key) is None]
        if len(without) in (0, len(shards.images)):
            return ""
        some = f"{len(without)} of its {len(shards.images)} images"
        return f" ({some} have none: {without[0]!r} first)"
    have = {
        bool(getattr(one, what)): given.url
        for one, given in zip(shards.sets, shards.given, strict=True)
    }
    if len(have) < 2:
        return ""
    return f" ({have[True]} has {_HAS[what]}, {have[False]} has none, or not for all its images)"


def shares_of(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of `weights`, which are above 0: of PERIOD together, or less.

    Exactly in that ratio, as it is written in decimals, where they can be; otherwise rounded, each
    at least 1, with which they may be some more than PERIOD.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(one.denominator for one in exact))
    whole = [int(one * common) for one in exact]
    whole = [one // math.gcd(*whole) for one in whole]
    total = sum(whole)
    if total <= PERIOD:
        return whole
    least = [max(one * PERIOD // total, 1) for one in whole]
    # The largest remainders first, until all is dealt out.
    order = sorted(range(len(whole)), key=lambda k: least[k] - Fraction(whole[k] * PERIOD, total))
    for k in order[: max(PERIOD - sum(least), 0)]:
        least[k] += 1
    return least


def dealt_out(shares: Sequence[int]) -> NDArray[np.int64]:
    """Which set each of sum(shares) indices is of: set k has shares[k] of them, evenly spread.

    Of the first i, set k has more than its share i * shares[k] / sum(shares) less 1, and less than
    that and 1 (R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980),
    323-330): of the sets that are far enough behind, the one that would be late first.
    """
    share, total, twice = np.array(shares, np.int64), sum(shares), 2 * len(shares) - 2
    behind = np.zeros(len(shares), np.int64)  # what a set should have, less what it has, * total
    dealt = np.zeros(total, np.int64)
    if twice:
        for index in range(total):
            behind += share
            late = np.where(
                twice * behind >= total, ((twice - 1) * total - twice * behind) / share, np.inf
            )
            dealt[index] = late.argmin()
            behind[dealt[index]] -= total
    return dealt


class MixedOrder:
    """order[i]: which of all sets' windows, which stand set after set, is number i of the stream.

    streams: of each set, in its own windows. shares: as `shares_of` has them.
    """

    def __init__(self, streams: Sequence[Stream], sizes: Sequence[int], shares: Sequence[int]):
        self.size = sum(sizes)
        self.seed = streams[0].seed
        self._streams = streams
        self._starts = [sum(sizes[:k]) for k in range(len(sizes))]
        self._shares = list(shares)
        self._dealt = dealt_out(shares)
        self._before = np.zeros_like(self._dealt)  # of the same set, in the period
        for k, share in enumerate(shares):
            self._before[self._dealt == k] = np.arange(share)

    def __getitem__(self, index: int) -> int:
        if index < 0:
            raise ValueError(f"index is {index}, allowed is 0 or more: the order has no end")
        period, at = divmod(index, len(self._dealt))
        k = int(self._dealt[at])
        own = period * self._shares[k] + int(self._before[at])
        return self._starts[k] + self._streams[k][own]


def _most(counts: Sequence[int | None]) -> int | None:
    return max((count for count in counts if count is not None), default=None)
