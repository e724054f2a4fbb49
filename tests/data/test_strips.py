"""What is read strip by strip, and rounded, is what is read at once, rounded."""

from itertools import pairwise

import pytest
import torch
from loaded import loader_of, small_shards

from axialtrain.data import strips
from axialtrain.data.augment import AugmentConfig
from axialtrain.data.config import DataConfig
from axialtrain.grid import Rect


def test_strips_are_rows_of_blocks():
    part = Rect(7, 7 + 65_536, 3, 3 + 65_536)
    found = list(strips.strips(part))
    assert {strip.height for strip in found} == {4096}
    assert (found[0].top, found[-1].bottom) == (part.top, part.bottom)
    assert all(one.bottom == two.top for one, two in pairwise(found))
    assert {(strip.left, strip.right) for strip in found} == {(3, 3 + 65_536)}
    assert list(strips.strips(Rect(0, 100, 0, 50))) == [Rect(0, 100, 0, 50)]
    # Of a part that is wider than a strip, one row of blocks.
    assert next(strips.strips(Rect(0, 5000, 0, 10**6))) == Rect(0, 2048, 0, 10**6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_is_the_same(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(strips, "STRIP", 1)
    monkeypatch.setattr(strips, "BLOCK", 24)  # tiles have 16 px
    url = small_shards(tmp_path, {"a": (90, 70), "b": (64, 100)})
    turned = {"vertical_flip": True, "horizontal_flip": True, "quarter_turns": True}
    augment = AugmentConfig(**turned, brightness=0.2, noise=0.1)
    config = DataConfig(url, window=[80, 60], augment=augment)
    whole, lean = loader_of(config), loader_of(config, lean=True, dtype=dtype)
    for want, got in zip(
        *([batch for step in one.steps(0, 3) for batch in step] for one in (whole, lean)),
        strict=True,
    ):
        assert got.pixels.dtype is dtype
        assert torch.equal(got.pixels, want.pixels.to(dtype))
        assert torch.equal(got.present, want.present)
        assert got.ids == want.ids
    assert lean.bytes_read > whole.bytes_read
