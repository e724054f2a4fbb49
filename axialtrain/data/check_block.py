"""All that can be wrong with one block, without stopping at the first fault.

`Block.parse` is for reading: it stops at once, and does not look at what a reader never uses. Here
a header that is damaged is skipped, to the next one that is not, so that what lies behind is seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import google_crc32c
import numpy as np

from axialtrain.data.block import decode_labels, decode_mask, decode_numbers, decode_tile
from axialtrain.data.faults import MADE_SO, Faults
from axialtrain.data.labelled import count_labels, labels_of
from axialtrain.data.store import (
    INSTANCES,
    LABELS,
    MASK,
    TAR_RECORD,
    BlockEntry,
    BlockIndex,
    Head,
    block_key,
    count_classes,
    tile_number,
)
from axialtrain.data.tar import is_file, is_sound, kind, parse_header

INDEX = "json"  # a block's member that lists the others


@dataclass
class Largest:
    """The largest values found in an image's rasters: labels + 1, and numbers of instances."""

    classes: int = 0
    instances: int = 0


@dataclass
class _Members:
    """The members of a block by what stands behind their prefix, with where their data starts.

    lost: (where, the name that stands there, what is wrong) of headers that cannot be used.
    """

    data: dict[str, bytes] = field(default_factory=dict)
    at: dict[str, int] = field(default_factory=dict)
    lost: list[tuple[int, str | None, str]] = field(default_factory=list)


def check_block(
    data: bytes, head: Head, entry: BlockEntry, faults: Faults, largest: Largest | None
) -> None:
    """Add to `faults` what is wrong with `data`, the bytes of `entry` in its shard.

    largest: None leaves tiles and rasters undecoded; otherwise all are decoded, and it is raised to
    the largest values in them.
    """
    before = faults.count
    prefix = f"{block_key(head.name, head.level, entry.row, entry.col)}."
    members = _walk(data, entry.offset, prefix, head, faults)
    index = _index(members, entry, prefix, head, faults)
    stored = {} if index is None else _checksums(index)
    expected = {INDEX, *stored}
    missing = sorted(expected - members.data.keys())
    for at, name, what in members.lost:
        if name is None and missing:  # members are sorted: the first that is missing was here
            name = prefix + missing[0]
        if name is not None and name.removeprefix(prefix) in missing:
            missing.remove(name.removeprefix(prefix))
        faults.add(what, offset=at, member=name, image=head.name)
    for name in missing:
        faults.add(
            "is missing from its block",
            offset=entry.offset,
            member=prefix + name,
            image=head.name,
        )
    if index is not None:
        for name in sorted(members.data.keys() - expected):
            faults.add(
                "is in no index of its block",
                MADE_SO,
                offset=members.at[name],
                member=prefix + name,
                image=head.name,
            )
        _check_empty(index, entry, prefix, head, faults)
    for name, crc in stored.items():
        if name in members.data:
            _check_member(name, crc, members, entry, prefix, head, faults, largest)
    if google_crc32c.value(data) != entry.crc32c and faults.count == before:
        _say_where(data, members, entry, prefix, head, faults)
    if largest is not None and faults.count == before:
        _check_labelled(members, entry, prefix, head, faults)


def _check_empty(
    index: BlockIndex, entry: BlockEntry, prefix: str, head: Head, faults: Faults
) -> None:
    """Where the head says which tiles are empty, all others are there, and none of these."""
    if not entry.empty:
        return
    stored = {tile_number(t.row, t.col, head.block): t.member for t in index.tiles}
    wrong = {
        stored[number]: "is stored, and empty in the head of its image"
        for number in stored.keys() & set(entry.empty)
    }
    for number in head.numbers_of(entry.row, entry.col) - stored.keys() - set(entry.empty):
        wrong[f"{number:02d}.{head.encoding}"] = "is neither stored nor empty in its image's head"
    for name, what in sorted(wrong.items()):
        faults.add(what, MADE_SO, offset=entry.offset, member=prefix + name, image=head.name)


def _check_labelled(
    members: _Members, entry: BlockEntry, prefix: str, head: Head, faults: Faults
) -> None:
    """Count the pixels of each class again; all members are known to be sound."""
    if entry.labelled is None:  # without labels, or of before they were counted
        return
    block = (entry.row, entry.col)
    rect = head.block_rect(*block)
    labels = decode_labels(members.data[LABELS], head, rect)
    present = decode_mask(members.data[MASK], rect) if MASK in members.data else None
    stored = sorted(head.numbers_of(*block) - set(entry.empty))
    found, what = count_labels(labels, present, head, block, stored), None
    try:
        if not np.array_equal(labels_of(entry, head), found):  # other zlibs write other texts
            what = "has other pixels of its classes than the head of its image tells"
    except ValueError as error:
        what = str(error)
    if what is not None:
        faults.add(
            what,
            MADE_SO,
            offset=members.at[LABELS],
            member=prefix + LABELS,
            image=head.name,
        )


def _say_where(
    data: bytes, members: _Members, entry: BlockEntry, prefix: str, head: Head, faults: Faults
) -> None:
    """Add the fault of a block whose members are sound, and whose CRC-32C is not the stored one."""
    names = list(members.data)
    for name, ordered in zip(names, sorted(names), strict=True):
        at = members.at[name] - TAR_RECORD
        what = None
        if not is_sound(data[at - entry.offset : at - entry.offset + TAR_RECORD]):
            what = "its tar header is damaged"
        elif name != ordered:
            what = f"stands where {ordered!r} belongs"
        if what is not None:
            faults.add(what, offset=at, member=prefix + name, image=head.name)
            return
    faults.add(
        "is damaged (its CRC-32C is not the stored one)",
        offset=entry.offset,
        member=prefix[:-1],
        image=head.name,
    )


def _walk(data: bytes, offset: int, prefix: str, head: Head, faults: Faults) -> _Members:
    found = _Members()
    at, lost = 0, False
    while at < len(data):
        name: str | None = None
        step = TAR_RECORD
        try:
            info = parse_header(data[at : at + TAR_RECORD])
        except ValueError as error:
            what = str(error)
        else:
            name = info.name
            start = at + TAR_RECORD
            if not is_file(info, len(data) - start):
                what = f"{kind(info)} stands there, allowed is a file that ends in its block"
            elif not name.startswith(prefix):
                what = f"stands there, allowed are members that start with {prefix!r}"
                step += padded(info.size)
            elif name.removeprefix(prefix) in found.data:
                what = "stands twice in its block"
                step += padded(info.size)
            else:
                stop = start + info.size
                short = name.removeprefix(prefix)
                found.data[short] = data[start:stop]
                found.at[short] = offset + start
                at += TAR_RECORD + padded(info.size)
                if data[stop:at].strip(b"\0"):
                    faults.add(
                        "the padding behind it is not zero",
                        offset=offset + stop,
                        member=name,
                        image=head.name,
                    )
                lost = False
                continue
        if not lost or name is not None:  # else it is still the same run of bytes
            found.lost.append((offset + at, name, what))
        lost = name is None
        at += step
    return found


def padded(size: int) -> int:
    return -(-size // TAR_RECORD) * TAR_RECORD


def _index(
    members: _Members, entry: BlockEntry, prefix: str, head: Head, faults: Faults
) -> BlockIndex | None:
    if INDEX not in members.data:
        return None
    where = f"member {prefix}{INDEX}"
    try:
        return BlockIndex.from_json(members.data[INDEX], head, entry.row, entry.col, where)
    except ValueError as error:
        faults.add(
            str(error).removeprefix(f"{where}: "),
            offset=members.at[INDEX],
            member=prefix + INDEX,
            image=head.name,
        )
        return None


def _checksums(index: BlockIndex) -> dict[str, int]:
    """The CRC-32C of each member but the index itself."""
    return {tile.member: tile.crc32c for tile in index.tiles} | index.rasters


def _check_member(
    name: str,
    crc: int,
    members: _Members,
    entry: BlockEntry,
    prefix: str,
    head: Head,
    faults: Faults,
    largest: Largest | None,
) -> None:
    data = members.data[name]
    if google_crc32c.value(data) != crc:
        what = "is damaged (its CRC-32C is not the stored one)"
        faults.add(what, offset=members.at[name], member=prefix + name, image=head.name)
    elif largest is not None:
        rect = head.block_rect(entry.row, entry.col)
        try:
            if name == LABELS:
                labels = decode_labels(data, head, rect)
                largest.classes = max(largest.classes, count_classes(labels))
            elif name == INSTANCES:
                numbers = decode_numbers(data, head, rect)
                largest.instances = max(largest.instances, int(numbers.max()))
            elif name == MASK:
                decode_mask(data, rect)
            else:
                decode_tile(data, head)
        except ValueError as error:
            faults.add(
                str(error), MADE_SO, offset=members.at[name], member=prefix + name, image=head.name
            )
