"""Real images, where they lie beside the checkout, and the command as a user runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

import hypothesis
import pytest
from distributed.other_device import Run, a_process
from repository import SHARED
from warm_command import start

# How long an example takes says how busy the machine is; a test that hangs has pytest's timeout.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def slide() -> Path:
    path = SHARED / "CMU-1-Small-Region.svs"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the checkout in shared/data")
    return path


@pytest.fixture(scope="session")
def elsewhere() -> Iterator[Run]:
    """elsewhere(function, **keywords): in a process with a device that is not the CPU."""
    with a_process() as run:
        yield run


@pytest.fixture(scope="session")
def axialtrain() -> Command:
    """axialtrain(*arguments, cwd=, timeout=, **environment): the finished process.

    A copy of a process that has imported everything; one of its own where `environment` is given,
    for much of that is read on the way.
    """

    def run(
        *arguments: object, cwd: Path, timeout: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        words = list(map(str, arguments))
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        env = clean | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"} | environment
        if environment:
            return subprocess.run(
                [sys.executable, "-m", "axialtrain.cli", *words],
                cwd=cwd,
                env=env,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        with TemporaryFile() as stdout, TemporaryFile() as stderr:
            process = start(words, cwd=cwd, env=env, stdout=stdout, stderr=stderr)
            try:
                status = process.wait(timeout)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            stdout.seek(0)
            stderr.seek(0)
            said = (stdout.read().decode(), stderr.read().decode())
        return subprocess.CompletedProcess(words, status, *said)

    assert run("--help", cwd=Path("/")).returncode == 0  # no test has the imports in its time
    return run


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two labelled scenes of 512 px, as shards."""
    from axialtrain.data.scene import draw_scenes
    from axialtrain.data.shard import shard_images

    folder = tmp_path_factory.mktemp("scenes")
    scenes = draw_scenes(folder / "scenes", count=2, size=512, seed=0)
    images, labels, _ = zip(*scenes, strict=True)
    shard_images(images, folder / "shards", labels=labels, progress=False)
    return folder / "shards"
