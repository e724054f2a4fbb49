"""What is installed: a wheel carries the configs and launch scripts inside the package."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest
from repository import REPOSITORY

from axialtrain.launch.scripts import FILES


@pytest.mark.slow
def test_a_wheel_has_all_configs_and_modules(tmp_path):
    copy = tmp_path / "copy"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in names:
        if (REPOSITORY / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((REPOSITORY / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, copy], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    for name in names:
        if name.startswith("axialtrain/") and name.endswith(".py"):
            assert name in inside
        if name.startswith("configs/"):
            assert f"axialtrain/{name}" in inside
    for name in [*FILES.values(), "hostfile.example"]:
        assert f"axialtrain/scripts/{name}" in inside
