"""Lets torchvision, and so timm, be imported beside a CPU build of torch. Import it before them.

torchvision's wheel on PyPI is built against CUDA; without that library its Python code still
registers shape rules for two operators, and fails as they are not there. Nothing here calls them.
"""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # the definitions live as long as it
for name in ("nms", "qnms"):
    LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
