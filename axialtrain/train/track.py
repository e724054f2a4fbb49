"""What a run leaves for people: metrics.jsonl, loss.png and W&B. Rank 0 only."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml

from axialtrain.data.checked import Record
from axialtrain.data.damage import Damage
from axialtrain.tasks.panels import Panel
from axialtrain.train.checkpoint import CONFIG, IDENTITY, identity_in, kept_by
from axialtrain.train.progress import finite
from axialtrain.train.storage import Folder

# matplotlib and wandb are imported where they are used: they take a second, rank 0 alone needs
# them, and a wrong key must be refused before.
if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG = logging.getLogger(__name__)
METRICS, FAULTS, DAMAGES = "metrics.jsonl", "faults.jsonl", "bad_tiles.jsonl"
LOCK = ".lock"
LOSS = "loss.png"
PATIENCE = 5.0  # s that a killed run may take to be gone
WANDB_ID = ".wandb-id"
MODES = ("auto", "offline", "online", "disabled")


@dataclass
class LoggerConfig:
    """W&B. mode: "auto" is online where the user is logged in and offline elsewhere."""

    mode: str = "auto"
    project: str = "axialtrain"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"logger.mode={self.mode!r}: allowed are {list(MODES)}")


class Tracker:
    """Writes one JSON object a step to metrics.jsonl and to W&B, and the pictures at the end.

    folder: of the run, which this one holds for itself until it is closed or its process ends; and
    so it does with the folder of its checkpoints, by `run_yaml`, where that is on this machine.
    resumed: the step that the run goes on from; lines of later ones are dropped, as those steps are
    taken again. damages: of what the steps before met, the lines of bad_tiles.jsonl.
    Raises ValueError where another process holds one of them.
    """

    def __init__(
        self, config: LoggerConfig, folder: Path, name: str, run_yaml: str, resumed: int = 0
    ) -> None:
        self.folder = folder
        self._locks = [_hold(folder, "hydra.run.dir", folder)]
        kept = kept_by(yaml.safe_load(run_yaml), folder)
        checkpoints = None if kept is None else Folder(kept)
        if checkpoints is not None and checkpoints.local is not None:
            checkpoints.make()
            if not checkpoints.local.samefile(folder):
                self._locks.append(_hold(checkpoints.local, "checkpoint.folder", folder))
        # Before anything else is here: a run that is killed now is begun again with the same.
        Folder(folder).write(CONFIG, run_yaml.encode())
        self._warned = False
        self._losses: list[tuple[int, float]] = []
        for line in _cut(folder / METRICS, resumed):
            if line.get("loss") is not None:
                self._losses.append((line["step"], line["loss"]))
        _cut(folder / FAULTS, resumed)
        self.damages = [
            Damage.from_record(Record(f"{folder / DAMAGES}: line {number}", line))
            for number, line in enumerate(_cut(folder / DAMAGES, resumed), 1)
        ]
        self._lines = (folder / METRICS).open("a")
        self._wandb = _start_wandb(config, folder, name, run_yaml)

    @property
    def closed(self) -> bool:
        """Whether a run here came to its end: loss.png is the last thing that it leaves."""
        return (self.folder / LOSS).exists()

    def reopen(self) -> None:
        """It goes on after all: what it left at its end is drawn anew."""
        (self.folder / LOSS).unlink(missing_ok=True)

    def identify(self, identity: str) -> None:
        """From now on the folder says which run it is of."""
        if identity != identity_in(self.folder):
            with self._spared():
                Folder(self.folder).write(IDENTITY, identity.encode())

    def log(self, step: int, metrics: dict[str, float]) -> None:
        with self._spared():
            self._lines.write(json.dumps({"step": step, **finite(metrics)}) + "\n")
            self._lines.flush()
        if math.isfinite(metrics["loss"]):
            self._losses.append((step, metrics["loss"]))
        self._to_wandb(lambda run: run.log(metrics, step=step))

    def fault(self, what: dict[str, Any]) -> None:
        """A line in faults.jsonl, about a step that was left out."""
        plain = {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in what.items()
        }
        self._append(FAULTS, [plain])

    def damage(self, lines: list[dict[str, Any]]) -> None:
        """Lines in bad_tiles.jsonl, about what was left out of the data of a step."""
        self._append(DAMAGES, lines)

    def _append(self, name: str, what: list[dict[str, Any]]) -> None:
        """Lines that last, at the end of the file `name` of the run."""
        with self._spared(), (self.folder / name).open("a") as lines:
            lines.write("".join(json.dumps(line) + "\n" for line in what))
            lines.flush()
            os.fsync(lines.fileno())

    def sync(self) -> None:
        """The lines so far last, whatever happens to the machine."""
        with self._spared():
            os.fsync(self._lines.fileno())

    @contextmanager
    def _spared(self) -> Iterator[None]:
        """Lines that cannot be written do not end a run whose checkpoints may lie elsewhere."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                LOG.warning("%s: lines are lost, the run goes on: %s", self.folder, error)
            self._warned = True

    def prediction(self, panels: list[Panel], title: str) -> Path:
        """The panels side by side, prediction.png."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5 * len(panels), 5.4), layout="constrained")
        for axes, panel in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            axes.imshow(panel.pixels, interpolation="nearest")
            axes.set_title(panel.title)
            axes.set_axis_off()
        figure.suptitle(title)
        return self._save(figure, "prediction.png")

    def close(self) -> None:
        """Draw loss.png and end the W&B run."""
        from matplotlib.figure import Figure

        with self._spared():
            self._lines.close()
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        if self._losses:
            axes.plot(*zip(*self._losses, strict=True), linewidth=1)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("global mean loss")
        axes.grid(alpha=0.3)
        self._save(figure, LOSS)
        self._to_wandb(lambda run: run.finish())
        for lock in self._locks:
            lock.close()

    def _save(self, figure: Figure, name: str) -> Path:
        path = self.folder / name
        temporary = path.with_suffix(".tmp.png")
        figure.savefig(temporary, dpi=120)
        os.replace(temporary, path)
        if self._wandb is not None:
            import wandb

            image = wandb.Image(str(path))
            self._to_wandb(lambda run: run.log({name.removesuffix(".png"): image}))
        return path

    def _to_wandb(self, call: Callable[[Any], object]) -> None:
        """Tracking never fails a run: at the first error it is dropped, with a warning."""
        if self._wandb is None:
            return
        try:
            call(self._wandb)
        except Exception as error:  # whatever its service raises
            LOG.warning("W&B stopped, the run goes on without it: %s", error)
            self._wandb = None


def _hold(folder: Path, key: str, run: Path) -> IO[str]:
    """Keep other runs out of the folder; the lock goes with the process, however it ends.

    key: by which a user names the folder. run: the folder of the run, for those that are kept out.
    """
    lock = (folder / LOCK).open("a+")
    end = time.monotonic() + PATIENCE
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip()
        lock.close()
        whose = "" if holder in ("", str(folder)) else f": the one in {holder}"
        raise ValueError(f"{key}={folder}: another run writes there{whose}") from error
    except OSError as error:  # some network file systems
        LOG.warning("%s cannot be locked, two runs there would not be noticed: %s", folder, error)
    else:
        lock.truncate(0)
        lock.write(str(run))
        lock.flush()
    return lock


def _cut(path: Path, last: int) -> list[dict[str, Any]]:
    """Drop the lines of steps after `last`, and one that is cut short. Returns those that stay."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int) and value["step"] <= last:
            lines.append(value)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    Folder(path.parent).write(path.name, text.encode())
    return lines


def _start_wandb(config: LoggerConfig, folder: Path, name: str, run_yaml: str) -> Any:
    """A W&B run, or None. Never asks a question and never fails the run.

    logger.mode=disabled wins over WANDB_MODE, which wins over any other mode.
    """
    mode = config.mode
    if mode != "disabled":
        mode = os.environ.get("WANDB_MODE", mode)
    if mode == "disabled":
        return None
    import wandb

    try:
        if mode != "offline":  # asked without a prompt: nobody sits at a cluster's terminal
            mode = "online" if wandb.login(prompt=False) else "offline"
    except Exception as error:  # a malformed key, a server that is not there
        LOG.warning("W&B: not logged in, so offline: %s", error)
        mode = "offline"
    settings = wandb.Settings(silent=True, console="off", init_timeout=30, x_disable_stats=True)
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            return wandb.init(
                project=config.project,
                name=name,
                id=_wandb_id(folder),
                resume="allow",
                dir=folder,
                mode=attempt,  # type: ignore[arg-type]
                config=yaml.safe_load(run_yaml),
                settings=settings,
            )
        except Exception as error:  # as above
            LOG.warning("W&B could not start in mode %s: %s", attempt, error)
    return None


def _wandb_id(folder: Path) -> str:
    """The same each time that the run in `folder` goes on, so that W&B shows it as one."""
    path = folder / WANDB_ID
    if path.exists():
        return path.read_text().strip()
    identity = uuid.uuid4().hex[:12]
    Folder(folder).write(WANDB_ID, identity.encode())
    return identity
