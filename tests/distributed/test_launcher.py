"""The launcher brings back results and the first error, and does not wait for a hung rank."""

import gc
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from distributed.launcher import RankError, run_ranks

from axialtrain.mesh.mesh import Mesh


def total(value: int) -> int:
    x = torch.tensor([dist.get_rank() + value])
    dist.all_reduce(x)
    return int(x)


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ZeroDivisionError("planted")
    dist.barrier()  # would wait for rank 1


def threads_before_a_mesh() -> int:
    gc.disable()  # it comes seldom where much has been imported
    found = len(os.listdir("/proc/self/task"))
    around: list[object] = [Mesh(row=2)]
    around.append(around)  # only the collector frees it
    return found


def fail_before_another_dies() -> None:
    if dist.get_rank() == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    raise ZeroDivisionError("planted")


def hang() -> None:
    time.sleep(60)


def test_ranks_talk_and_are_reused():
    assert run_ranks(total, 3, value=10) == [33, 33, 33]
    assert run_ranks(total, 2, value=1) == [3, 3]


def test_the_failing_rank_is_named():
    with pytest.raises(RankError, match=r"rank 1 of 2:[\s\S]*ZeroDivisionError: planted"):
        run_ranks(fail_on_one, 2)
    assert run_ranks(total, 2, value=1) == [3, 3]


def test_a_rank_that_dies_is_the_first():
    """Others fail in its wake, and can say so before it is noticed."""
    both = r"^rank 1 of 2:\nthe process died\nrank 0 of 2:[\s\S]*ZeroDivisionError: planted"
    with pytest.raises(RankError, match=both):
        run_ranks(fail_before_another_dies, 2)


@pytest.mark.slow
def test_a_hung_rank_ends_the_test():
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] gave no answer"):
        run_ranks(hang, 2, timeout=5)
    assert time.monotonic() - started < 20


def test_no_thread_of_a_mesh_is_left():
    try:
        run_ranks(threads_before_a_mesh, 2)
        assert run_ranks(threads_before_a_mesh, 2) == run_ranks(threads_before_a_mesh, 2)
    finally:
        run_ranks(gc.enable, 2)
