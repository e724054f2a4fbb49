"""Any mesh, same model: our models and losses, trained by the loop under DeepSpeed on a mesh, take
the steps of plain torch in one process.

Plain torch means: the model as it was built, whole images in one batch, losses computed pixel by
pixel, `clip_grad_norm_` and SGD (Adam would hide a wrong scale). What is allowed is rounding: the
plain run is in fp64, the one on the mesh in fp32.
"""

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from distributed.launcher import run_ranks
from distributed.task_ranks import ACCUMULATION, HELD_OUT, IMAGES, Case, train_steps

from axialtrain.mesh.mesh import MeshConfig
from axialtrain.models.chance import Chance
from axialtrain.train.config import RunConfig
from axialtrain.train.engine import OptimConfig
from axialtrain.train.schedule import ScheduleConfig, learning_rate

pytestmark = pytest.mark.slow

MESHES = {
    "2x2": MeshConfig(row=2, col=2),
    "data 2, row 2": MeshConfig(data=2, row=2),
    "col 2, tensor 2": MeshConfig(col=2, tensor=2),
}
STEPS = 3
SGD = OptimConfig("sgd", lr=3.0, weight_decay=0.02, momentum=0.9, clip=0.1)
SCHEDULE = ScheduleConfig("cosine", warmup=1, final=0.1)

# Each head and each way through rows and columns; no mesh divides the grids.
SEGMENTER = Case("segmentation", (13, 10))
RECONSTRUCTOR = Case("reconstruction", (13, 10), ("row", "col"))
SMALL = Case("segmentation", (7, 5), ("row", "col"))
# Every pass, relative tables in chunks, tokens beside the image; then the passes apart and summed,
# factorised positions, and what a step leaves out at random.
HYBRID = Case(
    "segmentation",
    (13, 10),
    ("window", "row+col", "shifted", "global"),
    (("positions", "relative"), ("span", 4), ("window", 3)),
    (("prefix_tokens", 2),),
)
APART = Case(
    "reconstruction",
    (13, 10),
    ("row+col", "col+global"),
    (
        ("positions", "axial"),
        ("fusion", "sum"),
        ("share_projections", False),
        ("skip_axis", 0.6),
    ),
    (("drop_path", 0.2),),
)


@dataclass
class Plain:
    start: dict[str, torch.Tensor]
    losses: list[float]
    norms: list[float]
    held_out: list[float]  # loss after the second step and after the last
    weights: dict[str, torch.Tensor]


@functools.cache
def plain_steps(case: Case) -> Plain:
    model, task = case.build().double(), case.make_task()
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    decays = {name: p.ndim >= 2 and name.endswith("weight") for name, p in model.named_parameters()}
    decayed = [parameter for name, parameter in model.named_parameters() if decays[name]]
    others = [parameter for name, parameter in model.named_parameters() if not decays[name]]
    groups = [
        {"params": decayed, "weight_decay": SGD.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, momentum=SGD.momentum)
    losses, norms, held_out = [], [], []
    for step in range(STEPS):
        batch = case.images(step, torch.float64)
        chance = Chance(RunConfig.seed, step, tuple(batch.samples.tolist()))
        model.train()
        loss = case.plain_loss(model(*task.inputs(batch), chance=chance), batch)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any() or case is APART, name  # which leaves out passes
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), SGD.clip)))
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, SGD.lr, SCHEDULE)
        optimizer.step()
        if step > 0:
            model.eval()
            batch = case.images(HELD_OUT, torch.float64)
            held_out.append(case.plain_val_loss(model(*task.inputs(batch)), batch).item())
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return Plain(start, losses, norms, held_out, weights)


def check(case: Case, mesh: MeshConfig, stage: int, chunk: int | None = None) -> None:
    expected = plain_steps(case)
    assert min(expected.norms) > 2 * SGD.clip, "clipping should be at work"
    ranks = run_ranks(
        train_steps,
        mesh.size,
        case=case,
        mesh=mesh,
        stage=stage,
        optim=SGD,
        schedule=SCHEDULE,
        steps=STEPS,
        chunk=chunk,
    )
    logged = ranks[0].logged
    assert [entry["grad_norm"] for entry in logged] == pytest.approx(expected.norms, rel=1e-5)
    assert [entry["loss"] for entry in logged] == pytest.approx(expected.losses, rel=1e-5)
    held_out = [entry["val_loss"] for entry in logged[1:]]
    assert held_out == pytest.approx(expected.held_out, rel=1e-5)
    for got in ranks:
        for name in ("loss", "grad_norm", "val_loss"):  # what the loop returns is every rank's
            assert got.last[name] == logged[-1][name]
        assert got.weights.keys() == expected.weights.keys()
        away, moved = 0.0, 0.0
        for name, weight in expected.weights.items():
            assert torch.equal(got.weights[name], ranks[0].weights[name]), name
            difference = (got.weights[name] - weight).norm()
            distance = (weight - expected.start[name]).norm()
            # Of each weight by itself: 3e-5, since a weight near 1 is itself rounded to 6e-8.
            assert difference <= 3e-5 * distance, name
            away, moved = away + difference.square(), moved + distance.square()
        assert away.sqrt() <= 1e-6 * moved.sqrt()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", [SEGMENTER, RECONSTRUCTOR], ids=lambda case: case.task)
def test_training_takes_the_steps_of_one_process(case, mesh, stage):
    check(case, MESHES[mesh], stage)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_parts_may_be_of_two_rows_or_columns(stage):
    check(SMALL, MESHES["2x2"], stage)


@pytest.mark.parametrize(
    ("case", "mesh", "exchange", "stage"),
    [
        (HYBRID, "2x2", "swap", 3),
        (HYBRID, "2x2", "heads", 1),
        (HYBRID, "col 2, tensor 2", "gather", 3),
        (HYBRID, "data 2, row 2", "gather", 0),
        (APART, "2x2", "swap", 0),
        (APART, "2x2", "gather", 3),
        (APART, "col 2, tensor 2", "heads", 3),
        (APART, "data 2, row 2", "swap", 2),
    ],
    ids=lambda value: value.task if isinstance(value, Case) else str(value),
)
def test_every_attention_takes_the_steps_of_one_process(case, mesh, exchange, stage):
    """Tables that are read again in backward, parameters of passes that were left out."""
    check(case, replace(MESHES[mesh], exchange=exchange), stage, chunk=2**10)


@pytest.mark.parametrize("case", [SEGMENTER, RECONSTRUCTOR, SMALL, HYBRID, APART], ids=str)
def test_the_comparison_is_not_an_empty_one(case):
    expected = plain_steps(case)
    for name, weight in expected.weights.items():  # each one moves, far beyond rounding
        distance = (weight - expected.start[name]).norm()
        assert distance > 1e-3 * expected.start[name].norm(), name
    for step in range(STEPS):
        batch = case.images(step, torch.float64)
        targets = (batch.labels != 255).sum((1, 2)).tolist()
        assert len(set(targets)) == IMAGES - 1, "unequal, and two images without any"
        assert batch.valid.sum((1, 2)).unique().numel() == 3
    for mesh in MESHES.values():
        micro_batch = -(-IMAGES // (ACCUMULATION * mesh.data))
        assert micro_batch * ACCUMULATION * mesh.data > IMAGES, "there are fillers"
