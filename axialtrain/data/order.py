"""The endless order in which a run sees its windows; a pure function of a seed.

Index i of the stream is window f(seed, i div n)(i mod n), for a permutation f of the n windows that
differs by epoch. An optimizer step takes the indices [s * batch, (s + 1) * batch), across epochs.
Nothing here knows of a mesh, so the order is the same on every one.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.checked import Record

ORDER_VERSION = 1  # a saved run goes on only under the order that it began with
MAX_SEED = (1 << 63) - 1
_MAX_INDEX = (1 << 62) - 1
_SHA256 = re.compile(r"[0-9a-f]{64}")


def permutation(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of `size` things in `epoch`.

    Sorts Philox's raw words: numpy promises those to stay the same for a key, and does not promise
    that of `Generator.permutation`.
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(size)
    return np.argsort(words, kind="stable")


class Order:
    """order[i]: which of `size` windows is number i of the stream; size >= 1."""

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"size is {size}, allowed is at least 1")
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed is {seed}, allowed is 0 to {MAX_SEED}")
        self.size = size
        self.seed = seed
        self._epoch = 0
        self._permutation = permutation(size, seed, 0)

    def __getitem__(self, index: int) -> int:
        if index < 0:
            raise ValueError(f"index is {index}, allowed is 0 or more: the order has no end")
        epoch, at = divmod(index, self.size)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, permutation(self.size, self.seed, epoch)
        return int(self._permutation[at])


@dataclass(frozen=True)
class OrderState:
    """Where a run is in its order. Moves only when an optimizer step completes.

    next_index: the first index that no completed step has taken. manifest: digest of the shards'.
    """

    next_index: int
    seed: int
    manifest: str
    version: int = ORDER_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(data: str | bytes, where: str = "order state") -> OrderState:
        """ValueError naming `where`, key and value if `data` is anything else."""
        record = Record.parse(data, where)
        return OrderState(
            next_index=record.integer("next_index", 0, _MAX_INDEX),
            seed=record.integer("seed", 0, MAX_SEED),
            manifest=record.text("manifest", _SHA256, "64 hexadecimal digits"),
            version=record.integer("version", ORDER_VERSION, ORDER_VERSION),
        )
