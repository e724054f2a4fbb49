"""Flips and quarter turns as transforms of the index."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from axialtrain.data.augment import AugmentConfig, Drawn, draw
from axialtrain.data.turns import AS_IS, HORIZONTAL, VERTICAL, Turn, View
from axialtrain.grid import Rect

TURNS = st.builds(Turn, st.integers(0, 3), st.booleans())
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))


def numbers(height: int, width: int) -> np.ndarray:
    return np.arange(height * width).reshape(height, width)


@given(TURNS, SIZES, st.data())
def test_a_part_of_the_turned_picture_is_its_source_turned(
    turn: Turn, size: tuple[int, int], data: st.DataObject
) -> None:
    whole = numbers(*size)
    turned = turn.apply(whole)
    assert turned.shape == turn.size(*size)
    top, bottom = sorted(data.draw(st.tuples(*[st.integers(0, turned.shape[0])] * 2)))
    left, right = sorted(data.draw(st.tuples(*[st.integers(0, turned.shape[1])] * 2)))
    part = Rect(top, bottom, left, right)
    source = turn.source(part, *size)
    assert source.area == part.area
    read = whole[source.top : source.bottom, source.left : source.right]
    np.testing.assert_array_equal(turn.apply(read), turned[top:bottom, left:right])


@given(TURNS, TURNS, SIZES)
def test_turns_compose(first: Turn, second: Turn, size: tuple[int, int]) -> None:
    whole = numbers(*size)
    both = second.apply(first.apply(whole))
    np.testing.assert_array_equal(first.then(second).apply(whole), both)


@given(TURNS, SIZES)
def test_four_quarters_and_two_mirrors_are_nothing(turn: Turn, size: tuple[int, int]) -> None:
    for each, times in ((Turn(1), 4), (HORIZONTAL, 2), (VERTICAL, 2)):
        got, array = turn, turn.apply(numbers(*size))
        for _ in range(times):
            got, array = got.then(each), each.apply(array)
        assert got == turn
        np.testing.assert_array_equal(array, turn.apply(numbers(*size)))


def test_turns_are_what_their_names_say() -> None:
    whole = numbers(3, 4)
    np.testing.assert_array_equal(HORIZONTAL.apply(whole), whole[:, ::-1])
    np.testing.assert_array_equal(VERTICAL.apply(whole), whole[::-1])
    np.testing.assert_array_equal(Turn(1).apply(whole), whole.T[::-1])
    assert HORIZONTAL.then(VERTICAL) == Turn(2)
    assert VERTICAL.then(VERTICAL) == AS_IS


@given(TURNS, SIZES, st.tuples(st.integers(1, 40), st.integers(1, 40)), st.data())
def test_fixed_windows_keep_their_size_and_stay_in_the_image(
    turn: Turn, size: tuple[int, int], image: tuple[int, int], data: st.DataObject
) -> None:
    top = data.draw(st.integers(0, max(image[0] - size[0], 0)))
    left = data.draw(st.integers(0, max(image[1] - size[1], 0)))
    down, right = data.draw(st.tuples(st.integers(-9, 9), st.integers(-9, 9)))
    rect = Rect(top, top + size[0], left, left + size[1])
    view = Drawn(turn=turn, down=down, right=right).view(rect, image, fixed=True)
    assert view.size == size
    for start, stop, length in (
        (view.rect.top, view.rect.bottom, image[0]),
        (view.rect.left, view.rect.right, image[1]),
    ):
        assert start >= 0
        # A window that is larger than its image begins where that does.
        assert stop <= length or start == 0
    if turn.quarters % 2 == 0 and 0 <= top + down <= image[0] - size[0]:
        assert view.rect.top == top + down


def test_whole_images_change_height_for_width() -> None:
    rect = Rect(0, 5, 0, 8)
    assert Drawn(turn=Turn(3)).view(rect, (5, 8), fixed=False) == View(rect, Turn(3))
    assert View(rect, Turn(3)).size == (8, 5)


def test_all_eight_turns_are_drawn_alike_often() -> None:
    config = AugmentConfig(horizontal_flip=True, quarter_turns=True)
    drawn = [draw(config, 3, sample).turn for sample in range(4000)]
    counts = [drawn.count(Turn(q, m)) for q in range(4) for m in (False, True)]
    assert sum(counts) == 4000
    assert min(counts) > 420  # 500 each, 3.8 deviations of 21
    flips = [draw(AugmentConfig(vertical_flip=True), 3, sample).turn for sample in range(400)]
    assert set(flips) == {AS_IS, VERTICAL}


def test_draws_are_those_of_seed_and_sample_whatever_else_is_drawn() -> None:
    few = AugmentConfig(shift=5, brightness=0.2)
    more = AugmentConfig(
        shift=5, brightness=0.2, vertical_flip=True, quarter_turns=True, contrast=0.1,
        saturation=0.3, hue=0.5, hed=0.1, hed_bias=0.2, noise=1,
    )  # fmt: skip
    seen = set()
    for sample in range(50):
        one, other = draw(few, 7, sample), draw(more, 7, sample)
        assert (one.down, one.right, one.brightness) == (other.down, other.right, other.brightness)
        assert one.key == (7, sample)
        assert one != draw(few, 8, sample)
        assert abs(other.hue) <= 0.5
        assert all(0.9 <= factor <= 1.1 for factor in other.stains)
        assert all(abs(added) <= 0.2 for added in other.stains_bias)
        seen.add((one.down, one.right))
    assert len(seen) > 25
    assert {down for down, _ in seen} == set(range(-5, 6))


def test_nothing_is_drawn_by_default() -> None:
    assert draw(AugmentConfig(), 7, 1) == Drawn(key=(7, 1))
    assert not draw(AugmentConfig(vertical_flip=True, shift=3), 7, 1).recolours


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shift", -1),
        ("shift", 1 << 31),
        ("brightness", 1.5),
        ("contrast", -0.1),
        ("saturation", float("nan")),
        ("hue", 0.6),
        ("hed", 2),
        ("hed_bias", -1),
        ("noise", float("inf")),
    ],
)
def test_wrong_values_are_named(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^data\.augment\.{key} is {value}, allowed are .* 0 to"):
        AugmentConfig(**{key: value})  # type: ignore[arg-type]
