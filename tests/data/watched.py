"""Which bytes of shards are read, of this machine's files or as if they came over a network."""

from __future__ import annotations

import os

import pytest

from axialtrain.data.reading import ByteSource
from axialtrain.data.store import MANIFEST

WAYS = ("near", "afar")


def watched(monkeypatch: pytest.MonkeyPatch, way: str) -> list[list[tuple[int, int]]]:
    """For each reading from now on the [start, stop) of its ranges; none of manifests.

    way: of WAYS; for shards that are opened afterwards.
    """
    found: list[list[tuple[int, int]]] = []
    fetch, pread = ByteSource.fetch, os.pread

    def fetching(self: ByteSource, path: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        if not path.endswith(MANIFEST):
            found.append(list(ranges))
        return fetch(self, path, ranges)

    def preading(file: int, size: int, start: int) -> bytes:
        found.append([(start, start + size)])
        return pread(file, size, start)

    monkeypatch.setattr(ByteSource, "fetch", fetching)
    monkeypatch.setattr(os, "pread", preading)
    if way == "afar":
        monkeypatch.setattr("axialtrain.data.reading._LOCAL", frozenset())
    return found
