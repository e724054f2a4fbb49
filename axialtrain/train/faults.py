"""Steps that should not count: a loss that is not finite, or jumps far above those before it."""

from __future__ import annotations

import math
from statistics import median

from axialtrain.train.config import FaultsConfig

NONFINITE, SPIKE = "nonfinite", "spike"


def fault_of(loss: float, before: list[float], config: FaultsConfig) -> str | None:
    """What is wrong with a step of this loss, from the loss alone: the same on every mesh, since
    it looks before the weights are touched.

    before: the losses of steps that were taken. A spike is judged when there are `spike_window`.
    """
    if not math.isfinite(loss):
        return NONFINITE
    if config.spike == "off" or len(before) < config.spike_window:
        return None
    usual = median(before[-config.spike_window :])
    return SPIKE if loss > config.spike_factor * usual > 0 else None


def policy_of(fault: str, config: FaultsConfig) -> str:
    """stop, skip or rollback."""
    return config.nonfinite if fault == NONFINITE else config.spike


def told(fault: str, step: int, loss: float, norm: float, samples: list[str]) -> str:
    """The sentence about a fault in optimizer step `step`, counted from 1."""
    what = (
        f"the loss is {loss:.6g}"
        if fault == SPIKE or not math.isfinite(loss)
        else f"the gradient's norm is {norm:.6g}"
    )
    kind = "a spike" if fault == SPIKE else "not finite"
    return f"step {step}: {what}, {kind}; its samples: {', '.join(samples)}"
