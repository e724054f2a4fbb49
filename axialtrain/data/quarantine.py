"""Damaged shards moved aside, so that what stays is a data set without a fault.

The new manifest comes first, at once: from then on the folder is whole. A shard that a kill left
behind is in no row of it, which the next `verify` says, and quarantines.
"""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from axialtrain.data.region import read_manifest
from axialtrain.data.store import MANIFEST, Manifest
from axialtrain.data.verify import SetReport
from axialtrain.data.whole import replacing, sync_folder


@dataclass(frozen=True)
class Moved:
    """What was moved to `folder`. missing: shards that were not there to be moved."""

    folder: Path
    shards: tuple[str, ...]
    missing: tuple[str, ...]
    images: tuple[str, ...]
    stay: int

    def __str__(self) -> str:
        lines = [f"moved to {self.folder}: {name}" for name in self.shards]
        lines += [f"is not there, and no longer in {MANIFEST}: {name}" for name in self.missing]
        lines.append(
            f"{len(self.images)} images are no longer in {MANIFEST} (their rows are in "
            f"{self.folder / MANIFEST}), {self.stay} stay"
        )
        return "\n".join(lines)


def check_quarantine(url: str | Path, folder: str | Path) -> tuple[Path, Path]:
    """(the folder of the shards, the one to move to); ValueError where moving could lose data."""
    fs, root, _ = read_manifest(str(url))
    if "file" not in fs.protocol:
        raise ValueError(f"quarantine of {url}: allowed are folders on this machine")
    shards, aside = Path(root).resolve(), Path(folder).resolve()
    if aside.is_relative_to(shards):
        raise ValueError(f"quarantine is {folder}, allowed is a folder that is not in {url}")
    if aside.exists() and (not aside.is_dir() or any(aside.iterdir())):
        raise ValueError(f"quarantine is {folder}, allowed is a new or an empty folder")
    there = next(path for path in aside.parents if path.exists())
    if not there.is_dir() or not os.access(shards, os.W_OK | os.X_OK):
        raise ValueError(f"quarantine is {folder}: it, or {url}, cannot be written to")
    return shards, aside


def quarantine(report: SetReport, folder: str | Path) -> Moved:
    """Move the shards that `report` calls damaged to `folder`, their images out of the manifest.

    `folder` is new or empty, and gets a manifest of the rows that were taken out. ValueError,
    before anything is changed, where moving could lose data, or where nothing would stay.
    """
    shards, aside = check_quarantine(report.url, folder)
    if report.digest is None:
        raise ValueError(f"{report.url}: its {MANIFEST} cannot be read, so none can be made of it")
    manifest = Manifest.from_json((shards / MANIFEST).read_bytes(), str(shards / MANIFEST))
    if manifest.digest != report.digest:
        raise ValueError(f"{shards / MANIFEST}: was changed while the shards were verified")
    out = tuple(row for row in manifest.images if row.shard in report.damaged)
    stay = tuple(row for row in manifest.images if row.shard not in report.damaged)
    if not stay:
        raise ValueError(f"{report.url}: every shard has a fault, so that nothing would stay")
    aside.mkdir(parents=True, exist_ok=True)
    if out:
        with replacing(aside / MANIFEST) as file:
            file.write(replace(manifest, images=out).to_json())
        with replacing(shards / MANIFEST) as file:
            file.write(replace(manifest, images=stay).to_json())
    moved, missing = [], []
    for name in sorted(report.damaged):
        if os.path.lexists(shards / name):
            _move(shards / name, aside / name)
            moved.append(name)
        else:
            missing.append(name)
    sync_folder(aside)
    sync_folder(shards)
    names = tuple(row.name for row in out)
    return Moved(aside, tuple(moved), tuple(missing), names, len(stay))


def _move(source: Path, to: Path) -> None:
    """Rename, or on another file system copy, sync, rename and then unlink."""
    if os.path.lexists(to):
        raise ValueError(f"{to}: is there already, allowed is a new name")
    try:
        source.rename(to)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with source.open("rb") as data, replacing(to) as file:
            shutil.copyfileobj(data, file)
        source.unlink()
