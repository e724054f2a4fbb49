"""What training leaves out at random: drawn from counters, never from a rank's generator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Words of a Philox counter keep the streams apart; masked modelling has 0 there.
_PATHS, _AXES = 1, 2


@dataclass(frozen=True)
class Chance:
    """The draws of one micro-batch of an optimizer step, the same on every mesh.

    seed: of the run. step: the optimizer step. samples: the index of each image of the batch in
    the endless order.
    """

    seed: int
    step: int
    samples: tuple[int, ...]

    def skipped(self, layer: int, passes: int, share: float) -> int | None:
        """Which pass of a layer of several is left out, for all images alike; None for no one."""
        if share == 0 or passes == 1:
            return None
        draw = _generator(self.seed, self.step, _AXES, layer)
        return int(draw.integers(passes)) if draw.random() < share else None

    def kept(self, layer: int, branch: int, drop: float) -> list[float]:
        """For each image the factor of a residual branch: 0 where dropped, else 1 / (1 - drop)."""
        draws = [_generator(self.seed, one, _PATHS, layer, branch) for one in self.samples]
        return [0.0 if draw.random() < drop else 1 / (1 - drop) for draw in draws]


def _generator(
    seed: int, number: int, kind: int, layer: int, branch: int = 0
) -> np.random.Generator:
    # The first word is what drawing increments.
    bits = np.random.Philox(key=[seed, number], counter=[0, branch, kind, layer])
    return np.random.Generator(bits)
