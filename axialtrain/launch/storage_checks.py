"""What `axialtrain doctor` looks at where runs write and shards lie."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from axialtrain.data.passing import without_secrets
from axialtrain.data.whole import replacing
from axialtrain.launch.findings import Found, shown
from axialtrain.train.storage import Folder

WRITTEN = 1 << 20  # bytes, of the file that is tried
LEAST_FREE = 10**9  # bytes; a checkpoint of a small model takes some hundred MB
READ = 1 << 10  # bytes of the range that is tried


def existing(folder: Path) -> Path:
    """`folder`, or the nearest above it that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_folder(found: Found, folder: Path) -> None:
    """Whether files can be written there, synced and renamed; it need not be there yet."""
    above = existing(folder)
    found.fact(f"{folder}" if above == folder else f"{folder} (to be made in {above})")
    own = above / f".axialtrain-doctor-{secrets.token_hex(8)}"
    try:
        own.mkdir()
        try:
            with replacing(own / "file") as file:
                file.write(os.urandom(WRITTEN))
            if (own / "file").stat().st_size != WRITTEN:
                raise OSError(f"of {WRITTEN} bytes {(own / 'file').stat().st_size} arrived")
        finally:
            shutil.rmtree(own, ignore_errors=True)
    except OSError as error:
        found.trouble(
            f"{folder} cannot be written to ({error.strerror or error})",
            f"make room in {above} or make it writable, or give another hydra.run.dir",
        )
        return
    free = shutil.disk_usage(above).free
    found.fact(f"write, fsync and rename work in {above}, {free / 1e9:.1f} GB free")
    if free < LEAST_FREE:
        found.trouble(
            f"{above} has {free / 1e6:.0f} MB free, allowed is from {LEAST_FREE / 1e6:.0f}",
            "make room there, or give another hydra.run.dir",
        )


def check_store(found: Found, url: str, *, write: bool = False) -> None:
    """Whether the folder at `url` can be listed and a range of a file of it read.

    write: whether it is where checkpoints go, and so must take an object, too.
    """
    where = without_secrets(url)
    try:
        folder = Folder(url)
    except (ImportError, ValueError) as error:
        found.trouble(
            f"{where} cannot be opened ({shown(error)})",
            "install what this message names, or correct the URL",
        )
        return
    try:
        names = folder.names()
    except OSError as error:
        found.trouble(f"{where} cannot be listed ({shown(error)})", _ACCESS)
        return
    if write:
        _check_written(found, folder, where)
    elif not names:
        found.trouble(f"{where} is not there, or is empty", "name the folder that holds shards")
    if names:
        _check_read(found, folder, names, where)


_ACCESS = (
    "check the endpoint, the credentials and the rights of this host on it (list and read, and "
    "write for checkpoints)"
)


def _check_read(found: Found, folder: Folder, names: Sequence[str], where: str) -> None:
    first = "manifest.json" if "manifest.json" in names else None
    for name in (first,) if first else names[:8]:
        try:
            data = folder.read(name, READ)
        except IsADirectoryError:
            continue
        except OSError as error:
            found.trouble(f"{where}/{name} cannot be read ({shown(error)})", _ACCESS)
            return
        found.fact(f"{where}: {len(names)} names, {len(data)} bytes of {name} read")
        return
    found.fact(f"{where}: {len(names)} names, and no file among the first")


def _check_written(found: Found, folder: Folder, where: str) -> None:
    name = f"axialtrain-doctor-{secrets.token_hex(8)}"
    content = os.urandom(READ)
    try:
        folder.make()
        try:
            folder.write(name, content)
            back = folder.read(name, READ)
        finally:
            folder.remove(name)
    except OSError as error:
        found.trouble(f"{where} cannot be written to ({shown(error)})", _ACCESS)
        return
    if back != content:
        found.trouble(
            f"{where} gives back other bytes than were written",
            "use a store that shows an object when all of it has arrived",
        )
        return
    found.fact(f"{where}: written, read and removed an object")
