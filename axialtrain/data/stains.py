"""Stains of histology slides, taken apart, changed and put together again.

Light that passes through a stained section is absorbed: the optical density -ln(I / I0) of a pixel
is a sum over stains, of each one's amount times its colour (Beer and Lambert). Ruifrok and Johnston
(Quantification of histochemical staining by color deconvolution, Analytical and Quantitative
Cytology and Histology 23, 2001) give the colours of haematoxylin, eosin and DAB. Changing the
amounts at random, each stain's by s * amount + b, makes a network indifferent to how a laboratory
stains (Tellez et al., Whole-slide mitosis detection in H&E breast histology using PHH3 as a
reference to train distilled stain-invariant convolutional networks, IEEE Transactions on Medical
Imaging 37, 2018).
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

# Optical density of red, green and blue for one unit of haematoxylin, of eosin, of DAB.
COLOURS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_DARKEST = math.log(256)  # optical density of 0, of (0 + 1) / 256: the logarithm of 0 is nowhere
_STEPS = 65535  # of optical density: less than 0.02 of a grey level each


class Stains:
    """Pixels of 8-bit RGB with other amounts of their stains.

    factors, additions: of haematoxylin, eosin and DAB; additions in optical density. Amounts may
    become negative, as what a pixel has beside the three stains is told by that; nothing of it is
    lost.

    By tables, in place of logarithms and powers: fast, and the same for a pixel wherever in an
    array it lies.
    """

    def __init__(self, factors: tuple[float, ...], additions: tuple[float, ...]) -> None:
        change = np.linalg.inv(COLOURS) @ np.diag(factors) @ COLOURS  # [from, to]
        self._change = change.astype(np.float32)
        # Half a step, as steps are cut off.
        added = np.array(additions) @ COLOURS * (_STEPS / _DARKEST) + 0.5
        self._added = added.astype(np.float32)

    def __call__(self, pixels: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        """`pixels` [h, w, 3] into `out` [h, w, 3], in 0..1."""
        density, light = _density(), _light()
        red, green, blue = (density[pixels[..., band]] for band in range(3))
        for band in range(3):
            r, g, b = self._change[:, band]
            steps = red * r + green * g + blue * b + self._added[band]
            out[..., band] = light.take(np.clip(steps, 0, _STEPS).astype(np.intp), mode="wrap")


@cache
def _density() -> NDArray[np.float32]:
    """Optical density, in steps, by the value of a pixel."""
    density = -np.log((np.arange(256) + 1) / 256)
    return (density * (_STEPS / _DARKEST)).astype(np.float32)


@cache
def _light() -> NDArray[np.float32]:
    """What comes through, 0..1, by the step of optical density."""
    density = np.arange(_STEPS + 1) * (_DARKEST / _STEPS)
    return np.clip((256 * np.exp(-density) - 1) / 255, 0, 1).astype(np.float32)
