"""`axialtrain models`: what each model by name has and costs.

Nothing is allocated: models are built, and run once, on torch's meta device. A multiply-add is one
of a convolution, a linear layer or a matrix product of attention; norms, activations, softmax and
interpolation are not counted, which is how the papers count.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from axialtrain.bench.page import replace_part
from axialtrain.models.conv_config import AxialDeepLabConfig
from axialtrain.models.position_sensitive import PositionSensitiveAttention
from axialtrain.models.registry import create_model, list_models, model_config
from axialtrain.models.transformer import AxialTransformerConfig

IMAGE, CLASSES = (224, 224), 1000  # px and classes of ImageNet, for what classifies
SCENE, LABELS = (1024, 2048), 19  # of Cityscapes, for what names a class for each pixel
HEAD = (
    "| model | input (px) | classes | parameters | multiply-adds (G) |",
    "|---|---|---:|---:|---:|",
)
BEGIN, END = "<!-- axialtrain models: begin -->", "<!-- axialtrain models: end -->"


@dataclass(frozen=True)
class Row:
    """A model with its head, on one image of height x width px."""

    name: str
    height: int
    width: int
    classes: int
    parameters: int
    multiply_adds: int

    @property
    def line(self) -> str:
        """Of the table."""
        return (
            f"| `{self.name}` | {self.height} x {self.width} | {self.classes} | "
            f"{self.parameters:,} | {self.multiply_adds / 1e9:.3f} |"
        )


def rows(pattern: str = "*") -> list[Row]:
    """Of the models whose names match, in alphabetical order.

    Raises ValueError where none does.
    """
    names = list_models(pattern)
    if not names:
        raise ValueError(
            f"models {pattern}: no name matches: allowed are {', '.join(list_models())}"
        )
    return [_row(name) for name in names]


def _row(name: str) -> Row:
    config = model_config(name)
    dense = isinstance(config, AxialDeepLabConfig)
    (height, width), classes = (SCENE, LABELS) if dense else (IMAGE, CLASSES)
    with torch.device("meta"):
        model = counted = create_model(name, num_classes=classes)
        if isinstance(config, AxialTransformerConfig):
            # Resampling the embedding is none of what counts, and needs numbers.
            counted = create_model(name, num_classes=classes, grid_embedding=False)
        image = torch.zeros(1, height, width, config.bands)
    for module in counted.modules():
        if isinstance(module, PositionSensitiveAttention):
            module.chunk = sys.maxsize  # no logits exist, and thousands of chunks take minutes
    counter = FlopCounterMode(display=False)
    # A fused kernel of attention counts as nothing on the CPU, its formula as two products.
    with sdpa_kernel(SDPBackend.MATH), counter:
        counted.eval().requires_grad_(False)(image)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Row(name, height, width, classes, parameters, counter.get_total_flops() // 2)


def markdown(pattern: str = "*") -> str:
    """The rows as a table."""
    return "\n".join([*HEAD, *(row.line for row in rows(pattern))])


def write(page: Path, pattern: str = "*") -> None:
    """Put the table in place of what stands between the two markers of a page, BEGIN and END.

    The page has its name when all of it is there. Raises ValueError where it has no such place.
    """
    replace_part(page, BEGIN, END, markdown(pattern), key="--out")
