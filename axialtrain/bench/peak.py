"""The bytes that torch holds at once: on a CPU each storage from its first use to when it is let
go, on a GPU as torch's allocator counts them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Within it: `bytes`, the most that was alive at once, and `largest`, the largest storage.

    Counts what is made inside; a view counts as the storage that it looks into. kind: of devices of
    this kind alone, as "cpu"; None: of all.
    """

    def __init__(self, kind: str | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.bytes = self.largest = self.now = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        before = {x.untyped_storage()._cdata for x in given}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if torch.is_tensor(x) and self.kind in (None, x.device.type):
                storage = x.untyped_storage()
                if storage._cdata not in self.alive | before:
                    self._made(storage)
        return out

    def _made(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        self.alive.add(key)
        self.now += size
        self.bytes = max(self.bytes, self.now)
        self.largest = max(self.largest, size)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def held_at_once(way: Callable[[], object], device: torch.device) -> tuple[int, int | None]:
    """(bytes, largest): the most that `way` had at once beside what was there before, and its
    largest storage, which on a GPU nobody tells (None).

    On a CPU, what a kernel takes for itself while it runs is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        way()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, None
    with Peak() as peak:
        way()
    return peak.bytes, peak.largest
