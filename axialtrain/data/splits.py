"""Which images are for training and which for validation: never two of one group apart."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence

SPLIT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,30}")
SPLIT_WORDS = "a name of A-Z a-z 0-9 _ -, at most 31 characters"


def check_shares(shares: Mapping[str, float]) -> None:
    """ValueError unless `shares` names splits and what of the images each gets, adding up to 1."""
    for name, share in shares.items():
        if not SPLIT.fullmatch(name):
            raise ValueError(f"split is {name!r}, allowed is {SPLIT_WORDS}")
        if not 0 < share <= 1:
            raise ValueError(f"split {name} is {share}, allowed is above 0, to 1")
    total = math.fsum(shares.values())
    if shares and abs(total - 1) > 1e-6:
        raise ValueError(f"split shares add up to {total:g}, allowed is 1")


def dealt(groups: Sequence[str], shares: Mapping[str, float], seed: int) -> list[str]:
    """The split of each image, of whose group `groups` has the name.

    Groups go, in an order that `seed` and their names alone decide, to the split that is farthest
    behind its share of the images. More images leave the order of the others as it was.
    """
    check_shares(shares)
    sizes: dict[str, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1

    def place(group: str) -> bytes:
        return hashlib.sha256(f"{seed}\0{group}".encode()).digest()

    given = dict.fromkeys(shares, 0)
    split_of, done = {}, 0
    for group in sorted(sizes, key=place):
        done += sizes[group]
        split = max(shares, key=lambda name: shares[name] * done - given[name])
        given[split] += sizes[group]
        split_of[group] = split
    return [split_of[group] for group in groups]
