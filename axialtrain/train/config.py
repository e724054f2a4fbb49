"""Everything a run can be told. Each part is a dataclass of the room that owns the keys.

No DeepSpeed here: a wrong key or value is refused before anything heavy is imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from axialtrain.data.config import DataConfig
from axialtrain.mesh.mesh import MeshConfig
from axialtrain.models.recompute import Recompute
from axialtrain.models.registry import KINDS, ModelConfig
from axialtrain.models.transformer import AxialTransformerConfig
from axialtrain.train.compiled import check_compile
from axialtrain.train.recomputed import check_recompute
from axialtrain.train.schedule import ScheduleConfig
from axialtrain.train.track import LoggerConfig

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("fp32", "bf16")
POLICIES = ("stop", "skip", "rollback")


def _check_least(group: str, config: object, **least: int) -> None:
    for key, low in least.items():
        if getattr(config, key) < low:
            raise ValueError(
                f"{group}.{key}={getattr(config, key)}: allowed are whole numbers from {low}"
            )


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
        for key, owner, plain in (("betas", "adamw", [0.9, 0.999]), ("momentum", "sgd", 0.9)):
            value = getattr(self, key)
            if self.name != owner and value != plain:
                raise ValueError(
                    f"optim.{key}={value}: is of {owner}; allowed with optim={self.name} is none"
                )


@dataclass
class TrainConfig:
    """The length of a run and the size of its steps.

    steps: optimizer steps. batch: images in one of them, never changed by the mesh.
    micro_batch: images per data rank at a time; accumulation follows.
    validate_every: steps between validations; 0 validates only at the end.
    patience: validations without a better `checkpoint.best` after which the run ends early; 0 is
    off.
    precision: "fp32", or "bf16" with fp32 masters in the optimizer.
    compile: whether torch compiles the layers of an axial transformer, or their passes, for each
        size of the token grid; see `axialtrain.train.compiled`, also for what it does not go with.
    recompute: 0 keeps all activations for backward; n keeps the tokens before every n-th layer, and
        computes the layers again. offload: the share of those tokens that is kept on the host.
    recompute_band: tokens of a band, in which passes of rows and columns are computed again, so
        that a pass keeps its input alone; 0 keeps all that a pass needs. The pixels then wait on
        the host, as well: see `axialtrain.train.recomputed` for what it does not go with.
    """

    steps: int = 100
    batch: int = 1
    micro_batch: int = 1
    validate_every: int = 0
    patience: int = 0
    precision: str = "fp32"
    compile: bool = False
    recompute: int = 0
    offload: float = 0.0
    recompute_band: int = 0

    @property
    def lean(self) -> bool:
        """Whether memory is short: pixels wait on the host, in the dtype of the weights."""
        return self.recompute_band > 0

    def __post_init__(self) -> None:
        _check_least("train", self, steps=1, batch=1, micro_batch=1, validate_every=0, patience=0)
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"train.precision={self.precision!r}: allowed are {', '.join(PRECISIONS)}"
            )
        Recompute(
            self.recompute, self.offload, self.recompute_band
        )  # refuses what it does not allow


@dataclass
class CheckpointConfig:
    """What is saved of a run, where, and for how long.

    every: optimizer steps between checkpoints; 0 saves only at the end (and when told to end).
    folder: a path or a URL that fsspec knows (s3://...), which all ranks reach; null is
        `checkpoints` in the run's folder.
    asynchronous: write beside training.
    keep_last: how many of the newest stay. keep_every: one whose step is a multiple of it stays
        for good; 0 is off.
    best: the metric of validation (val_loss, or one of the task's) whose best step is saved and
        kept too; null is off.
    on_error: "continue" goes on with a warning where one cannot be written, "stop" ends the run.
        One that cannot be written at the end is an error in any case.
    new_data: go on although the shards or windows are not those that the run began with.
    """

    every: int = 100
    folder: str | None = None
    asynchronous: bool = False
    keep_last: int = 2
    keep_every: int = 0
    best: str | None = None
    on_error: str = "continue"
    new_data: bool = False

    def __post_init__(self) -> None:
        _check_least("checkpoint", self, every=0, keep_last=1, keep_every=0)
        if self.on_error not in ("continue", "stop"):
            raise ValueError(
                f"checkpoint.on_error={self.on_error!r}: allowed are continue and stop"
            )


@dataclass
class FaultsConfig:
    """What happens where a step's loss or gradient is not finite, or its loss jumps up.

    nonfinite, spike: "stop" ends the run; "skip" leaves the step's batch out, weights and moments
        stay as they were; "rollback" does so too, and takes those of the last checkpoint again;
        spike may be "off".
    spike_factor: a loss above this many times the median of the `spike_window` losses before it is
        a spike.
    limit: batches left out after which the run stops all the same.
    """

    nonfinite: str = "stop"
    spike: str = "off"
    spike_factor: float = 3.0
    spike_window: int = 20
    limit: int = 10

    def __post_init__(self) -> None:
        for key, allowed in (("nonfinite", POLICIES), ("spike", ("off", *POLICIES))):
            if getattr(self, key) not in allowed:
                raise ValueError(
                    f"faults.{key}={getattr(self, key)!r}: allowed are {', '.join(allowed)}"
                )
        if not 1 < self.spike_factor < math.inf:
            raise ValueError(f"faults.spike_factor={self.spike_factor}: allowed is above 1")
        _check_least("faults", self, spike_window=1, limit=0)


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

    model: a config of `axialtrain.models`, of one of its kinds, chosen by the group `model`.
    task: a config of `axialtrain.tasks`, chosen by the group `task`.
    init: what the model starts from: timm:NAME, pretrained from timm's hub; a file of weights, of a
        timm ViT or DeiT or from `axialtrain export`; a run (its last checkpoint) or a checkpoint,
        a folder or URL; null draws them from `seed`. It may be a model of another image size.
    resume: what the run goes on from: auto, the newest checkpoint in its own folder if there is one
        (without hydra.run.dir, that is the newest run of this name); or a run, or a checkpoint, as
        which it is auto where the folder is of a run that was begun with it.
    """

    data: DataConfig
    name: str = "run"
    seed: int = 0
    init: str | None = None
    resume: str | None = None
    model: Any = field(default_factory=AxialTransformerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    task: Any = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)

    def __post_init__(self) -> None:
        if not isinstance(self.model, ModelConfig):
            raise ValueError(
                f"model={self.model!r}: allowed is model=NAME of those that `axialtrain models` "
                f"lists, or of a file that says in its defaults which kind it is: "
                f"{', '.join(f'{kind}_schema' for kind in KINDS)}"
            )
        train = self.train
        check_recompute(
            train.recompute, train.recompute_band, self.model, self.mesh, self.zero.stage, self.task
        )
        if self.init == "":
            raise ValueError("init is not set: give init=timm:NAME, init=FILE or init=null")
        if self.resume == "":
            raise ValueError("resume is empty: give resume=auto, resume=RUN or resume=null")
        if self.train.compile:
            check_compile(self.model, self.mesh, self.zero.stage)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: allowed are whole numbers from 0 to 2^63 - 1")
