"""What the suite `exchange` measures on each rank, small. How fast it is says the bench itself."""

import pytest
import torch
from distributed.exchange_ranks import bands, rates, turns
from distributed.launcher import run_ranks

from axialtrain.bench import exchange_ranks
from axialtrain.bench.setting import Setting

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


def test_one_process_has_no_swap_to_measure():
    assert rates({}, height=4, width=4, dim=2, dtype=torch.float32, rounds=1) == []


def test_of_several_ranks_the_slowest_counts_and_the_furthest_ends_all():
    """Rank r takes 1 + r s for `a`; for `b`, the first of them takes 10, and the other nothing."""
    for limit, rounds in ((1000.0, 4), (35.0, 3), (30.0, 2), (0.1, 2)):
        for seconds, called in run_ranks(turns, 2, rounds=4, limit=limit):
            assert seconds == {"a": [2.0] * rounds, "b": [10.0] * rounds}
            assert called == ("ab" + "baab" * 2)[: 2 + 2 * rounds]


def test_a_layer_in_bands_sends_the_same_bytes_in_more_messages():
    overlaps, rounds = (2, 3), 2
    size = {"height": 8, "width": 16, "dim": 8, "heads": 2}
    every = run_ranks(
        bands, 4, shape=(2, 2), overlaps=overlaps, dtype=torch.float32, rounds=rounds, **size
    )
    for found, messages in every:
        assert found == every[0][0]
        assert [one.bands for one in found] == list(overlaps)
        for one in found:
            # Two swaps among all ranks, forward and backward, of which a quarter stays.
            assert one.sent_bytes == 2 * 2 * (8 * 16 * 8 * 4) * 3 / 4
            assert (one.bands_s, one.once_s, one.ratio) == (1, 1, 1)  # by a clock that ticks
        # Once to count, once to warm up, then the rounds: 2 swaps, forward and backward.
        assert messages == (1 + 1 + rounds) * 2 * 2 * (1 + sum(overlaps))


def test_rounds_and_limit_of_the_command_reach_the_ranks(monkeypatch):
    rate = {"way": "tile -> rows", "ranks": 2, "swap_s": 2.0, "bare_s": 1.0, "ratio": 0.5}
    rate |= {"sent_bytes": 3, "formula_bytes": 4.0}
    layer = {"bands": 2, "bands_s": 3.0, "once_s": 4.0, "ratio": 0.75, "sent_bytes": 5}
    asked = []

    def on_ranks(fn, name, *arguments):
        asked.append((fn.__name__, arguments[-2:]))
        return {"_rates": [rate], "_overlaps": [layer]}[fn.__name__]

    monkeypatch.setattr(exchange_ranks, "_on_ranks", on_ranks)
    setting = Setting(torch.device("cpu"), rounds=3, limit=1.5)
    rows = [row for case in exchange_ranks.cases(setting) for row in case.run()]
    assert set(asked) == {("_rates", (3, 1.5)), ("_overlaps", (3, 1.5))}
    assert {(row.what, row.value) for row in rows} == {
        ("tile -> rows: rate, of a bare all-to-all's", 0.5),
        ("all: counted bytes, off the formula by at most", 0.25),
        ("time with mesh.overlap=2, of that with 1", 0.75),
    }
