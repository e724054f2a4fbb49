"""What a run leaves for people: metrics.jsonl, loss.png and W&B. Rank 0 only."""

from __future__ import annotations

import json
import logging
import os
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
        self._lines = (folder / "metrics.jsonl").open("w")
        self._losses: list[tuple[int, float]] = []
        self._wandb = _start_wandb(config, folder, name, run_yaml)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._lines.write(json.dumps({"step": step, **metrics}) + "\n")
        self._lines.flush()
        self._losses.append((step, metrics["loss"]))
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

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
        if self._wandb is not None:
            self._wandb.finish()

    def _save(self, figure: Figure, name: str) -> Path:
        path = self.folder / name
        temporary = path.with_suffix(".tmp.png")
        figure.savefig(temporary, dpi=120)
        os.replace(temporary, path)
        if self._wandb is not None:
            import wandb

            self._wandb.log({name.removesuffix(".png"): wandb.Image(str(path))})
        return path


def _start_wandb(config: LoggerConfig, folder: Path, name: str, run_yaml: str) -> Any:
    """A W&B run, or None. Never asks a question and never fails the run."""
    import wandb

    mode = os.environ.get("WANDB_MODE", config.mode)
    if mode == "disabled":
        return None
    if mode == "auto":
        mode = "online" if wandb.login(prompt=False) else "offline"
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
        except (wandb.Error, OSError) as error:
            LOG.warning("W&B could not start in mode %s: %s", attempt, error)
    return None
