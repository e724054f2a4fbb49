"""What training changes at random in its samples: drawn from counters, never from process state.

All that is drawn for a sample follows from (seed, number of the sample in the endless order), so it
is the same on every mesh, for any number of workers, and in a run that goes on. `Loader.once` draws
nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from axialtrain.data.turns import AS_IS, HORIZONTAL, VERTICAL, Turn, View
from axialtrain.grid import Rect

# The third word of a Philox counter keeps the streams of a key (seed, sample) apart: masked
# modelling has 0 there, what layers leave out 1 and 2.
DRAWS, NOISE = 3, 4
MAX_SHIFT = 1 << 30  # px


@dataclass
class AugmentConfig:
    """The keys `data.augment`: how the samples of training differ each time they are seen.

    vertical_flip, horizontal_flip: top and bottom, left and right swapped in half of the samples.
    quarter_turns: by 0, 90, 180 or 270 degrees. A window of fixed size keeps it: where it is not
    square, the turned one is cut around the same centre. Whole images change height for width.
    shift: px that windows of fixed size move by at most, down and right or up and left, each
    number alike often; they stay inside their image.
    brightness, contrast, saturation: each is x, and the factor is drawn from 1 - x to 1 + x.
    Contrast is about `data.mean`. hue: share of the colour circle, turned by -x to x.
    hed: the amounts of haematoxylin, eosin and DAB change by a factor from 1 - x to 1 + x, each by
    its own. hed_bias: what is added to each is drawn from -x to x, in units of optical density.
    noise: standard deviation of what is added to each band of each pixel.
    Brightness and noise are in units of the full range 0..1, of float32 images in their own.
    """

    vertical_flip: bool = False
    horizontal_flip: bool = False
    quarter_turns: bool = False
    shift: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    hed: float = 0.0
    hed_bias: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.shift <= MAX_SHIFT:
            raise ValueError(
                f"data.augment.shift is {self.shift}, allowed are px from 0 to {MAX_SHIFT}"
            )
        most = {"hue": 0.5, "noise": float(np.finfo(np.float32).max)}
        for key in ("brightness", "contrast", "saturation", "hue", "hed", "hed_bias", "noise"):
            if not 0 <= getattr(self, key) <= most.get(key, 1.0):
                raise ValueError(
                    f"data.augment.{key} is {getattr(self, key)}, allowed are numbers from 0 to "
                    f"{most.get(key, 1.0):g}"
                )


@dataclass(frozen=True)
class Drawn:
    """What was drawn for one sample; as it stands, nothing is changed.

    key: (seed, sample), of its noise. down, right: px that its window moves by. stains,
    stains_bias: factors and additions of haematoxylin, eosin and DAB. For the rest see
    `AugmentConfig`.
    """

    key: tuple[int, int] = (0, 0)
    turn: Turn = AS_IS
    down: int = 0
    right: int = 0
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    stains: tuple[float, float, float] = (1.0, 1.0, 1.0)
    stains_bias: tuple[float, float, float] = (0.0, 0.0, 0.0)
    noise: float = 0.0

    @property
    def restains(self) -> bool:
        return self.stains != (1, 1, 1) or self.stains_bias != (0, 0, 0)

    @property
    def recolours(self) -> bool:
        """Whether the numbers of pixels change, and not only where they are."""
        factors = (self.brightness, self.contrast, self.saturation)
        return factors != (1, 1, 1) or self.hue != 0 or self.noise != 0 or self.restains

    def view(self, rect: Rect, image: tuple[int, int], *, fixed: bool) -> View:
        """What the window `rect` of an image of (height, width) px shows.

        fixed: whether its size stays as it is, however it is turned; otherwise it is a whole image.
        """
        if not fixed:
            return View(rect, self.turn)
        height, width = self.turn.size(rect.height, rect.width)
        top = rect.top + (rect.height - height) // 2 + self.down
        left = rect.left + (rect.width - width) // 2 + self.right
        top = min(max(top, 0), max(image[0] - height, 0))
        left = min(max(left, 0), max(image[1] - width, 0))
        return View(Rect(top, top + height, left, left + width), self.turn)


def draw(config: AugmentConfig, seed: int, sample: int) -> Drawn:
    """For `sample`, the number of one in the endless order of the run's `seed`.

    Each quantity has a word of its own, so that none depends on whether others are drawn. They are
    raw words, as numpy promises those to stay the same for a key.
    """
    bits = np.random.Philox(key=[seed, sample], counter=[0, 0, DRAWS, 0])
    words = [int(word) for word in bits.random_raw(16)]

    def around(word: int, most: float) -> float:
        """From -most to most, each number alike often."""
        return most * (math.ldexp(word >> 11, -52) - 1)

    turn = Turn(words[2] >> 62 if config.quarter_turns else 0)
    if config.vertical_flip and words[0] >> 63:
        turn = VERTICAL.then(turn)
    if config.horizontal_flip and words[1] >> 63:
        turn = HORIZONTAL.then(turn)
    down, right = (word % (2 * config.shift + 1) - config.shift for word in words[3:5])
    h, e, d = (1 + around(word, config.hed) for word in words[9:12])
    h_bias, e_bias, d_bias = (around(word, config.hed_bias) for word in words[12:15])
    return Drawn(
        key=(seed, sample),
        turn=turn,
        down=down,
        right=right,
        brightness=1 + around(words[5], config.brightness),
        contrast=1 + around(words[6], config.contrast),
        saturation=1 + around(words[7], config.saturation),
        hue=around(words[8], config.hue),
        stains=(h, e, d),
        stains_bias=(h_bias, e_bias, d_bias),
        noise=config.noise,
    )


def sizes_shown(
    config: AugmentConfig, height: int, width: int, *, fixed: bool
) -> list[tuple[int, int]]:
    """The (height, width) that what is shown of a window of height x width px may have."""
    if fixed or not config.quarter_turns or height == width:
        return [(height, width)]
    return [(height, width), (width, height)]
