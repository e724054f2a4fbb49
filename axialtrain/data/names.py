"""Names in the shards: of images, shards, samples and their members. None can leave its folder."""

from __future__ import annotations

import re
from pathlib import Path

BLOCK = 8  # tiles along each side of a block, where nothing else is said
BLOCKS = (1, 2, 4, 8)  # what may be said: a tile's number in its block has two digits
LABELS = "labels.png"  # a block's member
INSTANCES = "instances.png"  # and another
MASK = "mask.png"  # and another
MAX_LEVEL = 64
# A member of more than 100 characters gets a header of another kind, which is in no directory.
MAX_NAME = 100 - len(f"/{MAX_LEVEL}/00000_00000.{LABELS}")
MAX_NAME_WITH_INSTANCES = MAX_NAME - (len(INSTANCES) - len(LABELS))
NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}")
NAME_WORDS = f"a name of at most {MAX_NAME} of A-Z a-z 0-9 . _ - that does not start with . or -"
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,120}\.tar")
SHARD_WORDS = "the name of a .tar in the same folder"


def image_name(path: str | Path) -> str:
    """The name of the image at `path` in the shards: its stem, other characters replaced by _."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(path).stem).lstrip(".-")
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{path}: no image name can be made of it (it would have {len(name)} characters), "
            f"allowed is {NAME_WORDS}"
        )
    return name


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.tar"


def is_shard_name(name: str) -> bool:
    return SHARD.fullmatch(name) is not None


def block_key(image: str, level: int, row: int, col: int) -> str:
    return f"{image}/{level}/{row:05d}_{col:05d}"


def head_key(image: str) -> str:
    return f"{image}/head"


def tile_number(row: int, col: int, block: int = BLOCK) -> int:
    """Number, within its block of `block` x `block`, of the tile at (row, col) of the image."""
    return row % block * block + col % block


def tile_member(row: int, col: int, encoding: str, block: int = BLOCK) -> str:
    """Name, within its block's sample, of the tile at (row, col) of the image."""
    return f"{tile_number(row, col, block):02d}.{encoding}"
