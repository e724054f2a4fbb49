"""Flips and quarter turns of what a sample shows, as transforms of the index.

A rank that holds a part of the turned picture works out which rectangle of the stored image that
part is, reads this rectangle only, and turns the small array. So nothing is read for turning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from axialtrain.grid import Rect

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class Turn:
    """One of the eight ways to lay down a picture.

    mirrored: left and right swapped, first. quarters: turns by 90 degrees counter-clockwise
    after that, 0 to 3.
    """

    quarters: int = 0
    mirrored: bool = False

    def __post_init__(self) -> None:
        assert self.quarters in range(4), self

    def then(self, other: Turn) -> Turn:
        """This turn, and `other` after it."""
        # What is mirrored after it was turned was turned the other way.
        first = -self.quarters if other.mirrored else self.quarters
        return Turn((first + other.quarters) % 4, self.mirrored != other.mirrored)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a picture of height x width once it is turned."""
        return (width, height) if self.quarters % 2 else (height, width)

    def source(self, part: Rect, height: int, width: int) -> Rect:
        """What of a picture of height x width becomes `part` of the turned one."""
        top, bottom, left, right = part.top, part.bottom, part.left, part.right
        if self.quarters == 1:
            top, bottom, left, right = left, right, width - bottom, width - top
        elif self.quarters == 2:
            top, bottom, left, right = height - bottom, height - top, width - right, width - left
        elif self.quarters == 3:
            top, bottom, left, right = height - right, height - left, top, bottom
        if self.mirrored:
            left, right = width - right, width - left
        return Rect(top, bottom, left, right)

    def apply(self, array: NDArray[T]) -> NDArray[T]:
        """`array` [h, w, ...] turned; a view of it."""
        return np.rot90(array[:, ::-1] if self.mirrored else array, self.quarters)


AS_IS = Turn()
HORIZONTAL = Turn(mirrored=True)  # left and right swapped
VERTICAL = Turn(2, mirrored=True)  # top and bottom swapped


@dataclass(frozen=True)
class View:
    """What a sample shows: `rect` of its image, in px, which may reach outside, turned."""

    rect: Rect
    turn: Turn = AS_IS

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in px of what is shown."""
        return self.turn.size(self.rect.height, self.rect.width)

    def source(self, part: Rect) -> Rect:
        """Where `part` of what is shown, in px from its corner, lies in the image."""
        inside = self.turn.source(part, self.rect.height, self.rect.width)
        return inside.shifted(self.rect.top, self.rect.left)

    def shown(self, array: NDArray[Any]) -> NDArray[Any]:
        """What was read of `source(part)`, [h, w, ...], as `part` shows it."""
        return self.turn.apply(array)
