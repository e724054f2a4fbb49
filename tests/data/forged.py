"""Shards of a liar: changed where a test wants it, with every checksum right again.

A checksum says that bytes are those that were written, not that whoever wrote them meant well. What
is behind the checksums is only reached by shards like these.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import webdataset

Json = dict[str, Any]


def _same(name: str, data: bytes) -> bytes:
    return data


def _nothing(record: Json) -> None:
    pass


def _alike(data: bytes) -> bytes:
    return data


def forge(
    folder: Path,
    image: str,
    *,
    member: Callable[[str, bytes], bytes] = _same,
    index: Callable[[Json], None] = _nothing,
    block: Callable[[bytes], bytes] = _alike,
    head: Callable[[Json], None] = _nothing,
    row: Callable[[Json], None] = _nothing,
) -> None:
    """Rewrite the only shard of `folder`, with `image` changed.

    member(name, data): the data of each member of its blocks, and of `thumbnail.jpg`.
    index(record), head(record), row(record): change the JSON of each block, of the head, and of the
    manifest's row. block(data): the bytes of each block, tar headers included.
    """
    manifest = json.loads((folder / "manifest.json").read_bytes())
    tar = folder / "shard-00000.tar"
    old, new = tar.read_bytes(), bytearray()
    for entry in manifest["images"]:
        start, length = entry["head_offset"], entry["head_length"]
        record = json.loads(old[start : start + length])
        mine = entry["name"] == image
        for stored in record["blocks"]:
            data = old[stored["offset"] : stored["offset"] + stored["length"]]
            if mine:
                data = block(_changed(data, member, index))
            crc = google_crc32c.value(bytes(data))
            stored |= {"offset": len(new), "length": len(data), "crc32c": crc}
            new += data
        thumbnail = _thumbnail(old, start + -(-length // 512) * 512)
        if mine:
            thumbnail = member("thumbnail.jpg", thumbnail)
        record["thumbnail_crc32c"] = google_crc32c.value(thumbnail)
        if mine:
            head(record)
        data = json.dumps(record).encode()
        entry |= {
            "head_offset": len(new) + 512,
            "head_length": len(data),
            "head_sha256": hashlib.sha256(data).hexdigest(),
        }
        new += sample(f"{entry['name']}/head", {"json": data, "thumbnail.jpg": thumbnail})
        if mine:
            row(entry)
    tar.write_bytes(new + bytes(1024))
    (folder / "manifest.json").write_text(json.dumps(manifest))


def sample(key: str, members: dict[str, bytes]) -> bytes:
    """The tar members of a sample, without an end of archive."""
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0) as tar:
        tar.write({"__key__": key, **members})
        length = tar.tarstream.offset
    return buffer.getvalue()[:length]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """The tar header of a member."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")


def _changed(
    data: bytes, member: Callable[[str, bytes], bytes], index: Callable[[Json], None]
) -> bytes:
    members, key = {}, ""
    with tarfile.open(fileobj=io.BytesIO(data + bytes(1024))) as tar:
        for info in tar:
            file = tar.extractfile(info)
            assert file is not None
            key, _, name = info.name.partition(".")
            members[name] = file.read()
    record = json.loads(members.pop("json"))
    members = {name: member(name, content) for name, content in members.items()}
    for tile in record["tiles"]:
        tile["crc32c"] = google_crc32c.value(members[tile["member"]])
    for name in ("labels", "instances", "mask"):
        if f"{name}.png" in members:
            record[f"{name}_crc32c"] = google_crc32c.value(members[f"{name}.png"])
    index(record)
    return sample(key, members | {"json": json.dumps(record).encode()})


def _thumbnail(old: bytes, start: int) -> bytes:
    size = tarfile.TarInfo.frombuf(old[start : start + 512], "ascii", "strict").size
    return old[start + 512 : start + 512 + size]
