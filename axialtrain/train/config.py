"""Everything a run can be told. Each part is a dataclass of the room that owns the keys.

No DeepSpeed here: a wrong key or value is refused before anything heavy is imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from axialtrain.data.config import DataConfig
from axialtrain.mesh.mesh import MeshConfig
from axialtrain.models.transformer import AxialTransformerConfig
from axialtrain.train.schedule import ScheduleConfig
from axialtrain.train.track import LoggerConfig

DEVICES = ("auto", "cpu", "cuda")


@dataclass
class ZeroConfig:
    """What DeepSpeed partitions over the ranks that hold the same weights.

    stage: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too.
    persistence_threshold: at stage 3, parameters of fewer elements are kept whole.
    """

    stage: int = 1
    persistence_threshold: int = 100_000

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"zero.stage={self.stage}: allowed are 0, 1, 2, 3")
        if self.persistence_threshold < 0:
            raise ValueError(
                f"zero.persistence_threshold={self.persistence_threshold}: "
                "allowed are whole numbers from 0"
            )


@dataclass
class OptimConfig:
    """The optimizer.

    name: "adamw" or "sgd".
    lr: base learning rate; the schedule gives that of each step.
    weight_decay: of the weights of projections (not of biases, norms, positions, learned tokens).
    betas: of adamw. momentum: of sgd.
    clip: largest norm of the gradient of the whole model; 0 is off.
    """

    name: str = "adamw"
    lr: float = 5e-4
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    momentum: float = 0.9
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "sgd"):
            raise ValueError(f"optim.name={self.name!r}: allowed are adamw, sgd")
        for key in ("lr", "weight_decay", "clip"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"optim.{key}={getattr(self, key)}: allowed are numbers from 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={self.betas}: allowed are two numbers from 0 to below 1")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim.momentum={self.momentum}: allowed is 0 to below 1")


@dataclass
class TrainConfig:
    """The length of a run and the size of its steps.

    steps: optimizer steps. batch: images in one of them, never changed by the mesh.
    micro_batch: images per data rank at a time; accumulation follows.
    validate_every: steps between validations; 0 validates only at the end.
    """

    steps: int = 100
    batch: int = 1
    micro_batch: int = 1
    validate_every: int = 0

    def __post_init__(self) -> None:
        for key, least in (("steps", 1), ("batch", 1), ("micro_batch", 1), ("validate_every", 0)):
            value = getattr(self, key)
            if value < least:
                raise ValueError(f"train.{key}={value}: allowed are whole numbers from {least}")


@dataclass
class LauncherConfig:
    """Local processes, where neither torchrun nor deepspeed started this one.

    threads: of each process; null takes OMP_NUM_THREADS, or shares the cores between them.
    timeout: seconds after which a collective that a rank does not answer ends the run.
    device: "cpu", "cuda", or "auto": cuda where each local process has a GPU of its own.
    """

    threads: int | None = None
    timeout: float = 600.0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(
                f"launcher.threads={self.threads}: allowed are null and numbers from 1"
            )
        if not 0 < self.timeout <= 1e6:
            raise ValueError(f"launcher.timeout={self.timeout}: allowed are seconds up to 1e6")
        if self.device not in DEVICES:
            raise ValueError(f"launcher.device={self.device!r}: allowed are {list(DEVICES)}")


@dataclass
class RunConfig:
    """One run: what `configs/` composes to. An unknown key is an error.

    task: a config of `axialtrain.tasks`, chosen by the group `task`.
    init: what the model starts from: timm:NAME, pretrained from timm's hub, or a file of weights of
        a timm ViT or DeiT; null draws them from `seed`.
    """

    data: DataConfig
    name: str = "run"
    seed: int = 0
    init: str | None = None
    model: AxialTransformerConfig = field(default_factory=AxialTransformerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    task: Any = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)

    def __post_init__(self) -> None:
        if self.init == "":
            raise ValueError("init is not set: give init=timm:NAME, init=FILE or init=null")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: allowed are whole numbers from 0 to 2^63 - 1")
