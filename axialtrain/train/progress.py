"""What a run carries from step to step beside its model, and so saves with it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Progress:
    """Where a run stands.

    step: optimizer steps taken, those that were left out too: the next one to take.
    left_out: batches that were left out for a fault. losses: of the last steps, for spikes.
    best, best_step: of the metric best_of, which `checkpoint.best` names. worse: validations since.
    early: whether the run ended because of `train.patience`.
    metrics: of the last step.
    """

    step: int = 0
    left_out: int = 0
    losses: list[float] = field(default_factory=list)
    best: float | None = None
    best_step: int | None = None
    best_of: str | None = None
    worse: int = 0
    early: bool = False
    metrics: dict[str, float] = field(default_factory=dict)

    def judge(self, name: str, value: float) -> bool:
        """Whether the metric `name` is the best so far: a loss is to be low, all else high."""
        if name != self.best_of:
            self.forget_best()
            self.best_of = name
        better = self.best is None or (
            value < self.best if name.endswith("loss") else value > self.best
        )
        better = better and math.isfinite(value)
        if better:
            self.best, self.best_step, self.worse = value, self.step, 0
        else:
            self.worse += 1
        return better

    def forget_best(self) -> None:
        self.best, self.best_step, self.best_of, self.worse = None, None, None, 0

    def to_state(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"metrics": finite(self.metrics)}

    @staticmethod
    def of_state(state: dict[str, Any], where: str) -> Progress:
        """Raises ValueError, naming `where`, for what `to_state` does not make."""
        try:
            progress = Progress(**{key: state[key] for key in Progress.__dataclass_fields__})
            progress.losses = [float(loss) for loss in progress.losses]
            progress.metrics = {
                str(name): math.nan if value is None else float(value)
                for name, value in progress.metrics.items()
            }
            for count in (progress.step, progress.left_out, progress.worse):
                if not isinstance(count, int) or count < 0:
                    raise ValueError(f"{count!r} stands where a whole number belongs")
            if progress.best_step is not None and not isinstance(progress.best_step, int):
                raise ValueError(f"{progress.best_step!r} stands where a step belongs")
            progress.best = None if progress.best is None else float(progress.best)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where}: does not say where its run stands: {error!r}") from error
        return progress


def finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """For JSON, which has no NaN: null stands for it."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
