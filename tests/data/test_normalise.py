"""Each band by its own mean and deviation, or all by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from loaded import loader_of

from axialtrain.data.config import DataConfig
from axialtrain.tasks.panels import image_panel

if TYPE_CHECKING:
    from conftest import Source

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.3, 2]


@pytest.mark.parametrize(("mean", "std"), [(MEAN, STD), (0.4, STD), (MEAN, 0.2)])
def test_each_band_has_a_normalisation_of_its_own(
    source: Source, mean: float | list[float], std: float | list[float]
) -> None:
    batch = next(loader_of(DataConfig(source.url, mean=mean, std=std)).once())
    assert batch.pixels.dtype == torch.float32
    expected = (source.pixels["wide"] / 255 - mean) / std
    np.testing.assert_array_equal(batch.pixels[0, :200, :300], expected.astype(np.float32))
    assert not batch.pixels[~batch.present].any()
    panel = image_panel(batch.pixels[0], 1, "image", mean=mean, std=std)
    shown = panel.pixels[:200, :300].astype(int)
    assert np.abs(shown - source.pixels["wide"]).max() <= 1  # it rounds down


def test_one_number_is_the_same_as_one_for_each_band(source: Source) -> None:
    one, several = (
        next(loader_of(DataConfig(source.url, mean=mean, std=std)).once())
        for mean, std in ((0.4, 0.2), ([0.4] * 3, [0.2] * 3))
    )
    assert torch.equal(one.pixels, several.pixels)
    table = ((np.arange(256) / 255 - 0.4) / 0.2).astype(np.float32)
    np.testing.assert_array_equal(one.pixels[0, :200, :300], table[source.pixels["wide"]])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mean", 1.5),
        ("mean", [0.5]),
        ("mean", [0.5] * 4),
        ("mean", [0.5, 0.5, -0.1]),
        ("std", [0.2, 0.2]),
    ],
)
def test_normalisation_must_be_that_of_the_shards_bands(
    source: Source, key: str, value: object
) -> None:
    with pytest.raises(ValueError, match=rf"^data\.{key} is .*allowed is .*3 bands of uint8$"):
        loader_of(DataConfig(source.url, window=[64, 64], **{key: value}))  # type: ignore[arg-type]
