"""Whether shards are whole: every byte accounted for, every checksum right.

Shards are checked by threads, several at once: reading, checksums and decoding release the
interpreter's lock, and a thread that ends leaves nothing behind. A thread has one block in memory,
or 16 MiB of them over a network.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import fsspec
from tqdm import tqdm

from axialtrain.data.check_shard import ShardCheck
from axialtrain.data.faults import COPY_EITHER, Fault, Faults
from axialtrain.data.passing import is_passing
from axialtrain.data.reading import ByteSource, ReadConfig
from axialtrain.data.region import read_manifest
from axialtrain.data.store import MANIFEST, ImageRow, Manifest, is_shard_name
from axialtrain.data.whole import replacing

MODES = ("quick", "full", "deep")
VERSION = 1  # of the record
READ = ReadConfig(requests=32)  # quick asks for many headers, of which each is small


@dataclass(frozen=True)
class SetReport:
    """What was found in one folder of shards.

    digest: of its manifest, None where that cannot be read. bytes: of its shards. faults: those
    that were kept. count: how many there were.
    """

    url: str
    digest: str | None
    images: int
    shards: int
    bytes: int
    faults: tuple[Fault, ...]
    count: int

    @property
    def damaged(self) -> set[str]:
        """The shards with a fault, those that are not there included."""
        return {fault.shard for fault in self.faults if fault.shard is not None}


@dataclass(frozen=True)
class Report:
    """What `verify` found. mode: one of MODES."""

    mode: str
    sets: tuple[SetReport, ...]

    @property
    def faults(self) -> list[Fault]:
        return [fault for part in self.sets for fault in part.faults]

    @property
    def count(self) -> int:
        """How many faults there were, those that were not kept included."""
        return sum(part.count for part in self.sets)

    def __str__(self) -> str:
        lines = [str(fault) for fault in self.faults]
        if self.count > len(lines):
            lines.append(f"and {self.count - len(lines)} more faults in the same shards")
        for part in self.sets:
            found = f"{part.count} faults in {len(part.damaged)} shards" if part.count else "clean"
            lines.append(
                f"{part.url}: {part.images} images in {part.shards} shards, "
                f"{part.bytes / 1e6:.1f} MB, {self.mode}: {found}"
            )
        return "\n".join(lines)

    def to_json(self) -> bytes:
        """The record for machines; the same shards give the same bytes."""
        record = {
            "version": VERSION,
            "mode": self.mode,
            "clean": self.count == 0,
            "count": self.count,
            "sets": [
                {key: value for key, value in asdict(part).items() if key != "faults"}
                for part in self.sets
            ],
            "faults": [asdict(fault) for fault in self.faults],
        }
        return json.dumps(record, indent=1).encode() + b"\n"

    def write(self, path: str | Path) -> None:
        """Write the record to `path`, whole or not at all."""
        with replacing(Path(path)) as file:
            file.write(self.to_json())


def verify(
    urls: Sequence[str | Path],
    *,
    mode: str = "full",
    jobs: int | None = None,
    progress: bool = True,
) -> Report:
    """Check the shards in each of `urls`, the splits of one data set.

    mode: "quick" compares sizes, heads and the first tar header of each block with the manifest;
    "full" reads every byte and compares every checksum; "deep" also decodes all, and looks for
    images of one group, or of one source, in several splits. jobs: shards at once, None for one a
    core. progress: show a bar on a terminal.

    ValueError for a wrong argument, and for a url where no shards can be read; whatever is wrong
    with the shards is in the report.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, allowed is one of {', '.join(MODES)}")
    if jobs is None:
        jobs = len(os.sched_getaffinity(0))
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}, allowed is at least 1")
    names = [str(url).rstrip("/") or "/" for url in urls]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"the folders are {names}, allowed is at least one, each once")
    sets = [_Set(name, *read_manifest(name), mode) for name in names]
    _run([check for part in sets for check in part.checks], jobs, progress)
    if mode == "deep":
        _find_leaks(sets)
    return Report(mode, tuple(part.report() for part in sets))


class _Set:
    """One folder of shards while it is checked: `checks` has one for each shard."""

    def __init__(
        self, url: str, fs: fsspec.AbstractFileSystem, root: str, manifest: bytes, mode: str
    ) -> None:
        self.url = url
        self.whole = Faults(url, None)  # of no single shard
        self.images: tuple[ImageRow, ...] = ()
        self.digest: str | None = None
        self.checks: list[ShardCheck] = []
        self._strays: list[Faults] = []
        try:
            read = Manifest.from_json(manifest, MANIFEST)
        except ValueError as error:
            self.whole.add(str(error), "copy the manifest again, or shard the images again")
            return
        self.images, self.digest = read.images, read.digest
        rows: dict[str, list[ImageRow]] = {}
        for row in read.images:
            rows.setdefault(row.shard, []).append(row)
        source = ByteSource(fs, READ)
        for shard in rows:
            self.checks.append(ShardCheck(source, root, Faults(url, shard), rows[shard], mode))
        for name in self._shards_in(fs, root):
            if name not in rows:
                stray = Faults(url, name)
                stray.add(f"is in no row of {MANIFEST}", COPY_EITHER)
                self._strays.append(stray)

    def _shards_in(self, fs: fsspec.AbstractFileSystem, root: str) -> list[str]:
        """The names of the shards in the folder; none where it cannot be listed, as on the web."""
        if "http" in fs.protocol:
            return []
        try:
            names = [str(path).rstrip("/").rpartition("/")[2] for path in fs.ls(root, detail=False)]
        except Exception as error:  # a store has errors of its own
            if not (isinstance(error, OSError) or is_passing(error)):
                raise
            what = " ".join(f"{type(error).__name__}: {error}".split())
            self.whole.add(
                f"cannot be listed ({what}), so shards of no row were not looked for",
                "see that it can be listed, and verify again",
            )
            return []
        return sorted(name for name in names if is_shard_name(name))

    def report(self) -> SetReport:
        parts = [check.faults for check in self.checks] + self._strays + [self.whole]
        return SetReport(
            self.url,
            self.digest,
            len(self.images),
            len(self.checks),
            sum(check.size for check in self.checks),
            tuple(fault for part in parts for fault in part.kept),
            sum(part.count for part in parts),
        )


def _run(checks: list[ShardCheck], jobs: int, progress: bool) -> None:
    """Run all, some at once. What ends this early, Ctrl-C say, ends them at their next block."""
    lock, stop = threading.Lock(), threading.Event()
    bar: tqdm[NoReturn] = tqdm(unit="B", unit_scale=True, disable=None if progress else True)

    def advance(done: int) -> None:
        if stop.is_set():
            raise _StoppedError
        with lock:
            bar.update(done)

    with bar, ThreadPoolExecutor(jobs, thread_name_prefix="verify") as pool:
        try:
            bar.total = sum(pool.map(ShardCheck.measure, checks))
            for done in as_completed([pool.submit(check.run, advance) for check in checks]):
                done.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class _StoppedError(Exception):
    """Tells a thread to end."""


def _find_leaks(sets: list[_Set]) -> None:
    """Add a fault for each image whose group, or whose source, is in an earlier set, too."""
    groups: dict[str, str] = {}
    sources: dict[str, str] = {}
    for part in sets:
        seen = [image for check in part.checks for image in check.seen]
        for image in seen:
            for key, value, known in (
                ("group", image.group, groups),
                ("source_sha256", image.source_sha256, sources),
            ):
                if known.setdefault(value, part.url) != part.url:
                    part.whole.add(
                        f"its {key} {value!r} is in {known[value]}, too",
                        "keep what belongs together in one split: shard the splits again",
                        image=image.name,
                    )
                    break
