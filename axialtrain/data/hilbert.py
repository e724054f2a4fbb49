"""The order of an image's blocks in its shard: neighbours in the image are near in the file."""

from __future__ import annotations

import numpy as np


def hilbert_order(rows: int, cols: int) -> list[tuple[int, int]]:
    """All (row, col) of a grid, in the order in which a Hilbert curve visits them.

    The curve runs over the enclosing square of side 2^k; what lies outside the grid is skipped.
    """
    row, col = (a.ravel() for a in np.indices((rows, cols), dtype=np.int64))
    y, x = row.copy(), col.copy()
    distance = np.zeros_like(row)
    side = 1 << max(rows - 1, cols - 1, 0).bit_length()
    half = side >> 1
    while half:
        below, right = (y & half) > 0, (x & half) > 0
        distance += half * half * ((3 * right) ^ below)
        # The quadrants of the upper half hold the curve transposed, the right one also reversed.
        reverse = ~below & right
        x[reverse], y[reverse] = side - 1 - x[reverse], side - 1 - y[reverse]
        x[~below], y[~below] = y[~below], x[~below].copy()
        half >>= 1
    order = np.argsort(distance, kind="stable")
    return list(zip(row[order].tolist(), col[order].tolist(), strict=True))
