"""`axial_config`: what each layer of a pattern does, and what is refused in which words."""

from __future__ import annotations

import pytest

from axialtrain.attention.config import POSITIONS, AxialConfig, Pass
from axialtrain.attention.passes import AxialAttention
from axialtrain.grid import Layout, Place


@pytest.mark.parametrize("start", Layout)
def test_a_pass_says_where_its_tokens_must_be(start):
    place = Place(13, 10, start, (2, 3), (1, 2))
    for exchange, rows, cols in (
        ("swap", Layout.ROWS, Layout.COLS),
        ("heads", Layout.TILE, Layout.TILE),
        ("gather", Layout.TILE, Layout.TILE),
    ):
        assert Pass.ROW.enters(place, exchange) == place.under(rows)
        assert Pass.COL.enters(place, exchange) == place.under(cols)
        for windowed in (Pass.WINDOW, Pass.SHIFTED):
            assert windowed.enters(place, exchange) == place.under(Layout.TILE)
        assert Pass.GLOBAL.enters(place, exchange) == place
    assert (Pass.ROW.dims, Pass.COL.dims, Pass.GLOBAL.dims) == ((2,), (1,), (1, 2))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (["row+col"], ["row col"] * 5),
        (["col+row"], ["col row"] * 5),
        (["row", "col"], ["row", "col", "row", "col", "row"]),
        (["row+col", "col", "row"], ["row col", "col", "row", "row col", "col"]),
    ],
)
def test_the_pattern_is_cycled_over_the_depth(pattern, expected):
    config = AxialConfig(pattern)
    assert [" ".join(p.value for p in config.passes(layer)) for layer in range(5)] == expected


def test_the_default_is_row_then_column_with_rotary_positions():
    config = AxialConfig()
    assert config.passes(0) == (Pass.ROW, Pass.COL)
    assert config.positions == "rope"


def test_defaults_are_not_shared():
    AxialConfig().pattern.append("row")
    assert AxialConfig().pattern == ["row+col"]


@pytest.mark.parametrize(("layer", "name"), [("row+diagonal", "diagonal"), ("row+", ""), ("", "")])
def test_an_unknown_pass_is_named_with_what_is_allowed(layer, name):
    with pytest.raises(ValueError, match=r"axial_config\.pattern") as error:
        AxialConfig(["row", layer])
    assert f"unknown pass {name!r} in {layer!r}" in str(error.value)
    for one in Pass:
        assert repr(one.value) in str(error.value)


def test_an_empty_pattern_is_refused():
    with pytest.raises(ValueError, match=r"axial_config.pattern=\[\]: at least one layer"):
        AxialConfig([])


def test_unknown_positions_are_named_with_what_is_allowed():
    with pytest.raises(ValueError, match=r"axial_config.positions='sinus'") as error:
        AxialConfig(positions="sinus")
    for one in POSITIONS:
        assert repr(one) in str(error.value)


def test_attention_refuses_widths_that_do_not_fit():
    with pytest.raises(ValueError, match=r"model.heads=3 does not divide model.dim=16"):
        AxialAttention(16, 3, (Pass.ROW,), AxialConfig())
    with pytest.raises(ValueError, match=r"even head width, got model.dim=12 / model.heads=4 = 3"):
        AxialAttention(12, 4, (Pass.ROW,), AxialConfig())
    assert AxialAttention(12, 4, (Pass.ROW,), AxialConfig(positions="none")).head_dim == 3
