"""docker/: what its own tools say of it, and what the files in it rely on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from repository import REPOSITORY

DOCKER = REPOSITORY / "docker"
DOCKERFILES = ["Dockerfile", "Dockerfile.cpu"]
TOOLS = Path(sys.executable).parent


def checked(*command: object) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name):
    checked(TOOLS / "hadolint", DOCKER / name)


def test_hadolint_would_find_something(tmp_path):
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python\nRUN cd /tmp\nRUN pip install numpy\n")
    with pytest.raises(AssertionError, match="DL3006"):
        checked(TOOLS / "hadolint", bad)


def test_the_compose_file_is_one(tmp_path):
    check = [TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec"]
    checked(*check, DOCKER / "compose.yaml")
    bad = tmp_path / "compose.yaml"
    bad.write_text((DOCKER / "compose.yaml").read_text().replace("depends_on", "depends"))
    with pytest.raises(AssertionError, match="depends"):
        checked(*check, bad)


def test_the_two_nodes_meet():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    nodes = compose["services"]
    assert len(nodes) == 2
    for name, node in nodes.items():
        assert node["hostname"] == name, "torchrun knows the host of its endpoint by its name"
        assert (DOCKER / node["build"]["context"]).resolve() == REPOSITORY
        assert (REPOSITORY / node["build"]["dockerfile"]).is_file()
        options = dict(part[2:].split("=") for part in node["command"] if part.startswith("--"))
        assert int(options["nnodes"]) == len(nodes)
        assert options["rdzv-endpoint"].split(":")[0] in nodes
        rows, cols = map(int, next(
            re.fullmatch(r"mesh=(\d+)x(\d+)", part) for part in node["command"] if "mesh=" in part
        ).groups())  # fmt: skip
        assert rows * cols == len(nodes) * int(options["nproc-per-node"])
        (volume,) = node["volumes"]
        assert volume.split(":")[1] == "/work"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_pinned_small_and_not_root(name):
    text = re.sub(r"\\\n", "", (DOCKER / name).read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert next(line for line in lines if line.startswith("HEALTHCHECK")).endswith(
        'CMD ["axialtrain", "doctor"]'
    )
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000"]
    assert lines.index("USER 1000") > max(
        number for number, line in enumerate(lines) if line.startswith("RUN")
    )
    for install in re.findall(r"pip install [^&]*", text):
        assert "--constraint constraints.txt" in install
    assert "PIP_NO_CACHE_DIR=1" in text
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    copied = [
        source
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    assert {"axialtrain", "configs", "launch", "constraints.txt", "pyproject.toml"} <= set(copied)
    for source in copied:
        assert (REPOSITORY / source).exists()
        assert source in allowed
    assert ignored[ignored.index("*") + 1].startswith("!"), "nothing else goes to the builder"
    assert "**/__pycache__" in ignored[ignored.index("*") + 1 :]


def test_the_base_has_the_torch_that_is_pinned():
    pins = (REPOSITORY / "constraints.txt").read_text().splitlines()
    (torch,) = [pin.removeprefix("torch==") for pin in pins if pin.startswith("torch==")]
    assert f"ARG BASE=pytorch/pytorch:{torch}-" in (DOCKER / "Dockerfile").read_text()
