"""Parts of the pictures that show a prediction: each rank makes those of its own tile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import reduce
from torch import Tensor

from axialtrain.data.config import PerBand

ROWS = 1024  # px


@dataclass(frozen=True)
class Panel:
    """One of the pictures side by side; pixels: uint8 [h, w, 3] of this rank's tile."""

    title: str
    pixels: np.ndarray


def image_panel(pixels: Tensor, side: int, title: str, *, mean: PerBand, std: PerBand) -> Panel:
    """Normalised pixels [h * side, w * side, bands] as they were before, side x side averaged.

    mean, std: of their normalisation, one number or one for each band.
    """
    # Some rows at a time: pixels that wait on the host in bf16 have no room in fp32 beside them.
    rows = pixels.split(side * max(1, ROWS // side))
    pattern = "(h p) (w q) C -> h w C"
    small = torch.cat([reduce(some.float(), pattern, "mean", p=side, q=side) for some in rows])
    small = small * torch.as_tensor(std).to(small) + torch.as_tensor(mean).to(small)
    if small.shape[-1] != 3:  # show the first band in grey
        small = small[..., :1].expand(*small.shape[:-1], 3)
    return Panel(title, (small.clamp(0, 1) * 255).byte().cpu().numpy())
