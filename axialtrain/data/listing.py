"""Which images, and what is known of each: paths, globs, or a table."""

from __future__ import annotations

import csv
import glob
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from axialtrain.data.checked import shown
from axialtrain.data.manifest import MAX_LABEL
from axialtrain.data.readers.reader import MPP
from axialtrain.data.splits import SPLIT, SPLIT_WORDS

COLUMNS = ("image", "label", "instances", "group", "split", "mpp")
MAX_TABLE_BYTES = 1 << 28
_GLOB = re.compile(r"[*?[]")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Entry:
    """An image as the user names it.

    labels, instances: paths of its rasters, labels also of polygons. label: the class of the whole
    image. group: images that belong in the same split; None: it is one by itself. split: None where
    it has none. mpp: micrometres per px of level 0, where the file does not say or is wrong.
    """

    image: Path
    labels: Path | None = None
    instances: Path | None = None
    label: int | None = None
    group: str | None = None
    split: str | None = None
    mpp: float | None = None


def images_of(named: Sequence[str]) -> list[Path]:
    """Paths as they are, and what globs match, sorted; ** goes into folders.

    ValueError naming a glob that matches nothing.
    """
    found: list[Path] = []
    for name in named:
        if not _GLOB.search(name) or Path(name).exists():
            found.append(Path(name))
            continue
        matched = sorted(glob.glob(name, recursive=True))
        if not matched:
            raise ValueError(f"{name}: no file has a name like this")
        found += map(Path, matched)
    return found


def rows_of(path: Path) -> list[list[str]]:
    """The rows of a CSV file, its header first; ValueError where it is none, or too large."""
    try:
        size = path.stat().st_size
        if size > MAX_TABLE_BYTES:
            raise ValueError(f"{path}: has {size} bytes, allowed is {MAX_TABLE_BYTES}")
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as a table ({error})") from error


def table_of(path: Path) -> list[Entry]:
    """The images of a CSV file with a header of COLUMNS, of which only image must be there.

    label is a class, 0 to 65535, or the path of a label raster or of polygons. Paths are relative
    to the table. ValueError naming line and column.
    """
    rows = rows_of(path)
    if not rows:
        raise ValueError(f"{path}: is empty, allowed is a header with {', '.join(COLUMNS)}")
    header = [name.strip() for name in rows[0]]
    for name in header:
        if name not in COLUMNS:
            raise ValueError(
                f"{path}: column is {shown(name)}, allowed are {', '.join(COLUMNS)}, image being "
                "the one that must be there"
            )
    if len(set(header)) < len(header) or "image" not in header:
        raise ValueError(f"{path}: columns are {shown(header)}, allowed is image once, others once")
    entries = []
    for number, row in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            raise ValueError(
                f"{path}: line {number} has {len(row)} cells, allowed are {len(header)}"
            )
        cells = dict(zip(header, (cell.strip() for cell in row), strict=True))
        entries.append(_entry(cells, path, number))
    if not entries:
        raise ValueError(f"{path}: names no image")
    return entries


def _entry(cells: dict[str, str], table: Path, line: int) -> Entry:
    def wrong(column: str, allowed: str) -> ValueError:
        return ValueError(
            f"{table}: line {line}: {column} is {shown(cells[column])}, allowed is {allowed}"
        )

    def near(column: str) -> Path | None:
        return table.parent / cells[column] if cells.get(column) else None

    image = near("image")
    if image is None:
        raise wrong("image", "a path")
    label, mpp, split = cells.get("label", ""), cells.get("mpp", ""), cells.get("split", "")
    whole = _NUMBER.fullmatch(label) is not None
    if whole and (len(label) > 9 or int(label) > MAX_LABEL):
        raise wrong("label", f"a class from 0 to {MAX_LABEL}, or a path")
    if cells.get("instances") and (whole or not label):
        raise wrong("instances", "nothing where label is no raster")
    micrometres = None
    if mpp:
        try:
            micrometres = float(mpp)
        except ValueError:
            micrometres = math.nan
        if not MPP[0] <= micrometres <= MPP[1]:
            raise wrong("mpp", f"micrometres per px above 0 ({MPP[0]:g} to {MPP[1]:g}), or nothing")
    if split and not SPLIT.fullmatch(split):
        raise wrong("split", SPLIT_WORDS)
    return Entry(
        image,
        labels=None if whole else near("label"),
        instances=near("instances"),
        label=int(label) if whole else None,
        group=cells.get("group") or None,
        split=split or None,
        mpp=micrometres,
    )


def entries_of(
    images: Sequence[str | Path],
    labels: Sequence[str | Path] | None = None,
    instances: Sequence[str | Path] | None = None,
    image_labels: Sequence[int] | None = None,
) -> list[Entry]:
    """An entry for each image, from lists in the same order.

    labels, instances: paths of rasters. image_labels: a class, 0 to 65535, for each whole image.
    ValueError naming the list that does not fit.
    """
    for key, rasters in (("labels", labels), ("instances", instances)):
        if rasters is not None and len(rasters) != len(images):
            raise ValueError(
                f"{key} has {len(rasters)} paths, allowed is one for each of the {len(images)} "
                "images"
            )
    if instances is not None and labels is None:
        raise ValueError(
            f"instances has {len(instances)} paths and labels is missing, allowed are instances "
            "of images that have labels"
        )
    if image_labels is not None:
        if len(image_labels) != len(images):
            raise ValueError(
                f"image_labels has {len(image_labels)} classes, allowed is one for each of the "
                f"{len(images)} images"
            )
        for index, label in enumerate(image_labels):
            whole = isinstance(label, (int, np.integer)) and not isinstance(label, bool)
            if not whole or not 0 <= label <= MAX_LABEL:
                raise ValueError(
                    f"image_labels[{index}] is {shown(label)}, allowed is a class from 0 to "
                    f"{MAX_LABEL}"
                )
    return [
        Entry(
            Path(image),
            labels=None if labels is None else Path(labels[index]),
            instances=None if instances is None else Path(instances[index]),
            label=None if image_labels is None else int(image_labels[index]),
        )
        for index, image in enumerate(images)
    ]
