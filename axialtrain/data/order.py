"""The endless order in which a run sees its windows; a pure function of a seed.

Index i of the stream is window f(seed, i div n)(i mod n), for a permutation f of the n windows that
differs by epoch. An optimizer step takes the indices [s * batch, (s + 1) * batch), across epochs.
Nothing here knows of a mesh, so the order is the same on every one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.checked import Record

ORDER_VERSION = 1  # a saved run goes on only under the order that it began with
MAX_SEED = (1 << 63) - 1
_MAX_INDEX = (1 << 62) - 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
SHORT = 8  # hexadecimal digits
_SHORT = re.compile(rf"[0-9a-f]{{{SHORT}}}")


class Stream(Protocol):
    """stream[i]: which window is number i of an endless stream, a pure function of (seed, i).

    size: indices of an epoch.
    """

    @property
    def size(self) -> int: ...
    @property
    def seed(self) -> int: ...
    def __getitem__(self, index: int) -> int: ...


def words(size: int, seed: int, epoch: int, part: int = 0, use: int = 0) -> NDArray[np.uint64]:
    """`size` raw words of Philox, of 64 bits: numpy promises those to stay the same for a key.

    part: which of several sets they are for. use: what for, of one set and epoch.
    """
    key, counter = np.array([seed, epoch], np.uint64), np.array([0, 0, part, use], np.uint64)
    return np.asarray(np.random.Philox(key=key, counter=counter).random_raw(size))


def permutation(size: int, seed: int, epoch: int, part: int = 0) -> NDArray[np.int64]:
    """The order of `size` things in `epoch`.

    Sorts Philox's raw words; numpy does not promise `Generator.permutation` to stay the same.
    """
    return np.argsort(words(size, seed, epoch, part), kind="stable")


class Order:
    """order[i]: which of `size` windows is number i of the stream; size >= 1.

    part: of an order for each of several sets, which one; they have nothing in common.
    """

    def __init__(self, size: int, seed: int, part: int = 0) -> None:
        if size < 1:
            raise ValueError(f"size is {size}, allowed is at least 1")
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed is {seed}, allowed is 0 to {MAX_SEED}")
        self.size = size
        self.seed = seed
        self.part = part
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __getitem__(self, index: int) -> int:
        if index < 0:
            raise ValueError(f"index is {index}, allowed is 0 or more: the order has no end")
        epoch, at = divmod(index, self.size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.of_epoch(epoch)
        return int(self._order[at])

    def of_epoch(self, epoch: int) -> NDArray[np.int64]:
        """The indices [epoch * size, (epoch + 1) * size) of the stream."""
        return permutation(self.size, self.seed, epoch, self.part)


@dataclass(frozen=True)
class OrderState:
    """Where a run is in its order. Moves only when an optimizer step completes.

    next_index: the first index that no completed step has taken. manifest: digest of the shards'.
    plan: what else the order follows from, by the key that says it: a digest of the value. Empty
    where each window is taken once an epoch, edge to edge, of one set; it is not written then, so
    that older states read the same.
    """

    next_index: int
    seed: int
    manifest: str
    version: int = ORDER_VERSION
    plan: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        values = asdict(self)
        if not self.plan:
            del values["plan"]
        return json.dumps(values, sort_keys=True)

    @staticmethod
    def from_json(data: str | bytes, where: str = "order state") -> OrderState:
        """ValueError naming `where`, key and value if `data` is anything else."""
        record = Record.parse(data, where)
        return OrderState(
            next_index=record.integer("next_index", 0, _MAX_INDEX),
            seed=record.integer("seed", 0, MAX_SEED),
            manifest=record.text("manifest", _SHA256, "64 hexadecimal digits"),
            version=record.integer("version", ORDER_VERSION, ORDER_VERSION),
            plan=_plan(record),
        )


def _plan(record: Record) -> dict[str, str]:
    if "plan" not in record.values:
        return {}
    given = Record.of(record.values["plan"], f"{record.where}: plan")
    allowed = f"{SHORT} hexadecimal digits"
    return {key: given.text(key, _SHORT, allowed) for key in given.values}


def short_digest(value: bytes) -> str:
    """Tells two values of a key apart in a saved state."""
    return hashlib.sha256(value).hexdigest()[:SHORT]
