"""What the suite `exchange` measures on each rank, small. How fast it is says the bench itself."""

import math

import pytest
import torch
from distributed.exchange_ranks import rates
from distributed.launcher import run_ranks

WAYS = {
    (2, 2): {"tile -> rows": 2, "tile -> cols": 2, "rows -> cols": 4}
    | {"rows -> tile": 2, "cols -> tile": 2, "cols -> rows": 4},
    (1, 4): {"tile -> rows": 4, "rows -> tile": 4, "rows -> cols": 4, "cols -> rows": 4},
}


@pytest.mark.parametrize("shape", WAYS, ids=str)
def test_swaps_are_measured_with_the_bytes_of_the_formula(shape):
    mesh = {"row": shape[0], "col": shape[1]}
    options = {"height": 8, "width": 16, "dim": 3, "batch": 2, "rounds": 2}
    every = run_ranks(rates, 4, mesh=mesh, dtype=torch.bfloat16, **options)
    assert all(found == every[0] for found in every)
    assert {one.way: one.ranks for one in every[0]} == WAYS[shape]
    for one in every[0]:
        assert one.sent_bytes == one.formula_bytes
        assert one.sent_bytes == 2 * 8 * 16 * 3 * 2 * (one.ranks - 1) / one.ranks
        assert 0 < one.swap_s < 10
        assert 0 < one.bare_s < 10
        assert math.isclose(one.swap_rate / one.bare_rate, one.bare_s / one.swap_s)


def test_one_process_has_no_swap_to_measure():
    assert rates({}, height=4, width=4, dim=2, dtype=torch.float32, rounds=1) == []
