"""Colours, stains and noise: what they are, and that no seam shows between ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from axialtrain.data.augment import AugmentConfig, Drawn, draw
from axialtrain.data.colours import Colours
from axialtrain.data.kinds import Kind
from axialtrain.data.noise import gaussian
from axialtrain.data.normalise import Normalise
from axialtrain.data.stains import COLOURS, Stains
from axialtrain.grid import Rect

RNG = np.random.default_rng(0)
KINDS = [Kind(), Kind(1, "uint8"), Kind(3, "uint16"), Kind(5, "uint16"), Kind(7, "float32")]
SEED = 11


def pixels_of(kind: Kind, height: int = 40, width: int = 52) -> np.ndarray:
    size = (height, width, kind.bands)
    if kind.dtype == "float32":
        return RNG.normal(3, 20, size).astype(np.float32)
    return RNG.integers(0, np.iinfo(kind.dtype).max + 1, size, kind.dtype)


def coloured(pixels: np.ndarray, drawn: Drawn, *, mean: Any = 0.0, std: Any = 1.0) -> np.ndarray:
    """Of a whole picture, without normalisation unless it is given."""
    kind = Kind(pixels.shape[2], str(pixels.dtype))
    colours = Colours(AugmentConfig(), Normalise(kind, mean, std))
    present = np.ones(pixels.shape[:2], bool)
    return colours(pixels, present, drawn, Rect(0, pixels.shape[0], 0, pixels.shape[1]))


@given(
    kind=st.sampled_from(KINDS),
    edges=st.tuples(*[st.integers(0, 40)] * 2, *[st.integers(0, 52)] * 2),
    sample=st.integers(0, 99),
)
def test_a_part_has_the_numbers_of_the_whole(
    kind: Kind, edges: tuple[int, int, int, int], sample: int
) -> None:
    """Bit by bit, although parts begin and end anywhere."""
    stained = kind == Kind()
    rgb = kind.bands == 3
    config = AugmentConfig(
        brightness=0.3, contrast=0.4, noise=0.1, saturation=0.5 * rgb, hue=0.2 * rgb,
        hed=0.2 * stained, hed_bias=0.05 * stained,
    )  # fmt: skip
    colours = Colours(config, Normalise(kind, 0.4, [0.1 + i for i in range(kind.bands)]))
    pixels = pixels_of(kind)
    present = RNG.random(pixels.shape[:2]) < 0.9
    drawn = draw(config, SEED, sample)
    whole = colours(pixels, present, drawn, Rect(0, 40, 0, 52))
    assert not whole[~present].any()
    (top, bottom), (left, right) = sorted(edges[:2]), sorted(edges[2:])
    if top == bottom or left == right:
        return
    here = (slice(top, bottom), slice(left, right))
    part = colours(pixels[here], present[here], drawn, Rect(top, bottom, left, right))
    np.testing.assert_array_equal(part, whole[here])


def test_strips_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AugmentConfig(contrast=0.4, noise=0.1, hue=0.2, hed=0.2)
    colours = Colours(config, Normalise(Kind(), 0.4, 0.2))
    pixels, present = pixels_of(Kind()), np.ones((40, 52), bool)
    arguments = (pixels, present, draw(config, SEED, 4), Rect(0, 40, 0, 52))
    whole = colours(*arguments)
    monkeypatch.setattr("axialtrain.data.colours._STRIP", 1)
    np.testing.assert_array_equal(colours(*arguments), whole)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_brightness_and_contrast_are_of_the_whole_range(kind: Kind) -> None:
    pixels = pixels_of(kind)
    full = {"uint8": 255, "uint16": 65535}.get(kind.dtype, 1)
    mean = [0.1 * (i + 1) for i in range(kind.bands)]
    got = coloured(pixels, Drawn(brightness=1.2, contrast=0.7), mean=mean, std=0.5)
    expected = (pixels / full * 1.2 - mean) * 0.7 + mean
    if full > 1:
        expected = expected.clip(0, 1)
    expected = (expected - mean) / 0.5
    np.testing.assert_allclose(got, expected, atol=1e-6 * np.abs(expected).max())


def test_contrast_leaves_the_mean_where_it_is() -> None:
    pixels = np.full((3, 4, 2), 51, np.uint8)
    for contrast in (0.3, 1.7):
        got = coloured(pixels, Drawn(contrast=contrast), mean=0.2)
        np.testing.assert_allclose(got, 0, atol=1e-7)


def test_saturation_and_hue_keep_greys_and_their_brightness() -> None:
    grey = np.repeat(RNG.integers(0, 256, (8, 9, 1), np.uint8), 3, axis=2)
    drawn = Drawn(saturation=1.6, hue=0.3)
    np.testing.assert_allclose(coloured(grey, drawn), grey / 255, atol=2e-6)
    pale = RNG.integers(110, 140, (8, 9, 3), np.uint8)  # nothing leaves the range
    weights = [0.299, 0.587, 0.114]
    np.testing.assert_allclose(coloured(pale, drawn) @ weights, pale / 255 @ weights, atol=2e-6)
    without = coloured(pale, Drawn(saturation=1e-9))
    np.testing.assert_allclose(
        without, np.repeat((pale / 255 @ weights)[..., None], 3, 2), atol=1e-3
    )
    round_trip = coloured(pale, Drawn(hue=0.5))
    round_trip = coloured(np.float32(round_trip), Drawn(hue=-0.5))
    np.testing.assert_allclose(round_trip, pale / 255, atol=1e-5)
    spread = np.ptp(coloured(pale, Drawn(saturation=2.0)), axis=2)
    np.testing.assert_allclose(spread, 2 * np.ptp(pale / 255, axis=2), atol=2e-3)


def test_noise_is_normal_and_independent() -> None:
    noise = gaussian((SEED, 3), Rect(0, 400, 0, 300), 3).astype(np.float64)
    count = noise.size
    assert abs(noise.mean()) < 4 / count**0.5
    assert abs(noise.std() - 1) < 4 / (2 * count) ** 0.5
    assert abs((noise**3).mean()) < 4 * (15 / count) ** 0.5
    assert abs((noise**4).mean() - 3) < 4 * (96 / count) ** 0.5
    for one, other in (
        (noise[1:], noise[:-1]),
        (noise[8:], noise[:-8]),  # streams begin there
        (noise[:, 1:], noise[:, :-1]),
        (noise[1:, 1:], noise[:-1, :-1]),
        (noise[..., 1:], noise[..., :-1]),
        (noise[..., 0], noise[..., 2]),
        (noise, gaussian((SEED, 4), Rect(0, 400, 0, 300), 3)),
        (noise, gaussian((SEED + 1, 3), Rect(0, 400, 0, 300), 3)),
    ):
        assert abs((one * other).mean()) < 4 / one.size**0.5
    assert 4 < np.abs(noise).max() < 4.4


@given(
    top=st.integers(0, 60),
    left=st.integers(0, 60),
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    bands=st.sampled_from([1, 2, 3, 5, 16]),
)
def test_noise_of_a_part_is_that_of_the_whole(
    top: int, left: int, height: int, width: int, bands: int
) -> None:
    whole = gaussian((SEED, 5), Rect(0, 90, 0, 90), bands)
    part = gaussian((SEED, 5), Rect(top, top + height, left, left + width), bands)
    np.testing.assert_array_equal(part, whole[top : top + height, left : left + width])


def test_noise_does_not_change_from_one_version_to_the_next() -> None:
    """A run goes on under what it began with."""
    got = gaussian((1, 2), Rect(9, 11, 1000, 1002), 1)[..., 0]
    stored = [[-0.2661635, 0.6555776], [0.9696425, 0.4307247]]
    np.testing.assert_allclose(got, stored, rtol=1e-6)


def test_noise_has_the_deviation_that_is_asked_for() -> None:
    grey = np.full((100, 100, 3), 128, np.uint8)
    got = coloured(grey, Drawn(key=(SEED, 1), noise=0.05), mean=128 / 255, std=0.5)
    assert abs(got.std() - 0.1) < 0.002
    assert abs(got.mean()) < 0.002


def test_stains_that_do_not_change_leave_pixels_as_they_are() -> None:
    pixels = pixels_of(Kind(), 64, 64)
    out = np.empty(pixels.shape, np.float32)
    Stains((1, 1, 1), (0, 0, 0))(pixels, out)
    np.testing.assert_allclose(out * 255, pixels, atol=0.02)
    np.testing.assert_array_equal(np.rint(out * 255), pixels)


def test_stains_change_by_their_factors_and_additions() -> None:
    """A pixel that is made of known amounts becomes that of the changed amounts."""
    amounts = RNG.uniform(0.3, 0.8, (6, 7, 3))
    factors, additions = (1.1, 0.8, 0.9), (0.05, 0.1, -0.1)

    def pixels(stains: np.ndarray) -> np.ndarray:
        return 256 * np.exp(-stains @ COLOURS) - 1  # Beer and Lambert

    before = pixels(amounts)
    expected = pixels(amounts * factors + additions)
    got = np.empty(before.shape, np.float32)
    Stains(factors, additions)(np.rint(before).astype(np.uint8), got)
    np.testing.assert_allclose(got * 255, expected, atol=2)  # 8 bits came before
    assert np.abs(before - expected).max() > 10


def test_stains_are_drawn_and_normalised_like_the_rest() -> None:
    pixels, drawn = pixels_of(Kind()), Drawn(stains=(1.2, 1, 1), stains_bias=(0, 0.1, 0))
    plain = coloured(pixels, drawn)
    assert plain.min() >= 0
    assert plain.max() <= 1
    out = np.empty(pixels.shape, np.float32)
    Stains(drawn.stains, drawn.stains_bias)(pixels, out)
    np.testing.assert_allclose(plain, out, atol=1e-6)
    normalised = coloured(pixels, drawn, mean=[0.1, 0.5, 0.9], std=0.2)
    np.testing.assert_allclose(normalised, (plain - [0.1, 0.5, 0.9]) / 0.2, atol=1e-5)


@pytest.mark.parametrize("key", ["saturation", "hue", "hed", "hed_bias"])
@pytest.mark.parametrize("kind", [Kind(1), Kind(4), Kind(3, "uint16"), Kind(3, "float32")], ids=str)
def test_colours_need_three_bands(key: str, kind: Kind) -> None:
    config, normalise = AugmentConfig(**{key: 0.1}), Normalise(kind, 0.5, 0.25)  # type: ignore[arg-type]
    if kind.bands == 3 and not key.startswith("hed"):
        Colours(config, normalise)
        return
    with pytest.raises(
        ValueError, match=rf"^data\.augment\.{key} is 0\.1, allowed is 0 for .*{kind}"
    ):
        Colours(config, normalise)
