"""The arithmetic of the grid: splits, rectangles, layouts, and who sends what to whom."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from axialtrain.grid import (
    Enlargement,
    Kernel,
    Layout,
    Place,
    Rect,
    WindowBand,
    cuts_windows,
    messages,
    owned_rect,
    split,
    tokens_across,
    window_bands,
    windows_of,
)

DEGREES = st.integers(1, 5)
COORDINATES = st.integers(-30, 30)


@st.composite
def rects(draw, lowest=-8, highest=24):
    """Any rectangle, empty ones and ones outside the image included."""
    top, bottom = sorted(draw(st.tuples(*[st.integers(lowest, highest)] * 2)))
    left, right = sorted(draw(st.tuples(*[st.integers(lowest, highest)] * 2)))
    return Rect(top, bottom, left, right)


@st.composite
def grids_on_meshes(draw):
    """(height, width), (rows, cols), from a grid as small as the mesh to a large one."""
    rows, cols = draw(DEGREES), draw(DEGREES)
    size = draw(st.integers(rows, 40)), draw(st.integers(cols, 40))
    return size, (rows, cols)


@st.composite
def partitions(draw):
    """(height, width), rectangles that tile it: cut in two, again and again, anywhere."""
    height, width = draw(st.integers(1, 16)), draw(st.integers(1, 16))
    parts = [Rect(0, height, 0, width)]
    for _ in range(draw(st.integers(0, 5))):
        part = parts.pop(draw(st.integers(0, len(parts) - 1)))
        if draw(st.booleans()):
            cut = draw(st.integers(part.top, part.bottom))
            parts += [
                dataclasses.replace(part, bottom=cut),
                dataclasses.replace(part, top=cut),
            ]
        else:
            cut = draw(st.integers(part.left, part.right))
            parts += [
                dataclasses.replace(part, right=cut),
                dataclasses.replace(part, left=cut),
            ]
    return (height, width), parts


def coordinates(shape: tuple[int, int]) -> list[tuple[int, int]]:
    return list(itertools.product(range(shape[0]), range(shape[1])))


def cells(rect: Rect) -> set[tuple[int, int]]:
    """The tokens of a rectangle, one by one."""
    return set(itertools.product(range(rect.top, rect.bottom), range(rect.left, rect.right)))


def times_held(height: int, width: int, held: list[Rect]) -> np.ndarray:
    count = np.zeros((height, width), int)
    for rect in held:
        count[rect.slices(Rect(0, height, 0, width))] += 1
    return count


@given(size=st.integers(0, 10**6), parts=st.integers(1, 300))
def test_split_is_balanced_ordered_and_covers(size, parts):
    intervals = [split(size, parts, index) for index in range(parts)]
    assert intervals[0][0] == 0
    assert intervals[-1][1] == size
    assert all(before[1] == after[0] for before, after in itertools.pairwise(intervals))
    sizes = [stop - start for start, stop in intervals]
    assert min(sizes) >= 0
    assert max(sizes) - min(sizes) <= 1


def test_split_with_fewer_things_than_parts():
    sizes = [stop - start for start, stop in (split(2, 5, i) for i in range(5))]
    assert sorted(sizes) == [0, 0, 0, 1, 1]


@given(pixels=st.integers(0, 10**6), patch=st.integers(1, 64))
def test_tokens_across_is_the_least_that_covers(pixels, patch):
    tokens = tokens_across(pixels, patch)
    assert tokens * patch >= pixels
    assert (tokens - 1) * patch < pixels


@given(a=rects(), b=rects())
def test_intersect_is_the_set_intersection(a, b):
    both = a.intersect(b)
    assert cells(both) == cells(a) & cells(b)
    assert cells(b.intersect(a)) == cells(both)
    assert both.area == len(cells(both))
    assert both.empty == (not cells(both))
    assert both.height >= 0
    assert both.width >= 0


@given(a=rects(), down=COORDINATES, right=COORDINATES, factor=st.integers(1, 20))
def test_shifted_and_scaled(a, down, right, factor):
    assert cells(a.shifted(down, right)) == {(y + down, x + right) for y, x in cells(a)}
    assert a.shifted(down, right).shifted(-down, -right) == a
    fine = a.scaled(factor)
    assert (fine.top, fine.left) == (a.top * factor, a.left * factor)
    assert (fine.height, fine.width) == (a.height * factor, a.width * factor)


@given(origin=rects(), other=rects())
def test_slices_index_an_array_that_holds_origin(origin, other):
    """The intersection is read where it lies, an empty one as nothing, wherever it lies."""
    part = origin.intersect(other)
    shape = (origin.height, origin.width)
    rows = np.broadcast_to(np.arange(origin.top, origin.bottom)[:, None], shape)
    columns = np.broadcast_to(np.arange(origin.left, origin.right), shape)
    found = zip(rows[part.slices(origin)].flat, columns[part.slices(origin)].flat, strict=True)
    assert set(found) == cells(part)


@given(case=grids_on_meshes(), layout=st.sampled_from(Layout))
def test_every_layout_holds_each_token_once(case, layout):
    (height, width), shape = case
    held = [owned_rect(height, width, layout, shape, at) for at in coordinates(shape)]
    assert (times_held(height, width, held) == 1).all()
    if layout is Layout.ROWS:
        assert {(rect.left, rect.right) for rect in held} == {(0, width)}
        assert max(rect.height for rect in held) - min(rect.height for rect in held) <= 1
    if layout is Layout.COLS:
        assert {(rect.top, rect.bottom) for rect in held} == {(0, height)}
        assert max(rect.width for rect in held) - min(rect.width for rect in held) <= 1


@given(
    case=grids_on_meshes(),
    layout=st.sampled_from([Layout.ROWS, Layout.COLS]),
    count=st.integers(1, 5),
)
def test_bands_hold_the_whole_lines_of_a_rank_each_once(case, layout, count):
    (height, width), shape = case
    for at in coordinates(shape):
        place = Place(height, width, layout, shape, at)
        held = [band.rect for band in place.bands(count)]
        assert len(held) == count
        assert sum(rect.area for rect in held) == place.rect.area
        assert set().union(*map(cells, held)) == cells(place.rect)
        across = [rect.height if layout is Layout.ROWS else rect.width for rect in held]
        along = [rect.width if layout is Layout.ROWS else rect.height for rect in held]
        assert max(across) - min(across) <= 1
        assert set(along) == {width if layout is Layout.ROWS else height}


@given(case=grids_on_meshes())
def test_tiles_are_balanced_and_never_empty(case):
    (height, width), shape = case
    tiles = [Place(height, width, Layout.TILE, shape, at).rect for at in coordinates(shape)]
    for sizes in ({tile.height for tile in tiles}, {tile.width for tile in tiles}):
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1


@given(case=grids_on_meshes())
def test_rows_stay_in_their_band_and_columns_in_theirs(case):
    """So TILE <-> ROWS talks along mesh axis col alone, TILE <-> COLS along row alone."""
    size, shape = case
    for at in coordinates(shape):
        place = Place(*size, Layout.TILE, shape, at)
        for other in coordinates(shape):
            rows = place.under(Layout.ROWS).rect_of(other)
            cols = place.under(Layout.COLS).rect_of(other)
            if at[0] != other[0]:
                assert place.rect.intersect(rows).empty
            if at[1] != other[1]:
                assert place.rect.intersect(cols).empty


@given(case=partitions(), data=st.data())
def test_messages_mirror_each_other_and_cover_what_is_wanted(case, data):
    (height, width), owned = case
    grid = Rect(0, height, 0, width)
    wanted = [data.draw(rects()) for _ in owned]
    plans = [messages(owned, wanted, me) for me in range(len(owned))]
    for me, other in itertools.product(range(len(owned)), repeat=2):
        assert plans[me].send[other] == plans[other].receive[me]
        assert cells(plans[me].send[other]) <= cells(owned[me])
    for want, plan in zip(wanted, plans, strict=True):
        times = times_held(height, width, list(plan.receive))
        expected = np.zeros((height, width), int)
        expected[want.intersect(grid).slices(grid)] = 1
        assert (times == expected).all()


def test_messages_by_hand():
    owned = [Rect(0, 2, 0, 2), Rect(0, 2, 2, 5)]
    wanted = [Rect(-1, 3, 1, 3), Rect(0, 1, 0, 5)]
    plan = messages(owned, wanted, me=1)
    assert plan.send == (Rect(0, 2, 2, 3), Rect(0, 1, 2, 5))
    assert plan.receive == (Rect(0, 1, 0, 2), Rect(0, 1, 2, 5))


@pytest.mark.parametrize("size", [(1, 9), (9, 2)])
def test_a_grid_smaller_than_the_mesh_is_refused(size):
    height, width = size
    with pytest.raises(ValueError, match="smaller than mesh") as error:
        Place(height, width, shape=(2, 3))
    assert f"{height} x {width}" in str(error.value)
    assert "row=2 col=3" in str(error.value)


def test_a_place_is_a_frozen_value():
    place = Place(13, 10, Layout.TILE, (2, 3), (1, 2))
    assert place.rect == Rect(6, 13, 6, 10)
    assert place.rect_of((0, 0)) == Rect(0, 6, 0, 3)
    assert place.under(Layout.ROWS).under(Layout.TILE) == place
    assert len({place, Place(13, 10, Layout.TILE, (2, 3), (1, 2)), place.under(Layout.COLS)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        place.height = 1


def test_one_rank_holds_everything_under_every_layout():
    assert {Place(4, 7, layout).rect for layout in Layout} == {Rect(0, 4, 0, 7)}


@st.composite
def cuts(draw):
    """Side of a window, and how far its cuts are shifted: by nothing, by half, by anything."""
    size = draw(st.integers(1, 9))
    return size, draw(st.sampled_from([0, size // 2, draw(st.integers(0, size - 1))]))


@given(rect=rects(), cut=cuts())
def test_windows_of_a_rectangle_are_the_windows_of_its_tokens(rect, cut):
    """Those whose number along each axis, floor((coordinate + shift) / size), some token has."""
    size, shift = cut
    numbers = {((y + shift) // size, (x + shift) // size) for y, x in cells(rect)}
    whole = windows_of(rect, size, shift)
    expected = {
        (i * size - shift + down, j * size - shift + right)
        for i, j in numbers
        for down, right in itertools.product(range(size), repeat=2)
    }
    assert cells(whole) == expected
    assert whole.empty == rect.empty
    assert windows_of(whole, size, shift) == whole


def test_windows_by_hand():
    assert windows_of(Rect(3, 9, 8, 10), 4, 0) == Rect(0, 12, 8, 12)
    assert windows_of(Rect(3, 9, 8, 10), 4, 2) == Rect(2, 10, 6, 10)
    assert windows_of(Rect(0, 1, 0, 13), 4, 2) == Rect(-2, 2, -2, 14)  # reaches outside the image
    assert windows_of(Rect(5, 5, 2, 9), 4, 2) == Rect(0, 0, 0, 0)


@given(case=grids_on_meshes(), cut=cuts())
def test_tiles_fetch_from_each_other_only_where_windows_are_cut(case, cut):
    (height, width), shape = case
    for at in coordinates(shape):
        place = Place(height, width, Layout.TILE, shape, at)
        inside = windows_of(place.rect, *cut).intersect(place.grid)
        if not cuts_windows(height, shape[0], *cut):
            assert (inside.top, inside.bottom) == (place.rect.top, place.rect.bottom)
        if not cuts_windows(width, shape[1], *cut):
            assert (inside.left, inside.right) == (place.rect.left, place.rect.right)


@given(parts=DEGREES, extra=st.integers(0, 30), cut=cuts())
def test_a_split_cuts_windows_where_two_parts_have_tokens_of_one(parts, extra, cut):
    length, (size, shift) = parts + extra, cut
    numbers = [
        {(at + shift) // size for at in range(*split(length, parts, index))}
        for index in range(parts)
    ]
    shared = any(a & b for a, b in itertools.pairwise(numbers))
    assert cuts_windows(length, parts, size, shift) == shared


def test_one_part_cuts_no_window():
    assert not cuts_windows(13, 1, 4, 2)
    assert not cuts_windows(16, 2, 8, 0)
    assert cuts_windows(16, 2, 8, 4)
    assert cuts_windows(18, 2, 8, 0)


@st.composite
def queries_in_windows(draw):
    """(start, stop) of queries, that of the image's tokens in their windows, and the cut."""
    size, shift = draw(cuts())
    length = draw(st.integers(1, 30))
    start = draw(st.integers(0, length - 1))
    stop = draw(st.integers(start + 1, length))
    numbers = {(at + shift) // size for at in range(start, stop)}
    keys = [at for at in range(length) if (at + shift) // size in numbers]
    return (start, stop), (keys[0], keys[-1] + 1), (size, shift)


@given(case=queries_in_windows())
def test_bands_of_windows_hold_each_query_once_and_the_keys_of_its_window(case):
    (start, stop), (first, last), (size, shift) = case
    bands = window_bands((start, stop), (first, last), size, shift)
    asked = {}  # by each query: the tokens of its window
    for band in bands:
        assert band.start == start + len(asked)  # in order, nothing left out
        queries, keys = band.queries // band.windows, band.keys // band.windows
        assert (band.windows * queries, band.windows * keys) == (band.queries, band.keys)
        for window, query in itertools.product(range(band.windows), range(queries)):
            begin = band.first + window * keys
            asked[band.start + window * queries + query] = list(range(begin, begin + keys))
    assert asked == {
        at: [key for key in range(first, last) if (key + shift) // size == (at + shift) // size]
        for at in range(start, stop)
    }
    # Keys are cut into those of the bands, one after the other.
    assert bands[0].first == first
    assert sum(band.keys for band in bands) == last - first
    assert len(bands) <= 3


def test_bands_by_hand():
    assert window_bands((2, 13), (0, 14), 4, 0) == [
        WindowBand(windows=1, queries=2, keys=4, start=2, first=0),
        WindowBand(windows=2, queries=8, keys=8, start=4, first=4),
        WindowBand(windows=1, queries=1, keys=2, start=12, first=12),  # the image ends at 14
    ]
    assert window_bands((5, 6), (4, 8), 4, 0) == [WindowBand(1, 1, 4, 5, 4)]


@given(case=grids_on_meshes(), layout=st.sampled_from(Layout))
def test_the_grid_of_a_place_is_all_that_its_ranks_hold(case, layout):
    (height, width), shape = case
    places = [Place(height, width, layout, shape, at) for at in coordinates(shape)]
    assert {place.grid for place in places} == {Rect(0, height, 0, width)}
    assert set().union(*(cells(place.rect) for place in places)) == cells(places[0].grid)


def test_the_grid_imports_no_torch():
    code = "import sys, axialtrain.grid; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- Finer and coarser grids of the same image ----------------------------------------------------


@given(
    size=st.tuples(st.integers(3, 40), st.integers(3, 40)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    factor=st.integers(1, 8),
    layout=st.sampled_from(Layout),
)
def test_the_cells_of_a_token_stay_on_its_rank_and_lines_are_dealt_evenly(
    size, shape, factor, layout
):
    ranks = list(itertools.product(range(shape[0]), range(shape[1])))
    tokens = Place(*size, shape=shape)
    cells = tokens.finer(factor)
    for at in ranks:
        assert cells.rect_of(at) == tokens.rect_of(at).scaled(factor)
    spread = cells.under(layout)
    assert sum(spread.rect_of(at).area for at in ranks) == spread.grid.area
    for one, other in itertools.combinations(ranks, 2):
        assert spread.rect_of(one).intersect(spread.rect_of(other)).empty
    if layout is Layout.ROWS:  # of one band, to a line
        for row in range(shape[0]):
            heights = [spread.rect_of((row, col)).height for col in range(shape[1])]
            assert max(heights) - min(heights) <= 1


def test_a_coarser_grid_stays_aligned_where_the_unit_divides():
    pixels = Place(5, 7, shape=(2, 3), at=(1, 2)).finer(16)
    assert pixels.coarser(2).coarser(2) == Place(5, 7, shape=(2, 3), at=(1, 2)).finer(4)
    odd = Place(5, 7, shape=(2, 3), at=(1, 2)).coarser(2)
    assert (odd.height, odd.width, odd.unit) == (3, 4, 1)
    assert odd.rect == Rect(1, 3, 2, 4)
    again = odd.coarser(2).coarser(2)  # one cell, which somebody has
    holders = [at for at in itertools.product(range(2), range(3)) if again.rect_of(at).area]
    assert len(holders) == 1
    with pytest.raises(ValueError, match="smaller than mesh"):
        Place(1, 7, shape=(2, 3)).finer(16)


def test_a_kernel_needs_what_its_results_look_at():
    assert Kernel(3, padding=1).needs(Rect(2, 5, 0, 4)) == Rect(1, 6, -1, 5)
    assert Kernel(7, stride=2, padding=3).needs(Rect(0, 4, 3, 5)) == Rect(-3, 10, 3, 12)
    assert Kernel(3, dilation=6, padding=6).needs(Rect(0, 1, 0, 1)) == Rect(-6, 7, -6, 7)
    assert Kernel(2, stride=2).needs(Rect(1, 3, 0, 1)) == Rect(2, 6, 0, 2)
    assert Kernel(5, padding=2).needs(Rect(4, 4, 0, 9)).empty


def test_an_enlargement_needs_neighbours_within_the_grid():
    grid = Rect(0, 6, 0, 5)
    assert Enlargement(4, grid).needs(Rect(8, 16, 0, 20)) == Rect(1, 5, 0, 5)
    assert Enlargement(4, grid).needs(Rect(0, 0, 0, 20)).empty


def test_pixels_of_a_place_are_its_tokens_cut_at_the_window() -> None:
    """13 x 10 tokens of 16 px over 2 x 3 ranks, for windows that end in a token or before it."""
    for row, col in ((0, 0), (1, 2), (1, 1)):
        place = Place(13, 10, shape=(2, 3), at=(row, col))
        whole = place.pixels(16, 208, 160)
        assert whole == place.rect.scaled(16)
        cut = place.pixels(16, 201, 145)
        assert cut == Rect(whole.top, min(whole.bottom, 201), whole.left, min(whole.right, 145))
    assert Place(13, 10, shape=(2, 3), at=(1, 2)).pixels(16, 90, 160).empty
