"""Pixels as they are stored to what the model is given, with colours changed and noise added."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.augment import AugmentConfig, Drawn
from axialtrain.data.kinds import Raster
from axialtrain.data.noise import gaussian
from axialtrain.data.normalise import Normalise
from axialtrain.data.stains import Stains
from axialtrain.grid import Rect

_STRIP = 1 << 16  # values that are worked on at once: so no second picture is held, and caches hold
# RGB to brightness and two coordinates of colour around it (YIQ, of NTSC television).
_YIQ = np.array(
    [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]],
)


class Colours:
    """What `Normalise` gives, after the changes that were drawn for a sample.

    All is computed pixel by pixel, by sums, products and tables, with constants that do not depend
    on other pixels: ranks that hold parts of a picture compute what one would that held it all.

    ValueError if `config` changes stains or colours of pixels that are not of three bands.
    """

    def __init__(self, config: AugmentConfig, normalise: Normalise) -> None:
        kind = normalise.kind
        for key in ("saturation", "hue", "hed", "hed_bias"):
            stains = key.startswith("hed")
            if getattr(config, key) and (kind.bands != 3 or (stains and kind.dtype != "uint8")):
                raise ValueError(
                    f"data.augment.{key} is {getattr(config, key)}, allowed is 0 for pixels of "
                    f"{kind}: it needs 3 bands{' of uint8' * stains}, red, green and blue"
                )
        self._normalise = normalise

    def __call__(
        self, pixels: Raster, present: NDArray[np.bool_], drawn: Drawn, part: Rect
    ) -> NDArray[np.float32]:
        """[h, w, bands of the model] of `part` of a picture, in px from its corner.

        pixels: [h, w, bands as stored]. The result is 0 where not `present` [h, w].
        """
        normalise = self._normalise
        if not drawn.recolours:
            return normalise(pixels, present)
        height, width, bands = part.height, part.width, normalise.kind.bands
        stains = Stains(drawn.stains, drawn.stains_bias) if drawn.restains else None
        scale, offset, mix = self._linear(drawn)
        out = np.empty((height, width, bands), np.float32)
        rows = max(_STRIP // (8 * width * bands), 1) * 8
        for top in range(0, height, rows):
            strip = pixels[top : top + rows]
            # A band is contiguous in it, which is several times as fast for what mixes them.
            values = np.empty((bands, *strip.shape[:2]), np.float32).transpose(1, 2, 0)
            if stains is None:
                normalise.full(strip, values)
            else:
                stains(normalise.select(strip), values)
            values *= scale
            values += offset
            if mix is not None:
                red, green, blue = (values[..., band] for band in range(3))
                mixed = [r * red + g * green + b * blue for r, g, b in mix]
                for band in range(3):
                    values[..., band] = mixed[band]
            if drawn.noise:
                here = Rect(part.top + top, part.top + top + len(strip), part.left, part.right)
                values += np.float32(drawn.noise) * gaussian(drawn.key, here, bands)
            if normalise.bounded:
                np.clip(values, 0, 1, out=values)
            out[top : top + rows] = normalise.standard(values)
        out[~present] = 0
        return out

    def _linear(
        self, drawn: Drawn
    ) -> tuple[np.float32, NDArray[np.float32], NDArray[np.float32] | None]:
        """(scale, offset [bands], mixing of bands [3, 3] or None) of brightness, contrast about the
        mean, saturation and hue, in this order."""
        scale = np.float32(drawn.brightness * drawn.contrast)
        offset = (self._normalise.mean * (1 - drawn.contrast)).astype(np.float32)
        if drawn.saturation == 1 and drawn.hue == 0:
            return scale, offset, None
        angle = 2 * math.pi * drawn.hue
        along, across = drawn.saturation * math.cos(angle), drawn.saturation * math.sin(angle)
        turned = np.array([[1, 0, 0], [0, along, -across], [0, across, along]])
        return scale, offset, (np.linalg.inv(_YIQ) @ turned @ _YIQ).astype(np.float32)
