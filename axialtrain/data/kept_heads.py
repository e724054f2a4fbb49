"""The heads that were read of a set, kept in memory for when their images are read again.

From its JSON a head of 49 x 49 blocks takes 0.1 s of Python, and then 0.6 to 1.9 MB of memory. With
its blocks in one array it takes a fifth of that (half and more where they have counts of labels),
and 5 to 10 ms to be a head again. So the last heads are kept as they are, and far more packed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.store import BlockEntry, Head

WHOLE = 1 << 28  # bytes of heads that are kept as they are
PACKED = 1 << 30  # bytes of those that are packed: of 5,000 images of 100,000 px without labels
# Bytes, as they were measured: of a head without its blocks, and of a block without what it names.
_HEAD, _BLOCK = 1 << 11, 270


@dataclass(frozen=True)
class _Packed:
    """A head without its blocks, and these.

    numbers: int64 [blocks, 6], place and checksum of each, and how many of the `empty` are its
    own. labelled: of each, None where none has any.
    """

    head: Head
    numbers: NDArray[np.int64]
    empty: bytes
    labelled: tuple[str | None, ...] | None

    @staticmethod
    def of(head: Head) -> _Packed:
        numbers = [(e.row, e.col, e.offset, e.length, e.crc32c, len(e.empty)) for e in head.blocks]
        labelled = tuple(entry.labelled for entry in head.blocks)
        return _Packed(
            replace(head, blocks=()),
            np.array(numbers, np.int64),
            b"".join(bytes(entry.empty) for entry in head.blocks),
            labelled if any(text is not None for text in labelled) else None,
        )

    @property
    def size(self) -> int:
        texts = 0 if self.labelled is None else sum(64 + len(text or "") for text in self.labelled)
        return _HEAD + len(self.head.crs or "") + self.numbers.nbytes + len(self.empty) + texts

    def unpacked(self) -> Head:
        blocks, at = [], 0
        texts = self.labelled or (None,) * len(self.numbers)
        for numbers, text in zip(self.numbers.tolist(), texts, strict=True):
            row, col, offset, length, crc32c, count = numbers
            empty = tuple(self.empty[at : at + count])
            blocks.append(BlockEntry(row, col, offset, length, crc32c, empty, text))
            at += count
        return replace(self.head, blocks=tuple(blocks))


class KeptHeads:
    """Heads by the names of their images; those that were asked for longest ago go first.

    Safe for several threads.
    """

    def __init__(self) -> None:
        self._whole: OrderedDict[str, tuple[Head, int]] = OrderedDict()
        self._packed: OrderedDict[str, tuple[_Packed, int]] = OrderedDict()
        self._whole_bytes = self._packed_bytes = 0
        self._lock = threading.Lock()

    def get(self, name: str) -> Head | None:
        """The head of the image `name`; None where it is not kept."""
        with self._lock:
            if name in self._packed:  # where it stays, not to be packed again
                self._packed.move_to_end(name)
            if name in self._whole:
                self._whole.move_to_end(name)
                return self._whole[name][0]
            if name not in self._packed:
                return None
            head = self._packed[name][0].unpacked()
            self._keep(head)
            return head

    def put(self, head: Head) -> None:
        with self._lock:
            self._forget(head.name)
            self._keep(head)

    def _keep(self, head: Head) -> None:
        size = _size(head)
        self._whole[head.name] = head, size
        self._whole_bytes += size
        while self._whole_bytes > WHOLE and len(self._whole) > 1:
            _, (oldest, size) = self._whole.popitem(last=False)
            self._whole_bytes -= size
            if oldest.name not in self._packed:
                packed = _Packed.of(oldest)
                self._packed[oldest.name] = packed, packed.size
                self._packed_bytes += packed.size
        while self._packed_bytes > PACKED:
            _, (_, size) = self._packed.popitem(last=False)
            self._packed_bytes -= size

    def _forget(self, name: str) -> None:
        self._whole_bytes -= self._whole.pop(name, (None, 0))[1]
        self._packed_bytes -= self._packed.pop(name, (None, 0))[1]


def _size(head: Head) -> int:
    """Bytes that it takes in memory."""
    lists = sum(40 + 8 * len(entry.empty) for entry in head.blocks if entry.empty)
    texts = sum(64 + len(entry.labelled) for entry in head.blocks if entry.labelled is not None)
    return _HEAD + len(head.crs or "") + _BLOCK * len(head.blocks) + lists + texts
