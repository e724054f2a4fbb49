"""Where on Earth an image lies, as text and numbers that are bounded before they are kept.

crs: the coordinate reference system as text, EPSG:... or WKT. transform: (a, b, c, d, e, f), with
x = a * col + b * row + c and y = d * col + e * row + f of a pixel's upper left corner. Both or
none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from axialtrain.data.checked import Record

MAX_CRS = 1 << 14  # characters
_CRS = re.compile(rf".{{1,{MAX_CRS}}}")
_MAX_NUMBER = 1e300
_GEOGRAPHIC, _PROJECTED = "GeographicTypeGeoKey", "ProjectedCSTypeGeoKey"
_USER_DEFINED = 32767  # in place of a code

Georeference = tuple[str | None, tuple[float, ...] | None]


def checked(crs: str | None, transform: Sequence[float] | None) -> Georeference:
    """(crs, transform) as they can be stored; (None, None) where one of them is missing or odd."""
    if not crs or len(crs) > MAX_CRS or not crs.isprintable():
        return None, None
    if transform is None or len(transform) != 6 or not all(map(math.isfinite, transform)):
        return None, None
    return crs, tuple(float(number) for number in transform)


def of_tiff(tags: Mapping[str, Any] | None, down: float, across: float) -> Georeference:
    """Of a GeoTIFF whose CRS has an EPSG code, for a level that is down x across times smaller."""
    if not tags:
        return None, None
    codes = [int(tags[key]) for key in (_PROJECTED, _GEOGRAPHIC) if key in tags]
    if not codes or not 1024 <= codes[0] < _USER_DEFINED:
        return None, None
    if "ModelTransformation" in tags:
        a, b, _, c, d, e, _, f = [float(x) for row in tags["ModelTransformation"] for x in row][:8]
    elif "ModelPixelScale" in tags and "ModelTiepoint" in tags:
        a, minus_e = (float(number) for number in tags["ModelPixelScale"][:2])
        col, row, _, x, y, _ = (float(number) for number in tags["ModelTiepoint"][:6])
        b, d, e = 0.0, 0.0, -minus_e
        c, f = x - a * col, y - e * row
    else:
        return None, None
    if int(tags.get("GTRasterTypeGeoKey", 1)) == 2:  # it is the pixels' centres
        c, f = c - (a + b) / 2, f - (d + e) / 2
    return checked(f"EPSG:{codes[0]}", (a * across, b * down, c, d * across, e * down, f))


def georeference_of(record: Record) -> Georeference:
    """(crs, transform) of a head, where it has them; ValueError if they are none that are kept."""
    if record.values.get("crs") is None:
        return None, None
    crs = record.text("crs", _CRS, f"at most {MAX_CRS} printable characters")
    numbers = record.items("transform", 6)
    plain = [float(n) for n in numbers if isinstance(n, (int, float)) and abs(n) < _MAX_NUMBER]
    found = checked(crs, plain)
    if found[1] is None or len(plain) != len(numbers):
        raise record.wrong("transform", "6 numbers")
    return found
