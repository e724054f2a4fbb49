"""The torch optimizer inside the engine: what it decays, and what it keeps of each parameter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from axialtrain.train.config import OptimConfig


def torch_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Raises ValueError where nothing in the model is to be trained."""
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient")

    def decays(name: str, param: nn.Parameter) -> bool:
        # As timm does: no biases, norms and scales, and no positions and learned tokens.
        return param.ndim >= 2 and name.endswith("weight")

    decayed = [param for name, param in trained if decays(name, param)]
    others = [param for name, param in trained if not decays(name, param)]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "adamw":
        first, second = config.betas
        return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second))
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


def moment_keys(optim: OptimConfig) -> tuple[str, ...]:
    """What torch's optimizer keeps of each parameter, by its own names."""
    if optim.name == "adamw":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if optim.momentum else ()


def create_moments(
    optimizer: torch.optim.Optimizer, flats: Iterable[Tensor], optim: OptimConfig
) -> None:
    """The state that torch's optimizer would create in its first step, so that there is one to be
    read and written before. With zeros in it the first step comes out the same.
    """
    for flat in flats:
        state = optimizer.state[flat]
        for key in moment_keys(optim):
            state[key] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        if optim.name == "adamw":
            state["step"] = torch.zeros((), dtype=torch.float32)
