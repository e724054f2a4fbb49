"""`axial_config`: what each layer of a pattern does, and what is refused in which words."""

from __future__ import annotations

import dataclasses
import re

import pytest

from axialtrain.attention.config import FUSIONS, KERNELS, POSITIONS, AxialConfig, Pass
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


REFUSED = [
    ("positions", "sinus", list(POSITIONS)),
    ("positions", None, list(POSITIONS)),
    ("fusion", "mean", list(FUSIONS)),
    ("kernel", "flash", list(KERNELS)),
    ("fusion", ["sum"], list(FUSIONS)),
    ("share_projections", "yes", "true, false"),
    ("share_projections", 1, "true, false"),
    ("window", 0, "whole numbers from 1"),
    ("window", -3, "whole numbers from 1"),
    ("window", 2.0, "whole numbers from 1"),
    ("window", True, "whole numbers from 1"),
    ("window", None, "whole numbers from 1"),
    ("span", 0, "whole numbers from 1"),
    ("span", 1.5, "whole numbers from 1"),
    ("span", "8", "whole numbers from 1"),
    ("skip_axis", -0.1, "0 to 1"),
    ("skip_axis", 1.5, "0 to 1"),
    ("skip_axis", float("nan"), "0 to 1"),
    ("skip_axis", "0.5", "0 to 1"),
    ("pattern", "row+col", "a list of strings"),
    ("pattern", [["row"]], "a list of strings"),
    ("pattern", ["row", None], "a list of strings"),
    ("pattern", None, "a list of strings"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), REFUSED, ids=str)
def test_a_value_that_is_not_allowed_is_named_with_what_is(key, value, allowed):
    with pytest.raises(ValueError, match=rf"axial_config\.{key}=") as error:
        AxialConfig.of({key: value})
    said = str(error.value)
    assert said.startswith(f"axial_config.{key}={value!r}: allowed")
    assert str(allowed) in said


@pytest.mark.parametrize("key", ["patern", "Window", "", 3])
def test_an_unknown_key_is_named_with_what_is_allowed(key):
    with pytest.raises(ValueError, match="axial_config: unknown key") as error:
        AxialConfig.of({"window": 4, key: 1})
    assert f"unknown key {key!r}" in str(error.value)
    for one in dataclasses.fields(AxialConfig):
        assert repr(one.name) in str(error.value)


def test_a_dictionary_gives_what_its_keys_say_and_defaults_elsewhere():
    given = {"pattern": ["window", "shifted"], "window": 4, "positions": "relative"}
    expected = AxialConfig(pattern=["window", "shifted"], window=4, positions="relative")
    assert AxialConfig.of(given) == expected
    assert (expected.fusion, expected.share_projections) == ("sequential", True)
    assert AxialConfig.of({}) == AxialConfig()


@pytest.mark.parametrize("skip", [0, 0.5, 1])
@pytest.mark.parametrize("span", [None, 1, 300])
def test_the_ends_of_what_is_allowed_are_allowed(span, skip):
    config = AxialConfig(window=1, span=span, skip_axis=skip)
    assert (config.window, config.span, config.skip_axis) == (1, span, skip)


def test_every_pass_that_some_layer_has_is_known():
    config = AxialConfig(["window", "row+col", "row+global"])
    assert config.used(1) == {Pass.WINDOW}
    assert config.used(2) == {Pass.WINDOW, Pass.ROW, Pass.COL}
    assert config.used(9) == {Pass.WINDOW, Pass.ROW, Pass.COL, Pass.GLOBAL}


@pytest.mark.parametrize(
    ("options", "depth", "unused"),
    [
        ({}, 2, []),
        ({"skip_axis": 0.5}, 2, []),
        ({"skip_axis": 0.5, "pattern": ["row", "col"]}, 2, ["skip_axis=0.5"]),
        ({"skip_axis": 0.5, "pattern": ["row", "row+col"]}, 2, []),
        ({"skip_axis": 0.5, "pattern": ["row", "row+col"]}, 1, ["skip_axis=0.5"]),
        ({"fusion": "sum", "share_projections": False}, 2, []),
        ({"fusion": "sum", "pattern": ["row"]}, 2, ["fusion=sum"]),
        ({"share_projections": False, "pattern": ["row"]}, 2, ["share_projections=false"]),
        ({"window": 3}, 2, ["window=3"]),
        ({"window": 3, "pattern": ["row", "window"]}, 2, []),
        ({"window": 3, "pattern": ["row", "window"]}, 1, ["window=3"]),
        ({"span": 8}, 1, ["span=8"]),
        ({"span": 8, "positions": "relative"}, 1, []),
    ],
    ids=str,
)
def test_what_no_layer_reads_is_named(options, depth, unused):
    found = AxialConfig(**options).unused_keys(depth)
    assert [one.split(" (")[0] for one in found] == unused


@pytest.mark.parametrize(
    ("kernel", "positions", "allowed"),
    [
        ("fused", "relative", "['auto', 'flex', 'chunks'] with positions=relative"),
        ("flex", "rope", "['auto', 'fused', 'chunks'] with positions=rope"),
    ],
)
def test_a_learned_bias_has_its_own_kernels(kernel, positions, allowed):
    message = f"axial_config.kernel='{kernel}': allowed are {allowed}"
    with pytest.raises(ValueError, match=re.escape(message)):
        AxialConfig(kernel=kernel, positions=positions)


def test_heads_that_are_too_narrow_for_flex_are_refused():
    config = AxialConfig(kernel="flex", positions="relative")
    config.check_heads(64, 4)
    with pytest.raises(ValueError, match=r"model.dim=64 / model.heads=8 = 8 channels: allowed are"):
        config.check_heads(64, 8)


def test_which_passes_are_windows_and_along_which_dims_they_attend():
    assert [one for one in Pass if one.windowed] == [Pass.WINDOW, Pass.SHIFTED]
    assert [one for one in Pass if one.dims == (1, 2)] == [Pass.WINDOW, Pass.SHIFTED, Pass.GLOBAL]


def test_attention_refuses_widths_that_do_not_fit():
    with pytest.raises(ValueError, match=r"model.heads=3 does not divide model.dim=16") as error:
        AxialAttention(16, 3, (Pass.ROW,), AxialConfig())
    assert "allowed are [1, 2, 4, 8, 16]" in str(error.value)
    with pytest.raises(ValueError, match=r"even head width, got model.dim=12 / model.heads=4 = 3"):
        AxialAttention(12, 4, (Pass.ROW,), AxialConfig())
    for positions in ("none", "axial"):
        assert AxialAttention(12, 4, (Pass.ROW,), AxialConfig(positions=positions)).head_dim == 3


@pytest.mark.parametrize("which", ["window", "shifted", "global"])
def test_rotary_positions_over_both_axes_need_a_head_width_of_whole_quarters(which):
    config = AxialConfig(["row", which])
    with pytest.raises(ValueError, match=r"must be a multiple of 4") as error:
        config.check_heads(18, 3)
    said = str(error.value)
    assert f"axial_config.positions=rope in a {which} pass" in said
    assert "model.dim=18 / model.heads=3 = 6" in said
    config.check_heads(24, 3)
    AxialConfig(["row+col"]).check_heads(18, 3)
    AxialConfig(["row", which], positions="none").check_heads(18, 3)


@pytest.mark.parametrize(("positions", "what"), [("relative", "tables"), ("axial", "embeddings")])
def test_learned_positions_need_to_know_their_size(positions, what):
    config = AxialConfig(positions=positions)
    with pytest.raises(ValueError, match=f"axial_config.positions={positions}") as error:
        config.check_span(None)
    said = str(error.value)
    assert f"needs to know its {what}' size" in said
    assert "model's grid" in said
    assert ("axial_config.span" in said) == (positions == "relative")
    config.check_span((4, 4))


def test_a_span_or_windows_alone_give_relative_tables_their_size():
    AxialConfig(positions="relative", span=9).check_span(None)
    AxialConfig(["window", "shifted"], positions="relative").check_span(None)
    for positions in ("none", "rope"):
        AxialConfig(positions=positions).check_span(None)
    with pytest.raises(ValueError, match=r"axial_config\.span"):
        AxialConfig(["window", "row"], positions="relative").check_span(None)
    with pytest.raises(ValueError, match=r"axial_config\.span"):
        AxialAttention(8, 2, (Pass.COL,), AxialConfig(["col"], positions="relative"))


@pytest.mark.parametrize("which", ["window", "shifted"])
@pytest.mark.parametrize(("height", "width"), [(7, 20), (20, 7)])
def test_a_window_larger_than_the_grid_is_refused(height, width, which):
    config = AxialConfig(["row+col", which], window=8)
    with pytest.raises(ValueError, match=r"axial_config\.window=8 is larger") as error:
        config.check_grid(height, width, None)
    assert f"than the grid of {height} x {width} tokens: allowed are 1 to 7" in str(error.value)
    config.check_grid(8, 20, None)
    AxialConfig(["row+col"], window=8).check_grid(height, width, None)


@pytest.mark.parametrize(
    ("pattern", "size", "fits"),
    [
        ("row+col", (4, 6), True),
        ("row+col", (3, 2), True),
        ("row+col", (5, 6), False),
        ("row+col", (4, 7), False),
        ("row", (50, 6), True),
        ("row", (4, 7), False),
        ("col", (4, 70), True),
        ("col", (5, 6), False),
        ("global", (4, 7), False),
        ("global", (5, 6), False),
        ("window", (50, 70), True),
        ("window+col", (50, 6), False),
    ],
    ids=str,
)
def test_relative_tables_must_reach_as_far_as_their_passes(pattern, size, fits):
    made_for = (4, 6)
    config = AxialConfig([pattern], positions="relative", window=2)
    if fits:
        config.check_grid(*size, made_for)
    else:
        with pytest.raises(ValueError, match="exceeds the relative positions") as error:
            config.check_grid(*size, made_for)
        said = str(error.value)
        assert f"a grid of {size[0]} x {size[1]} tokens" in said
        assert "made for model.grid=[4, 6]: allowed is up to that" in said
        assert "axial_config.span" in said
    AxialConfig([pattern], positions="relative", window=2, span=2).check_grid(*size, made_for)
