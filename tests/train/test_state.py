"""The whole state of a run, saved on any mesh at any ZeRO stage, is that of plain torch, and every
mesh and stage goes on from it as if nothing had been.

All of it is trained, saved and loaded by the real parts: engine, files, reader. What is allowed
against plain torch is rounding in fp32; for bf16 the bounds are measured (see BF16).
"""

import functools
from dataclasses import dataclass

import pytest
import torch
from distributed import launcher
from distributed.engine_ranks import serial_steps
from distributed.launcher import run_ranks
from distributed.state_ranks import (
    OPTIMS,
    WHOLE,
    Variant,
    build_whole,
    go_on,
    in_a_row,
    rate_of,
    train_and_save,
)

from axialtrain.mesh.mesh import MeshConfig
from axialtrain.train.checkpoint import newest

pytestmark = pytest.mark.slow

STAGES = (0, 1, 2, 3)
MESHES = {
    "2x2": MeshConfig(row=2, col=2),
    "4x1": MeshConfig(row=4),
    "data 2, 2x1": MeshConfig(data=2, row=2),
    "2x1, tensor 2": MeshConfig(row=2, tensor=2),
    "tensor 2": MeshConfig(tensor=2),
    "1x2": MeshConfig(col=2),
    "1x1": MeshConfig(),
}
SAVED, LAST = 3, 8  # steps
SGD, ADAMW, SGD_BF16, ADAMW_BF16 = (
    (optim, precision) for precision in ("fp32", "bf16") for optim in ("sgd", "adamw")
)
KINDS = (SGD, ADAMW, SGD_BF16)
VARIANTS = [Variant(stage, *kind) for stage in STAGES for kind in KINDS]
BUFFERS = (
    "average",
    "statistics.running_mean",
    "statistics.running_var",
    "statistics.num_batches_tracked",
)


@functools.cache
def expected(optim: str, steps: int):
    return serial_steps(WHOLE, OPTIMS[optim], [rate_of(OPTIMS[optim], s) for s in range(steps)])


@functools.cache
def start():
    return build_whole().state_dict()


@pytest.fixture(scope="module")
def saved_on(tmp_path_factory):
    """saved_on(mesh): (folder of what was trained there and saved, norms of each variant)."""

    @functools.cache
    def made(mesh):
        folder = tmp_path_factory.mktemp("saved")
        config = MESHES[mesh]
        ranks = run_ranks(
            train_and_save, config.size, mesh=config, variants=VARIANTS, folder=folder, steps=SAVED
        )
        assert all(norms == ranks[0] for norms in ranks)
        return folder, ranks[0]

    return made


def files_of(folder):
    """Name, size and checksum of everything in a checkpoint."""
    saved = newest(folder)
    return dict(saved.files)


@dataclass(frozen=True)
class Bound:
    """How far from plain torch in fp32. norm: of gradients, relative. weight: |difference| of each
    parameter over the way that it has gone; whole: of all of them together. moment: the largest
    difference over the largest value, of each; moments: |difference| of all over all. buffer: as
    moment."""

    norm: float
    weight: float
    whole: float
    moment: float
    moments: float
    buffer: float


# Measured, the largest of all meshes, stages and pairs, after three steps and after eight:
# norm, weight, whole, moment, buffer. In fp32 SGD 1e-7, 3e-6, 5e-8, 1.5e-5, 2e-7. AdamW, which
# makes steps of the rounding of small gradients, 2e-7, 2e-4, 1e-5, 1.2e-5, 3e-7. SGD in bf16 9e-3,
# 2e-2, 6e-4, 0.3 (of one element, whose momentum has just changed its sign; else 3e-2), 2e-3.
BOUNDS = {
    ("sgd", "fp32"): Bound(1e-6, 1e-5, 5e-7, 5e-5, 1e-5, 1e-6),
    ("adamw", "fp32"): Bound(1e-6, 1e-3, 1e-4, 5e-5, 1e-5, 1e-6),
    ("sgd", "bf16"): Bound(2e-2, 5e-2, 2e-3, 0.6, 5e-2, 1e-2),
}


def assert_near(folder, norms, variant, steps):
    """What is saved in `folder` after `steps`, and the last norms, are those of plain torch."""
    bound, serial = BOUNDS[variant.optim, variant.precision], expected(variant.optim, steps)
    assert norms == pytest.approx(serial.norms[-len(norms) :], rel=bound.norm)
    weights = newest(folder).weights()
    assert weights.keys() == serial.weights.keys()
    away, moved = {}, {}
    for name, weight in serial.weights.items():
        if weight.dtype == torch.int64:
            assert torch.equal(weights[name], weight), name
        elif name in BUFFERS:
            assert distance(weights[name], weight) <= bound.buffer, name
        else:
            away[name] = (weights[name] - weight).norm()
            moved[name] = (weight - start()[name]).norm()
            assert away[name] <= bound.weight * moved[name], name
    assert sum(away.values()) <= bound.whole * sum(moved.values())
    with newest(folder).opened() as tensors:
        assert sorted(tensors.moment_names) == sorted(serial.moments)
        off = 0.0
        for name, moment in serial.moments.items():
            key, _, parameter = name.partition("/")
            got = tensors.moment(parameter, key)
            assert distance(got, moment) <= bound.moment, name
            off += (got - moment).norm()
        assert off <= bound.moments * sum(moment.norm() for moment in serial.moments.values())


def distance(got, reference):
    assert got.dtype == reference.dtype == torch.float32
    return (got - reference).abs().max() / reference.abs().max()


@pytest.mark.parametrize("mesh", MESHES)
def test_what_is_saved_is_what_plain_torch_has(mesh, saved_on):
    folder, norms = saved_on(mesh)
    for variant in VARIANTS:
        assert_near(folder / str(variant), norms[variant], variant, SAVED)


@pytest.mark.parametrize("mesh", MESHES)
def test_what_is_loaded_and_saved_again_is_the_same_to_the_bit(mesh, saved_on):
    folder, _ = saved_on(mesh)
    for variant in VARIANTS:
        assert files_of(folder / str(variant)) == files_of(folder / f"{variant}-again"), variant


def test_the_comparisons_are_not_empty_ones(saved_on):
    """Everything that is saved has moved, and no parameter divides by the ranks."""
    for optim, _ in KINDS:
        serial = expected(optim, SAVED)
        assert min(serial.norms) > 2 * OPTIMS[optim].clip, "clipping is at work"
        for name, value in serial.weights.items():
            if name not in ("frozen", "offset"):  # which are not to move
                assert not torch.equal(value, start()[name]), name
        assert all(moment.abs().max() > 0 for moment in serial.moments.values())
        other = build_whole(seed=5).state_dict()
        assert not any(torch.equal(other[name], start()[name]) for name in other)
    assert "scratch" not in start()
    sizes = [parameter.numel() for parameter in build_whole().parameters()]
    assert {size % 4 for size in sizes} == {0, 1, 2, 3}
    weights = newest(saved_on("2x2")[0] / str(VARIANTS[0])).weights()
    assert set(BUFFERS) < set(weights)
    assert weights["statistics.num_batches_tracked"] == torch.tensor(SAVED)
    assert torch.equal(weights["frozen"], start()["frozen"])


# Each stage to each other one; each mesh is left and reached.
PAIRS = [
    ((0, "2x2"), (1, "4x1")),
    ((0, "4x1"), (2, "1x1")),
    ((0, "data 2, 2x1"), (3, "2x2")),
    ((1, "2x1, tensor 2"), (0, "data 2, 2x1")),
    ((1, "tensor 2"), (2, "1x2")),
    ((1, "1x2"), (3, "2x1, tensor 2")),
    ((2, "1x1"), (0, "tensor 2")),
    ((2, "2x2"), (1, "data 2, 2x1")),
    ((2, "tensor 2"), (3, "2x2")),
    ((3, "data 2, 2x1"), (0, "1x2")),
    ((3, "1x2"), (1, "4x1")),
    ((3, "4x1"), (2, "2x1, tensor 2")),
]


def test_the_pairs_cover_all():
    assert len({(source[0], target[0]) for source, target in PAIRS}) == 12
    for end in (0, 1):
        assert {pair[end][0] for pair in PAIRS} == set(STAGES)
        assert {pair[end][1] for pair in PAIRS} == set(MESHES)
    assert all(source[1] != target[1] for source, target in PAIRS)


@pytest.mark.parametrize("mesh", MESHES)
def test_another_mesh_and_stage_go_on_as_plain_torch_does(mesh, saved_on, tmp_path):
    jobs = []
    for (source, source_mesh), (target, target_mesh) in PAIRS:
        if target_mesh == mesh:
            folder, _ = saved_on(source_mesh)
            for kind in KINDS:
                saved, variant = folder / str(Variant(source, *kind)), Variant(target, *kind)
                jobs.append((saved, variant, tmp_path / f"{len(jobs)}"))
    config = MESHES[mesh]
    ranks = run_ranks(go_on, config.size, mesh=config, jobs=jobs, steps=LAST - SAVED)
    assert all(norms == ranks[0] for norms in ranks)
    for (_, variant, folder), norms in zip(jobs, ranks[0], strict=True):
        assert len(norms) == LAST - SAVED
        assert_near(folder, norms, variant, LAST)


@pytest.mark.parametrize(
    ("mesh", "variants"),
    [
        (
            "2x2",
            [
                *(Variant(stage, *SGD) for stage in STAGES),
                *(Variant(stage, *ADAMW_BF16) for stage in (0, 3)),
                Variant(1, "plain sgd"),
            ],
        ),
        (
            "2x1, tensor 2",
            [*(Variant(stage, *ADAMW) for stage in STAGES), Variant(1, *SGD_BF16)],
        ),
    ],
    ids=["2x2", "2x1, tensor 2"],
)
def test_new_processes_on_the_same_mesh_go_on_to_the_bit(mesh, variants, tmp_path):
    config = MESHES[mesh]
    run_ranks(in_a_row, config.size, mesh=config, variants=variants, folder=tmp_path)
    launcher._workers.stop()
    jobs = [
        (tmp_path / f"{variant}-{step}", variant, tmp_path / f"{variant}-from-{step}")
        for variant in variants
        for step in (0, 3)
    ]
    run_ranks(go_on, config.size, mesh=config, jobs=jobs, steps=3)
    for variant in variants:
        assert files_of(tmp_path / f"{variant}-from-0") == files_of(tmp_path / f"{variant}-3")
        assert files_of(tmp_path / f"{variant}-from-3") == files_of(tmp_path / str(variant))
