"""Any mesh and any ZeRO stage take the steps of plain torch in one process.

Compared are the gradient's norm, which shows a wrong scale that Adam would hide, and the weights
after clipped steps of SGD; what is allowed is rounding.
"""

from dataclasses import replace

import pytest
import torch
from distributed.engine_ranks import (
    CHUNKED,
    TOY,
    build_toy,
    left_afterwards,
    serial_steps,
    train_steps,
)
from distributed.launcher import run_ranks
from distributed.state_ranks import Variant, steps_with_a_bad_one
from torch import nn

from axialtrain.mesh.mesh import Mesh, MeshConfig
from axialtrain.models.mlp import Mlp
from axialtrain.train.engine import Engine, OptimConfig, ZeroConfig

pytestmark = pytest.mark.slow

MESHES = {
    "2x2": MeshConfig(row=2, col=2),
    "data 2, row 2": MeshConfig(data=2, row=2),
    "col 2, tensor 2": MeshConfig(col=2, tensor=2),
}
RATES = [0.5, 0.4, 0.3]
SGD = OptimConfig("sgd", lr=0.5, weight_decay=0.1, momentum=0.9, clip=0.1)


@pytest.fixture(scope="module")
def start():
    return build_toy().state_dict()


@pytest.fixture(scope="module")
def expected():
    return serial_steps(TOY, SGD, RATES)


def assert_same_steps(got, expected, start):
    assert got.norms == pytest.approx(expected.norms, rel=1e-5)
    assert got.losses == pytest.approx(expected.losses, rel=1e-5)
    assert got.weights.keys() == expected.weights.keys()
    away, moved = {}, {}
    for name, weight in expected.weights.items():
        away[name] = (got.weights[name] - weight).norm()
        moved[name] = (weight - start[name]).norm()
        assert away[name] <= 1e-4 * moved[name], name
    assert sum(away.values()) <= 1e-6 * sum(moved.values())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("mesh", MESHES)
def test_steps_are_those_of_one_process(mesh, stage, expected, start):
    assert min(expected.norms) > 2 * SGD.clip, "clipping should be at work"
    results = run_ranks(
        train_steps,
        4,
        task=TOY,
        mesh=MESHES[mesh],
        zero=ZeroConfig(stage, persistence_threshold=0),
        optim=SGD,
        rates=RATES,
    )
    for got in results:
        assert_same_steps(got, expected, start)
        # What is replicated stays so, over tensor ranks too.
        assert all(torch.equal(got.weights[n], results[0].weights[n]) for n in got.weights)


@pytest.mark.parametrize("stage", [0, 3])
def test_one_process_runs_the_same_code(stage, expected, start):
    (got,) = run_ranks(
        train_steps,
        1,
        task=TOY,
        mesh=MeshConfig(),
        zero=ZeroConfig(stage, persistence_threshold=50),
        optim=SGD,
        rates=RATES,
        accumulation=4,
    )
    assert_same_steps(got, expected, start)


def test_ranks_need_not_have_had_the_same_engines_before(expected, start):
    for ranks in (1, 2):  # rank 0 is the same process
        for got in run_ranks(
            train_steps,
            ranks,
            task=TOY,
            mesh=MeshConfig(col=ranks),
            zero=ZeroConfig(3, persistence_threshold=0),
            optim=SGD,
            rates=RATES,
        ):
            assert_same_steps(got, expected, start)


@pytest.mark.parametrize("stage", [0, 2])
def test_clipping_can_be_off(stage, start):
    optim = OptimConfig("sgd", lr=0.1, weight_decay=0.1, momentum=0.0, clip=0.0)
    expected = serial_steps(TOY, optim, RATES)
    for got in run_ranks(
        train_steps,
        2,
        task=TOY,
        mesh=MeshConfig(tensor=2),
        zero=ZeroConfig(stage),
        optim=optim,
        rates=RATES,
    ):
        assert_same_steps(got, expected, start)


def test_adamw_has_the_serial_losses():
    optim = OptimConfig("adamw", lr=0.01, weight_decay=0.1, betas=[0.8, 0.95], clip=0.1)
    rates = [0.01] * 5
    expected = serial_steps(TOY, optim, rates)
    for got in run_ranks(
        train_steps,
        4,
        task=TOY,
        mesh=MESHES["col 2, tensor 2"],
        zero=ZeroConfig(1),
        optim=optim,
        rates=rates,
    ):
        assert got.losses == pytest.approx(expected.losses, rel=1e-5)


@pytest.mark.parametrize("mesh", [MeshConfig(row=2), MeshConfig(tensor=2)], ids=str)
def test_a_gradient_that_is_not_finite_changes_nothing_then_or_later(mesh):
    """Weights, moments and the count of updates; and the step after is as if it had not been."""
    variants = [
        Variant(stage, optim, precision)
        for stage in (0, 1, 2, 3)
        for optim, precision in (("sgd", "fp32"), ("adamw", "fp32"), ("adamw", "bf16"))
    ]
    run_ranks(steps_with_a_bad_one, 2, mesh=mesh, variants=variants, accumulation=2)


def test_an_engine_leaves_torch_as_it_was():
    """Or a process would have its gradients in another order than its peers, which ZeRO 2 adds up
    in the order of their coming. And DeepSpeed must keep nothing of the model on its stack."""
    assert run_ranks(left_afterwards, 1) == [(True, 0)]


def test_an_engine_needs_a_process_group():
    with pytest.raises(ValueError, match="init_process_group"):
        Engine(build_toy(), Mesh(), optim=SGD, zero=ZeroConfig(), micro_batch=1, accumulation=1)


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (ZeroConfig, "zero.stage", 4),
        (ZeroConfig, "zero.persistence_threshold", -1),
        (OptimConfig, "optim.name", "lion"),
        (OptimConfig, "optim.lr", -0.1),
        (OptimConfig, "optim.lr", float("nan")),
        (OptimConfig, "optim.weight_decay", -0.1),
        (OptimConfig, "optim.betas", [0.9]),
        (OptimConfig, "optim.betas", [0.9, 1.0]),
        (OptimConfig, "optim.momentum", 1.0),
        (OptimConfig, "optim.clip", -1.0),
    ],
)
def test_what_is_not_allowed_is_named(config, key, value):
    with pytest.raises(ValueError, match=rf"{key}=.*allowed"):
        config(**{key.partition(".")[2]: value})


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("mesh", ["data 2, row 2", "col 2, tensor 2"])
def test_an_mlp_in_chunks_takes_the_same_steps(mesh, stage):
    """Ranks have different numbers of chunks; at stage 3 there are none."""
    begin = CHUNKED.build()
    serial = replace(CHUNKED, build=build_unchunked)
    expected = serial_steps(serial, SGD, RATES)
    for got in run_ranks(
        train_steps,
        4,
        task=CHUNKED,
        mesh=MESHES[mesh],
        zero=ZeroConfig(stage, persistence_threshold=0),
        optim=SGD,
        rates=RATES,
    ):
        assert_same_steps(got, expected, begin.state_dict())


def build_unchunked() -> nn.Module:
    model = CHUNKED.build()
    for module in model.modules():
        if isinstance(module, Mlp):
            module.chunk = None
    return model
