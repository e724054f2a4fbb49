"""The Python that the pages of docs/ show runs, each page from its first block to its last; and the
runs that they name can be composed, and their models built."""

from __future__ import annotations

import re
import shlex
import tomllib

import pytest
import torch
import torchvision_ops  # noqa: F401 (lets timm be imported)
from repository import REPOSITORY

from axialtrain.cli import main
from axialtrain.models.registry import build_backbone
from axialtrain.train.check import task_of
from axialtrain.train.compose import compose_run

TEXTS = {page.name: page.read_text() for page in sorted((REPOSITORY / "docs").glob("*.md"))}
PAGES = {name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for name, text in TEXTS.items()}


def commands(name: str) -> list[list[str]]:
    """The words of each `axialtrain NAME` of the pages, in blocks and in lines; those that leave
    something out (`...`) are no commands."""
    found = []
    for text in TEXTS.values():
        for one in re.findall(rf"axialtrain {name} (?:[^`\n]|\\\n)*", text.replace("\\\n", " ")):
            words = shlex.split(one, comments=True)[2:]
            if any("=" in word for word in words) and "..." not in one and "|" not in one:
                found.append(words)
    return found


TRAIN, LAUNCH = commands("train"), commands("launch")


def test_there_are_blocks():
    assert len(PAGES["attention.md"]) == 3


@pytest.mark.parametrize("page", [name for name, blocks in PAGES.items() if blocks])
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(PAGES[page]):
        exec(compile(block, f"docs/{page}, block {number}", "exec"), names)


def test_there_are_commands():
    assert len(TRAIN) >= 9
    assert len(LAUNCH) >= 1
    assert any("data=tiles" in words for words in TRAIN)


@pytest.mark.parametrize("words", TRAIN, ids=" ".join)
def test_a_run_of_the_pages_has_a_model(words):
    """All but what its shards and its files of weights are asked for."""
    shards = [] if any(word.startswith(("data.shards", "experiment")) for word in words) else ["x"]
    config, *_ = compose_run([*words, *(f"data.shards={one}" for one in shards)])
    config.model.check_mesh(config.mesh)
    with torch.device("meta"):
        task_of(config).build(build_backbone(config.model))


@pytest.mark.slow
def test_tiles_are_trained_on_as_their_page_says(axialtrain, small_shards, tmp_path):
    images = sorted((small_shards.parent / "scenes").glob("*[0-9].tif"))
    words = ["shard", *images, "--out", "shards/slides", "--image-labels", "0", "1"]
    for command in (words, ["train", *next(one for one in TRAIN if "data=tiles" in one)]):
        small = ["train.steps=1", "train.batch=4", "train.micro_batch=4", "logger=none"]
        done = axialtrain(*command, *(small if command[0] == "train" else ()), cwd=tmp_path)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", LAUNCH, ids=" ".join)
def test_a_launch_of_the_pages_is_printed(words, capsys):
    assert main(["launch", *words]) == 0
    assert "axialtrain" in capsys.readouterr().out


def test_the_extras_that_can_be_installed_are_named():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    named = re.findall(r"^\| `(\w+)` \|", TEXTS["installing.md"], re.MULTILINE)
    assert sorted(named) == sorted(project["optional-dependencies"])


def test_by_hand_is_installed_what_the_script_installs():
    """CI runs the script itself."""
    script = (REPOSITORY / "launch" / "install.sh").read_text().replace(" --quiet", "")
    lines = re.findall(r"^pip install .*", TEXTS["installing.md"], re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        assert line.replace("[timm]", "${extras:+[$extras]}") in script
