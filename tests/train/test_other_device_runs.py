"""The training loop on a device that is not the CPU: the same numbers, and few waits for it."""

from __future__ import annotations

from collections import Counter

import pytest
from distributed.other_device_ranks import STEPS, a_training
from distributed.task_ranks import ACCUMULATION, Case

from axialtrain.models.recompute import Recompute

pytestmark = pytest.mark.slow

CASES = [
    Case("segmentation", (5, 6), options=(("drop_path", 0.3),)),
    Case("reconstruction", (5, 6), ("col+row",), (("skip_axis", 0.5),)),
]


def assert_alike(found: list[dict[str, float]], want: list[dict[str, float]]) -> None:
    for one, other in zip(found, want, strict=True):
        for key in ("loss", "grad_norm", "lr"):
            assert one[key] == pytest.approx(other[key], rel=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.task)
def test_steps_and_pictures_are_those_of_the_cpu(elsewhere, case):
    kept = Recompute()
    want = elsewhere(a_training, case=case, kept=kept, there=False)
    found = elsewhere(a_training, case=case, kept=kept, there=True)
    assert_alike(found.logged, want.logged)
    assert found.panels == want.panels
    waits, forwards = Counter(found.waits), STEPS * ACCUMULATION
    # A step waits for its loss before the last backward, and when it is done for the norm, what it
    # logs, and which images of each micro-batch are no fillers.
    assert waits.pop("train/loop.py:_step") == STEPS * (1 + 1 + 2) + forwards
    assert waits.pop("train/loop.py:train", 0) <= 1
    # A forward for whether all tokens count, and how rows and columns are compacted where not.
    assert waits.pop("models/transformer.py:encode") == forwards
    assert waits.pop("attention/compact.py:plan") <= 2 * forwards
    assert not waits


@pytest.mark.parametrize(
    "kept", [Recompute(1), Recompute(2, 1.0), Recompute(band=7), Recompute(1, 0.5, 7)], ids=str
)
def test_what_is_kept_changes_no_number(elsewhere, kept):
    want = elsewhere(a_training, case=CASES[0], kept=Recompute(), there=False)
    assert_alike(elsewhere(a_training, case=CASES[0], kept=kept, there=True).logged, want.logged)
