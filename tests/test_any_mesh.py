"""From a slide to weights, on any mesh: the same losses at every step and the same weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from axialtrain.data.loader import Loader
from axialtrain.data.readers import tiles_of
from axialtrain.data.region import open_shards
from axialtrain.models.transformer import AxialTransformer
from axialtrain.train.check import task_of
from axialtrain.train.checkpoint import newest
from axialtrain.train.compose import compose_run

MESHES = {
    "1x1": ["mesh=1x1"],
    "2x2": ["mesh=2x2", "zero=2"],
    "1x3": ["mesh=1x3", "zero=3", "zero.persistence_threshold=0"],
    "data 2": ["mesh.data=2", "train.micro_batch=1", "zero=1"],
    "tensor 2": ["mesh.tensor=2", "zero=0"],
}
STEPS = 20
LENGTH = {"sgd": STEPS, "adamw": 8}
# Nothing divides: 63 x 69 tokens, the last of each line partial.
OVERRIDES = ["experiment=reconstruct", "data.window=[1000,1100]", f"train.steps={STEPS}"]

pytestmark = pytest.mark.slow


@dataclass
class Result:
    losses: list[float]
    weights: dict[str, Tensor]
    reading: list[dict[str, int]]


@pytest.fixture(scope="module")
def slide_shards(axialtrain, slide, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slide")
    done = axialtrain("shard", slide, "--out", folder / "shards", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "shards"


@pytest.fixture(scope="module")
def run_on(axialtrain, slide_shards, tmp_path_factory):
    def run(mesh: str, optim: str) -> Result:
        folder = tmp_path_factory.mktemp("run") / "here"
        steps = LENGTH[optim]
        done = axialtrain(
            "train", *OVERRIDES, *MESHES[mesh], f"optim={optim}", f"data.shards={slide_shards}",
            f"hydra.run.dir={folder}", f"train.steps={steps}", cwd=folder.parent,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        reading = json.loads((folder / "reading.json").read_text())
        weights = newest(folder).weights()
        return Result([line["loss"] for line in lines], weights, reading)

    return run


@pytest.fixture(scope="module")
def one_process(run_on) -> dict[str, Result]:
    return {optim: run_on("1x1", optim) for optim in ("sgd", "adamw")}


@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if mesh != "1x1"])
def test_sgd(run_on, one_process, slide_shards, mesh):
    expected, got = one_process["sgd"], run_on(mesh, "sgd")
    assert got.losses == pytest.approx(expected.losses, rel=1e-4)
    assert expected.losses[-1] < 0.9 * expected.losses[0], "it learned nothing to compare"
    start = initial_weights()
    assert got.weights.keys() == expected.weights.keys() == start.keys()
    moved = distance(expected.weights, start)
    assert moved > 0
    assert distance(got.weights, expected.weights) <= 1e-4 * moved
    assert_each_tile_is_read_where_it_is_needed(got.reading, slide_shards, mesh)


@pytest.mark.parametrize("mesh", ["2x2", "tensor 2"])
def test_adamw(run_on, one_process, mesh):
    assert run_on(mesh, "adamw").losses == pytest.approx(one_process["adamw"].losses, rel=1e-4)


def initial_weights() -> dict[str, Tensor]:
    config, _, _ = compose_run([*OVERRIDES, "data.shards=x"])
    torch.manual_seed(config.seed)
    return task_of(config).build(AxialTransformer(config.model)).state_dict()


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Between all weights, as one vector."""
    return float(sum((left[n].double() - right[n].double()).square().sum() for n in left) ** 0.5)


def assert_each_tile_is_read_where_it_is_needed(reading, slide_shards, mesh) -> None:
    """Each rank decoded the tiles that its tokens touch, by arithmetic, and no other."""
    config, _, _ = compose_run([*OVERRIDES, *MESHES[mesh], f"data.shards={slide_shards}"])
    shards = open_shards(str(slide_shards))
    for rank in reading:
        loader = Loader(
            shards,
            config.data,
            patch=config.model.patch,
            mesh_shape=(config.mesh.row, config.mesh.col),
            at=(rank["row"], rank["col"]),
            data_rank=rank["data"],
            data_ranks=config.mesh.data,
            batch=config.train.batch,
            micro_batch=config.train.micro_batch,
            seed=config.seed,
        )
        tiles = 0
        for step in range(STEPS):
            for position in range(config.train.batch):
                if position % config.mesh.data != rank["data"]:
                    continue
                window = loader.windows[loader.order[step * config.train.batch + position]]
                head = shards.head(window.name)
                size = (window.rect.height, window.rect.width)
                mine = loader._place([size]).rect.scaled(config.model.patch)
                part = mine.shifted(window.rect.top, window.rect.left).intersect(window.rect)
                tiles += len(list(tiles_of(part, head.height, head.width, head.tile)))
        assert rank["tiles_decoded"] == tiles
        assert rank["bytes_read"] > 0
        assert rank["head_bytes_read"] >= sum(row.head_length for row in shards.images)
