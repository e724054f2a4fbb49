"""What all suites are told: where, how large, for how long."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from axialtrain.bench.arguments import DEVICES
from axialtrain.bench.record import Result
from axialtrain.bench.timing import Rounds, Way, in_turns


@dataclass(frozen=True)
class Setting:
    """quick: sizes of seconds, for tests. long: what takes many minutes too. rounds: of each
    comparison, and limit, the s after which it begins no other. malloc: whether this process keeps
    the memory that it has had ("kept")."""

    device: torch.device
    quick: bool = False
    long: bool = False
    rounds: int = 7
    limit: float = math.inf
    malloc: str = "default"

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def in_turns(self, ways: Mapping[str, Way]) -> Rounds:
        return in_turns(ways, self.device, rounds=self.rounds, limit=self.limit)


@dataclass(frozen=True)
class Case:
    """A part of a suite that is measured as a whole, or not at all."""

    name: str
    run: Callable[[], list[Result]]


def device_of(choice: str) -> torch.device:
    """auto: a GPU where there is one. Raises ValueError where cuda is wanted and there is none."""
    if choice not in DEVICES:
        raise ValueError(f"--device {choice}: allowed are {', '.join(DEVICES)}")
    there = torch.cuda.is_available()
    if choice == "cuda" and not there:
        raise ValueError("--device cuda: no GPU is here that torch can use: allowed are cpu, auto")
    return torch.device("cuda" if there and choice != "cpu" else "cpu")


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
