"""Runs on meshes that span hosts, each with a network of its own: those of one host, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed.host_runs import DEEPSPEED, GIVEN, TORCHRUN, by_hostfile, finished, torchrun
from distributed.hosts import Host, hosts
from killed_runs import assert_bit_equal, finish, losses

STEPS = 6

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given(small_shards) -> list[str]:
    return [*GIVEN, f"data.shards={small_shards}", f"train.steps={STEPS}"]


@pytest.fixture(scope="module")
def machines(tmp_path_factory) -> Iterator[list[Host]]:
    with hosts(4, tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="module")
def one_host(given, tmp_path_factory) -> Path:
    """The same run in four processes of this machine."""
    folder = tmp_path_factory.mktemp("one") / "host"
    finish(folder, *given, "mesh=2x2")
    assert losses(folder)[-1] < losses(folder)[0]
    return folder


def test_torchrun_on_each_of_four(machines, given, one_host, tmp_path):
    """Rows and columns of the mesh cross hosts."""
    folder = tmp_path / "four"
    with torchrun(machines, folder, *given, "mesh=2x2") as runs:
        finished(runs)
    assert_bit_equal(folder, one_host)


@pytest.mark.parametrize(
    ("count", "script", "runner"),
    [
        (2, TORCHRUN, {}),
        (4, DEEPSPEED, {"RUNNER": "pdsh"}),
        (2, DEEPSPEED, {"RUNNER": "ssh"}),
    ],
    ids=["torchrun", "deepspeed by pdsh", "deepspeed by ssh"],
)
def test_those_of_a_hostfile(machines, given, one_host, tmp_path, count, script, runner):
    """Started on the first of them, over a real sshd; the mesh crosses hosts."""
    folder, some = tmp_path / "some", machines[:count]
    with by_hostfile(script, some, folder, *given, "mesh=2x2", slots=4 // count, **runner) as run:
        finished([run])
    assert_bit_equal(folder, one_host)
