"""Parts of the pictures that show a prediction: each rank makes those of its own tile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import reduce
from torch import Tensor

from axialtrain.data.config import PerBand


@dataclass(frozen=True)
class Panel:
    """One of the pictures side by side; pixels: uint8 [h, w, 3] of this rank's tile."""

    title: str
    pixels: np.ndarray


def image_panel(pixels: Tensor, side: int, title: str, *, mean: PerBand, std: PerBand) -> Panel:
    """Normalised pixels [h * side, w * side, bands] as they were before, side x side averaged.

    mean, std: of their normalisation, one number or one for each band.
    """
    small = reduce(pixels.float(), "(h p) (w q) C -> h w C", "mean", p=side, q=side)
    small = small * torch.as_tensor(std).to(small) + torch.as_tensor(mean).to(small)
    if small.shape[-1] != 3:  # show the first band in grey
        small = small[..., :1].expand(*small.shape[:-1], 3)
    return Panel(title, (small.clamp(0, 1) * 255).byte().cpu().numpy())
