"""Rotary, relative and factorised positions, against their formulas."""

from __future__ import annotations

import cmath
import itertools

import pytest
import torch
from formulas import assert_agree
from formulas import tokens as leaf
from torch import Tensor

from axialtrain.attention.positions import (
    AxialEmbedding,
    relative_bias,
    rotary_angles,
    rotate,
    rotate_tokens,
)
from axialtrain.grid import Layout, Place, Rect

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


def turned(x: Tensor, coordinates: list[int]) -> Tensor:
    """x: [B, H, W, N, K], its columns at `coordinates`: pairs of channels as complex numbers."""
    width = x.shape[-1]
    turns = [
        [cmath.exp(1j * at * 10_000 ** (-2 * i / width)) for i in range(width // 2)]
        for at in coordinates
    ]
    pairs = torch.view_as_complex(x.unflatten(-1, (width // 2, 2)))
    turns = torch.tensor(turns, dtype=pairs.dtype).view(1, 1, -1, 1, width // 2)
    return torch.view_as_real(pairs * turns).flatten(-2)


RECT = Rect(4, 7, 10, 15)  # 3 rows, 5 columns of a larger grid
DOWN, ACROSS = list(range(4, 7)), list(range(10, 15))


@pytest.mark.parametrize("dim", DIMS)
def test_tokens_turn_with_their_global_coordinate_along_the_attended_axis(dim):
    x = leaf(*SHAPE)
    want = turned(x, ACROSS) if dim == 2 else turned(x.transpose(1, 2), DOWN).transpose(1, 2)
    assert_agree(rotate_tokens((x,), RECT, (dim,))[0], want, x)


def test_over_both_axes_half_of_the_channels_turn_with_either_coordinate():
    x = leaf(*SHAPE)
    down = turned(x[..., :4].transpose(1, 2), DOWN).transpose(1, 2)
    want = torch.cat((down, turned(x[..., 4:], ACROSS)), -1)
    assert_agree(rotate_tokens((x,), RECT, (1, 2))[0], want, x)


@pytest.mark.parametrize("dims", [(1,), (2,), (1, 2)], ids=str)
def test_a_part_of_the_grid_turns_as_in_the_whole(dims):
    x = tokens((1, 7, 9, 2, 8))
    rows, columns = slice(2, 5), slice(3, 9)
    (whole,) = rotate_tokens((x,), Rect(0, 7, 0, 9), dims)
    (part,) = rotate_tokens((x[:, rows, columns],), Rect(2, 5, 3, 9), dims)
    torch.testing.assert_close(part, whole[:, rows, columns], rtol=0, atol=0)


@pytest.mark.parametrize("dims", [(1,), (2,), (1, 2)], ids=str)
def test_an_empty_part_of_the_grid(dims):
    given = torch.zeros(2, 0, 5, 2, 8), torch.zeros(2, 0, 5, 1, 8)
    turned = rotate_tokens(given, Rect(3, 3, 0, 5), dims)
    assert [x.shape for x in turned] == [x.shape for x in given]


def test_several_tensors_turn_alike():
    q, k = tokens(seed=1), tokens(seed=2)
    both = rotate_tokens((q, k), RECT, (1, 2))
    for x, got in zip((q, k), both, strict=True):
        assert torch.equal(got, rotate_tokens((x,), RECT, (1, 2))[0])


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ((0, 5), (0, 5)),
        ((2, 4), (0, 5)),
        ((0, 5), (3, 4)),
        ((7, 9), (-2, 1)),
        ((0, 1), (0, 9)),
    ],
    ids=str,
)
@pytest.mark.parametrize("span", [1, 2, 5, 12])
def test_the_bias_of_a_pair_is_looked_up_by_its_distance(span, queries, keys):
    table = leaf(3, 2 * span - 1)
    got = relative_bias(table, queries, keys)
    assert got.shape == (3, queries[1] - queries[0], keys[1] - keys[0])
    pairs = itertools.product(range(3), range(*queries), range(*keys))
    want = [table[n, min(max(j - i, 1 - span), span - 1) + span - 1] for n, i, j in pairs]
    assert_agree(got, torch.stack(want).view(got.shape), table)


GRID = (4, 6)  # that an embedding is made for


def embedding() -> AxialEmbedding:
    made = AxialEmbedding(*GRID, 3).double()
    with torch.no_grad():
        made.rows.copy_(leaf(GRID[0], 3, seed=1))
        made.cols.copy_(leaf(GRID[1], 3, seed=2))
    return made


def stretched(table: Tensor, extent: int, at: int) -> Tensor:
    """The embedding of token `at` of `extent`: entries stand at the middles of equal parts."""
    middle = (at + 0.5) / extent * len(table)  # in entries; the first one's middle is at 0.5
    middle = min(max(middle, 0.5), len(table) - 0.5)
    low = min(int(middle - 0.5), len(table) - 1)
    share = middle - 0.5 - low
    return (1 - share) * table[low] + share * table[min(low + 1, len(table) - 1)]


def embedded(x: Tensor, made: AxialEmbedding, extents: list[tuple[int, int]]) -> Tensor:
    """Each image by its own extent, one token at a time."""
    out = []
    for b, i, j in itertools.product(*map(range, x.shape[:3])):
        height, width = extents[b]
        out.append(x[b, i, j] + stretched(made.rows, height, i) + stretched(made.cols, width, j))
    return torch.stack(out).view(x.shape)


def test_an_embedding_of_the_grids_size_is_the_table():
    made, x = embedding(), leaf(2, *GRID, 3, seed=3)
    got = made(x, Place(*GRID), None)
    want = x + made.rows[:, None] + made.cols
    assert torch.equal(got, want)
    assert_agree(got, want, x, made.rows, made.cols)


@pytest.mark.parametrize("size", [(4, 9), (8, 3), (5, 7), (1, 1), (40, 12)], ids=str)
def test_for_another_extent_it_is_interpolated_linearly(size):
    made, x = embedding(), leaf(1, *size, 3, seed=3)
    got = made(x, Place(*size), None)
    assert_agree(got, embedded(x, made, [size]), x, made.rows, made.cols)
    assert torch.equal(got, made(x, Place(*size), torch.ones(1, *size, dtype=torch.bool)))


def test_twice_the_extent_by_hand():
    made = embedding()
    out = made(torch.zeros(1, 8, 6, 3, dtype=torch.float64), Place(8, 6), None) - made.cols
    first, second, third = made.rows[:3]
    expected = [
        first,
        0.75 * first + 0.25 * second,
        0.25 * first + 0.75 * second,
        0.75 * second + 0.25 * third,
    ]
    torch.testing.assert_close(out[0, :4, 0], torch.stack(expected))


def extents_of_three() -> tuple[Tensor, list[tuple[int, int]]]:
    """A mask over a grid of 7 x 8 with holes, and how far its images reach."""
    valid = torch.zeros(3, 7, 8, dtype=torch.bool)
    valid[0, :4, :6] = True
    valid[0, 1, 2] = valid[0, 0] = False
    valid[1, 2, 7] = valid[1, 5, 0] = True  # single tokens
    return valid, [(4, 6), (6, 8), (1, 1)]  # the last has none


def within(extents: list[tuple[int, int]]) -> Tensor:
    inside = torch.zeros(3, 7, 8, dtype=torch.bool)
    for b, (height, width) in enumerate(extents):
        inside[b, :height, :width] = True
    return inside


def test_each_image_of_a_batch_is_embedded_by_its_own_extent():
    valid, extents = extents_of_three()
    made, x = embedding(), leaf(3, 7, 8, 3, seed=3)
    inside = within(extents)
    got = made(x, Place(7, 8), valid)[inside]
    assert_agree(got, embedded(x, made, extents)[inside], x, made.rows, made.cols)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_parts_of_the_grid_on_a_mesh_are_embedded_as_slices_of_the_whole(masked, layout):
    made, x = embedding(), leaf(3, 7, 8, 3, seed=3)
    valid = extents_of_three()[0] if masked else None
    whole = made(x, Place(7, 8), valid)
    for at in itertools.product(range(2), range(2)):
        place = Place(7, 8, layout, (2, 2), at)
        mine = (slice(None), *place.rect.slices(place.grid))
        assert torch.equal(made(x[mine], place, valid), whole[mine])


def test_the_gradients_of_the_parts_add_up_to_that_of_the_whole():
    made, x = embedding(), leaf(3, 7, 8, 3, seed=3)
    valid, _ = extents_of_three()
    tables = (made.rows, made.cols)
    want = torch.autograd.grad(made(x, Place(7, 8), valid).square().sum(), tables)
    found = [torch.zeros_like(table) for table in tables]
    for at in itertools.product(range(2), range(2)):
        place = Place(7, 8, Layout.TILE, (2, 2), at)
        part = made(x[:, *place.rect.slices(place.grid)], place, valid).square().sum()
        found = [sum(pair) for pair in zip(found, torch.autograd.grad(part, tables), strict=True)]
    torch.testing.assert_close(tuple(found), want, rtol=1e-12, atol=1e-12)


def test_an_empty_part_gives_its_tables_a_gradient_of_zero():
    made = embedding()
    place = Place(4, 6, Layout.ROWS, (1, 5), (0, 0))  # 4 rows over 5 ranks
    assert place.rect.empty
    out = made(torch.zeros(2, 0, 6, 3, dtype=torch.float64), place, None)
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), (made.rows, made.cols)))
