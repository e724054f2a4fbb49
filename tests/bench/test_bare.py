"""The share of a step that its products take alone, and the bytes of its residual stream."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from planted_time import Time
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from axialtrain.bench.bare import LOOKS, BareRate, _kept, bare_rate, stream_traffic

TOKENS, DIM = 24, 8


class Taking(TorchDispatchMode):
    """Within it a kernel takes as long as `seconds` says by its name, and others nothing."""

    def __init__(self, clock: Time, seconds: Callable[[str], float]) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.clock.sleep(self.seconds(func.name().removeprefix("aten::").partition(".")[0]))
        return func(*args, **(kwargs or {}))


def timed(step: Callable[[], object], seconds: Callable[[str], float], **options) -> BareRate:
    clock = Time()
    with Taking(clock, seconds):
        return bare_rate(step, clock=clock, **options)


def test_the_products_of_a_step_are_collected_by_shape_and_counted():
    linear = nn.Linear(DIM, 3 * DIM)
    x = torch.randn(TOKENS, DIM, requires_grad=True)

    def step() -> None:
        for _ in range(2):
            linear(x).square().sum().backward()

    rate = bare_rate(step, rounds=2)
    products = [row for row in rate.rows if row.product]
    assert {row.name.split()[0] for row in products} == {"addmm", "mm"}
    assert [row.calls for row in products] == [2, 2, 2]  # forward, of the input, of the weight
    assert any("24x8" in row.name and "8x24" in row.name for row in products)
    rest = {row.name: row.calls for row in rate.rows if not row.product}
    assert rest["pow"] >= 2  # the square
    assert not {"t", "view", "detach"} & rest.keys(), "views move nothing"
    assert "all products, bare" in rate.table()


def test_attention_is_a_product_forward_and_backward():
    q, k, v = torch.randn(3, 2, 2, 16, 8).requires_grad_()

    def step() -> None:
        F.scaled_dot_product_attention(q, k, v).sum().backward()

    names = [row.name for row in bare_rate(step, rounds=1).rows if row.product]
    assert len(names) == 2
    assert all(name.startswith("_scaled_dot_product") for name in names)


def test_the_share_is_that_of_the_products():
    a = torch.randn(3, 3)
    taking = {"mm": 1.0, "sin": 2.0}.get

    def step() -> None:
        (a @ a @ a).sin()

    rate = timed(step, lambda name: taking(name, 0.0), rounds=3)
    assert rate.rounds.seconds == {"step": [4.0] * 3, "bare": [2.0] * 3}
    assert (rate.step_s, rate.bare_s, rate.share) == (4, 2, 0.5)
    assert {row.name.split()[0]: (row.calls, row.seconds) for row in rate.rows} == {
        "mm": (2, 2.0),
        "sin": (1, 2.0),
    }
    assert timed(lambda: a @ a, lambda name: 1.0, rounds=1).share == 1


def test_of_other_kernels_the_medians_count():
    """Of the steps that are looked into: one of them may meet whatever else the machine does."""
    a, slow = torch.randn(3, 3), iter([1.0, 2.0, 50.0, 3.0])  # the first warms up

    def seconds(name: str) -> float:
        return next(slow, 0.0) if name == "sin" else 0.0

    rate = timed(lambda: (a @ a).sin(), seconds, rounds=1)
    assert [row.seconds for row in rate.rows if not row.product] == [3.0]


def test_no_round_begins_when_the_time_is_up_but_one_is_made():
    a, calls = torch.randn(3, 3), []

    def step() -> None:
        calls.append(a @ a)

    assert timed(step, lambda name: 1.0, rounds=50, limit=0.5).step_s == 1
    assert len(calls) == 1 + LOOKS + 1
    calls.clear()
    timed(step, lambda name: 1.0, rounds=50, limit=5)  # step and product: 2 s a round
    assert len(calls) == 1 + LOOKS + 3


@pytest.mark.parametrize("measure", [bare_rate, stream_traffic])
def test_a_step_without_what_can_be_seen_is_refused(measure):
    with pytest.raises(ValueError, match=r"that can be seen: allowed is a step that has some"):
        measure(lambda: None)


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(12.0).view(3, 4)[:, 1:3],
        torch.arange(3.0)[:, None].expand(3, 4),
        torch.arange(24.0).view(2, 3, 4).transpose(0, 2),
        torch.zeros(0, 4),
    ],
    ids=["part", "expanded", "transposed", "empty"],
)
def test_arguments_are_kept_with_their_strides(x: Tensor):
    kept = _kept(x)
    assert kept.stride() == x.stride()
    assert torch.equal(kept, x)


def test_the_bytes_of_a_norm_and_a_residual_sum():
    """A norm of M bytes: 2 M forward (statistics beside), 3 M backward; the sum reads 2, writes 1,
    and its gradients are added up: 3 M."""
    norm, linear = nn.LayerNorm(DIM), nn.Linear(DIM, DIM)
    leaf = torch.randn(1, TOKENS, DIM, requires_grad=True)

    def step() -> None:
        (leaf + linear(norm(leaf))).backward(torch.ones_like(leaf))

    clock = Time()
    with Taking(clock, lambda name: float(name.startswith("native_layer_norm"))):
        traffic = stream_traffic(step, clock=clock)
    stream = TOKENS * DIM * 4
    assert traffic.must == 8 * stream
    small = traffic.moved - (2 + 3 + 3 + 3 + 2) * stream  # 2: the ones, and the leaf's gradient
    assert traffic.ratio > 1
    assert abs(small) <= 2 * stream
    assert traffic.seconds == 2
    assert traffic.rate == traffic.moved / 2
