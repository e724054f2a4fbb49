"""Images that are being made, by several processes, in the order in which they were named."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from axialtrain.data.encode import Look, Run, look, runs_of, write_run
from axialtrain.data.inputs import Input
from axialtrain.data.readers.reader import Mask
from axialtrain.data.scratch import Scratch


@dataclass
class Made:
    """An image that is being made: its runs, in order."""

    job: Input
    looking: Future[Look]
    making: list[Future[Run]]

    def wait(self) -> None:
        """Until all of it is made, or one part has failed, with that part's error."""
        self.looking.result()
        for future in self.making:
            future.result()

    @property
    def seen(self) -> Look:
        return self.looking.result()

    @property
    def runs(self) -> list[Run]:
        return [future.result() for future in self.making]


def in_order(
    jobs: Iterable[Input], parts: Scratch, pool: Executor, ahead: int, bar: tqdm[NoReturn]
) -> Iterator[Made]:
    """The images in their order, while those `ahead` of them are being made. bar: of blocks."""

    def made(future: Future[Run]) -> None:
        if not future.cancelled() and future.exception() is None:
            bar.update(len(future.result().blocks))

    left = iter(jobs)
    looking: deque[tuple[Input, Future[Look]]] = deque()
    making: deque[Made] = deque()
    while True:
        for job in islice(left, ahead - len(looking)):
            looking.append((job, pool.submit(look, job)))
        while looking and len(making) < ahead:
            job, seen = looking.popleft()
            numbers = range(len(runs_of(job.head))) if seen.exception() is None else ()
            making.append(Made(job, seen, []))
            for number in numbers:
                future = pool.submit(_run, parts.folder, job, seen.result().kept, number)
                future.add_done_callback(made)
                making[-1].making.append(future)
        if not making:
            return
        yield making.popleft()


def _run(folder: Path, job: Input, kept: Mask | None, number: int) -> Run:
    """Run `number` of the image, made here unless it is there already."""
    parts = Scratch(folder)
    run = parts.run_of(job.name, number)
    if run is None:
        with parts.part(job.name, number) as file:
            run = write_run(job, kept, number, file)
        parts.keep(job.name, number, run)
    return run


@contextmanager
def processes(jobs: int) -> Iterator[Executor]:
    """What runs functions: `jobs` processes, or this one."""
    if jobs == 1:
        yield _Here()
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that made blocks was killed: there was too little memory for --jobs, or a "
            "library crashed on a damaged image (--jobs 1 shows on which)"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """A process of the pool leaves Ctrl-C to the one that started it, and ends when that has."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "a process of a pool has one"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Here(Executor):
    """Runs what it is given at once, in this process."""

    def submit(self, fn: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*arguments, **named))
        except Exception as error:  # whoever asks for the result gets it
            future.set_exception(error)
        return future
