"""What a run leaves for people: metrics.jsonl, loss.png and W&B. Rank 0 only."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from axialtrain.tasks.panels import Panel

# matplotlib and wandb are imported where they are used: they take a second, rank 0 alone needs
# them, and a wrong key must be refused before.
if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG = logging.getLogger(__name__)
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
    """Writes one JSON object a step to metrics.jsonl and to W&B, and the pictures at the end."""

    def __init__(self, config: LoggerConfig, folder: Path, name: str, run_yaml: str) -> None:
        self.folder = folder
        try:  # "x": of two runs that began in the same second, one goes on
            self._lines = (folder / "metrics.jsonl").open("x")
        except FileExistsError as error:
            raise ValueError(f"hydra.run.dir={folder}: another run writes there") from error
        self._losses: list[tuple[int, float]] = []
        self._wandb = _start_wandb(config, folder, name, run_yaml)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._lines.write(json.dumps({"step": step, **metrics}) + "\n")
        self._lines.flush()
        self._losses.append((step, metrics["loss"]))
        self._to_wandb(lambda run: run.log(metrics, step=step))

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

        self._lines.close()
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*self._losses, strict=True), linewidth=1)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("global mean loss")
        axes.grid(alpha=0.3)
        self._save(figure, "loss.png")
        self._to_wandb(lambda run: run.finish())

    def _save(self, figure: Figure, name: str) -> Path:
        path = self.folder / name
        temporary = path.with_suffix(".tmp.png")
        figure.savefig(temporary, dpi=120)
        os.replace(temporary, path)
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
                dir=folder,
                mode=attempt,  # type: ignore[arg-type]
                config=yaml.safe_load(run_yaml),
                settings=settings,
            )
        except Exception as error:  # as above
            LOG.warning("W&B could not start in mode %s: %s", attempt, error)
    return None
