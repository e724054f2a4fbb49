"""Tokens arrive where they are wanted, gradients where they came from, and no byte more is sent."""

from __future__ import annotations

import itertools

import pytest
import torch
from distributed.exchange_ranks import (
    BATCH,
    RULES,
    coordinates,
    everywhere,
    fetches,
    move,
    part,
    swap_there_and_back,
    swaps,
    whole,
)
from distributed.launcher import run_ranks

from axialtrain.grid import Layout, Place, Rect
from axialtrain.mesh.exchange import Exchange, crop, fetch, swap
from axialtrain.mesh.mesh import Mesh

MESHES = [(2, 2), (2, 3)]
SIZES = [(13, 10), (7, 5)]
SIZED = [((13, 10), ()), ((7, 5), (2, 3))]  # of [B, h, w] and of [B, h, w, N, K]


def tiles(size: tuple[int, int], shape: tuple[int, int]) -> list[Rect]:
    return [Place(*size, shape=shape, at=at).rect for at in coordinates(shape)]


def halo(size: tuple[int, int], shape: tuple[int, int]) -> list[Rect]:
    """Each tile and what is around it: further than the neighbour, and outside the image."""
    return [Rect(r.top - 3, r.bottom + 2, r.left - 1, r.right + 6) for r in tiles(size, shape)]


def strided(size: tuple[int, int], shape: tuple[int, int]) -> list[Rect]:
    """What tiles of a grid half as large need of this one: balanced splits do not match."""
    height, width = (-(-n // 2) for n in size)
    return [r.scaled(2) for r in tiles((height, width), shape)]


def lopsided(size: tuple[int, int], shape: tuple[int, int]) -> list[Rect]:
    """The first wants the whole image, the last what is outside, the others nothing, or alike."""
    height, width = size
    middle = [Rect(3, 3, 0, width), Rect(2, 5, 1, 4), Rect(2, 5, 1, 4), Rect(0, 0, 0, 0)]
    between = shape[0] * shape[1] - 2
    outside = Rect(height + 2, height + 4, -5, 2)
    return [Rect(0, height, 0, width), *middle[:between], outside]


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize(("size", "rest"), SIZED, ids=["[B, h, w]", "[B, h, w, N, K]"])
@pytest.mark.parametrize("want", [halo, strided, lopsided])
def test_redistribute(rest, want, size, shape):
    wanted, owned = want(size, shape), tiles(size, shape)
    mesh = {"row": shape[0], "col": shape[1]}
    ranks = run_ranks(move, len(owned), mesh=mesh, size=size, rest=rest, wanted=wanted)

    margin = 10
    around = torch.zeros(BATCH, size[0] + 2 * margin, size[1] + 2 * margin, *rest).double()
    around[:, margin:-margin, margin:-margin] = whole(size, rest)
    for rect, got in zip(wanted, ranks, strict=True):
        assert torch.equal(got.output, part(around, rect.shifted(margin, margin)))

    forward, backward = sum(r.forward for r in ranks), sum(r.backward for r in ranks)
    scale = sum(float(r.output.norm()) for r in ranks)
    assert abs(forward - backward) <= 1e-12 * scale

    per_token = BATCH * torch.Size(rest).numel() * 8
    for me, got in enumerate(ranks):
        others = [other for other in range(len(ranks)) if other != me]
        there = sum(owned[me].intersect(wanted[other]).area for other in others)
        back = sum(owned[other].intersect(wanted[me]).area for other in others)
        assert got.sent == (there * per_token, back * per_token)


@pytest.mark.parametrize("shape", [(1, 2), *MESHES], ids=str)
@pytest.mark.parametrize(("size", "rest"), SIZED, ids=["[B, h, w]", "[B, h, w, N, K]"])
@pytest.mark.parametrize("mask", [False, True], ids=["numbers", "mask"])
def test_a_swap_is_a_slice_of_the_whole(rest, mask, size, shape):
    mesh = {"row": shape[0], "col": shape[1]}
    world = shape[0] * shape[1]
    ranks = run_ranks(swaps, world, mesh=mesh, size=size, rest=rest, mask=mask)
    tokens = whole(size, rest) > 0 if mask else whole(size, rest)
    per_token = BATCH * torch.Size(rest).numel() * (1 if mask else 8)
    for at, found in zip(coordinates(shape), ranks, strict=True):
        for source, goal in itertools.product(Layout, repeat=2):
            out, sent = found[source.value, goal.value]
            place = Place(*size, source, shape, at)
            assert out.dtype == tokens.dtype
            assert torch.equal(out, part(tokens, place.under(goal).rect)), (at, source, goal)
            arrives_here = place.rect.intersect(place.under(goal).rect).area
            leaves = place.rect.area - arrives_here
            assert sum(sent.values()) == leaves * per_token, (at, source, goal)


def test_a_swap_talks_in_the_smallest_group():
    mesh = {"row": 2, "col": 2}
    tile, rows, cols = (layout.value for layout in (Layout.TILE, Layout.ROWS, Layout.COLS))
    group = {
        (tile, rows): "col",
        (rows, tile): "col",
        (tile, cols): "row",
        (cols, tile): "row",
        (rows, cols): "spatial",
        (cols, rows): "spatial",
    }
    for found in run_ranks(swaps, 4, mesh=mesh, size=(13, 10), rest=(), mask=False):
        for pair, (_, sent) in found.items():
            used = {name for name, count in sent.items() if count}
            assert used == ({group[pair]} if pair in group else set()), pair


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("kind", ["direct", "hierarchical"])
def test_the_adjoint_of_a_swap_is_the_way_back(kind, shape, size):
    mesh = {"row": shape[0], "col": shape[1]}
    ranks = run_ranks(swap_there_and_back, shape[0] * shape[1], mesh=mesh, size=size, kind=kind)
    for pair in zip(*ranks, strict=True):
        forward, backward, same = zip(*pair, strict=True)
        assert abs(sum(forward) - sum(backward)) <= 1e-12 * BATCH * size[0] * size[1]
        assert all(same)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), *MESHES], ids=str)
def test_two_hops_lead_where_one_does(shape):
    """And talk along one axis at a time."""
    mesh = {"row": shape[0], "col": shape[1]}
    direct, hops = (
        run_ranks(
            swaps, shape[0] * shape[1], mesh=mesh, size=(7, 5), rest=(), mask=False, kind=kind
        )
        for kind in ("direct", "hierarchical")
    )
    for once, twice in zip(direct, hops, strict=True):
        assert once.keys() == twice.keys()
        for pair, (out, _) in once.items():
            assert torch.equal(out, twice[pair][0]), pair
            assert twice[pair][1]["spatial"] == 0


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), *MESHES], ids=str)
@pytest.mark.parametrize("layout", Layout)
def test_fetch(layout, shape):
    """Whatever is wanted, zeros outside; the adjoint adds; in the smallest group."""
    size, margin = (7, 5), 40
    mesh = {"row": shape[0], "col": shape[1]}
    ranks = run_ranks(fetches, shape[0] * shape[1], mesh=mesh, size=size, layout=layout)
    owned = [Place(*size, layout, shape, at).rect for at in coordinates(shape)]
    around = torch.zeros(BATCH, size[0] + 2 * margin, size[1] + 2 * margin, 3).double()
    around[:, margin:-margin, margin:-margin] = whole(size, (3,))
    for name, (wanted, rows, cols) in RULES.items():
        got = [rank[name] for rank in ranks]
        for me, (mine, one) in enumerate(zip(owned, got, strict=True)):
            goal = wanted(mine)
            assert torch.equal(one.output, part(around, goal.shifted(margin, margin))), name
            others = owned[:me] + owned[me + 1 :]
            tokens = sum(mine.intersect(wanted(other)).area for other in others)
            assert sum(one.there.values()) == BATCH * tokens * 3 * 8, name
        forward, backward = sum(one.forward for one in got), sum(one.backward for one in got)
        assert abs(forward - backward) <= 1e-11, name
        if layout is not Layout.TILE:
            rows = cols = rows or cols
        groups = {(True, False): "row", (False, True): "col", (True, True): "spatial"}
        for one in got:
            used = {group for group in one.there if one.there[group] or one.back[group]}
            assert used <= {groups.get((rows, cols))}, name


@pytest.mark.parametrize("shape", [(1, 2), *MESHES], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_mask_is_whole_everywhere(size, shape):
    mesh = {"row": shape[0], "col": shape[1]}
    ranks = run_ranks(everywhere, shape[0] * shape[1], mesh=mesh, size=size)
    for at, found in zip(coordinates(shape), ranks, strict=True):
        for layout, (mask, sent) in zip(Layout, found, strict=True):
            assert mask.dtype == torch.bool
            assert torch.equal(mask, whole(size, ()) > 0)
            mine = Place(*size, layout, shape, at).rect.area
            assert sent == BATCH * mine * (len(ranks) - 1)  # a byte a token


TILE = Rect(2, 5, 1, 5)
CROPS = {
    "itself": TILE,
    "a part": Rect(3, 5, 1, 2),
    "around": Rect(0, 9, -3, 6),
    "across a corner": Rect(4, 7, 0, 3),
    "beside": Rect(2, 5, 5, 8),
    "nothing inside": Rect(3, 3, 2, 4),
    "nothing": Rect(0, 0, 0, 0),
    "apart": Rect(7, 9, 8, 11),
}


@pytest.mark.parametrize("wanted", CROPS.values(), ids=CROPS)
@pytest.mark.parametrize("mask", [False, True], ids=["numbers", "mask"])
def test_crop(mask, wanted):
    tokens = torch.zeros(2, 30, 30, *(() if mask else (3,)))
    torch.manual_seed(0)
    x = torch.randn_like(tokens[:, *TILE.slices(Rect(0, 30, 0, 30))])
    tokens[:, *TILE.shifted(10, 10).slices(Rect(0, 30, 0, 30))] = x
    if mask:
        tokens, x = tokens > 0, x > 0
    out = crop(x, TILE, wanted)
    assert torch.equal(out, part(tokens, wanted.shifted(10, 10)))
    assert (out is x) == (wanted == TILE)


@pytest.mark.parametrize("name", RULES)
def test_one_process_fetches_from_itself(name):
    wanted, rows, cols = RULES[name]
    x, place = whole((7, 5), (3,)), Place(7, 5)
    around = torch.zeros(BATCH, 87, 85, 3).double()
    around[:, 40:47, 40:45] = x
    expected = part(around, wanted(place.rect).shifted(40, 40))
    for got in (
        fetch(x, place, wanted, Mesh(), across_rows=rows, across_cols=cols),
        Exchange().fetch(x, place, wanted, across_rows=rows, across_cols=cols),
    ):
        assert torch.equal(got, expected)


def test_a_place_of_another_mesh_is_refused():
    place = Place(4, 7, Layout.TILE, (2, 2), (0, 1))
    with pytest.raises(
        ValueError, match=r"\(2, 2\), the mesh is \(1, 1\): make places with mesh\."
    ):
        swap(torch.zeros(1, 2, 4, 3), place, Layout.ROWS, Mesh())


def test_one_process_moves_nothing():
    mesh = Mesh()
    x = torch.randn(2, 4, 7, 3)
    for source, goal in itertools.product(Layout, repeat=2):
        assert swap(x, Place(4, 7, source), goal, mesh) is x
        assert Exchange()(x, Place(4, 7, source), goal) is x


def test_an_exchange_without_a_mesh_refuses_a_part_of_an_image():
    place = Place(4, 7, Layout.TILE, (2, 2), (0, 1))
    with pytest.raises(AssertionError, match=r"goes through parallelize\(\)"):
        Exchange()(torch.zeros(1, 2, 4, 3), place, Layout.ROWS)
