"""File systems of fsspec without asyncio, which need not be safe to be asked by two at once.

The end of a process waits for asyncio's threads, and one that stalls would keep it for ever. So
they are asked in threads that nobody waits for; one that stalls keeps its file system, and the next
try asks another that is made alike.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from functools import partial
from typing import Any

import fsspec


async def ask_in_thread(fs: fsspec.AbstractFileSystem, what: str, path: str, **bounds: int) -> Any:
    """What `fs.what(path, **bounds)` gives, from a thread of its own.

    Where this is cancelled `fs` may be at it still, and is not to be asked again. What it raises is
    raised here; RuntimeError for what would end this loop.
    """
    ask = partial(getattr(fs, what), path, **bounds)
    answer: Future[tuple[Any, BaseException | None]] = Future()
    answer.set_running_or_notify_cancel()  # so that its thread can settle it, whoever is gone

    def asking() -> None:
        try:
            answer.set_result((ask(), None))
        except BaseException as error:  # for whoever waits; here nobody would see it
            answer.set_result((None, error))

    threading.Thread(target=asking, name="axialtrain-read", daemon=True).start()
    given, error = await asyncio.wrap_future(answer)
    if error is None:
        return given
    if isinstance(error, Exception):
        raise error
    raise RuntimeError(f"{what} of {path}: {error!r}") from error


def alike(fs: fsspec.AbstractFileSystem) -> fsspec.AbstractFileSystem:
    """A file system as `fs`, with connections of its own: fsspec gives out one to all who ask."""
    made = type(fs)(*fs.storage_args, **fs.storage_options, skip_instance_cache=True)
    assert isinstance(made, fsspec.AbstractFileSystem)
    return made
