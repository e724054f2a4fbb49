"""Losses, metrics and pictures on a device that is not the CPU."""

from __future__ import annotations

import pytest
import torch
from distributed.other_device_ranks import judged


@pytest.mark.parametrize(
    "name", ["segmentation", "segmentation of pixels", "panoptic", "classification"]
)
def test_the_numbers_are_those_of_the_cpu(elsewhere, name):
    want, found = (elsewhere(judged, name=name, there=there) for there in (False, True))
    for one, other in zip(found.numbers, want.numbers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert found.summary == pytest.approx(want.summary, rel=1e-10)
    assert want.summary
    for one, other in zip(found.pictures, want.pictures, strict=True):
        assert (one == other).all()
