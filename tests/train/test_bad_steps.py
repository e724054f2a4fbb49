"""Steps that should not count: what each policy makes of a NaN that one rank meets and of a spike,
at every ZeRO stage, against plain arithmetic in fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from distributed.keep_ranks import (
    CASE,
    EMPTY,
    NAN,
    SPIKE,
    lines_of,
    plain_with_faults,
    train_with_faults,
)
from distributed.launcher import run_ranks
from distributed.task_ranks import IMAGES

from axialtrain.mesh.mesh import MeshConfig
from axialtrain.train.checkpoint import newest
from axialtrain.train.config import CheckpointConfig, FaultsConfig
from axialtrain.train.faults import fault_of

STEPS = 8
MESH = MeshConfig(data=2, row=2)
SKIP = FaultsConfig(nonfinite="skip", spike="skip", spike_window=2)
ROLLBACK = replace(SKIP, nonfinite="rollback", spike="rollback")
STOP = replace(SKIP, nonfinite="stop", spike="stop")


# --- From the losses alone ------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite(loss):
    assert fault_of(loss, [], FaultsConfig()) == "nonfinite"


@pytest.mark.parametrize(
    ("loss", "before", "fault"),
    [
        (2.9, [1.0, 5.0, 1.0], None),  # of the median, which one spike does not move
        (3.1, [1.0, 5.0, 1.0], "spike"),
        (99.0, [1.0, 1.0], None),  # too few to judge by
        (99.0, [500.0, 500.0, 500.0, 1.0, 1.0, 1.0], "spike"),  # only the last three count
        (0.1, [1.0, 1.0, 1.0], None),
    ],
)
def test_a_spike_is_judged_by_the_losses_before(loss, before, fault):
    config = FaultsConfig(spike="skip", spike_factor=3.0, spike_window=3)
    assert fault_of(loss, before, config) == fault
    assert fault_of(loss, before, replace(config, spike="off")) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nonfinite", "off"),
        ("nonfinite", "ignore"),
        ("spike", "ignore"),
        ("spike_factor", 1.0),
        ("spike_factor", math.inf),
        ("spike_window", 0),
        ("limit", -1),
    ],
)
def test_what_is_not_allowed_is_named(key, value):
    with pytest.raises(ValueError, match=rf"faults\.{key}=.*allowed"):
        FaultsConfig(**{key: value})


# --- In the loop ----------------------------------------------------------------------------------


def run(tmp_path, stage, faults, bad, **options):
    return run_ranks(
        train_with_faults,
        4,
        mesh=options.pop("mesh", MESH),
        stage=stage,
        steps=STEPS,
        bad=bad,
        faults=faults,
        folder=tmp_path / "run",
        **options,
    )


def assert_weights(ranks, expected):
    start = CASE.build().state_dict()
    away = moved = 0.0
    for name, weight in expected.items():
        for got in ranks:
            assert torch.equal(got.weights[name], ranks[0].weights[name]), name
        away += float((ranks[0].weights[name] - weight).square().sum())
        moved += float((weight - start[name]).square().sum())
    assert moved > 0
    assert away**0.5 <= 1e-5 * moved**0.5


def every_sample(step):
    return sorted(f"image {index} of {step}" for index in range(IMAGES))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_bad_batch_is_left_out(tmp_path, policy, stage):
    faults = SKIP if policy == "skip" else ROLLBACK
    bad = {3: NAN, 5: SPIKE}
    ranks = run(tmp_path, stage, faults, bad)
    assert [got.raised for got in ranks] == [""] * 4
    assert_weights(ranks, plain_with_faults(STEPS, list(bad), rollback=policy == "rollback"))

    # Rolled back: to the 2 steps of checkpoint 2, which is checkpoint 4 too, twice; then two more.
    done = {"skip": 6, "rollback": 4}[policy]
    assert [got.updates for got in ranks] == [done] * 4
    told = lines_of(tmp_path / "run" / "faults.jsonl")
    assert [(line["step"], line["fault"]) for line in told] == [(4, "nonfinite"), (6, "spike")]
    assert [sorted(line["samples"]) for line in told] == [every_sample(3), every_sample(5)]
    assert {line["policy"] for line in told} == {policy}
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "left_out" in line] == [4, 6]
    assert lines[3]["loss"] is None  # JSON has no NaN


@pytest.mark.slow
def test_steps_without_targets_are_told_of_once_and_hide_no_spike(tmp_path):
    ranks = run(tmp_path, 1, SKIP, {2: EMPTY, 3: EMPTY, 4: EMPTY, 5: SPIKE})
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["loss"] == 0] == [3, 4, 5]
    told = lines_of(tmp_path / "run" / "faults.jsonl")
    assert [(line["step"], line["fault"]) for line in told] == [(6, "spike")]
    said = [text for got in ranks for text in got.warned if "target" in text]
    (text,) = said
    assert text.startswith("step 3: none of its images has a target, so its loss is 0")


@pytest.mark.slow
def test_the_weights_of_the_two_policies_differ():
    skipped, back = (plain_with_faults(STEPS, [3, 5], rollback=b) for b in (False, True))
    whole = plain_with_faults(STEPS, [])
    assert not any(torch.allclose(skipped[name], back[name], rtol=1e-3) for name in whole)
    assert not any(torch.allclose(skipped[name], whole[name], rtol=1e-3) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "stage"), [(NAN, 0), (SPIKE, 1), (NAN, 3)])
def test_the_run_stops_and_names_the_samples(tmp_path, how, stage):
    ranks = run(tmp_path, stage, STOP, {5: how})
    for got in ranks:
        assert got.raised.startswith("step 6: the loss is ")
        assert all(name in got.raised for name in every_sample(5))
        assert f"faults.{'nonfinite' if how == NAN else 'spike'}=stop" in got.raised
    assert newest(tmp_path / "run").step == 4
    # What stopped it is still to come: another policy gets past it.
    after = run(tmp_path, (stage + 1) % 4, SKIP, {5: how}, mesh=MeshConfig(row=2, col=2),
                resume=True)  # fmt: skip
    assert [got.raised for got in after] == [""] * 4
    assert_weights(after, plain_with_faults(STEPS, [5]))


@pytest.mark.slow
def test_a_resumed_run_decides_again_as_it_did(tmp_path):
    bad = {3: SPIKE, 5: NAN}
    whole = run(tmp_path, 2, ROLLBACK, bad)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-00000008" / "checkpoint.json").unlink()  # as if killed in that save
    again = run(tmp_path, 2, ROLLBACK, bad, resume=True)
    for name, weight in whole[0].weights.items():
        assert torch.equal(again[0].weights[name], weight), name
    for key in ("step", "left_out", "losses"):
        assert again[0].progress[key] == whole[0].progress[key]
    assert [line["step"] for line in lines_of(tmp_path / "run" / "faults.jsonl")] == [4, 6]


@pytest.mark.slow
def test_too_many_stop_the_run(tmp_path):
    ranks = run(tmp_path, 1, replace(SKIP, limit=1), {2: NAN, 4: NAN})
    for got in ranks:
        assert "step 5" in got.raised
        assert "batch 2 to be left out, faults.limit is 1" in got.raised


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_in_bf16_a_bad_batch_changes_nothing(tmp_path, stage):
    """Left out at the end, so that what is there is what was there before it, to the bit."""
    bad = {STEPS - 1: NAN}
    ranks = run(
        tmp_path, stage, SKIP, bad, precision="bf16", checkpoint=CheckpointConfig(every=STEPS - 1)
    )
    with newest(tmp_path / "run").opened() as last:
        names = last.weight_names
    before = tmp_path / "run" / "checkpoints" / f"step-{STEPS - 1:08d}"
    with newest(before).opened() as tensors:
        for name in names:
            assert torch.equal(tensors.weight(name), ranks[0].weights[name]), name
    assert ranks[0].updates == STEPS - 1
