"""Rotary positions: a turn of complex numbers, and a dot product that sees differences alone."""

from __future__ import annotations

import pytest
import torch

from axialtrain.attention.positions import rotary_angles, rotate

SHAPE = (2, 3, 5, 2, 8)  # B, H, W, N, K
DIMS = [pytest.param(2, id="along rows"), pytest.param(1, id="along columns")]


def tokens(shape=SHAPE, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_angles_are_coordinate_times_frequency():
    angles = rotary_angles(7, 10, 6, base=100.0)
    expected = [[x * 100.0 ** (-2 * i / 6) for i in range(3)] for x in (7, 8, 9)]
    torch.testing.assert_close(
        angles, torch.tensor(expected, dtype=angles.dtype), rtol=1e-14, atol=0
    )
    assert torch.equal(rotary_angles(0, 10, 6)[4:], rotary_angles(4, 10, 6))


@pytest.mark.parametrize("dim", DIMS)
def test_rotate_is_multiplication_by_unit_complex_numbers(dim):
    x = tokens()
    angles = rotary_angles(3, 3 + x.shape[dim], 8)
    turns = torch.polar(torch.ones_like(angles), angles)
    turns = turns[:, None, None, :] if dim == 1 else turns[None, :, None, :]
    expected = torch.view_as_complex(x.unflatten(-1, (4, 2))) * turns
    got = rotate(x, angles, dim)
    torch.testing.assert_close(got, torch.view_as_real(expected).flatten(-2))
    torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("dim", DIMS)
def test_the_dot_product_depends_on_the_difference_alone(dim):
    q, k = tokens(seed=1), tokens(seed=2)
    length = q.shape[dim]
    # One token of each line, put at every coordinate of it.
    query, key = (x.narrow(dim, 0, 1).expand(SHAPE) for x in (q, k))

    def scores(start_q: int, start_k: int) -> torch.Tensor:
        turned_q = rotate(query, rotary_angles(start_q, start_q + length, 8), dim)
        turned_k = rotate(key, rotary_angles(start_k, start_k + length, 8), dim)
        return (turned_q * turned_k).sum(-1)

    here = scores(0, 4)
    torch.testing.assert_close(here, here.select(dim, 0).unsqueeze(dim).expand_as(here))
    torch.testing.assert_close(scores(100_000, 100_004), here, rtol=1e-8, atol=1e-8)
    assert (scores(0, 5) - here).abs().max() > 0.1


@pytest.mark.parametrize("dim", DIMS)
def test_far_coordinates_keep_their_phase_in_fp32(dim):
    """A float32 angle near 10^6 is off by up to 0.03; the turn must be good to float32 rounding."""
    x = tokens()
    far = range(1_000_000, 1_000_000 + x.shape[dim])
    by_hand = torch.tensor([[at * 0.1**i for i in range(4)] for at in far], dtype=x.dtype)
    exact = rotate(x, by_hand, dim)
    single = rotate(x.float(), rotary_angles(far.start, far.stop, 8), dim)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dim", DIMS)
def test_the_gradient_turns_back(dim):
    x, grad = tokens().requires_grad_(), tokens(seed=5)
    angles = rotary_angles(0, x.shape[dim], 8)
    rotate(x, angles, dim).backward(grad)
    torch.testing.assert_close(x.grad, rotate(grad, -angles, dim))


def test_an_empty_part():
    assert rotate(torch.zeros(2, 0, 5, 2, 8), rotary_angles(0, 0, 8), 1).shape == (2, 0, 5, 2, 8)


def test_an_odd_head_width_is_refused():
    with pytest.raises(ValueError, match="K=7"):
        rotary_angles(0, 4, 7)
