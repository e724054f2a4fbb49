"""`axial_config`: the one description of the attention of a whole backbone."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from axialtrain.grid import Layout, Place


class Pass(enum.Enum):
    """One attention pass of a layer: what each token attends to."""

    ROW = "row"  # its row, a line of tokens of length W
    COL = "col"  # its column, a line of length H
    WINDOW = "window"  # the window it lies in; windows are cut at multiples of their size
    SHIFTED = "shifted"  # the same, cut half a window earlier
    GLOBAL = "global"  # every token of the image

    @property
    def dims(self) -> tuple[int, ...]:
        """The dims of a [B, H, W, ...] tensor along which a token attends."""
        return {Pass.ROW: (2,), Pass.COL: (1,)}.get(self, (1, 2))

    @property
    def windowed(self) -> bool:
        return self in (Pass.WINDOW, Pass.SHIFTED)

    def enters(self, place: Place, exchange: str) -> Place:
        """Where tokens that are at `place` must be for this pass, known without running it.

        exchange: swap, heads or gather (`MeshConfig.exchange`); the last two leave row and column
        passes in tiles. A global pass works wherever the tokens are.
        """
        if self is Pass.GLOBAL:
            return place
        if self.windowed or exchange != "swap":
            return place.under(Layout.TILE)
        return place.under(Layout.ROWS if self is Pass.ROW else Layout.COLS)


FUSIONS = ("sequential", "sum")
POSITIONS = ("rope", "relative", "axial", "none")
KERNELS = ("auto", "fused", "chunks")
BIASED_KERNELS = ("auto", "flex", "chunks")  # with a learned bias
WINDOW = 8  # side of a window where none is given
FLEX_WIDTH = 16  # channels of a head, at least, that FlexAttention has kernels for


@dataclass
class AxialConfig:
    """How the layers of a backbone attend.

    pattern: the passes of one layer, '+' joins; the list is cycled over the depth. ["row+col"] is
        row-then-column in every layer, ["row", "col"] alternates by layer, ["global"] is a
        standard ViT, ["window", "row+col", "shifted", "global"] a hybrid.
    fusion: "sequential", each pass has its own residual; or "sum", the passes of a layer see the
        same input and share one residual.
    share_projections: whether the passes of a layer share Q, K, V and output projections, heads
        and norm (sequential), so that a layer has the parameters of a standard ViT layer.
    positions: "rope" (rotary, along the attended axis, in every layer; over both axes half of
        each head's channels turn with either), "relative" (learned, per head and axis; over both
        axes they add), "axial" (learned row and column embeddings, added once at the input, and
        interpolated to each image's own extent) or "none".
    window: side of a window, in tokens.
    span: reach of relative positions, in tokens: tables of 2 span - 1 entries, farther distances
        take the outermost. null: the extents of the model's grid, which no image may exceed then.
    skip_axis: chance of leaving out one pass of a layer of several, while training. What runs is
        scaled so that its expectation is that of evaluation.
    kernel: what passes are computed by: "fused" (torch's scaled_dot_product_attention), with
        positions="relative" "flex" (torch's FlexAttention, on a GPU only); "chunks" (batched matrix
        products, some lines at a time); or "auto", which chooses by device, dtype and length.
        Numbers differ by rounding alone.

    Raises ValueError naming the value and what is allowed.
    """

    pattern: list[str] = field(default_factory=lambda: ["row+col"])
    fusion: str = "sequential"
    share_projections: bool = True
    positions: str = "rope"
    window: int = WINDOW
    span: int | None = None
    skip_axis: float = 0.0
    kernel: str = "auto"

    def __post_init__(self) -> None:
        allowed = [one.value for one in Pass]
        if not isinstance(self.pattern, list | tuple) or not all(
            isinstance(one, str) for one in self.pattern
        ):
            raise ValueError(
                f"axial_config.pattern={self.pattern!r}: allowed is a list of strings, one for "
                "each layer, like ['row+col']"
            )
        if not self.pattern:
            raise ValueError("axial_config.pattern=[]: at least one layer, like ['row+col']")
        for layer in self.pattern:
            for name in layer.split("+"):
                if name not in allowed:
                    raise ValueError(
                        f"axial_config.pattern: unknown pass {name!r} in {layer!r}: "
                        f"allowed are {allowed}, joined by '+'"
                    )
        for key, choices in (
            ("fusion", FUSIONS),
            ("positions", POSITIONS),
        ):
            if getattr(self, key) not in choices:
                raise ValueError(
                    f"axial_config.{key}={getattr(self, key)!r}: allowed are {list(choices)}"
                )
        kernels = BIASED_KERNELS if self.positions == "relative" else KERNELS
        if self.kernel not in kernels:
            raise ValueError(
                f"axial_config.kernel={self.kernel!r}: allowed are {list(kernels)} with "
                f"positions={self.positions}"
            )
        if not isinstance(self.share_projections, bool):
            raise ValueError(
                f"axial_config.share_projections={self.share_projections!r}: allowed are true, "
                "false"
            )
        for key in ("window", "span"):
            value = getattr(self, key)
            if (key, value) != ("span", None) and (type(value) is not int or value < 1):
                raise ValueError(f"axial_config.{key}={value!r}: allowed are whole numbers from 1")
        skip = self.skip_axis
        if type(skip) not in (int, float) or not 0 <= skip <= 1:
            raise ValueError(f"axial_config.skip_axis={skip!r}: allowed is 0 to 1")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> AxialConfig:
        """From a dictionary, whose unknown keys are a ValueError."""
        known = [one.name for one in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"axial_config: unknown key {key!r}: allowed are {known}")
        return cls(**values)

    def passes(self, layer: int) -> tuple[Pass, ...]:
        """The passes of layer number `layer`, in order."""
        return tuple(Pass(name) for name in self.pattern[layer % len(self.pattern)].split("+"))

    def used(self, depth: int) -> frozenset[Pass]:
        """Every pass that one of `depth` layers has."""
        return frozenset(one for layer in range(depth) for one in self.passes(layer))

    def unused_keys(self, depth: int) -> list[str]:
        """What is set, and read by none of `depth` layers."""
        passes = [self.passes(layer) for layer in range(depth)]
        unused = []
        if all(len(one) == 1 for one in passes):
            several = (
                (self.skip_axis > 0, f"skip_axis={self.skip_axis}"),
                (self.fusion != "sequential", f"fusion={self.fusion}"),
                (not self.share_projections, "share_projections=false"),
            )
            unused += [f"{said} (no layer has several passes)" for given, said in several if given]
        if self.window != WINDOW and not any(one.windowed for one in self.used(depth)):
            unused.append(f"window={self.window} (no layer has windows)")
        if self.span is not None and self.positions != "relative":
            unused.append(f"span={self.span} (positions={self.positions})")
        return unused

    def check_heads(self, dim: int, heads: int, passes: Collection[Pass] | None = None) -> None:
        """Raise ValueError where a model of that width cannot have so many heads.

        passes: those that it has; all of the pattern where left out, here and below.
        """
        passes = self.used(len(self.pattern)) if passes is None else passes
        if dim % heads:
            allowed = [n for n in range(1, dim + 1) if dim % n == 0]
            raise ValueError(
                f"model.heads={heads} does not divide model.dim={dim}: allowed are {allowed}"
            )
        width = dim // heads
        if self.kernel == "flex" and width < FLEX_WIDTH:
            raise ValueError(
                f"axial_config.kernel=flex has no kernel for heads of model.dim={dim} / "
                f"model.heads={heads} = {width} channels: allowed are {FLEX_WIDTH} at least, or "
                "kernel=chunks"
            )
        if self.positions != "rope":
            return
        if width % 2:
            raise ValueError(
                f"axial_config.positions=rope needs an even head width, got model.dim={dim} / "
                f"model.heads={heads} = {width}"
            )
        areas = sorted(one.value for one in passes if len(one.dims) == 2)
        if areas and width % 4:
            raise ValueError(
                f"axial_config.positions=rope in a {areas[0]} pass gives half of each head to "
                f"either axis, so the head width must be a multiple of 4: got model.dim={dim} / "
                f"model.heads={heads} = {width}"
            )

    def check_span(
        self, grid: tuple[int, int] | None, passes: Collection[Pass] | None = None
    ) -> None:
        """Raise ValueError where learned positions have no size to be made for."""
        passes = self.used(len(self.pattern)) if passes is None else passes
        far = any(not one.windowed for one in passes)
        if self.positions == "relative" and self.span is None and grid is None and far:
            raise ValueError(
                "axial_config.positions=relative needs to know its tables' size: give "
                "axial_config.span, or the model's grid"
            )
        if self.positions == "axial" and grid is None:
            raise ValueError(
                "axial_config.positions=axial needs to know its embeddings' size: give the "
                "model's grid, [height, width] in tokens"
            )

    def check_grid(
        self,
        height: int,
        width: int,
        grid: tuple[int, int] | None,
        passes: Collection[Pass] | None = None,
    ) -> None:
        """Raise ValueError where an image of height x width tokens cannot be attended to.

        grid: that which the model was made for.
        """
        passes = self.used(len(self.pattern)) if passes is None else passes
        if any(one.windowed for one in passes) and self.window > min(height, width):
            raise ValueError(
                f"axial_config.window={self.window} is larger than the grid of {height} x {width} "
                f"tokens: allowed are 1 to {min(height, width)}"
            )
        if self.positions == "relative" and self.span is None and grid is not None:
            size = (height, width)
            far = [one for one in passes if not one.windowed]
            if any(size[dim - 1] > grid[dim - 1] for one in far for dim in one.dims):
                raise ValueError(
                    f"a grid of {height} x {width} tokens exceeds the relative positions, made for "
                    f"model.grid={list(grid)}: allowed is up to that, or any size with "
                    "axial_config.span, beyond which distances are clipped"
                )
