"""Writing the checkpoints of a run, beside training if asked, and which of them stay."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import google_crc32c
import safetensors.torch
from torch import Tensor

from axialtrain.mesh.collectives import gather_objects
from axialtrain.mesh.mesh import Group
from axialtrain.train.alike import NotSavedError, RefusedError
from axialtrain.train.checkpoint import (
    FORMAT,
    MARKER,
    MOMENTS,
    STATE,
    WEIGHTS,
    Owner,
    all_steps_in,
    folder_name,
    index_of,
    moment_name,
    owner_of,
    steps_in,
)
from axialtrain.train.config import CheckpointConfig
from axialtrain.train.engine import Engine
from axialtrain.train.storage import Folder

LOG = logging.getLogger(__name__)

PROBE = "probe"
Files = dict[str, tuple[int, int]]  # bytes and CRC-32C, by name


@dataclass(frozen=True)
class _Writing:
    """A checkpoint that is being written. files: what this rank writes."""

    step: int
    best: int | None
    state: Mapping[str, Any]
    indexes: Mapping[str, Mapping[str, Any]]
    files: Future[Files]


class Checkpoints:
    """The checkpoints of a run, in `folder`, which all ranks reach.

    All but `written` and `begun_by` is collective over `world`: what fails on one rank raises
    NotSavedError on all of them, with the same words; and RefusedError where another run saves into
    the folder, too. A lock keeps it out of one on this machine (track.py), but nothing at a URL.
    """

    def __init__(self, folder: Folder, config: CheckpointConfig, world: Group) -> None:
        self.folder = folder
        self._config = config
        self._world = world
        self._writing: _Writing | None = None
        self._complete: list[int] = []
        self._best: int | None = None  # the best step that was saved
        self._owner: Owner | None = None  # on rank 0
        self.begun_by: Owner | None = None  # on rank 0, of the checkpoint here that is gone on from

    @property
    def under_way(self) -> bool:
        """Whether `commit` is due, alike on all ranks."""
        return self._writing is not None

    @property
    def written(self) -> bool:
        """Whether this rank is through with what it has to write."""
        return self._writing is None or self._writing.files.done()

    @property
    def empty(self) -> bool:
        """Whether there is none yet. Known to rank 0 first, and told to all."""
        return gather_objects(not self._complete, self._world)[0]

    def start(self, resumed: int | None, best: int | None = None) -> None:
        """Clear away what a run that was killed left half written, and what is damaged.

        resumed: the step of the checkpoint here that the run goes on from; later ones are damaged.
        best: the best step until then.
        """

        def clear() -> None:
            self.folder.make()
            self.folder.write(PROBE, b"")  # a bucket, or a disk, that takes nothing
            self.folder.remove(PROBE)
            self._complete = steps_in(self.folder)
            self._best = best
            for step in all_steps_in(self.folder):
                if step not in self._complete or (resumed is not None and step > resumed):
                    self._remove(step)
            if resumed is not None:
                self.begun_by = owner_of(self.folder.within(folder_name(resumed)))

        self._on_first(clear, f"{self.folder} cannot hold checkpoints")

    def belong_to(self, owner: Owner | None) -> None:
        """The run that saves here from now on. owner: on rank 0, which alone needs it."""
        self._owner = owner
        self._refuse_others(self._complete[:-1])  # one that began meanwhile, and was faster

    def begin(self, engine: Engine, step: int, state: Mapping[str, Any], best: int | None) -> None:
        """Take a copy of the run's state after `step` and write it, or start to.

        state: a JSON object. best: the step that validation found best so far. Returns when the
        copy is taken, or without `checkpoint.asynchronous` when it is written; then, at a time that
        is the same on all ranks, `commit`.
        """
        assert self._writing is None, "commit() is due"
        self._refuse_others(self._complete)  # before anything of theirs is written over
        rank, ranks = self._world.rank, self._world.size
        owners = deal({name: shape.numel() for name, shape in engine.shapes.items()}, ranks)
        count = max(owners.values()) + 1  # ranks that write anything are the first ones
        mine: dict[str, dict[str, Tensor]] = {WEIGHTS: {}, MOMENTS: {}}
        index: dict[str, dict[str, str]] = {WEIGHTS: {}, MOMENTS: {}}
        totals = {WEIGHTS: 0, MOMENTS: 0}

        def take(kind: str, owner: int, name: str, tensor: Tensor) -> None:
            totals[kind] += tensor.nbytes
            index[kind][name] = shard(kind, owner, count)
            if owner == rank:
                mine[kind][name] = tensor.contiguous()

        for name, weight in engine.weights():
            take(WEIGHTS, owners[name], name, weight)
        for name, key, moment in engine.moments():
            take(MOMENTS, owners[name], moment_name(name, key), moment)

        folder = self.folder.within(folder_name(step))
        contents = {shard(kind, rank, count): tensors for kind, tensors in mine.items() if tensors}
        indexes = {
            index_of(kind): {"metadata": {"total_size": totals[kind]}, "weight_map": index[kind]}
            for kind in (WEIGHTS, MOMENTS)
        }
        write = lambda: _write_tensors(folder, contents)  # noqa: E731
        files = _beside(write) if self._config.asynchronous else _now(write)
        self._writing = _Writing(step, best, dict(state), indexes, files)

    def commit(self) -> str:
        """Wait for all ranks, and make the checkpoint count. Returns where it is.

        Raises NotSavedError where a rank could not write; nothing of it is left then. What
        RefusedError leaves may be the other run's.
        """
        assert self._writing is not None, "begin() comes first"
        writing, self._writing = self._writing, None
        folder = self.folder.within(folder_name(writing.step))
        try:
            files, problem = writing.files.result(), ""
        except Exception as error:  # whatever it is: the others are waiting, and it is raised below
            files, problem = {}, f"{type(error).__name__}: {error}"
        told = gather_objects((files, problem, socket.gethostname()), self._world)
        before = folder_name(self._complete[-1]) if self._complete else "none"
        self._refuse_others(self._complete)

        def complete() -> None:
            for rank, (_, wrong, host) in enumerate(told):
                if wrong:
                    raise OSError(f"rank {rank} on {host}: {wrong}")
            every = {name: entry for part, _, _ in told for name, entry in part.items()}
            # A file system of several machines may be late to show them; a store is not.
            if self.folder.local is None and (gone := sorted(every.keys() - set(folder.names()))):
                raise OSError(f"{gone[0]} is gone: another start of the run has cleared it away")
            for name, content in (*writing.indexes.items(), (STATE, writing.state)):
                every[name] = _write(folder, name, _text(content))
            marker = {"format": FORMAT, "step": writing.step, "files": every}
            if self._owner is not None:
                marker["run"] = asdict(self._owner)
            _write(folder, MARKER, _text(marker))
            if writing.step not in self._complete:
                self._complete.append(writing.step)

        try:
            self._on_first(
                complete, f"step {writing.step} is not saved (the checkpoint before it: {before})"
            )
        except NotSavedError as error:
            try:
                self._on_first(lambda: self._remove(writing.step), "nor can it be cleared away")
            except NotSavedError as second:
                raise NotSavedError(f"{error}; {second}") from error
            raise
        if writing.best is not None and writing.best in self._complete:
            self._best = writing.best
        self._on_first(self._thin_out, "old checkpoints")
        return folder.url

    def _thin_out(self) -> None:
        stay = kept(self._complete, self._config, self._best)
        for step in [step for step in self._complete if step not in stay]:
            try:
                self._remove(step)
            except OSError as error:  # one too many harms nobody
                LOG.warning("step %d could not be removed: %s", step, error)

    def _remove(self, step: int) -> None:
        folder = self.folder.within(folder_name(step))
        folder.remove(MARKER)  # first: what is half removed does not count
        folder.remove_all()
        if step in self._complete:
            self._complete.remove(step)

    def _refuse_others(self, known: Collection[int]) -> None:
        """known: the steps that are ours."""
        problem = ""
        if self._owner is not None:
            with suppress(OSError):  # what cannot be asked cannot be written, which says more
                problem = self._other(self._owner, known)
        problem = gather_objects(problem, self._world)[0]
        if problem:
            raise RefusedError(problem)

    def _other(self, owner: Owner, known: Collection[int]) -> str:
        for step in all_steps_in(self.folder):
            other = None if step in known else owner_of(self.folder.within(folder_name(step)))
            if other is not None and other.identity != owner.identity:
                return (
                    f"checkpoint.folder={self.folder}: the run in {other.folder} has saved there, "
                    f"too ({folder_name(step)}): allowed is a folder that no other run has"
                )
        return ""

    def _on_first(self, act: Callable[[], None], what: str) -> None:
        """`act()` on rank 0; every rank raises if it does."""
        problem = ""
        if self._world.rank == 0:
            try:
                act()
            except Exception as error:  # as in commit
                problem = f"{what}: {error}"
        problem = gather_objects(problem, self._world)[0]
        if problem:
            raise NotSavedError(problem)


def kept(steps: Iterable[int], config: CheckpointConfig, best: int | None) -> set[int]:
    """Which of the checkpoints of these steps stay: the last ones, every n-th, the best."""
    ordered = sorted(steps)
    stay = set(ordered[-config.keep_last :])
    if config.keep_every:
        stay |= {step for step in ordered if step % config.keep_every == 0}
    return stay | ({best} & set(ordered) if best is not None else set())


def deal(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Which rank writes which tensor: the largest first, each to the rank with the least so far.

    Ranks that write anything are the first ones.
    """
    load = [0] * ranks
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner = load.index(min(load))
        owners[name] = owner
        load[owner] += sizes[name]
    return owners


def shard(kind: str, index: int, count: int) -> str:
    return f"{kind}-{index + 1:05d}-of-{count:05d}.safetensors"


def _write_tensors(folder: Folder, contents: Mapping[str, dict[str, Tensor]]) -> Files:
    folder.make()
    files = {}
    for name, tensors in contents.items():
        content = safetensors.torch.save(tensors, metadata={"format": "pt"})
        files[name] = _write(folder, name, content)
    return files


def _write(folder: Folder, name: str, content: bytes) -> tuple[int, int]:
    folder.write(name, content)
    return len(content), google_crc32c.value(content)


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(content), indent=1, allow_nan=False) + "\n").encode()


def _now(job: Callable[[], Files]) -> Future[Files]:
    future: Future[Files] = Future()
    try:
        future.set_result(job())
    except Exception as error:  # raised again where all ranks hear of it
        future.set_exception(error)
    return future


def _beside(job: Callable[[], Files]) -> Future[Files]:
    """In a thread that does not hold up a process that ends."""
    future: Future[Files] = Future()

    def body() -> None:
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=body, name="axialtrain-save", daemon=True).start()
    return future
