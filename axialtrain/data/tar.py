"""Headers of a tar that may come from strangers. Nothing in here is ever a path on this machine."""

from __future__ import annotations

import tarfile

_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


def parse_header(data: bytes) -> tarfile.TarInfo:
    """The header of a member; ValueError, without a place, where `data` is none."""
    try:
        return tarfile.TarInfo.frombuf(data, "ascii", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise ValueError(f"no tar header where one belongs ({error})") from error


def is_file(info: tarfile.TarInfo, most: int) -> bool:
    """Whether a member is an ordinary file of at most `most` bytes.

    tarfile's own `isreg` also takes sparse files, whose bytes are not those that readers get.
    """
    return info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and 0 <= info.size <= most


def kind(info: tarfile.TarInfo) -> str:
    """What a member is, in words."""
    if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
        return f"a file of {info.size} bytes"
    return _KINDS.get(info.type, f"a member of type {info.type!r}")


def is_sound(header: bytes) -> bool:
    """Whether a header is the one that its fields make, in every byte.

    Its own sum does not cover all of its bits: not the end of the sum, for one.
    """
    return parse_header(header).tobuf(tarfile.USTAR_FORMAT, "ascii", "strict") == header
