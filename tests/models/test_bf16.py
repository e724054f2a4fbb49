"""In bf16 every forward and backward works on batches in fp32, and gradients are those of fp32.

A model is compared with itself in fp32, from weights that both can hold: what differs is the
arithmetic, of 2 layers of 32 channels on 13 x 10 tokens. Measured over all cases here: the whole
gradient's cosine is 0.99996 or more (bound 0.9998), each parameter's gradient is 0.018 of its norm
away at most (bound 0.04), the loss 0.0021 of itself (bound 0.005).

On four ranks (gradients summed in fp32, as the engine does) against serial in bf16: the whole
gradient is 0.012 of its norm away at most (bound 0.02), that of each parameter 0.024 (bound 0.04).
Neither is nearer to fp32: 0.012 and 0.021 are the distances of both from there, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from distributed.bf16_ranks import (
    CASES,
    CHANCE,
    TASKS,
    Trained,
    added_up,
    all_on_four_ranks,
    batch_of,
    build,
    trained,
)
from distributed.launcher import run_ranks
from torch import Tensor, nn

from axialtrain.attention import lines
from axialtrain.attention.area import attend_all, attend_windows
from axialtrain.attention.axis import attend
from axialtrain.attention.merge import attend_everywhere
from axialtrain.attention.positions import AxialEmbedding, GridEmbedding, rotary_angles, rotate
from axialtrain.grid import Place, Rect
from axialtrain.mesh.exchange import Exchange
from axialtrain.mesh.mesh import Mesh
from axialtrain.models.heads import mean_token
from axialtrain.models.layer import LayerScale, Norm
from axialtrain.tasks.classification import Classification, ClassificationConfig, DistillConfig
from axialtrain.tasks.objective import image_means

BF16 = torch.bfloat16


def norm_of(tensors: list[Tensor]) -> float:
    return float(sum(one.detach().double().square().sum() for one in tensors)) ** 0.5


def distances(got: Trained, want: Trained) -> dict[str, float]:
    """Of each gradient, as a share of its norm, or of a hundredth of the whole one's; "all" too."""
    moved = {name: got.gradients[name].double() - one for name, one in want.gradients.items()}
    whole = norm_of(list(want.gradients.values()))
    found = {
        name: norm_of([moved[name]]) / max(norm_of([one]), whole / 100)
        for name, one in want.gradients.items()
    }
    return found | {"all": norm_of(list(moved.values())) / whole}


def cosine(got: Trained, want: Trained) -> float:
    one, other = (
        torch.cat([part.gradients[name].double().flatten() for name in want.gradients])
        for part in (got, want)
    )
    return float(one @ other / one.norm() / other.norm())


# --- Models and tasks -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_fp32(name):
    want, got = trained(CASES[name], torch.float32), trained(CASES[name], BF16)
    assert got.loss.dtype is torch.float32
    assert got.loss == pytest.approx(float(want.loss), rel=5e-3)
    assert got.output.dtype is BF16
    assert got.dtypes.keys() >= {"backbone.patch_embed", "backbone.blocks.1", "backbone.norm"}
    for module, dtypes in got.dtypes.items():
        assert dtypes <= {BF16}, f"{module} gives {dtypes}"
    for parameter, gradient in got.gradients.items():
        assert gradient.dtype is BF16, parameter
        assert gradient.isfinite().all(), parameter
    assert cosine(got, want) > 0.9998
    found = distances(got, want)
    assert max(found.values()) < 0.04, max(found, key=found.__getitem__)


def test_cases_have_every_pass_position_head_and_fusion():
    attention = [case.attention for case in CASES.values()]
    assert {case.task for case in CASES.values()} == set(TASKS)
    assert {one.get("positions", "rope") for one in attention} == {
        "rope", "relative", "axial", "none"
    }  # fmt: skip
    passes = {which for one in attention for which in "+".join(one.get("pattern", [])).split("+")}
    assert passes - {""} == {"row", "col", "window", "shifted", "global"}
    assert {one.get("fusion", "sequential") for one in attention} == {"sequential", "sum"}


def test_evaluation_gives_scores_and_pictures():
    for case in CASES.values():
        task, batch = TASKS[case.task](), batch_of(Mesh())
        with torch.no_grad():
            output = build(case).bfloat16().eval()(*task.inputs(batch))
        assert output.dtype is BF16
        local_sum, _ = task.loss(output, batch)
        assert local_sum.dtype is torch.float32
        assert all(value.dtype is torch.float64 for value in task.scores(output, batch).values())
        assert task.panels(output, batch, mean=0.5, std=0.2)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_teacher_stays_in_fp32(kind):
    case = CASES["summed, clipped, distilled"]
    task = Classification(
        ClassificationConfig(5, distilled=True, distill=DistillConfig("a file", kind))
    )
    teacher = build(case).eval().requires_grad_(False)
    with mock.patch.object(task, "teacher", return_value=teacher):
        task.prepare(Mesh(), torch.device("cpu"))
    batch = batch_of(Mesh())
    student = build(case).bfloat16()
    output = student(*task.inputs(batch), chance=CHANCE)
    loss, _ = task.loss(output, batch)
    assert loss.dtype is torch.float32
    taught = teacher(*task.inputs(batch))
    assert taught.dtype is torch.float32
    one, two = output.double().unbind(1)
    if kind == "hard":
        second = F.cross_entropy(two, taught.argmax(1), reduction="none")
    else:
        p, q = (taught.double() / 3).softmax(1), (two / 3).softmax(1)
        second = 9 * (p * (p / q).log()).sum(1)
    want = (F.cross_entropy(one, batch.targets, reduction="none") + second) / 2
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-6)
    loss.sum().backward()
    assert all(value.grad.dtype is BF16 for value in student.parameters())


@pytest.mark.parametrize("name", ["row rope", "axial, summed, layer scale", "a ViT"])
def test_losses_of_an_output_in_bf16_are_computed_in_fp32(name):
    task, batch = TASKS[CASES[name].task](), batch_of(Mesh())
    output = trained(CASES[name], BF16).output
    (got, _), (want, _) = task.loss(output, batch), task.loss(output.double(), batch)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_a_loss_in_bf16_is_divided_by_the_whole_count():
    counts = torch.tensor([1001, 4097])  # bf16 has 1000 and 4096
    means = image_means(torch.tensor([1.0, 1.0]).bfloat16(), counts, torch.ones(2), Mesh())
    assert means.dtype is torch.float32
    assert torch.equal(means, 1 / counts)


# --- Gradients that are sums over many tokens, which would stand still in bf16 --------------------


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_adds_up(fn: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Output and gradients in bf16 are those in fp64 to 0.01 of their norms (measured: 0.0045).

    The gradient of the output is near 1 everywhere, so that sums over tokens grow large.
    """
    found = []
    for dtype in (torch.float64, BF16):
        given = [one.bfloat16().to(dtype).requires_grad_() for one in inputs]
        output = fn(*given)
        assert output.dtype is dtype
        grad = (1 + 0.1 * random(*output.shape)).to(dtype)
        found.append((output, *torch.autograd.grad(output, given, grad)))
    for want, got in zip(*found, strict=True):
        assert got.dtype is BF16
        assert norm_of([got - want]) < 0.01 * norm_of([want])


def of_module(module: nn.Module, *inputs: Any) -> Callable[..., Tensor]:
    """(x, *parameters) -> module(x, *inputs) with those parameters."""
    names = [name for name, _ in module.named_parameters()]
    return lambda x, *values: torch.func.functional_call(
        module, dict(zip(names, values, strict=True)), (x, *inputs)
    )


TOKENS = (2, 100, 80)  # 16,000; a sum of ones in bf16 stands still at 256


@pytest.mark.parametrize("module", [Norm(8), LayerScale(8, 1.0), nn.Linear(8, 8)], ids=repr)
def test_parameters_that_all_tokens_share(module):
    x = random(*TOKENS, 8)
    assert_adds_up(of_module(module), x, *(1 + random(*p.shape) for p in module.parameters()))


@pytest.mark.parametrize("made", [AxialEmbedding(2, 3, 4), GridEmbedding(2, 3, 4)], ids=repr)
def test_embeddings_that_are_stretched_over_many_tokens(made):
    tables = [random(*table.shape) for table in made.parameters()]
    assert_adds_up(of_module(made, Place(1600, 5), None), random(2, 1600, 5, 4), *tables)


def test_prefix_tokens_and_pooling_by_attention():
    """Logits of some tens: what they lose in bf16 their exponentials would show."""
    assert_adds_up(
        lambda q, k, v: attend_everywhere(q, k, v, Exchange()),
        *(random(2, 3, 2, 8) * 20, random(*TOKENS, 2, 8), random(*TOKENS, 2, 8) + 1),
    )


def test_means_and_rotations_are_rounded_once():
    tokens = (random(*TOKENS, 8) + 1).bfloat16()
    valid = random(*TOKENS) > -1
    tokens = torch.where(valid[..., None], tokens, 0.0)
    want = mean_token(tokens.double(), valid, Exchange()).bfloat16()
    assert torch.equal(mean_token(tokens, valid, Exchange()), want)
    x, angles = random(1, 1, 50, 2, 16).bfloat16(), rotary_angles(10**6, 10**6 + 50, 16)
    # One step of bf16, where fp32 and fp64 stand on either side of a border.
    torch.testing.assert_close(
        rotate(x, angles, 2), rotate(x.double(), angles, 2).bfloat16(), rtol=2**-7, atol=0
    )


LENGTH, SPAN = 256, 5  # distances beyond the span all take one entry


def qkv(*shape: int) -> list[Tensor]:
    return [random(*shape, 2, 8), random(*shape, 2, 8) + 0.1, random(*shape, 2, 8) + 1]


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("chunk", [lines.CHUNK, LENGTH * 4], ids=["whole", "in parts"])
def test_relative_tables_of_lines(dim, chunk):
    """In parts: two queries at a time, so keys and values get their gradients from many."""
    shape = (1, 2, LENGTH) if dim == 2 else (1, LENGTH, 2)
    with mock.patch.object(lines, "CHUNK", chunk):
        assert_adds_up(
            lambda q, k, v, table: attend(q, k, v, dim, bias=table),
            *qkv(*shape),
            random(2, 2 * SPAN - 1),
        )


def test_relative_tables_of_areas():
    tables = [random(2, 2 * SPAN - 1), random(2, 2 * SPAN)[:, 1:]]
    grid = Rect(0, 37, 0, 21)
    given = [*qkv(1, grid.height, grid.width), *tables]
    assert_adds_up(
        lambda q, k, v, *bias: attend_windows(q, k, v, grid, grid, 8, 4, bias=bias), *given
    )
    assert_adds_up(lambda q, k, v, *bias: attend_all(q, k, v, grid, bias=bias), *given)


# --- On a mesh ------------------------------------------------------------------------------------

TILES = {"row": 2, "col": 2}
MESHES: list[dict[str, Any]] = [
    TILES,
    TILES | {"exchange": "gather"},
    TILES | {"exchange": "heads"},
    {"row": 2, "tensor": 2},
]
SPREAD = [(name, mesh) for name in list(CASES)[-7:] for mesh in MESHES]
QUICK = [("summed, clipped, distilled", MESHES[0]), ("row+col relative", MESHES[3])]


def check_spread(chosen: list[tuple[str, dict[str, Any]]]) -> None:
    ranks = run_ranks(
        all_on_four_ranks, 4, cases=[(CASES[name], mesh) for name, mesh in chosen], timeout=120
    )
    for number, (name, mesh) in enumerate(chosen):
        want = trained(CASES[name], BF16)
        spread = [found[number] for found in ranks]
        assert all(one.loss.dtype is torch.float32 for one in spread)
        # The objective is the mean over ranks.
        loss = sum(float(one.loss) for one in spread) / 4
        assert loss == pytest.approx(float(want.loss), rel=5e-3), (name, mesh)
        for one in spread:
            assert all(dtypes <= {BF16} for dtypes in one.dtypes.values()), (name, mesh)
            found = distances(one, want)
            assert found.pop("all") < 0.02, (name, mesh)
            assert max(found.values()) < 0.04, (name, mesh, max(found, key=found.__getitem__))


def test_four_ranks_have_the_serial_gradients():
    check_spread(QUICK)


@pytest.mark.slow
def test_four_ranks_have_the_serial_gradients_on_every_mesh():
    check_spread([one for one in SPREAD if one not in QUICK])


def test_gradients_from_several_ranks_are_not_added_up_in_bf16():
    """256 + 1 + 1 + 1 = 259, which rounds to 260; in bf16 256 + 1 is 256 each time."""
    for grad in run_ranks(added_up, 4, timeout=60):
        assert grad.dtype is BF16
        assert torch.equal(grad, torch.full_like(grad, 260.0))
