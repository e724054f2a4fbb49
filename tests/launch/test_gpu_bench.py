"""The script that measures a GPU: what it leaves, and how little it needs. Run on a CPU, small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib

import pytest
import torch
from repository import REPOSITORY

THERE = ("torch", "numpy", "einops", "pytest", "axialtrain")  # and what they need themselves
BLOCKED = [
    "aiohttp", "axial_attention", "deepspeed", "fairscale", "fsspec", "google_crc32c", "hydra",
    "hypothesis", "imagecodecs", "lightning_utilities", "matplotlib", "omegaconf", "openslide",
    "PIL", "rasterio", "safetensors", "simplejpeg", "tifffile", "timm", "torchmetrics",
    "torchvision", "tqdm", "wandb", "webdataset", "yaml", "zarr",
]  # fmt: skip


@pytest.mark.slow
def test_the_script_needs_torch_numpy_einops_and_pytest(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({BLOCKED}))\n"
    )
    out = tmp_path / "out"
    done = subprocess.run(
        [
            REPOSITORY / "launch" / "gpu_bench.sh",
            *("--device", "cpu", "--quick", "--rounds", "1"),
        ],
        env=os.environ
        | {
            "PYTHONPATH": str(tmp_path),
            "PYTHON": sys.executable,
            "OUT": str(out),
            "TESTS": "forward_and_backward and fp32 and rope",
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    every = json.loads((out / "all.json").read_bytes())
    assert list(every["suites"]) == ["memory", "complexity", "layer", "step", "attention"]
    for record in every["suites"].values():
        assert record["results"]
        assert record["date"] == every["date"]
        assert record["versions"]["torch"] == torch.__version__
    missing = [one for record in every["suites"].values() for one in record["missing"]]
    assert len(missing) == 3  # the package, the gigapixel, the plot
    for name, one in zip(("matplotlib", "axial-attention", "gigapixel"), missing, strict=True):
        assert name in one
    text = (out / "all.md").read_text()
    for name in every["suites"]:
        assert f"## {name}\n" in text
    assert "passed" in text.rpartition("## tests")[2]
    assert "passed" in done.stdout


def test_what_is_blocked_is_what_the_project_has():
    """Else the test above proves nothing."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    names = {word.split(">")[0].split("=")[0].split("<")[0] for word in project["dependencies"]}
    modules = {
        "hydra-core": "hydra",
        "google-crc32c": "google_crc32c",
        "pyyaml": "yaml",
        "lightning-utilities": "lightning_utilities",
    }
    needed = {modules.get(name, name) for name in names} - {"packaging"}  # pytest's
    assert needed - set(THERE) <= set(BLOCKED)
