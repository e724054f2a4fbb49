"""How the JSON records of the shards are written, and what may be absent in them."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from axialtrain.data.checked import Record
from axialtrain.data.kinds import Kind

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Keys that came after the first shards, and what their absence means: older digests stay.
_LATER: dict[str, object] = {
    "label": None,
    "instances": None,
    "instances_crc32c": None,
    "thumbnail_crc32c": None,
    "bands": Kind.bands,
    "dtype": Kind.dtype,
    "mask_crc32c": None,
    "masked": False,
    "crs": None,
    "transform": None,
    "statistics": None,
    "empty": (),
    "labelled": None,
}


def absent_or(record: Record, key: str, most: int) -> int | None:
    """The integer at `key`; None also where there is no such key, as in older shards."""
    return None if record.values.get(key) is None else record.integer(key, 0, most)


def fields_of(record: DataclassInstance) -> dict[str, object]:
    """What of `record` its JSON holds. What came later is no key where it says what was before."""
    return {k: v for k, v in _shallow(record).items() if k not in _LATER or v != _LATER[k]}


def dump(value: object) -> bytes:
    """JSON of one spelling only, so that the same data gives the same bytes."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_inner
    ).encode()


def _inner(value: object) -> dict[str, object]:
    if is_dataclass(value) and not isinstance(value, type):
        return _shallow(value)
    raise TypeError(f"{type(value).__name__} is not for JSON")


def _shallow(record: DataclassInstance) -> dict[str, object]:
    """As asdict, which would also copy each number of each tile; `dump` takes what is inside."""
    return {field.name: getattr(record, field.name) for field in fields(record)}


def check_apart(where: str, ranges: list[tuple[int, int, str]]) -> None:
    """ValueError if two of the (start, stop, name) share a byte.

    Otherwise a small shard could be read as a large image, the same bytes again and again.
    """
    ranges.sort()
    for (_, stop, before), (start, _, after) in pairwise(ranges):
        if start < stop:
            raise ValueError(
                f"{where}: {after} starts at byte {start}, allowed is behind {before}, which ends "
                f"at byte {stop}"
            )
