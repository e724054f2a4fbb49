"""Which tokens of an image count, and how its lines are compacted: found out once a forward.

All layers see the same mask, and its plans (`compact`) depend on nothing else, while each of them
is a wait for the device. So the mask travels through the layers with the plans made of it so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from axialtrain.attention.compact import LEAST, Plan, plan
from axialtrain.grid import Rect


class LineMasks:
    """The masks of X lines of tokens: of their keys, and of those that ask.

    keys: bool [B, X, L], True where a token is a key. A line without any gives zeros.
    queries: bool [B, X, Lq], True where a token asks; the others get zeros. None where all ask.
    """

    def __init__(self, keys: Tensor | None, queries: Tensor | None = None) -> None:
        self.keys, self.queries = keys, queries
        self._plans: dict[tuple[int, bool, bool], Plan | None] = {}

    @classmethod
    def along(cls, dim: int, keys: Tensor | None, queries: Tensor | None = None) -> LineMasks:
        """Of the rows (dim 2) or columns (1) of masks [B, H, W]."""
        if dim == 2:
            return cls(keys, queries)
        lines = None if keys is None else keys.transpose(1, 2)
        if queries is keys:  # one object, so that it is counted once
            return cls(lines, lines)
        return cls(lines, None if queries is None else queries.transpose(1, 2))

    @classmethod
    def of_images(cls, keys: Tensor | None) -> LineMasks:
        """Of the tokens of masks [B, H, W] as one line for each image, row by row; all ask."""
        return cls(None if keys is None else keys.flatten(1)[:, None])

    def plan(self, queries: int, *, across: bool, alone: bool) -> Plan | None:
        """How the lines are compacted, None where they are not; worked out on the first call.

        queries: how many tokens of a line can ask. across, alone: see `compact.plan`.
        """
        if self.keys is None or (self.queries is None and self.keys.shape[2] < LEAST):
            return None
        key = (queries, across, alone)
        if key not in self._plans:
            asking = self.queries
            if asking is None:
                asking = self.keys.new_ones(*self.keys.shape[:2], queries)
            self._plans[key] = plan(self.keys, asking, across=across, alone=alone)
        return self._plans[key]


class GridMask:
    """The mask of the whole grid of a batch of images, and the plans made of it so far.

    valid: bool [B, H, W], True where a token counts. Made for one forward: it, its backward and
    what is computed again in it share the plans, which go with it. It is no module's parameter and
    needs no gradient, so that hooks on the tensors that go into a module need not see into it.
    """

    def __init__(self, valid: Tensor) -> None:
        self.valid = valid
        self._lines: dict[tuple[int, Rect, Rect], LineMasks] = {}
        self._image: LineMasks | None = None
        self._parts: dict[Rect, GridMask] = {}

    @classmethod
    def of(cls, valid: Tensor | GridMask | None) -> GridMask | None:
        """A mask without plans where a tensor is given."""
        return cls(valid) if isinstance(valid, Tensor) else valid

    def within(self, rect: Rect) -> Tensor:
        """[B, h, w]: of the tokens of `rect`."""
        return self.valid[:, rect.top : rect.bottom, rect.left : rect.right]

    def part(self, rect: Rect) -> GridMask:
        """The mask of `rect` as a grid by itself, with plans of its own."""
        if rect not in self._parts:
            self._parts[rect] = GridMask(self.within(rect))
        return self._parts[rect]

    def lines(self, dim: int, keys: Rect, queries: Rect) -> LineMasks:
        """Of the rows (dim 2) or columns (1) of `keys`, of which those in `queries` ask."""
        at = (dim, keys, queries)
        if torch.compiler.is_compiling():  # a graph makes no plans, and must not depend on them
            return self._made(*at)
        if at not in self._lines:
            self._lines[at] = self._made(*at)
        return self._lines[at]

    def image(self) -> LineMasks:
        """Of all tokens as one line for each image, row by row; all ask."""
        if torch.compiler.is_compiling():
            return LineMasks.of_images(self.valid)
        if self._image is None:
            self._image = LineMasks.of_images(self.valid)
        return self._image

    def _made(self, dim: int, keys: Rect, queries: Rect) -> LineMasks:
        own = self.within(keys)
        return LineMasks.along(dim, own, own if queries == keys else self.within(queries))
