"""Headers of a tar that nobody honest writes, with their sums right."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from axialtrain.data.faults import Fault
from axialtrain.data.store import TAR_RECORD
from axialtrain.data.tar import file_header, is_sound, parse_header
from axialtrain.data.verify import MODES, verify

if TYPE_CHECKING:
    from conftest import Source

OWNER = slice(108, 116)  # the user's number
SUM = slice(148, 156)
BASE_256 = bytes.fromhex("80000000ffffffff")  # a number that ustar's octal digits cannot hold
FIELDS = (*range(100, 148, 8), 156, 157, 257, 265, 297, 329, 337, 345)


def summed(header: bytes | bytearray) -> bytes:
    """`header` with the sum of its bytes."""
    changed = bytearray(header)
    changed[SUM] = b" " * 8
    changed[SUM] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def of_owner(header: bytes | bytearray) -> bytes:
    changed = bytearray(header)
    changed[OWNER] = BASE_256
    return summed(changed)


def test_sound_is_what_its_fields_make() -> None:
    header = file_header("a.png", 7)
    assert is_sound(header)
    assert not is_sound(of_owner(header))
    rng = random.Random(0)
    for _ in range(2000):  # none of them is more than unsound
        changed = bytearray(header)
        for at in rng.choices(FIELDS, k=3):
            changed[at : at + 8] = bytes([rng.choice([0x80, 0xFF, 0x31])]) + rng.randbytes(7)
        try:
            parse_header(summed(changed))
        except ValueError:
            continue
        assert not is_sound(summed(changed))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("member", ["head", "thumbnail", "tile"])
def test_number_that_ustar_cannot_hold_hides_nothing(
    source: Source, tmp_path: Path, mode: str, member: str
) -> None:
    folder = Path(shutil.copytree(source.url, tmp_path / "copy"))
    tar = folder / "shard-00000.tar"
    data = bytearray(tar.read_bytes())
    at, name = {
        "head": (data.index(b"wide/head.json\0"), "wide/head.json"),
        "thumbnail": (data.index(b"wide/head.thumbnail.jpg\0"), "wide/head.thumbnail.jpg"),
        "tile": (data.index(b"wide/0/00000_00000.00.png\0"), "wide/0/00000_00000.00.png"),
    }[member]
    data[at : at + TAR_RECORD] = of_owner(data[at : at + TAR_RECORD])
    data[-1] = 1
    tar.write_bytes(data)
    found = {(fault.shard, fault.member, fault.offset) for fault in _faults(folder, mode)}
    other = (tar.name, None, len(data) - 1024)
    if member == "tile" and mode == "quick":  # which leaves a block's bytes to the others
        assert found == {other}
    else:
        assert found == {(tar.name, name, at), other}


def _faults(folder: Path, mode: str) -> list[Fault]:
    return verify([folder], mode=mode, jobs=1, progress=False).faults
