"""Every command of the README does what it says. The two that install are run by CI itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from repository import REPOSITORY

from axialtrain.data.scene import draw_scenes
from axialtrain.train.compose import compose_run

INSTALLING = ("./launch/",)


def commands() -> list[str]:
    text = (REPOSITORY / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if not line.startswith(INSTALLING)]


def own_experiment() -> str:
    (text,) = re.findall(
        r"```yaml\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL
    )
    return text


def test_an_experiment_of_ones_own_begins_with_one_of_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(own_experiment())
    own = ["hydra.searchpath=[conf]", "experiment=mine"]
    config, *_ = compose_run(own)
    assert (config.name, config.zero.stage, config.model.depth) == ("mine", 2, 3)
    assert (config.model.patch, config.task.cells) == (32, 4)  # the quickstart's
    with pytest.raises(ValueError, match=r"unknown key model\.deep: allowed are"):
        compose_run([*own, "model.deep=3"])


@pytest.mark.slow
def test_the_commands_of_the_readme(tmp_path):
    image, *_ = draw_scenes(tmp_path, count=1, size=1024, seed=5)[0]
    image.rename(tmp_path / "slide.tif")
    mine = tmp_path / "conf" / "experiment" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text(own_experiment())
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "WANDB_MODE": "offline",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    ran = commands()
    assert len(ran) >= 7
    for number, command in enumerate(ran):
        if " train " in command:  # the real thing, but short, and in a folder that we know
            named = re.search(r"hydra\.run\.dir=(\S+)", command)
            folder = tmp_path / (named[1] if named else f"run{number}")
            command += f" train.steps=2 hydra.run.dir={folder}"
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        if " train " in command:
            for name in ("config.yaml", "metrics.jsonl", "reading.json", "loss.png", "checkpoints"):
                assert (folder / name).exists(), f"{command}: no {name}"
            assert (folder / "prediction.png").stat().st_size > 10_000
            assert list((folder / "wandb").glob("offline-run-*")), "W&B runs offline"


def test_the_readme_names_the_scripts_that_ci_runs():
    ci = (REPOSITORY / ".ci" / "run").read_text()
    text = (REPOSITORY / "README.md").read_text()
    for script in re.findall(r"\./launch/\w+\.sh", text):
        assert script in ci
        assert os.access(REPOSITORY / script, os.X_OK)
