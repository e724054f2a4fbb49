"""The learning rate is a pure function of the step."""

import pytest

from axialtrain.train.schedule import ScheduleConfig, learning_rate


def rates(steps, **keys):
    return [learning_rate(step, steps, 2.0, ScheduleConfig(**keys)) for step in range(steps + 2)]


def test_cosine_falls_from_base_to_final():
    assert rates(4, final=0.5) == pytest.approx(
        [2.0, 1 + 0.5 + 0.5 * 0.5**0.5, 1.5, 1 + 0.5 - 0.5 * 0.5**0.5, 1.0, 1.0]
    )


def test_warmup_rises_linearly_and_meets_the_cosine():
    got = rates(10, warmup=4)
    assert got[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert got[5:10] == sorted(got[5:10], reverse=True)
    assert got[10:] == [0.0, 0.0]


def test_no_step_has_a_rate_of_zero():
    assert min(rates(7, warmup=3)[:7]) > 0


def test_constant_stays_after_the_warmup():
    assert rates(4, name="constant", warmup=1, final=0.1) == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_a_warmup_longer_than_the_run_only_rises():
    assert rates(3, warmup=7) == [0.25, 0.5, 0.75, 1.0, 1.25]


@pytest.mark.parametrize(
    ("key", "value"), [("name", "linear"), ("warmup", -1), ("final", 1.5), ("final", -0.1)]
)
def test_what_is_not_allowed_is_named(key, value):
    with pytest.raises(ValueError, match=rf"schedule\.{key}=.*allowed"):
        ScheduleConfig(**{key: value})
