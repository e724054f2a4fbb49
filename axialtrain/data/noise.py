"""Gaussian noise that is the same at a pixel whichever rank holds it."""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.augment import NOISE
from axialtrain.grid import Rect

_LEVELS = 1 << 16  # different values: a word of 64 bits makes four
_AT_ONCE = 16  # values that Philox makes for one count
_ROWS = 8  # of pixels that share a stream: moving to another costs as much as some 1000 values
_STREAM = 1 << 192  # counts from one stream to the next, whose number is the counter's high word


def gaussian(key: tuple[int, int], part: Rect, bands: int) -> NDArray[np.float32]:
    """Noise of mean 0 and deviation 1 for `part` of the picture of `key` = (seed, sample).

    part: px from the picture's corner. Returns [h, w, bands], each band contiguous. Eight rows of
    pixels are a stream of counts, column by column, and a rank skips those left of its part. The
    values come from a table, not from logarithms, whose last bit may depend on where in an array
    they are computed.
    """
    top, bottom = part.top // _ROWS, -(-part.bottom // _ROWS)
    start, stop = part.left * _ROWS * bands, part.right * _ROWS * bands
    first, last = start // _AT_ONCE, -(-stop // _AT_ONCE)
    words = np.empty((bottom - top, 4 * (last - first)), np.uint64)
    bits = np.random.Philox(key=key, counter=[first, 0, NOISE, top])
    for stream in words:
        stream[:] = bits.random_raw(len(stream))
        bits.advance(_STREAM - (last - first))
    shorts = words.astype("<u8", copy=False).view("<u2")  # the same on every machine
    columns = shorts[:, start - first * _AT_ONCE : stop - first * _AT_ONCE]
    columns = columns.reshape(bottom - top, part.width, _ROWS, bands)
    index = columns.transpose(3, 0, 2, 1).astype(np.intp).reshape(bands, -1, part.width)
    index = index[:, part.top - top * _ROWS : part.bottom - top * _ROWS]
    return _quantiles().take(index, mode="wrap").transpose(1, 2, 0)  # "wrap" checks nothing


@cache
def _quantiles() -> NDArray[np.float32]:
    """The normal distribution at the centres of _LEVELS equal shares, up to 4.3 deviations."""
    inverse = NormalDist().inv_cdf
    half = np.array([inverse((i + 0.5) / _LEVELS) for i in range(_LEVELS // 2)])
    values = np.concatenate([half, -half[::-1]])
    return (values / np.sqrt(np.mean(values**2))).astype(np.float32)
