"""Everything a run can be told. Each part is a dataclass of the room that owns the keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from axialtrain.data.loader import DataConfig
from axialtrain.mesh.mesh import MeshConfig
from axialtrain.models.transformer import AxialTransformerConfig
from axialtrain.train.engine import OptimConfig, ZeroConfig
from axialtrain.train.schedule import ScheduleConfig
from axialtrain.train.track import LoggerConfig


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

    threads: of each process; null shares the machine's cores between them.
    timeout: seconds after which a collective that a rank does not answer ends the run.
    """

    threads: int | None = None
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(
                f"launcher.threads={self.threads}: allowed are null and numbers from 1"
            )
        if self.timeout <= 0:
            raise ValueError(f"launcher.timeout={self.timeout}: allowed are seconds above 0")


@dataclass
class RunConfig:
    """One run: what `configs/` composes to. An unknown key is an error.

    task: a config of `axialtrain.tasks`, chosen by the group `task`.
    """

    data: DataConfig
    name: str = "run"
    seed: int = 0
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
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: allowed are whole numbers from 0 to 2^63 - 1")
