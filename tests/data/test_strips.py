"""What is read strip by strip, and rounded, is what is read at once, rounded."""

import gc
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from loaded import loader_of, small_shards

from axialtrain.data import strips
from axialtrain.data.augment import AugmentConfig
from axialtrain.data.config import DataConfig
from axialtrain.data.damage import DamageConfig
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


@pytest.mark.parametrize("at", [(0, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_is_the_same(tmp_path, monkeypatch, dtype, at):
    monkeypatch.setattr(strips, "STRIP", 1)
    monkeypatch.setattr(strips, "BLOCK", 24)  # tiles have 16 px
    url = small_shards(tmp_path, {"a": (90, 70), "b": (64, 100)})
    shard = next(Path(url).glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[data.index(b"\xff\xda") + 20] ^= 1  # of a tile
    shard.write_bytes(data)
    turned = {"vertical_flip": True, "horizontal_flip": True, "quarter_turns": True}
    augment = AugmentConfig(**turned, brightness=0.2, noise=0.1)
    damage = DamageConfig("mask", tiles=1000)
    config = DataConfig(url, window=[80, 60], augment=augment, damage=damage)
    options = {"mesh_shape": (2, 2), "at": at, "micro_batch": 2}
    whole, lean = loader_of(config, **options), loader_of(config, lean=True, dtype=dtype, **options)
    faults = []
    for want, got in zip(
        *([batch for step in one.steps(0, 3) for batch in step] for one in (whole, lean)),
        strict=True,
    ):
        assert got.pixels.dtype is dtype
        assert torch.equal(got.pixels, want.pixels.to(dtype))
        assert torch.equal(got.present, want.present)
        assert torch.equal(got.valid, want.valid)
        assert (got.ids, got.faults) == (want.ids, want.faults)
        faults += [one for some in got.faults for one in some]
    assert faults
    assert lean.bytes_read > whole.bytes_read


@pytest.mark.slow
def test_no_batch_is_left_while_the_next_one_is_read(tmp_path):
    """Where none is read ahead, which is where memory is short."""
    config = DataConfig(small_shards(tmp_path, {"a": (64, 64)}), window=[32, 32], prefetch=0)
    loader = loader_of(config)
    gone: list[weakref.ref[torch.Tensor]] = []
    read = loader._load

    def seen(slots):
        gc.collect()
        assert [one() for one in gone] == [None] * len(gone)
        return read(slots)

    loader._load = seen
    for step in loader.steps(0, 2):
        for batch in step:
            gone.append(weakref.ref(batch.pixels))
            del batch
        gc.collect()  # as validation and saving find it
        assert [one() for one in gone] == [None] * len(gone)
    assert len(gone) == 8
