"""Which sets of shards are read, and with what weights: the value of `data.shards`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from axialtrain.data.checked import shown

MAX_SETS = 64
_ALLOWED = (
    "a folder of shards; or several, of different names, as {folder: weight} or "
    "[{url: folder, weight: number}], with weights above 0"
)


@dataclass(frozen=True)
class ShardSet:
    """url: a folder of shards. weight: of the samples, in the unit of the other sets' weights."""

    url: str
    weight: float = 1.0


def sets_of(value: Any, key: str = "data.shards") -> tuple[ShardSet, ...]:
    """The sets that `value` of `key` names: a url, {url: weight}, or [{url: ..., weight: ...}].

    ValueError for anything else, for one url twice, or for more than MAX_SETS.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)  # a folder whose name YAML takes for a number
    if isinstance(value, str) and value:
        return (ShardSet(value),)
    if isinstance(value, Mapping):
        pairs = [(str(url), weight) for url, weight in value.items()]
    elif isinstance(value, Sequence) and all(
        isinstance(item, Mapping) and "url" in item and item.keys() <= {"url", "weight"}
        for item in value
    ):
        pairs = [(str(item["url"]), item.get("weight", 1.0)) for item in value]
    else:
        pairs = []
    if not pairs:
        given = "empty" if value in ("", [], {}, None) else shown(value)
        raise ValueError(f"{key} is {given}, allowed is {_ALLOWED}")
    if len(pairs) > MAX_SETS:
        raise ValueError(f"{key} names {len(pairs)} sets, allowed are at most {MAX_SETS}")
    for url, weight in pairs:
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not url or not number or not 1e-6 <= weight <= 1e12:
            raise ValueError(
                f"{key} has {shown(url)} with weight {shown(weight)}, allowed is {_ALLOWED} "
                "(from 1e-6 to 1e12)"
            )
    if len({url for url, _ in pairs}) < len(pairs):
        raise ValueError(f"{key} is {shown(value)}, which names one folder twice, allowed is once")
    return tuple(ShardSet(url, float(weight)) for url, weight in pairs)
