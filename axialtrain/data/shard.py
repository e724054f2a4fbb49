"""Images into shards, in the format of `store`.

Blocks are made in runs, by several processes, as parts in a folder of unfinished work (`scratch`),
and put one behind the other into shards, in an order that the images alone decide: the same input
gives the same bytes, whatever was killed on the way. A shard appears whole or not at all; the
manifest comes last, so that a folder has one only when everything else is there.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from axialtrain.data.assemble import Assembler, Summary, path_of
from axialtrain.data.destination import Destination
from axialtrain.data.inputs import Input, check_inputs
from axialtrain.data.listing import Entry, entries_of
from axialtrain.data.making import processes
from axialtrain.data.readers import AUTO
from axialtrain.data.scratch import Scratch
from axialtrain.data.sharding import Sharding
from axialtrain.data.splits import dealt
from axialtrain.data.store import MANIFEST, Manifest

_FEW = 256  # blocks that one process makes sooner than others begin
SCRATCH = ".shard"  # beside the shards, where they are on this machine
RECORD = "shard.json"  # of the command that made them
FORMAT_OF_RECORDS = 2  # raised where the same images make other heads or manifests than before
_LIBRARIES = ("axialtrain", "numpy", "tifffile", "imagecodecs", "webdataset")


@dataclass(frozen=True)
class Work:
    """Images that were checked, by split, and those that were refused: (image, reason)."""

    splits: dict[str, list[Input]]
    refused: tuple[tuple[str, str], ...]

    @property
    def inputs(self) -> list[Input]:
        return [job for jobs in self.splits.values() for job in jobs]


def shard_images(
    images: Sequence[str | Path],
    out: str | Path,
    *,
    labels: Sequence[str | Path] | None = None,
    instances: Sequence[str | Path] | None = None,
    image_labels: Sequence[int] | None = None,
    level: int = 0,
    reader: str = AUTO,
    shard_bytes: int = 1 << 30,
    progress: bool = True,
) -> Summary:
    """Write `images` (paths) as shards into the folder `out`: manifest and shards, no more.

    labels: paths of label rasters, one per image, one uint8 band, 255 where there is no target, or
    of GeoJSON polygons. instances: likewise of rasters of instance numbers, one uint16 or uint8
    band, 0 where there is none; with labels only. image_labels: a class, 0 to 65535, for each whole
    image. For the rest see `Sharding` and `make_shards`.

    Everything is opened and compared before anything is written: ValueError names what is wrong.
    """
    check_out(out)
    how = Sharding(level=level, reader=reader, shard_bytes=shard_bytes)
    work = prepare(entries_of(images, labels, instances, image_labels), how)
    return make_shards(work, out, how, jobs=1, keep=False, progress=progress)


def check_out(out: str | Path, splits: Iterable[str] = (), scratch: Path | None = None) -> None:
    """ValueError unless `out` is a folder without shards, or one that can be made, or one in which
    work was begun and has not ended. splits, scratch: as `make_shards` has them."""
    parts = _scratch(out, scratch)
    place = Destination(out, parts.folder)
    place.check()
    if parts.begun:
        return
    found = [
        name
        for name in (MANIFEST, RECORD, *(path_of(split, MANIFEST) for split in splits))
        if place.has(name)
    ]
    for split in dict.fromkeys(("", *splits)):
        ours = parts.finished(split)  # of a run that is not known any more
        found += [path_of(split, name) for name in place.shards(split) if name not in ours]
    if found:
        raise ValueError(f"{out}: has a {found[0]} already, allowed is a new or an empty folder")


def _scratch(out: str | Path, scratch: Path | None) -> Scratch:
    """The folder of unfinished work: beside the shards, where they are on this machine; otherwise
    `scratch`, or one in the working folder that is named after the URL."""
    place = Destination(out, Path())
    if place.local is not None:
        if scratch is not None:
            raise ValueError(
                f"scratch is {scratch}, allowed is one for shards at a URL: that of {out} is "
                "beside the shards, where others see it"
            )
        return Scratch(place.local / SCRATCH)
    name = hashlib.sha256(place.url.encode()).hexdigest()[:12]
    return Scratch(Path(f"{SCRATCH}-{name}") if scratch is None else scratch)


def prepare(
    entries: Sequence[Entry],
    how: Sharding,
    *,
    classes: Mapping[str, int] | None = None,
    shares: Mapping[str, float] | None = None,
    seed: int = 0,
    skip_errors: bool = False,
) -> Work:
    """Open and compare all images, and deal them out into splits.

    classes: numbers of the names of classes, for polygons. shares, seed: see `splits.dealt`; None
    leaves each image in the split of its entry. skip_errors: leave out what is refused.
    ValueError naming the first that is wrong.
    """
    refused: list[tuple[str, str]] = []
    inputs = check_inputs(
        entries,
        how,
        classes,
        (lambda entry, error: refused.append((str(entry.image), str(error))))
        if skip_errors
        else None,
    )
    if not inputs:
        raise ValueError(f"no image can be stored; the first: {refused[0][1]}")
    named = [job.entry.split for job in inputs]
    if shares:
        if any(named):
            raise ValueError("split is given, and a column of the table, allowed is one of them")
        named = [*dealt([job.head.group for job in inputs], shares, seed)]
    elif any(named) and not all(named):
        odd = inputs[named.index(None)].entry.image
        raise ValueError(f"{odd}: has no split, allowed is one for every image or for none")
    splits: dict[str, list[Input]] = {}
    for job, split in zip(inputs, named, strict=True):
        splits.setdefault(split or "", []).append(job)
    for split in shares or ():
        if split not in splits:
            groups = len({job.head.group for job in inputs})
            raise ValueError(
                f"split {split} gets none of the {groups} groups of images, allowed is a share "
                "that gets one at least"
            )
    _check_groups(splits)
    return Work(splits, tuple(refused))


def _check_groups(splits: Mapping[str, Sequence[Input]]) -> None:
    """ValueError, naming it, if a group is in two splits."""
    split_of: dict[str, str] = {}
    for split, jobs in splits.items():
        for job in jobs:
            other = split_of.setdefault(job.head.group, split)
            if other != split:
                raise ValueError(
                    f"{job.entry.image}: its group {job.head.group!r} is in the splits {other} and "
                    f"{split}, allowed is one"
                )


def make_shards(
    work: Work,
    out: str | Path,
    how: Sharding,
    *,
    jobs: int | None = None,
    scratch: Path | None = None,
    resume: bool = False,
    keep: bool = True,
    skip_errors: bool = False,
    progress: bool = True,
    pictures: bool = False,
    finish: Callable[[Destination, Summary], None] | None = None,
) -> Summary:
    """Make the shards of `work` in the folder `out`, a path or a URL, each split in one of its own.

    jobs: processes; None: as many as cores there are where there is much to do. scratch: the folder
    of unfinished work, where `out` is a URL. resume: go on with what is there; without it,
    unfinished work is a ValueError, and so is none with it. keep: leave unfinished work where this
    fails. skip_errors: leave out images that fail. pictures: also write the thumbnail of each
    image, with what is stored drawn in. progress: a bar. finish: is called when all is there.

    ValueError, naming the image, for one that fails.
    """
    parts = _scratch(out, scratch)
    kept = f"what is done is kept in {parts.folder}, go on with it by --resume" if keep else ""
    place = Destination(out, parts.folder, kept)
    if jobs is None:
        much = sum(job.blocks for job in work.inputs) > _FEW
        jobs = len(os.sched_getaffinity(0)) if much else 1
    elif jobs < 1:
        raise ValueError(f"jobs is {jobs}, allowed is at least 1")
    check_out(out, work.splits, scratch)  # before a folder is made in it
    with parts.held(), ExitStack() as ends:
        check_out(out, work.splits, scratch)  # nobody else can change that now
        if parts.begun and not resume:
            raise ValueError(
                f"{parts.folder}: holds the unfinished work of another run, allowed is to go on "
                "with it (--resume), or none: delete the folder, and its shards, to begin anew"
            )
        if resume and not parts.begun:
            raise ValueError(
                f"{parts.folder}: holds no unfinished work, allowed to go on with (--resume) is a "
                "run that was ended"
            )
        try:
            ends.enter_context(place.held())
        except ValueError:
            if not parts.begun:
                parts.remove()  # nothing is in it
            raise
        parts.begin({"out": place.url, **_wanted(work, how)})
        if not keep:
            ends.callback(parts.remove)
        maker = Assembler(place, parts, how, skip_errors, pictures)
        total = sum(job.blocks for job in work.inputs)
        with tqdm(total=total, unit="block", disable=not progress) as bar, processes(jobs) as pool:
            for split, inputs in work.splits.items():
                maker.make(split, inputs, pool, 1 if jobs == 1 else 2 * jobs, bar)
        summary = maker.summary(str(out), work.refused)
        for split in work.splits:
            rows = tuple(image.row for image in summary.images if image.split == split)
            if rows:
                with place.file(path_of(split, MANIFEST)) as file:
                    file.write(Manifest(rows).to_json())
        if finish is not None:
            finish(place, summary)
        parts.remove()
    return summary


def _wanted(work: Work, how: Sharding) -> dict[str, Any]:
    """What a run that goes on must want as well: options, images and rasters as they are now, and
    the libraries and the form of heads that make them."""
    images = []
    for split, jobs in work.splits.items():
        for job in jobs:
            entry = job.entry
            files = [entry.image, entry.labels, entry.instances]
            said = {k: None if v is None else str(v) for k, v in asdict(entry).items()}
            stamps = [_stamp(path) for path in files if path is not None]
            images.append([split, said, stamps, dict(job.classes or {})])
    digest = hashlib.sha256(repr(images).encode()).hexdigest()
    return {**asdict(how), "images": digest, "versions": versions(), "records": FORMAT_OF_RECORDS}


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    """Size and time of change of a file, or of all files in a folder."""
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    stats = [(str(each), each.stat()) for each in files]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def versions() -> dict[str, str]:
    """Of what makes the bytes of shards."""
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}
