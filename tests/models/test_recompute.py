"""Layers that are computed again have the same gradients, on one rank and on several."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from distributed.launcher import run_ranks
from distributed.model_ranks import Case, serial, sharded
from torch import nn

from axialtrain.models import recompute
from axialtrain.models.layer import Layer
from axialtrain.models.recompute import Recompute
from axialtrain.models.transformer import AxialTransformer, AxialTransformerConfig
from axialtrain.train.compose import compose_run

CASE = Case(
    (7, 5),
    ("row+col", "window", "col+row"),
    "relative",
    depth=5,
    prefix=2,
    skip_axis=0.6,
    drop_path=0.5,
)
WAYS = [Recompute(1), Recompute(2), Recompute(3, 0.5), Recompute(1, 1.0), Recompute(9, 1.0)]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_gradients_are_the_same_to_the_last_bit(way):
    want, got = serial(CASE), serial(replace(CASE, recompute=way))
    assert torch.equal(got.output, want.output)
    assert torch.equal(got.input, want.input)
    assert got.parameters.keys() == want.parameters.keys()
    for name, gradient in want.parameters.items():
        assert torch.equal(got.parameters[name], gradient), name


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"row": 2, "col": 2}, {"col": 2, "tensor": 2}], ids=str)
def test_on_a_mesh_too(mesh):
    case = replace(CASE, recompute=Recompute(2, 0.5))
    without, with_it = (run_ranks(sharded, 4, case=one, mesh=mesh) for one in (CASE, case))
    for want, got in zip(without, with_it, strict=True):
        assert torch.equal(got.input, want.input)
        for name, gradient in want.parameters.items():
            assert torch.equal(got.parameters[name], gradient), name


@pytest.mark.parametrize(
    ("way", "forward", "backward"),
    [(Recompute(), 5, 0), (Recompute(1), 5, 5), (Recompute(2), 5, 5)],
)
def test_layers_run_again_in_backward_alone_and_not_in_evaluation(way, forward, backward):
    model = AxialTransformer(AxialTransformerConfig(patch=2, dim=8, heads=2, depth=5))
    model.recompute = way
    calls: list[nn.Module] = []
    for layer in model.blocks:
        layer.register_forward_pre_hook(lambda layer, _: calls.append(layer))
    tokens, _ = model(torch.randn(1, 8, 8, 3))
    assert len(calls) == forward
    tokens.sum().backward()
    assert len(calls) == forward + backward
    with mock.patch.object(recompute, "checkpoint") as never:
        model.eval()(torch.randn(1, 8, 8, 3))
    never.assert_not_called()
    assert all(isinstance(layer, Layer) for layer in calls)


def test_what_waits_on_the_host_is_its_share_of_the_tokens():
    moved = []
    for offload in (0.0, 0.4, 1.0):
        model = AxialTransformer(AxialTransformerConfig(patch=2, dim=8, heads=2, depth=5))
        model.recompute = Recompute(1, offload)
        whole = recompute.save_on_cpu
        with mock.patch.object(recompute, "save_on_cpu", side_effect=whole) as hooks:
            model(torch.randn(1, 8, 8, 3))
        moved.append(hooks.call_count)
        assert all(call.kwargs == {"pin_memory": False} for call in hooks.call_args_list)
    assert moved == [0, 2, 5]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.recompute=-1"], "train.recompute=-1: allowed are whole numbers from 0"),
        (["train.recompute=1", "train.offload=1.5"], "train.offload=1.5: allowed are numbers"),
        (["train.offload=0.5"], "train.offload=0.5 is a share of what train.recompute keeps"),
        (["train.recompute=1", "model=axial_resnet50s"], "train.recompute=1: only an axial tran"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        compose_run(["data.shards=x", *overrides])


def test_a_run_says_how_much_it_keeps():
    train = compose_run(["data.shards=x", "train.recompute=2", "train.offload=0.25"])[0].train
    assert (train.recompute, train.offload) == (2, 0.25)
