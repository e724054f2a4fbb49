"""A model with all that a checkpoint must carry, trained on ranks, saved and gone on from."""

from __future__ import annotations

import gc
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from distributed.engine_ranks import (
    CHANNELS,
    CLASSES,
    IMAGES,
    Task,
    Toy,
    cut_tokens,
    one_step,
    toy_batch,
)
from torch import Tensor, nn

from axialtrain.grid import Place
from axialtrain.mesh.collectives import sum_over
from axialtrain.mesh.mesh import Group, Mesh, MeshConfig
from axialtrain.mesh.parallelize import parallelize
from axialtrain.train.checkpoint import Saved, newest
from axialtrain.train.config import CheckpointConfig, OptimConfig, ZeroConfig
from axialtrain.train.engine import Engine
from axialtrain.train.resume import take_over
from axialtrain.train.save import Checkpoints
from axialtrain.train.storage import Folder

# torch renames its collectives; DeepSpeed still calls them by the old names, on every rank.
warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)

OPTIMS = {
    "sgd": OptimConfig("sgd", lr=0.5, weight_decay=0.1, momentum=0.9, clip=0.1),
    "plain sgd": OptimConfig("sgd", lr=0.5, weight_decay=0.1, momentum=0.0, clip=0.1),
    "adamw": OptimConfig("adamw", lr=0.01, weight_decay=0.1, betas=[0.8, 0.95], clip=0.1),
}


def rate_of(optim: OptimConfig, step: int) -> float:
    return optim.lr * 0.9**step


# --- The model ------------------------------------------------------------------------------------


class Statistics(nn.Module):
    """[B, h, w, C] -> the same, normalised by what earlier batches left in the buffers of a batch
    norm, so that one that is lost shows in every later loss."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.over = Group()  # the ranks that share the batch
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        # The buffers stay in fp32 where the weights are bf16.
        out = ((x - self.running_mean) / (self.running_var + 1e-5).sqrt()).to(x.dtype)
        if self.training:
            with torch.no_grad():
                tokens = x.float().flatten(0, -2)
                count, first, second = sum_over(
                    torch.stack([torch.ones_like(tokens), tokens, tokens.square()]).sum(1),
                    self.over,
                )
                mean = first / count
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(second / count - mean.square(), 0.1)
                self.num_batches_tracked += 1
        return out


class Whole(Toy):
    """A toy with running statistics, an average of its logits that is fed back, a frozen parameter
    (the toy's), and parameters of 1 and of 21 elements."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = Statistics(CHANNELS)
        self.over = Group()
        self.mix = nn.Parameter(torch.randn(7, CHANNELS) / 2)
        self.tilt = nn.Parameter(torch.full((1,), 0.7))
        self.register_buffer("average", torch.zeros(CLASSES))

    def forward(self, x: Tensor, place: Place) -> Tensor:
        x = self.statistics(x.to(self.tilt.dtype))
        x = x + self.tilt * ((x @ self.mix.T).tanh() @ self.mix)
        logits = super().forward(x, place) + self.average
        if self.training:
            with torch.no_grad():
                tokens = logits.float().flatten(0, -2)
                sums = torch.stack([torch.ones_like(tokens), tokens]).sum(1)
                count, total = sum_over(sums, self.over)
                self.average.lerp_(total / count, 0.1)
        return logits


def build_whole(seed: int = 2) -> Whole:
    """With another seed, everything that is saved has other values, buffers and frozen too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Whole()
        if seed != 2:
            for tensor in model.state_dict().values():
                tensor.add_(3 if tensor.dtype == torch.int64 else torch.rand(tensor.shape))
    return model


WHOLE = Task(build_whole, toy_batch, cut_tokens)


# --- On ranks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """How a model is trained. optim: a key of OPTIMS."""

    stage: int
    optim: str
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"zero{self.stage}-{self.optim.replace(' ', '-')}-{self.precision}"


def engine_of(
    axes: Mesh, variant: Variant, *, seed: int = 2, threshold: int = 0, accumulation: int = 1
) -> Engine:
    model = build_whole(seed)
    model.over = model.statistics.over = axes.replicas
    return Engine(
        parallelize(model, axes),
        axes,
        optim=OPTIMS[variant.optim],
        zero=ZeroConfig(variant.stage, persistence_threshold=threshold),
        micro_batch=IMAGES // (axes.data.size * accumulation),
        accumulation=accumulation,
        precision=variant.precision,
    )


def mesh_of(config: MeshConfig) -> Mesh:
    # Stage 3 collects garbage as it starts: half a second, most of it over torch's own objects.
    gc.freeze()
    return Mesh(**config.degrees)


def take_steps(engine: Engine, variant: Variant, first: int, last: int) -> list[float]:
    """Steps first to last; returns the norms of their gradients."""
    engine.train()
    optim = OPTIMS[variant.optim]
    return [one_step(engine, WHOLE, step, rate_of(optim, step))[1] for step in range(first, last)]


def save(engine: Engine, folder: Path, step: int) -> None:
    checkpoints = Checkpoints(Folder(folder), CheckpointConfig(keep_last=9), engine.mesh.world)
    checkpoints.start(None)
    checkpoints.begin(engine, step, {"step": step, "updates": engine.updates}, None)
    checkpoints.commit()


def loaded(saved: Saved, axes: Mesh, variant: Variant, threshold: int = 50) -> Engine:
    """An engine that had another model, and has taken over what was saved."""
    engine = engine_of(axes, variant, seed=5, threshold=threshold)
    take_over(saved, engine)
    return engine


def train_and_save(
    mesh: MeshConfig, variants: list[Variant], folder: Path, steps: int
) -> dict[Variant, list[float]]:
    """Each variant's run of `steps`, saved in folder/VARIANT; that loaded and saved again, in
    folder/VARIANT-again. Returns the norms."""
    axes = mesh_of(mesh)
    norms = {}
    for variant in variants:
        engine = engine_of(axes, variant)
        norms[variant] = take_steps(engine, variant, 0, steps)
        save(engine, folder / str(variant), steps)
        engine.close()
        again = loaded(newest(folder / str(variant)), axes, variant)
        save(again, folder / f"{variant}-again", steps)
        again.close()
    return norms


def go_on(
    mesh: MeshConfig, jobs: list[tuple[Path, Variant, Path]], steps: int
) -> list[list[float]]:
    """`steps` more from each job's checkpoint, saved in its second folder. Returns the norms."""
    axes = mesh_of(mesh)
    norms = []
    for start, variant, end in jobs:
        saved = newest(start)
        engine = loaded(saved, axes, variant)
        last = saved.step + steps
        norms.append(take_steps(engine, variant, saved.step, last))
        save(engine, end, last)
        engine.close()
    return norms


def in_a_row(mesh: MeshConfig, variants: list[Variant], folder: Path) -> None:
    """Six steps that nothing interrupts, in folder/VARIANT; and step 0 and 3 of the same run saved
    on its way, in folder/VARIANT-0 and -3."""
    axes = mesh_of(mesh)
    for variant in variants:
        engine = engine_of(axes, variant)
        take_steps(engine, variant, 0, 6)
        save(engine, folder / str(variant), 6)
        engine.close()
        engine = engine_of(axes, variant)
        save(engine, folder / f"{variant}-0", 0)
        take_steps(engine, variant, 0, 3)
        save(engine, folder / f"{variant}-3", 3)
        engine.close()


# --- Steps that do not count ----------------------------------------------------------------------


def state_of(engine: Engine) -> dict[str, Tensor]:
    """All that an optimizer step changes."""
    names = dict(engine.model.named_parameters())
    state = {name: value for name, value in engine.weights() if name in names}
    state |= {f"{key}/{name}": value for name, key, value in engine.moments()}
    return state | {"updates": torch.tensor(engine.updates)}


def steps_with_a_bad_one(mesh: MeshConfig, variants: list[Variant], accumulation: int) -> None:
    """A gradient that is not finite, on one rank and in one micro-batch, after the first step."""
    axes = mesh_of(mesh)

    def spoil(value: float, where: int):
        def spoiled(loss: Tensor, part: int) -> Tensor:
            return loss * value if part == where and dist.get_rank() == 1 else loss

        return spoiled

    for variant in variants:
        optim = OPTIMS[variant.optim]
        states = []
        for bad in (False, True):
            engine = engine_of(axes, variant, accumulation=accumulation)
            engine.eval()  # buffers belong to the forward
            one_step(engine, WHOLE, 0, rate_of(optim, 0), accumulation)
            before = state_of(engine)
            assert engine.updates == 1
            for value, where in ((math.nan, 0), (math.inf, accumulation - 1)) if bad else ():
                _, norm = one_step(
                    engine, WHOLE, 7, rate_of(optim, 7), accumulation, spoil(value, where)
                )
                assert not math.isfinite(norm), variant
                assert_same(state_of(engine), before, f"{variant} after a bad step")
            _, norm = one_step(engine, WHOLE, 1, rate_of(optim, 1), accumulation)
            states.append(state_of(engine) | {"norm": torch.tensor(norm)})
            assert engine.updates == 2
            moved = [name for name in before if not torch.equal(before[name], states[-1][name])]
            assert len(moved) == len(before) - 1, "all but the frozen one"
            engine.close()
        assert_same(states[1], states[0], f"{variant} in the step after")


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, f"{what}: {name}"
        assert torch.equal(got[name], value), f"{what}: {name}"
