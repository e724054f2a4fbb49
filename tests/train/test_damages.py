"""Damaged data in a run: all ranks do the same, what was left out is kept and within a budget."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from distributed.damage_ranks import IMAGES, settle_on_ranks, settle_twice, states_differ
from distributed.launcher import RankError, run_ranks

from axialtrain.data.damage import Damage, DamageConfig
from axialtrain.data.region import open_shards
from axialtrain.data.shard import shard_images
from axialtrain.mesh.mesh import MeshConfig

MESH = MeshConfig(data=2, row=2)  # ranks 0, 1 share a batch, and 2, 3 another
TILE = Damage("a", "tile", 1, 2, 1, "s.tar: byte 512: member a: is damaged")
BLOCK = Damage("b", "block", 0, 1, 60, "s.tar: byte 9216: block b: is damaged")
IMAGE = Damage("c", "image", 0, 0, 0, "s.tar: head of 'c' is damaged")
FOUND = [
    {},
    {1: {0: [TILE]}, 2: {2: [BLOCK]}, 3: {2: [BLOCK]}},
    {0: {0: [TILE]}},  # met again in the next epoch: it counts once
    {3: {1: [IMAGE]}},
]


def lines_of(folder: Path) -> list[dict[str, object]]:
    path = folder / "bad_tiles.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_masks_are_counted_alike_and_kept(tmp_path):
    ranks = run_ranks(
        settle_on_ranks, 4, mesh=MESH, config=DamageConfig("mask"), found=FOUND, folder=tmp_path
    )
    for rank in ranks:
        assert rank.raised == ""
        assert rank.counts == [(0, 0), (61, 0), (61, 0), (61, 1)]
        assert all(weight.tolist() == [1] * IMAGES for weight in rank.weights)
        assert all(torch.equal(valid, rank.valid[0]) for valid in rank.valid)
    assert lines_of(tmp_path) == [
        {"step": 2, **asdict(TILE)},
        {"step": 2, **asdict(BLOCK)},
        {"step": 4, **asdict(IMAGE)},
    ]


def test_a_skipped_image_counts_on_no_rank(tmp_path):
    config = DamageConfig("skip_image")
    ranks = run_ranks(settle_on_ranks, 4, mesh=MESH, config=config, found=FOUND, folder=tmp_path)
    expected = [[[1, 1, 1], [0, 1, 1], [0, 1, 1], [1, 1, 1]]] * 2
    expected += [[[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 1]]] * 2
    for rank, weights in zip(ranks, expected, strict=True):
        assert [weight.tolist() for weight in rank.weights] == weights
        assert rank.counts == [(0, 0), (61, 2), (61, 2), (61, 3)]
        assert all(rank.empty)
    assert len(lines_of(tmp_path)) == 3


@pytest.mark.parametrize(
    ("config", "step", "said"),
    [
        (DamageConfig("mask", tiles=60), 2, "61 tiles are damaged, data.damage.tiles is 60"),
        (DamageConfig("mask", images=0), 4, "1 images are damaged, data.damage.images is 0"),
        (DamageConfig("skip_image", images=1), 2, "2 images are damaged, data.damage.images is 1"),
    ],
)
def test_past_the_budget_all_ranks_stop_with_the_list(tmp_path, config, step, said):
    ranks = run_ranks(settle_on_ranks, 4, mesh=MESH, config=config, found=FOUND, folder=tmp_path)
    assert len({rank.raised for rank in ranks}) == 1
    raised = ranks[0].raised
    assert raised.startswith(f"DamagedError: step {step}: {said}")
    last = IMAGE if step == 4 else BLOCK
    assert str(last) in raised
    assert len(ranks[0].weights) == step - 1
    assert lines_of(tmp_path)[-1] == {"step": step, **asdict(last)}  # before it stopped


def test_a_run_that_goes_on_knows_what_it_had_met(tmp_path):
    options = {"mesh": MESH, "config": DamageConfig("mask", tiles=61, images=0)}
    first = run_ranks(settle_on_ranks, 4, found=FOUND[:2], folder=tmp_path, **options)
    assert first[0].counts[-1] == (61, 0)
    again = run_ranks(
        settle_on_ranks, 4, found=[FOUND[2], FOUND[1]], folder=tmp_path, resumed=2, **options
    )
    assert [rank.counts for rank in again] == [[(61, 0), (61, 0)]] * 4
    assert len(lines_of(tmp_path)) == 2
    # Lines of steps that are taken again are written again.
    run_ranks(settle_on_ranks, 4, found=FOUND[1:3], folder=tmp_path, resumed=1, **options)
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 2]


@pytest.mark.parametrize("policy", ["mask", "skip_image"])
def test_tensor_ranks_that_disagree_stop(tmp_path, policy):
    """They read the same bytes: what only one finds damaged was not stored so."""
    mesh, config = MeshConfig(row=2, tensor=2), DamageConfig(policy)
    alike = [{2: {1: [TILE]}, 3: {1: [TILE]}}]
    ranks = run_ranks(
        settle_on_ranks, 4, mesh=mesh, config=config, found=alike, folder=tmp_path / "alike"
    )
    assert [rank.raised for rank in ranks] == [""] * 4
    with pytest.raises(RankError, match="not for another"):
        run_ranks(
            _raising, 4, mesh=mesh, config=config, found=[{3: {1: [TILE]}}], folder=tmp_path / "one"
        )


def _raising(**options):
    raised = settle_on_ranks(**options).raised
    if raised:
        raise RuntimeError(raised)


def test_held_out_images_are_told_apart(tmp_path):
    """Training and validation may have images of one name."""
    (both,) = run_ranks(settle_twice, 1, folder=tmp_path)
    assert both == (2, 0)
    assert [line["image"] for line in lines_of(tmp_path)] == ["a", "validation/a"]


def test_ranks_with_other_shards_are_refused():
    raised = run_ranks(states_differ, 2)
    assert raised[0] == raised[1]
    assert raised[0].startswith("data.shards: rank 1 has other shards, or another order of them")


# --- Whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(small_shards, tmp_path_factory):
    """Two scenes of 512 px, in one of which a block of 256 px is damaged."""
    folder = tmp_path_factory.mktemp("damaged") / "shards"
    shutil.copytree(small_shards, folder)
    shards = open_shards(str(folder))
    (block,) = shards.head("scene_0001").blocks[:1]
    tar = folder / shards.row("scene_0001").shard
    data = bytearray(tar.read_bytes())
    data[block.offset + 700] ^= 4
    tar.write_bytes(data)
    return folder


def a_run(axialtrain, shards, folder, *arguments):
    return axialtrain(
        "train", "experiment=quickstart", f"data.shards={shards}", "data.validation=null",
        "data.window=null", "model.dim=16", "model.depth=1", "model.heads=2", "train.steps=2",
        "train.batch=2", "train.micro_batch=2", "optim=sgd", "logger=none",
        f"hydra.run.dir={folder}", *arguments, cwd=folder.parent,
    )  # fmt: skip


def losses_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_a_run_goes_on_alike_on_any_mesh(axialtrain, damaged, tmp_path):
    for mesh in ("single", "2x2"):
        done = a_run(
            axialtrain, damaged, tmp_path / mesh, f"mesh={mesh}", "data.damage.policy=mask"
        )
        assert done.returncode == 0, done.stderr
        assert "damaged, and left out: " in done.stdout
        assert "see bad_tiles.jsonl" in done.stdout
    (line,) = lines_of(tmp_path / "single")
    assert (line["image"], line["part"]) == ("scene_0001", "block")
    assert lines_of(tmp_path / "2x2") == [line]
    single, mesh = losses_of(tmp_path / "single"), losses_of(tmp_path / "2x2")
    assert len(single) == 2
    assert mesh == pytest.approx(single, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "is damaged (its CRC-32C is not the stored one)"),
        (
            ["data.damage.policy=mask", "data.damage.tiles=0"],
            "are damaged, data.damage.tiles is 0",
        ),
    ],
)
def test_a_run_stops_on_all_ranks_and_says_why(axialtrain, damaged, tmp_path, arguments, said):
    done = a_run(axialtrain, damaged, tmp_path / "run", "mesh=2x2", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "shard-00000.tar: byte " in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count(said) == 1 or not arguments


def break_shard(fault, folder):
    """What becomes of the shard of scene_0001, which is its alone."""
    row = open_shards(str(folder)).row("scene_0001")
    (block,) = open_shards(str(folder)).head("scene_0001").blocks[:1]
    tar = folder / row.shard
    if fault == "missing":
        tar.unlink()
    elif fault == "cut short":
        tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    else:
        data = bytearray(tar.read_bytes())
        data[{"tar header": block.offset + 3, "head": row.head_offset + 10}[fault]] ^= 4
        tar.write_bytes(data)


@pytest.fixture(scope="module")
def apart(small_shards, tmp_path_factory):
    """The two scenes, each in a shard of its own."""
    scenes = small_shards.parent / "scenes"
    names = [f"scene_{number:04d}" for number in range(2)]
    folder = tmp_path_factory.mktemp("apart") / "shards"
    shard_images(
        [scenes / f"{name}.tif" for name in names],
        folder,
        labels=[scenes / f"{name}_labels.tif" for name in names],
        shard_bytes=1,
        progress=False,
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "policy", "part"),
    [
        ("missing", "skip_image", "image"),
        ("cut short", "mask", "image"),
        ("tar header", "skip_image", "block"),
        ("head", "mask", "image"),
    ],
)
def test_a_policy_holds_for_each_fault(axialtrain, apart, tmp_path, fault, policy, part):
    folder = tmp_path / "shards"
    shutil.copytree(apart, folder)
    break_shard(fault, folder)
    for mesh in ("single", "2x2"):
        done = a_run(
            axialtrain, folder, tmp_path / mesh, f"mesh={mesh}", f"data.damage.policy={policy}"
        )
        assert done.returncode == 0, done.stderr
    (line,) = lines_of(tmp_path / "single")
    assert (line["image"], line["part"]) == ("scene_0001", part)
    assert lines_of(tmp_path / "2x2") == [line]
    single, mesh = losses_of(tmp_path / "single"), losses_of(tmp_path / "2x2")
    assert len(single) == 2
    assert mesh == pytest.approx(single, rel=1e-5)
