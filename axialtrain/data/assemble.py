"""What the processes have made, put one behind the other into shards."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, NoReturn

from tqdm import tqdm

from axialtrain.data.checked import Record
from axialtrain.data.destination import Destination
from axialtrain.data.encode import measured, picture_of, row_of, runs_of, write_head
from axialtrain.data.inputs import Input
from axialtrain.data.making import Made, in_order
from axialtrain.data.records import dump, fields_of
from axialtrain.data.scratch import Scratch
from axialtrain.data.sharding import Sharding
from axialtrain.data.statistics import Statistics
from axialtrain.data.store import TAR_RECORD, ImageRow, shard_name

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_TAR_END = bytes(2 * TAR_RECORD)


@dataclass(frozen=True)
class Image:
    """What was made of one image. tiles: stored, of which `copied` are as they were; empty: not
    stored. bytes: of its blocks. split: "" where there are no splits."""

    row: ImageRow
    source: str
    reader: str
    why: str
    split: str
    group: str
    mpp: float | None
    labelled: str
    blocks: int
    tiles: int
    copied: int
    empty: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """What `make_shards` wrote. bytes: of the shards. skipped: (image, reason) of those that were
    left out."""

    out: str
    images: tuple[Image, ...]
    shards: int
    bytes: int
    skipped: tuple[tuple[str, str], ...] = ()

    def total(self, what: str) -> int:
        """The sum over images of blocks, tiles, copied, or empty."""
        return sum(getattr(image, what) for image in self.images)

    def __str__(self) -> str:
        empty = self.total("empty")
        return (
            f"{self.out}: {len(self.images)} images in {self.shards} shards, "
            f"{self.total('blocks')} blocks, {self.total('tiles')} tiles "
            f"({self.total('copied')} copied as they were"
            + f", {empty} more are empty" * (empty > 0)
            + f"), {self.bytes / 1e6:.1f} MB"
            + f"; {len(self.skipped)} images were skipped" * bool(self.skipped)
        )


class Assembler:
    """Puts what the processes make into shards, split by split."""

    def __init__(
        self,
        place: Destination,
        parts: Scratch,
        how: Sharding,
        skip_errors: bool,
        pictures: bool,
    ) -> None:
        self._place, self._parts, self._how = place, parts, how
        self._skip_errors, self._pictures = skip_errors, pictures
        self._images: list[Image] = []
        self._skipped: list[tuple[str, str]] = []
        self._shards = self._bytes = 0

    def make(
        self, split: str, jobs: Sequence[Input], pool: Executor, ahead: int, bar: tqdm[NoReturn]
    ) -> None:
        """All shards of a split, but for those that are there."""
        finished = self._there(split)
        for shard, records in finished.items():
            images = [_image_of(record, f"{self._parts.folder}: {shard}") for record in records]
            self._images += images
            self._bytes += records[-1]["end"]
            bar.update(sum(image.blocks for image in images))
        there = {image.row.name for image in self._images}
        left = (job for job in jobs if job.name not in there)
        done = self._good(in_order(left, self._parts, pool, ahead, bar))
        number, made = len(finished), next(done, None)
        while made is not None:
            shard, records, jobs_of = shard_name(number), [], []
            with self._place.file(path_of(split, shard)) as file:
                while made is not None and file.tell() < self._how.shard_bytes:
                    jobs_of.append(made.job)
                    records.append(self._append(made, split, shard, file))
                    made = next(done, None)
                file.write(_TAR_END)
                records[-1]["end"] = file.tell()
            self._parts.finish(split, shard, records)
            self._images += [_image_of(record, shard) for record in records]
            self._bytes += records[-1]["end"]
            for job in jobs_of:
                self._parts.forget(job.name, len(runs_of(job.head)))
            number += 1
        self._shards += number

    def summary(self, out: str, refused: tuple[tuple[str, str], ...]) -> Summary:
        """What was made. refused: (image, reason) of those that never came here."""
        skipped = (*refused, *self._skipped)
        if not self._images:
            raise ValueError(f"{out}: no image could be stored; the first: {skipped[0][1]}")
        return Summary(out, tuple(self._images), self._shards, self._bytes, skipped)

    def _there(self, split: str) -> dict[str, list[dict[str, Any]]]:
        """The shards that were finished, and their images, up to the first that is not there."""
        finished = self._parts.finished(split)
        names = list(finished)
        for number, shard in enumerate(names):
            if self._place.size(path_of(split, shard)) != finished[shard][-1]["end"]:
                self._parts.unfinish(split, names[number:])
                return {name: finished[name] for name in names[:number]}
        return finished

    def _good(self, done: Iterable[Made]) -> Iterator[Made]:
        """Those that did not fail, each with its runs made; the first that did, as an error."""
        for made in done:
            try:
                made.wait()
            except (ValueError, OSError) as error:
                if self._is_of_storage(error):
                    where = self._parts.folder
                    raise ValueError(f"{where}: cannot be written to ({error})") from error
                if not self._skip_errors:
                    raise ValueError(_named(made.job, error)) from error
                self._skipped.append((str(made.job.entry.image), _named(made.job, error)))
            else:
                yield made

    def _is_of_storage(self, error: Exception) -> bool:
        """Whether it is no fault of an image: what was made of it found no room."""
        return isinstance(error, OSError) and (
            error.errno in _NO_ROOM or str(error.filename).startswith(str(self._parts.folder))
        )

    def _append(self, made: Made, split: str, shard: str, file: BinaryIO) -> dict[str, Any]:
        """Put an image at the end of the shard; returns the record of it."""
        job, seen, runs = made.job, made.seen, made.runs
        starts = []
        for number in range(len(runs)):
            starts.append(file.tell())
            with self._parts.blocks_of(job.name, number).open("rb") as part:
                shutil.copyfileobj(part, file, 1 << 20)
        end = file.tell()
        head = write_head(job, seen, runs, starts, file)
        statistics = None
        if measured(job):
            none = Statistics.none(job.head.bands)
            statistics = Statistics.joined([none, *(run.statistics or none for run in runs)])
        row = row_of(head, end, shard, statistics)
        if self._pictures:
            with self._place.file(path_of(split, f"pictures/{job.name}.jpg")) as picture:
                picture.write(picture_of(seen, head))
        image = Image(
            row,
            str(job.entry.image),
            job.reader,
            job.why,
            split,
            job.head.group,
            job.head.mpp,
            job.labelled,
            blocks=job.blocks,
            tiles=sum(run.tiles for run in runs),
            copied=sum(run.copied for run in runs),
            empty=sum(len(entry.empty) for entry in head.blocks),
            bytes=end - starts[0],
        )
        # As it will be read back by a run that goes on.
        return dict(json.loads(dump(asdict(image) | {"row": fields_of(row)})))


def _named(job: Input, error: Exception) -> str:
    """What went wrong, with the image that it went wrong with."""
    text = str(error) or type(error).__name__
    return text if str(job.entry.image) in text else f"{job.entry.image}: {text}"


def path_of(split: str, name: str) -> str:
    return f"{split}/{name}" if split else name


def _image_of(record: Mapping[str, Any], where: str) -> Image:
    row = ImageRow.from_record(Record.of(record["row"], where))
    return Image(**{k: v for k, v in record.items() if k not in ("row", "end")}, row=row)
