"""What `axialtrain doctor` looks at where runs write and shards lie."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

import fsspec

from axialtrain.data.passing import without_secrets
from axialtrain.data.reading import ByteSource, ReadConfig
from axialtrain.data.store import MANIFEST
from axialtrain.data.whole import replacing
from axialtrain.launch.findings import Found, shown
from axialtrain.train.storage import Folder

WRITTEN = 1 << 20  # bytes, of the file that is tried
LEAST_FREE = 10**9  # bytes; a checkpoint of a small model takes some hundred MB
READ = 1 << 10  # bytes that are read


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


def check_store(found: Found, url: str, *, seconds: float) -> None:
    """Whether the shards at `url` answer: their manifest is read as training does, or, where there
    is none, the folder is listed. seconds: for an answer; nothing is asked for again."""
    where = without_secrets(url)
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        found.trouble(f"{where} cannot be opened ({shown(error)})", _OPEN)
        return
    source = ByteSource(fs, ReadConfig(retries=0, timeout=seconds))
    try:
        data = source.beginning(f"{root.rstrip('/')}/{MANIFEST}", READ)
        found.fact(f"{where}: {len(data)} bytes of {MANIFEST} read")
        return
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        found.trouble(f"{where}/{MANIFEST} cannot be read ({shown(error)})", _ACCESS)
        return
    try:
        names = Folder(url).names()
    except OSError as error:
        found.trouble(f"{where} cannot be listed ({shown(error)})", _ACCESS)
        return
    if names:
        found.trouble(
            f"{where} holds {len(names)} names, and no {MANIFEST}",
            "name the folder that `axialtrain shard` wrote",
        )
    else:
        found.trouble(
            f"{where} is not there, or is empty",
            "name the folder that `axialtrain shard` wrote, at a path that this host has",
        )


def check_checkpoints(found: Found, url: str) -> None:
    """Whether an object can be written at `url`, read and removed."""
    where = without_secrets(url)
    try:
        folder = Folder(url)
    except (ImportError, ValueError) as error:
        found.trouble(f"{where} cannot be opened ({shown(error)})", _OPEN)
        return
    name = f"axialtrain-doctor-{secrets.token_hex(8)}"
    content = os.urandom(READ)
    try:
        try:
            folder.write(name, content)
            back = folder.read(name, READ)
            listed = folder.has(name)
        finally:
            folder.remove(name)
    except OSError as error:
        found.trouble(f"{where} cannot be written to ({shown(error)})", _ACCESS)
        return
    if back != content or not listed:
        found.trouble(
            f"{where} does not give back what was just written there",
            "use a store that shows an object when all of it has arrived",
        )
        return
    found.fact(f"{where}: wrote, listed, read and removed an object")


_OPEN = "install what this message names, or correct the URL"
_ACCESS = (
    "check the endpoint, the credentials and the rights of this host there (to list and to read, "
    "and for checkpoints to write)"
)
