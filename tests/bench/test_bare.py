"""The share of a step that its products take alone, and the bytes of its residual stream."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axialtrain.bench.bare import _kept, bare_rate, stream_traffic

TOKENS, DIM = 24, 8


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
    assert rate.bare_s > 0
    assert "all products, bare" in rate.table()


def test_attention_is_a_product_forward_and_backward():
    q, k, v = torch.randn(3, 2, 2, 16, 8).requires_grad_()

    def step() -> None:
        F.scaled_dot_product_attention(q, k, v).sum().backward()

    names = [row.name for row in bare_rate(step, rounds=1).rows if row.product]
    assert len(names) == 2
    assert all(name.startswith("_scaled_dot_product") for name in names)


def test_what_is_no_product_lowers_the_share():
    a = torch.randn(300, 300)

    def product() -> None:
        a @ a

    def slow() -> None:
        time.sleep(0.05)
        a @ a

    assert bare_rate(slow, rounds=3).share < 0.5
    calls = []
    limited = bare_rate(lambda: (calls.append(0), product()), rounds=50, limit=1e-9)
    assert len(calls) == 1 + 1 + 1  # once before, once looked into, one round
    assert limited.step_s > 0
    assert bare_rate(slow, rounds=3).step_s > 0.05
    assert bare_rate(product, rounds=3).share > bare_rate(slow, rounds=3).share


def test_a_step_without_a_product_that_can_be_seen_is_refused():
    with pytest.raises(ValueError, match="products_of"):
        bare_rate(lambda: None)


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

    traffic = stream_traffic(step)
    stream = TOKENS * DIM * 4
    assert traffic.must == 8 * stream
    small = traffic.moved - (2 + 3 + 3 + 3 + 2) * stream  # 2: the ones, and the leaf's gradient
    assert traffic.ratio > 1
    assert abs(small) <= 2 * stream
