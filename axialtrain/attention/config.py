"""`axial_config`: the one description of the attention of a whole backbone."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from axialtrain.grid import Layout


class Pass(enum.Enum):
    """One attention pass of a layer: along which axis of the image, so under which layout."""

    ROW = "row"  # each token attends to its row (a line of tokens of length W)
    COL = "col"  # each token attends to its column (of length H)

    @property
    def layout(self) -> Layout:
        return Layout.ROWS if self is Pass.ROW else Layout.COLS

    @property
    def dim(self) -> int:
        """The attended dim of a [B, H, W, ...] tensor."""
        return 2 if self is Pass.ROW else 1


POSITIONS = ("rope", "none")


@dataclass
class AxialConfig:
    """How the layers of a backbone attend.

    pattern: the passes of one layer, '+' joins; the list is cycled over the depth. ["row+col"] is
        row-then-column in every layer, ["row", "col"] alternates by layer. The passes of a layer
        share their projections and heads, and each has its own residual.
    positions: "rope" (rotary, along the active axis, in every layer) or "none".

    Raises ValueError naming the value and what is allowed.
    """

    pattern: list[str] = field(default_factory=lambda: ["row+col"])
    positions: str = "rope"

    def __post_init__(self) -> None:
        allowed = [one.value for one in Pass]
        if isinstance(self.pattern, str) or not all(isinstance(one, str) for one in self.pattern):
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
        if self.positions not in POSITIONS:
            raise ValueError(
                f"axial_config.positions={self.positions!r}: allowed are {list(POSITIONS)}"
            )

    def passes(self, layer: int) -> tuple[Pass, ...]:
        """The passes of layer number `layer`, in order."""
        return tuple(Pass(name) for name in self.pattern[layer % len(self.pattern)].split("+"))
