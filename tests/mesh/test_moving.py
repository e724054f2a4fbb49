"""What moving tokens copies: nothing on a side on which messages lie as the tokens do."""

import pytest
from distributed.exchange_ranks import buffers
from distributed.launcher import run_ranks

BANDS = {"tile -> rows": (True, False), "rows -> tile": (False, True)}
STRIPES = {"tile -> cols": (False, True), "cols -> tile": (True, False)}
ACROSS = {"rows -> cols": (False, True), "cols -> rows": (True, False)}


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [({"row": 2, "col": 2}, BANDS | STRIPES | ACROSS), ({"col": 3}, BANDS | ACROSS)],
    ids=str,
)
def test_whole_rows_are_their_own_messages(mesh, expected):
    ranks = mesh.get("row", 1) * mesh["col"]
    for found in run_ranks(buffers, ranks, mesh=mesh, size=(13, 10), batch=1):
        assert found == expected


def test_several_images_lie_apart():
    for found in run_ranks(buffers, 3, mesh={"col": 3}, size=(13, 10), batch=2):
        assert found == dict.fromkeys(BANDS | ACROSS, (False, False))
