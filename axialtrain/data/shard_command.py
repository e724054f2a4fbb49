"""`axialtrain shard`: its arguments, and what they do."""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from axialtrain.data.listing import Entry

_T = TypeVar("_T")

DESCRIPTION = """Images into WebDataset shards that `axialtrain train` reads by regions.
Everything is opened and compared before anything is written. Unfinished work stays in a folder
.shard beside the shards; --resume goes on from there, and gives the same bytes."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE|GLOB|TABLE.csv",
        help="files, quoted globs (** goes into folders), or one table with a header: image, and "
        "any of label (a class or a path), instances, group, split, mpp",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR|URL",
        help="a new or an empty folder; one process at a time works there, at a URL as far as its "
        "file shard.lock can tell",
    )
    what = parser.add_argument_group("labels")
    what.add_argument(
        "--labels",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="label rasters of the images' extent, or GeoJSON polygons, one for each image, in the "
        "same order",
    )
    what.add_argument(
        "--instances",
        nargs="+",
        type=Path,
        metavar="RASTER",
        help="rasters of instance numbers, 0 for none, of labelled images, in the same order",
    )
    what.add_argument(
        "--image-labels",
        nargs="+",
        type=int,
        metavar="CLASS",
        help="a class, 0 to 65535, for each whole image, in the same order",
    )
    what.add_argument(
        "--classes",
        nargs="+",
        default=[],
        metavar="NAME=CLASS",
        help="the classes, 0 to 254, that polygons have by name",
    )
    what.add_argument(
        "--background",
        type=int,
        metavar="CLASS",
        help="that of pixels in no polygon, which otherwise have none",
    )
    pixels = parser.add_argument_group("pixels")
    at = pixels.add_mutually_exclusive_group()
    at.add_argument("--level", type=int, default=0, help="of the pyramids, 0 is the finest")
    at.add_argument("--mpp", type=float, help="micrometres per px to store: a level, or reduced")
    pixels.add_argument(
        "--reader",
        default="auto",
        help="what reads the images; auto chooses for each, and says why",
    )
    pixels.add_argument(
        "--passthrough",
        default="auto",
        help="whether JPEG tiles are copied as they are: auto, never, always",
    )
    pixels.add_argument(
        "--encode",
        default="lossless",
        help="of tiles that are not copied: lossless, or jpeg where their pixels allow it",
    )
    pixels.add_argument("--quality", type=int, default=90, help="of that JPEG, 1 to 100")
    pixels.add_argument("--tile", type=int, help="px, of tiles that are not copied")
    pixels.add_argument("--block", type=int, default=8, help="tiles along each side of a sample")
    pixels.add_argument(
        "--keep",
        default="all",
        help="which tiles: all, nodata (that have a pixel), or tissue; others are recorded only",
    )
    pixels.add_argument(
        "--share", type=float, default=0.0, help="least share of tissue of a tile that is kept"
    )
    pixels.add_argument(
        "--statistics",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take mean and spread of each band into the manifest",
    )
    splits = parser.add_argument_group("splits")
    splits.add_argument(
        "--split",
        nargs="+",
        default=[],
        metavar="NAME=SHARE",
        help="deal the images out, groups whole, into folders of DIR: train=0.8 validation=0.2",
    )
    splits.add_argument("--seed", type=int, default=0, help="of the dealing")
    splits.add_argument(
        "--group",
        metavar="REGEX",
        help="the group of an image is what this finds in its file's name, or the first ( ) of it",
    )
    work = parser.add_argument_group("work")
    work.add_argument("--jobs", type=int, help="processes; as many as there are cores, for much")
    work.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    work.add_argument("--resume", action="store_true", help="go on with a run that was ended")
    work.add_argument(
        "--skip-errors",
        action="store_true",
        help="leave out images that fail, and write why to skipped.csv",
    )
    work.add_argument(
        "--shard-mb", type=int, default=1024, help="MiB after which a shard is closed"
    )
    work.add_argument(
        "--scratch", type=Path, metavar="FOLDER", help="of unfinished work, where DIR is a URL"
    )


def shard(parsed: argparse.Namespace) -> int:
    """Do what the command's arguments say; returns the exit status."""
    from axialtrain.data.assemble import Summary
    from axialtrain.data.checked import plain
    from axialtrain.data.destination import Destination
    from axialtrain.data.shard import check_out, make_shards, prepare
    from axialtrain.data.sharding import Sharding
    from axialtrain.data.splits import check_shares
    from axialtrain.data.summary import plan, write_summary

    how = Sharding(
        level=parsed.level,
        mpp=parsed.mpp,
        reader=parsed.reader,
        passthrough=parsed.passthrough,
        encode=parsed.encode,
        quality=parsed.quality,
        tile=parsed.tile,
        block=parsed.block,
        keep=parsed.keep,
        share=parsed.share,
        background=parsed.background,
        statistics=parsed.statistics,
        shard_bytes=parsed.shard_mb << 20,
    )
    shares = _pairs("split", parsed.split, float)
    check_shares(shares)
    classes = _pairs("classes", parsed.classes, int)
    _check_together(parsed)
    if parsed.jobs is not None and parsed.jobs < 1:
        raise ValueError(f"jobs is {parsed.jobs}, allowed is at least 1")
    check_out(parsed.out, shares, parsed.scratch)
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    entries = _entries(parsed)
    _check_polygons(parsed, entries)
    work = prepare(
        entries,
        how,
        classes=classes or None,
        shares=shares or None,
        seed=parsed.seed,
        skip_errors=parsed.skip_errors,
    )
    if parsed.dry_run:
        print(plan(work, parsed.out))
        return 0

    names: list[str] = []

    def finish(place: Destination, summary: Summary) -> None:
        names.extend(write_summary(place, summary, how, time.monotonic() - clock, started))

    summary = make_shards(
        work,
        parsed.out,
        how,
        jobs=parsed.jobs,
        scratch=parsed.scratch,
        resume=parsed.resume,
        skip_errors=parsed.skip_errors,
        pictures=True,
        finish=finish,
    )
    print(plain(str(summary)))
    chosen = Counter((image.reader, image.why) for image in summary.images)
    for (reader, why), count in chosen.items():
        print(f"{count} read with {reader}: {why}")
    print(f"written beside the shards: {', '.join(names)}, pictures/")
    return 0


def _check_together(parsed: argparse.Namespace) -> None:
    """ValueError for an option that would do nothing without another."""
    for key, given, other, there in (
        ("share", parsed.share != 0, "keep nodata or tissue", parsed.keep != "all"),
        ("quality", parsed.quality != 90, "encode jpeg", parsed.encode == "jpeg"),
        ("seed", parsed.seed != 0, "split", bool(parsed.split)),
    ):
        if given and not there:
            value = getattr(parsed, key)
            raise ValueError(f"{key} is {value}, allowed is only together with {other}")


def _check_polygons(parsed: argparse.Namespace, entries: Sequence[Entry]) -> None:
    """ValueError for what only polygons have, where no image has labels of them."""
    from axialtrain.data.rasters import POLYGONS

    labels = [entry.labels for entry in entries if entry.labels is not None]
    if any(Path(path).suffix.lower() in POLYGONS for path in labels):
        return
    for key, given in (("classes", parsed.classes or None), ("background", parsed.background)):
        if given is not None:
            raise ValueError(
                f"{key} is {given}, allowed is only together with labels that are polygons "
                f"({' or '.join(POLYGONS)})"
            )


def _entries(parsed: argparse.Namespace) -> Sequence[Entry]:
    """The images of the command, and what is known of each."""
    from axialtrain.data.listing import entries_of, images_of, table_of

    tables = [name for name in parsed.images if name.lower().endswith(".csv")]
    if tables:
        if len(parsed.images) > 1:
            raise ValueError(f"images are {len(parsed.images)}, allowed beside a table is no other")
        for key in ("labels", "instances", "image_labels"):
            if getattr(parsed, key) is not None:
                raise ValueError(f"{key} is given, allowed with a table are its columns")
        entries = table_of(Path(tables[0]))
    else:
        entries = entries_of(
            images_of(parsed.images), parsed.labels, parsed.instances, parsed.image_labels
        )
    if parsed.group is None:
        return entries
    return [
        entry if entry.group else replace(entry, group=_group(parsed.group, entry.image))
        for entry in entries
    ]


def _group(pattern: str, image: Path) -> str:
    try:
        found = re.search(pattern, image.name)
    except re.error as error:
        raise ValueError(
            f"group is {pattern!r}, allowed is a regular expression ({error})"
        ) from None
    if found is None:
        raise ValueError(f"{image}: group {pattern!r} finds nothing in its name")
    group = found[1] if found.re.groups else found[0]
    if not group:
        raise ValueError(f"{image}: group {pattern!r} finds nothing in its name")
    return group


def _pairs(key: str, given: Sequence[str], number: Callable[[str], _T]) -> Mapping[str, _T]:
    """NAME=NUMBER, several of them."""
    pairs: dict[str, _T] = {}
    for text in given:
        name, equals, value = text.rpartition("=")
        try:
            if not (name and equals):
                raise ValueError
            pairs[name] = number(value)
        except ValueError:
            raise ValueError(f"{key} is {text!r}, allowed is NAME=NUMBER") from None
    if len(pairs) < len(given):
        raise ValueError(f"{key} has a name twice")
    return pairs
