"""The unfinished work of `axialtrain shard`: what a run that was killed goes on from.

    run.json                    what is being made: one that goes on must want the same
    lock                        held by the process that works here
    parts/{image}.{run}.blocks  some blocks of an image, in a row
    parts/{image}.{run}.json    what they are; once it is there, the part is done
    done/{split}/{shard}.json   the images of a shard that is at its place

All of it is written here, and read by nobody else.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from axialtrain.data.encode import Run
from axialtrain.data.records import dump
from axialtrain.data.statistics import Statistics
from axialtrain.data.store import BlockEntry
from axialtrain.data.whole import replacing


class Scratch:
    """The folder of unfinished work."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts = folder / "parts"

    @property
    def begun(self) -> bool:
        """Whether a run has begun here, and has not ended."""
        return (self.folder / "run.json").exists()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else works here meanwhile; ValueError, naming who does, if somebody is.

        The lock ends with the process, however that ends.
        """
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{self.folder}: cannot be the folder of unfinished work ({error})"
            ) from error
        with (self.folder / "lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ValueError(
                    f"{self.folder}: {file.read(200).strip() or 'another process'} works here, "
                    "allowed is one at a time"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield

    def begin(self, wanted: Mapping[str, Any]) -> None:
        """Start, or go on with, a run that makes `wanted`. What is left of one that is not known
        goes first.

        ValueError, naming the first key that differs, where another one was begun here.
        """
        if not self.begun:
            for left in ("parts", "done", "out"):
                shutil.rmtree(self.folder / left, ignore_errors=True)
            self._parts.mkdir()
            with replacing(self.folder / "run.json") as file:
                file.write(dump(wanted))
            return
        before = json.loads((self.folder / "run.json").read_bytes())
        now = json.loads(dump(wanted))
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                raise ValueError(
                    f"{self.folder}: the run that was begun here differs in {key}, allowed is to "
                    "go on with the same images and options; to begin anew, delete it, and its "
                    "shards"
                )

    @contextmanager
    def part(self, image: str, number: int) -> Iterator[BinaryIO]:
        """A file for the blocks of a run; there when the block ends, or not at all.

        Under this process's own name until then: one that was orphaned may end a moment later, and
        what it puts there is the same.
        """
        path = self.blocks_of(image, number)
        own = path.with_name(f"{path.name}.{os.getpid()}")
        with replacing(own) as file:
            yield file
        own.replace(path)

    def blocks_of(self, image: str, number: int) -> Path:
        return self._parts / f"{image}.{number:05d}.blocks"

    def keep(self, image: str, number: int, run: Run) -> None:
        """Say that the part is done."""
        with replacing(self._record(image, number)) as file:
            file.write(dump(asdict(run)))

    def run_of(self, image: str, number: int) -> Run | None:
        """The part, None where it is not done, or not whole."""
        path, data = self._record(image, number), self.blocks_of(image, number)
        if not path.exists() or not data.exists():
            return None
        values = json.loads(path.read_bytes())
        blocks = tuple(
            BlockEntry(**(entry | {"empty": tuple(entry["empty"])}))
            for entry in values.pop("blocks")
        )
        if data.stat().st_size != sum(entry.length for entry in blocks):
            return None
        given = values.pop("statistics")
        statistics = None
        if given is not None:
            statistics = Statistics(given["count"], tuple(given["mean"]), tuple(given["squares"]))
        return Run(blocks=blocks, statistics=statistics, **values)

    def forget(self, image: str, runs: int) -> None:
        """Remove the parts of an image that stands in its shard."""
        for number in range(runs):
            self._record(image, number).unlink(missing_ok=True)
            self.blocks_of(image, number).unlink(missing_ok=True)

    def finish(self, split: str, shard: str, images: list[dict[str, Any]]) -> None:
        """Say that a shard, with these images, is at its place."""
        folder = self.folder / "done" / split
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"{shard}.json") as file:
            file.write(dump(images))

    def finished(self, split: str) -> dict[str, list[dict[str, Any]]]:
        """The shards of a split that are at their places, in order, and their images."""
        folder = self.folder / "done" / split
        return {
            path.name.removesuffix(".json"): json.loads(path.read_bytes())
            for path in sorted(folder.glob("*.tar.json"))
        }

    def unfinish(self, split: str, shards: Iterable[str]) -> None:
        """Say that shards are not at their places."""
        for shard in shards:
            (self.folder / "done" / split / f"{shard}.json").unlink(missing_ok=True)

    def remove(self) -> None:
        """All of it, the record of the run first: what is left then is no run."""
        (self.folder / "run.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _record(self, image: str, number: int) -> Path:
        return self._parts / f"{image}.{number:05d}.json"
