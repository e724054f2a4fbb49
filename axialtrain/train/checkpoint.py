"""The state of a run on disk, in one form that knows of no mesh, no ZeRO stage and no precision.

A checkpoint is a folder of safetensors files with the whole fp32 weights and the moments of the
optimizer under the names of the serial model, an index for each in Hugging Face's convention, and
state.json. It counts when its marker, checkpoint.json, is there: that is written last and lists
every other file with its size and CRC-32C.

Reading one needs neither DeepSpeed nor a process group.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from axialtrain.train.storage import Folder

LOG = logging.getLogger(__name__)

FORMAT = 1
FOLDER = "checkpoints"  # in a run's folder
CONFIG = "config.yaml"  # there, too
IDENTITY = ".run-id"  # and that: which run it is, wherever its folder is moved to
MARKER = "checkpoint.json"
STATE = "state.json"
WEIGHTS, MOMENTS = "model", "optimizer"  # the two sets of tensors
LARGEST_JSON = 64 * 2**20  # bytes; ours are under 1 MB
_STEP = re.compile(r"step-(\d{8,12})")
_IDENTITY = re.compile(r"[0-9a-f]{12,32}")
_ENTRY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+")  # a bare name: stays in its folder


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def index_of(kind: str) -> str:
    """The name of the index of `WEIGHTS` or `MOMENTS`."""
    return f"{kind}.safetensors.index.json"


def moment_name(name: str, key: str) -> str:
    """Of moment `key` of parameter `name` in the files."""
    return f"{key}/{name}"


class OtherFormatError(ValueError):
    """Not damaged: written by another version, which may read it."""


@dataclass(frozen=True)
class Owner:
    """The run that saves a checkpoint. folder: of the run, where it was then."""

    identity: str
    folder: str


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint. step: optimizer steps taken. state: what state.json holds. owner: None
    where the checkpoint does not say.

    Every method raises ValueError, naming the file, for what is not as the marker says, and OSError
    where the place does not answer.
    """

    folder: Folder
    step: int
    files: Mapping[str, tuple[int, int]]  # bytes, CRC-32C
    state: dict[str, Any] = field(repr=False)
    owner: Owner | None = None

    @property
    def where(self) -> str:
        """Path or URL."""
        return self.folder.url

    def weights(self) -> dict[str, Tensor]:
        """The state_dict of the serial model: parameters in fp32, and buffers."""
        with self.opened() as tensors:
            return {name: tensors.weight(name) for name in tensors.weight_names}

    @contextlib.contextmanager
    def opened(self) -> Iterator[Tensors]:
        """The tensors, read as they are asked for."""
        with contextlib.ExitStack() as stack:
            yield Tensors(self, stack)

    def check(self) -> None:
        """Read every file, and compare it with its checksum."""
        for name in self.files:
            self.content(name)

    def content(self, name: str) -> bytes:
        """Of a file, compared with its size and checksum."""
        return _content(self.folder, name, self.files[name])


class Tensors:
    """The tensors of a checkpoint, by name; its files are open as long as `stack` is."""

    def __init__(self, saved: Saved, stack: contextlib.ExitStack) -> None:
        self._saved = saved
        self._stack = stack
        self._file_of = {kind: _index(saved, index_of(kind)) for kind in (WEIGHTS, MOMENTS)}
        self._open: dict[str, Any] = {}

    @property
    def weight_names(self) -> list[str]:
        return list(self._file_of[WEIGHTS])

    @property
    def moment_names(self) -> list[str]:
        """As `moment_name` makes them."""
        return list(self._file_of[MOMENTS])

    def weight(self, name: str) -> Tensor:
        return self._tensor(WEIGHTS, name)

    def moment(self, name: str, key: str) -> Tensor:
        return self._tensor(MOMENTS, moment_name(name, key))

    def shape(self, name: str) -> list[int]:
        """Of a weight, without reading it."""
        with self._named(WEIGHTS, name) as file:
            return list(file.get_slice(name).get_shape())

    def _tensor(self, kind: str, name: str) -> Tensor:
        with self._named(kind, name) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    @contextlib.contextmanager
    def _named(self, kind: str, name: str) -> Iterator[Any]:
        if name not in self._file_of[kind]:
            raise ValueError(f"{self._saved.where}/{index_of(kind)}: has no {name}")
        file = self._file_of[kind][name]
        try:
            if file not in self._open:
                opened = safe_open(self._path(file), framework="pt")
                self._open[file] = self._stack.enter_context(opened)
            yield self._open[file]
        except SafetensorError as error:
            raise ValueError(f"{self._saved.where}/{file}: {error}") from error

    def _path(self, file: str) -> Path:
        """Of the file, or of a copy without a name, which cannot be left behind."""
        local = self._saved.folder.local
        if local is not None:
            return local / file
        copy = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        copy.write(self._saved.content(file))
        copy.flush()
        return Path(f"/proc/self/fd/{copy.fileno()}")


def newest(where: str | Path, *, best: bool = False, verify: bool = True) -> Saved:
    """The newest complete checkpoint of a run, or the one that validation found best.

    where: a run's folder, the folder of its checkpoints, or one checkpoint: a path or a URL. One
    that is damaged is passed over for the one before, with a warning.
    Raises ValueError, naming `where`, if there is none, OSError if the place does not answer.
    """
    found, problems = find(where, best=best, verify=verify)
    if found is None:
        elsewhere = kept_in(Path(where)) if "://" not in str(where) else None
        hint = f" (its run keeps them in {elsewhere})" if elsewhere else ""
        raise ValueError("; ".join(problems) or f"{where}: holds no complete checkpoint{hint}")
    for problem in problems:
        LOG.warning("%s", problem)
    return found


def find(
    where: str | Path, *, best: bool = False, verify: bool = True
) -> tuple[Saved | None, list[str]]:
    """As `newest`: (the checkpoint or None, what is wrong with those that were passed over).

    verify: read all of it, and compare the checksums.
    Raises OSError if the place does not answer: what cannot be read now is not damaged; and
    OtherFormatError for what another version has written, which is not damaged either.
    """
    folder = Folder(where)
    if folder.has(MARKER):
        candidates = [folder]
    else:
        inside = folder.within(FOLDER)
        above = inside if inside.names() else folder
        candidates = [above.within(folder_name(step)) for step in reversed(steps_in(above))]
    problems: list[str] = []
    for candidate in candidates:
        try:
            saved = _best_of(read(candidate), candidates) if best else read(candidate)
            if verify:
                saved.check()
        except OtherFormatError:
            raise
        except ValueError as error:
            problems.append(str(error) if best else f"damaged, and passed over: {error}")
        else:
            return saved, problems
    return None, problems


def kept_in(run_folder: Path) -> str | None:
    """Where the run in that folder keeps its checkpoints, by its config.yaml; None where it has
    none, or does not say."""
    return kept_by(_config_in(run_folder), run_folder)


def kept_by(config: Any, run_folder: Path) -> str | None:
    """As `kept_in`, by the values of a config."""
    try:
        folder = config["checkpoint"]["folder"]
    except (KeyError, TypeError):
        return None
    return str(run_folder / FOLDER) if folder is None else str(folder)


def begun_with(run_folder: Path) -> tuple[str | None, str | None]:
    """(resume, init) with which the run in that folder was begun, by its config.yaml.

    resume is never auto, which says nothing of that.
    """
    config = _config_in(run_folder)
    values = [config.get(key) for key in ("resume", "init")] if isinstance(config, dict) else []
    resume, init = (value if isinstance(value, str) else None for value in values or (None, None))
    return (None if resume == "auto" else resume), init


def identity_in(run_folder: Path) -> str | None:
    """Of the run in that folder; None where it has none yet."""
    try:
        text = (run_folder / IDENTITY).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if _IDENTITY.fullmatch(text) else None


def owner_of(folder: Folder) -> Owner | None:
    """Of the checkpoint in `folder`; None where there is no complete one, or it does not say."""
    try:
        return _owner(_json(folder, MARKER))
    except ValueError:
        return None


def _best_of(saved: Saved, candidates: Sequence[Folder]) -> Saved:
    step = saved.state.get("best_step")
    if not isinstance(step, int):
        raise ValueError(f"{saved.where}: no validation has found a best step")
    for candidate in candidates:
        if candidate.url.endswith(folder_name(step)):
            return read(candidate)
    raise ValueError(f"{saved.where}: the best step, {step}, is not there any more")


def steps_in(folder: Folder) -> list[int]:
    """Of the complete checkpoints in a folder of them, in order."""
    return sorted(step for step in all_steps_in(folder) if _complete(folder, step))


def all_steps_in(folder: Folder) -> list[int]:
    """Of the checkpoints in a folder of them, complete or not, in order."""
    matches = (_STEP.fullmatch(name) for name in folder.names())
    return sorted(int(match[1]) for match in matches if match)


def read(folder: Folder) -> Saved:
    """The checkpoint in `folder`, by its marker; the files are not read yet.

    Raises ValueError, naming the file, for what is none of ours.
    """
    marker = _json(folder, MARKER)
    files = marker.get("files")
    if (version := marker.get("format")) != FORMAT:
        said = f"{folder}/{MARKER}: format is {version!r}, allowed is {FORMAT}"
        raise OtherFormatError(said) if isinstance(version, int) else ValueError(said)
    if not isinstance(files, dict) or not all(_is_entry(*item) for item in files.items()):
        raise ValueError(f"{folder}/{MARKER}: files is no list of names, sizes and checksums")
    for needed in (STATE, index_of(WEIGHTS), index_of(MOMENTS)):
        if needed not in files:
            raise ValueError(f"{folder}/{MARKER}: does not list {needed}")
    every = {name: (size, checksum) for name, (size, checksum) in files.items()}
    state = _object(_content(folder, STATE, every[STATE]), f"{folder}/{STATE}")
    step = state.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"{folder}/{STATE}: step is {step!r}, allowed is a whole number from 0")
    return Saved(folder, step, every, state, _owner(marker))


def _config_in(run_folder: Path) -> Any:
    try:
        return yaml.safe_load((run_folder / CONFIG).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None


def _owner(marker: Mapping[str, Any]) -> Owner | None:
    """By a marker that may come from anyone."""
    run = marker.get("run")
    if not isinstance(run, dict):
        return None
    identity, folder = run.get("identity"), run.get("folder")
    if not isinstance(identity, str) or not _IDENTITY.fullmatch(identity):
        return None
    return Owner(identity, folder) if isinstance(folder, str) and folder.isprintable() else None


def _complete(folder: Folder, step: int) -> bool:
    return folder.within(folder_name(step)).has(MARKER)


def _is_entry(name: object, entry: object) -> bool:
    return (
        isinstance(name, str)
        and _ENTRY.fullmatch(name) is not None
        and isinstance(entry, list)
        and len(entry) == 2
        and all(isinstance(value, int) and value >= 0 for value in entry)
    )


def _content(folder: Folder, name: str, entry: tuple[int, int]) -> bytes:
    """Of a file, compared with its size, before it is read, and checksum."""
    size, checksum = entry
    try:
        found = folder.size(name)
        content = folder.read(name, size) if found == size else b""
    except FileNotFoundError as error:
        raise ValueError(f"{folder}/{name}: is not there") from error
    if found != size or len(content) != size:
        raise ValueError(f"{folder}/{name}: has {found} bytes, not {size}")
    if google_crc32c.value(content) != checksum:
        raise ValueError(f"{folder}/{name}: its checksum is not what was written")
    return content


def _json(folder: Folder, name: str) -> dict[str, Any]:
    """An object that may come from anyone."""
    try:
        content = folder.read(name, LARGEST_JSON + 1)
    except FileNotFoundError as error:
        raise ValueError(f"{folder}/{name}: is not there") from error
    return _object(content, f"{folder}/{name}")


def _object(content: bytes, where: str) -> dict[str, Any]:
    if len(content) > LARGEST_JSON:
        raise ValueError(f"{where}: larger than {LARGEST_JSON} bytes")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not a JSON object")
    return value


def _index(saved: Saved, name: str) -> dict[str, str]:
    """The file that each tensor is in."""
    where = f"{saved.where}/{name}"
    files = _object(saved.content(name), where).get("weight_map")
    if not isinstance(files, dict):
        raise ValueError(f"{where}: has no weight_map")
    for file in files.values():
        if not isinstance(file, str) or not _ENTRY.fullmatch(file) or file not in saved.files:
            raise ValueError(f"{where}: {file!r} is not the name of a file beside it")
        if not file.endswith(".safetensors"):
            raise ValueError(f"{where}: {file!r} is not a safetensors file")
    return files
