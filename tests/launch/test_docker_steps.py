"""The steps of docker/Dockerfile.cpu, executed. It takes minutes, gigabytes and a file system:

mmdebstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm BASE
AXIALTRAIN_BASE=BASE .venv/bin/python -m pytest tests/launch/test_docker_steps.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from dockerfile_steps import Image, build, inside, instructions
from repository import REPOSITORY
from system_tools import root

MINUTES = 60.0


def test_instructions_are_read_as_a_builder_does():
    text = "# a comment\nFROM x AS y\nRUN one \\\n# between\n && two\n\nENV A=1 B=2\n"
    assert instructions(text) == [("FROM", "x AS y"), ("RUN", "one && two"), ("ENV", "A=1 B=2")]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif("AXIALTRAIN_BASE" not in os.environ, reason="AXIALTRAIN_BASE names no folder")
def test_the_cpu_image_is_built_and_trains(tmp_path):
    root()
    dockerfile = REPOSITORY / "docker" / "Dockerfile.cpu"
    base = Path(os.environ["AXIALTRAIN_BASE"])
    settings = {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
    image = build(dockerfile, REPOSITORY, base, tmp_path, 15 * MINUTES, **settings)
    assert image.user == "1000"
    assert not inside(image, "src").exists(), "the last stage has no sources"
    who = image.run(["sh", "-c", "id -u && touch here && ! touch /opt/axialtrain/there"], MINUTES)
    assert who.stdout.startswith("1000\n"), who.stdout
    assert who.returncode == 0, who.stdout
    trained = image.run(
        [*image.command, "--scenes", "2", "1", "train.steps=2", "hydra.run.dir=runs/mine"],
        10 * MINUTES, HOME="/home/axialtrain", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stdout
    for name in ("loss.png", "prediction.png", "checkpoints"):
        assert (inside(image, "work") / "runs" / "mine" / name).exists()
    healthy(image)


def healthy(image: Image) -> None:
    done = image.run(image.health, MINUTES, HOME="/home/axialtrain")
    assert done.returncode == 0, done.stdout
