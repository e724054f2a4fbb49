"""Images of different sizes, in an order in which those of one step are of about one size.

A micro-batch is padded to its largest image, so the order of an epoch is rearranged: steps take
images of one bucket, as far as they go. It stays a pure function of (seed, index), and which rank
or micro-batch reads which part of a step plays no role.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.order import Stream, words
from axialtrain.data.windows import Windows
from axialtrain.grid import tokens_across

_RUNS = 4  # use of an epoch's words


class BucketedOrder:
    """The indices of each epoch of `stream`, rearranged; an epoch has the same windows as there.

    buckets: of each window, a number; neighbouring numbers are alike in size. batch: indices of a
    step. In an epoch's permutation, each bucket is cut into runs of `batch`, and these come in an
    order of their own. What is left over of the buckets, sorted by bucket, makes the steps that two
    epochs share, at its beginning and end, and mixed runs. It is sorted upwards in even epochs and
    downwards in odd ones, so that what meets in a step of two epochs is of one end.
    """

    def __init__(self, stream: Stream, buckets: NDArray[np.int64], batch: int) -> None:
        self.size = stream.size
        self.seed = stream.seed
        self._stream = stream
        self._buckets = buckets
        self._batch = batch
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
        """The indices [epoch * size, (epoch + 1) * size)."""
        size, batch = self.size, self._batch
        taken = np.array([self._stream[i] for i in range(epoch * size, (epoch + 1) * size)])
        head = min(-epoch * size % batch, size)  # of the step that began in the epoch before
        steps, tail = divmod(size - head, batch)
        runs: list[NDArray[np.int64]] = []
        left: list[NDArray[np.int64]] = []
        buckets = self._buckets[taken]
        for bucket in np.unique(buckets):
            some = taken[buckets == bucket]
            whole = len(some) // batch * batch
            runs += np.split(some[:whole], whole // batch) if whole else []
            left.append(some[whole:])
        if len(runs) > steps:  # by one, where the epoch's steps are cut at both ends
            left.append(runs.pop())
        rest = np.concatenate(left)
        sign = -1 if epoch % 2 else 1
        rest = rest[np.argsort(sign * self._buckets[rest], kind="stable")]
        mixed = rest[head : len(rest) - tail]
        runs += np.split(mixed, len(mixed) // batch) if len(mixed) else []
        order = np.argsort(words(len(runs), self.seed, epoch, use=_RUNS), kind="stable")
        return np.concatenate([rest[:head], *(runs[k] for k in order), rest[len(rest) - tail :]])


def buckets_of(windows: Windows, patch: int, granularity: int) -> NDArray[np.int64]:
    """The bucket of each window: of one height and width in steps of `granularity` tokens.

    patch: px of a token. Numbered by height, then by width.
    """
    sides = [
        [
            -(-tokens_across(side, patch) // granularity)
            for side in (window.rect.height, window.rect.width)
        ]
        for window in windows
    ]
    return np.unique(np.array(sides, np.int64), axis=0, return_inverse=True)[1].reshape(-1)
