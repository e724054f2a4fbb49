"""What a layer sends is what the design says: by formula where the mesh divides the grid, counted
token by token where it does not.

M are the bytes of one rank's activations, T the tensor ranks, and P the ranks among which tokens
move: those of mesh axis col for rows, of row for columns, all of the image from rows to columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import pytest
import torch
from distributed.bytes_ranks import BATCH, DIM, HEADS, Layers, Sent, layers_send
from distributed.launcher import run_ranks
from distributed.model_ranks import Case, sharded
from numpy.typing import NDArray

from axialtrain.grid import Layout, Place
from axialtrain.mesh.mesh import EXCHANGES

pytestmark = pytest.mark.slow

Mesh = tuple[int, int, int]  # row, col, tensor

MESHES = [(1, 2, 1), (2, 1, 1), (2, 2, 1), (2, 3, 1), (1, 2, 2), (2, 1, 2)]
EVEN = (12, 12)
UNEVEN = [(13, 10), (7, 5)]
PASSES = ("row", "col", "window", "row+col", "shifted", "global", "col+row", "row", "global")

# 8 ranks take their time to find each other.
LARGE = pytest.param((2, 2, 2), marks=pytest.mark.slow)
on_each_mesh = pytest.mark.parametrize(
    "mesh", [*MESHES, LARGE], ids="{0[0]}x{0[1]}, tensor {0[2]}".format
)
# Tokens travel as they are: in two bytes a value where the model trains in bf16.
DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def sent_by(mesh: Mesh, many: Iterable[Layers]) -> list[list[list[tuple[Sent, Sent]]]]:
    """Of each rank: for each of `many`, what each of its layers sends forward and backward."""
    degrees = dict(zip(("row", "col", "tensor"), mesh, strict=True))
    return run_ranks(layers_send, prod(mesh), mesh=degrees, many=list(many), timeout=120)


def assert_all_send(mesh: Mesh, expected: dict[Layers, list[int]]) -> None:
    """So many bytes in each layer on every rank, and the same again backward."""
    for rank in sent_by(mesh, expected):
        for (layers, counts), got in zip(expected.items(), rank, strict=True):
            sums = [(sum(there.values()), sum(back.values())) for there, back in got]
            assert sums == [(count, count) for count in counts], layers


def activations(mesh: Mesh, layers: Layers) -> int:
    """M, where the mesh divides the grid."""
    height, width = layers.size
    return BATCH * height * width * DIM * layers.dtype.itemsize // (mesh[0] * mesh[1])


# --- By formula -----------------------------------------------------------------------------------


@on_each_mesh
def test_a_swap_sends_all_but_its_own_part(mesh):
    """M (P - 1) / P a pass, and nothing while the axis is the same."""
    row, col, _ = mesh
    expected = {}
    for dtype in DTYPES:
        layers = Layers(EVEN, ("row", "row", "col", "col+row", "row+row", "row+col"), dtype=dtype)
        m = activations(mesh, layers)
        in_band, in_image = m * (col - 1) // col, m * (row * col - 1) // (row * col)
        expected[layers] = [in_band, 0, in_image, in_image, 0, in_image]
    assert_all_send(mesh, expected)


@on_each_mesh
def test_a_layer_of_rows_and_columns_costs_a_swap_a_pass(mesh):
    """With separate projections too; a sum of passes goes out to the first one and comes back."""
    row, col, _ = mesh
    layers = Layers(EVEN, ("row+col",) * 3)
    m = activations(mesh, layers)
    swap = m * (row * col - 1) // (row * col)
    both = [m * (col - 1) // col + swap, 2 * swap, 2 * swap]
    summed = [m * (row - 1) // row + 2 * swap, 2 * swap, 2 * swap]
    expected = {layers: both, replace(layers, share=False): both}
    assert_all_send(mesh, expected | {replace(layers, fusion="sum"): summed})


@pytest.mark.parametrize("mesh", [(2, 2, 1), (2, 3, 1), LARGE], ids=str)
def test_two_hops_send_along_one_axis_each(mesh):
    row, col, _ = mesh
    layers = Layers(EVEN, ("row", "col", "row"), swap="hierarchical")
    m = activations(mesh, layers)
    hops = {"row": m * (row - 1) // row, "col": m * (col - 1) // col, "spatial": 0, "tensor": 0}
    for rank in sent_by(mesh, [layers]):
        for there, back in rank[0][1:]:
            assert there == back == hops


@on_each_mesh
def test_heads_send_queries_keys_values_and_outputs(mesh):
    """4 M (P - 1) / (P T) a pass."""
    row, col, tensor = mesh
    expected = {}
    for dtype in DTYPES:
        layers = Layers(EVEN, ("row", "row", "col", "row+col"), "heads", dtype=dtype)
        m = 4 * activations(mesh, layers)
        rows, cols = m * (col - 1) // (col * tensor), m * (row - 1) // (row * tensor)
        expected[layers] = [rows, rows, cols, rows + cols]
    assert_all_send(mesh, expected)


@on_each_mesh
def test_gathering_sends_keys_and_values_to_each_other_rank(mesh):
    """2 M (P - 1) / T a pass."""
    row, col, tensor = mesh
    expected = {}
    for dtype in DTYPES:
        layers = Layers(EVEN, ("row", "row", "col", "row+col"), "gather", dtype=dtype)
        m = 2 * activations(mesh, layers)
        rows, cols = m * (col - 1) // tensor, m * (row - 1) // tensor
        expected[layers] = [rows, rows, cols, rows + cols]
    assert_all_send(mesh, expected)


@on_each_mesh
def test_a_global_pass_gathers_the_whole_grid(mesh):
    """2 M (P - 1) / T, over all ranks of the image, wherever the tokens are."""
    row, col, tensor = mesh
    layers = Layers(EVEN, ("global", "row", "global", "col", "global"))
    gathered = 2 * activations(mesh, layers) * (row * col - 1) // tensor
    many = [replace(layers, exchange=exchange) for exchange in EXCHANGES]
    for rank in sent_by(mesh, many):
        for got in rank:
            for there, back in got[::2]:
                assert sum(there.values()) == sum(back.values()) == gathered


@on_each_mesh
def test_windows_that_no_split_cuts_send_nothing(mesh):
    layers = Layers(EVEN, ("window", "window+window"))
    assert_all_send(mesh, {replace(layers, window=window): [0, 0] for window in (1, 2)})


@pytest.mark.parametrize("mesh", [(1, 2, 1), (2, 1, 1), (2, 2, 1)], ids=str)
def test_a_shift_may_move_the_cuts_onto_the_splits(mesh):
    """10 tokens are split at 5: amid the window from 3 to 6, or beside the one shifted to 5."""
    for rank in sent_by(mesh, [Layers((10, 10), ("window", "shifted"), window=3)]):
        window, shifted = rank[0]
        assert all(sum(sent.values()) > 0 for sent in window)
        assert all(sum(sent.values()) == 0 for sent in shifted)


@pytest.mark.parametrize("mesh", [(2, 2, 1), (2, 3, 1)], ids=str)
def test_a_mask_is_sent_once(mesh):
    """A byte a token to each other rank, however deep the model; nothing backward."""
    row, col, _ = mesh
    degrees = {"row": row, "col": col}
    for depth in (1, 3):
        with_mask, without = (
            run_ranks(sharded, row * col, case=Case(EVEN, depth=depth, holes=holes), mesh=degrees)
            for holes in (False, None)
        )
        for rank, other in zip(with_mask, without, strict=True):
            extra = sum(rank.sent.values()) - sum(other.sent.values())
            assert extra == (row * col - 1) * BATCH * 12 * 12 // (row * col)


# --- Token by token -------------------------------------------------------------------------------


Owners = NDArray[np.int64]  # [H, W], the rank of the image that has a token


@dataclass
class Count:
    """Values that each rank of the image sends, forward and backward."""

    there: NDArray[np.int64]
    back: NDArray[np.int64]

    def __add__(self, other: Count) -> Count:
        return Count(self.there + other.there, self.back + other.back)


def owners(size: tuple[int, int], shape: tuple[int, int], layout: Layout) -> Owners:
    found = np.full(size, -1)
    for rank, at in enumerate(np.ndindex(shape)):
        found[Place(*size, layout, shape, at).rect.slices(Place(*size).rect)] = rank
    assert (found >= 0).all()
    return found


def moved(source: Owners, goal: Owners, ranks: int) -> Count:
    """Each token goes to its new owner."""
    there, back = np.zeros(ranks, int), np.zeros(ranks, int)
    for old, new in zip(source.flat, goal.flat, strict=True):
        if old != new:
            there[old] += DIM
            back[new] += DIM
    return Count(there, back)


def fetched(source: Owners, wants: Sequence[NDArray[np.bool_]], values: int) -> Count:
    """Each token goes to whoever wants it, their gradients come back; `values` a token."""
    there, back = np.zeros(len(wants), int), np.zeros(len(wants), int)
    for token, owner in np.ndenumerate(source):
        for rank, wanted in enumerate(wants):
            if wanted[token] and rank != owner:
                there[owner] += values
                back[rank] += values
    return Count(there, back)


def dealt(tiles: Owners, shape: tuple[int, int], tensor: int, which: str) -> Count:
    """Q, K and V of each token and head go to who has that head of its line, O comes back."""
    ranks, width = shape[0] * shape[1], DIM // HEADS
    there, back = np.zeros(ranks, int), np.zeros(ranks, int)
    for owner in tiles.flat:
        row, col = divmod(int(owner), shape[1])
        line = [row * shape[1] + c for c in range(shape[1])]
        if which == "col":
            line = [r * shape[1] + col for r in range(shape[0])]
        for head in range(HEADS // tensor):
            dealer = line[head * len(line) // (HEADS // tensor)]
            if dealer != owner:
                there[owner] += 3 * width
                there[dealer] += width
                back[dealer] += 3 * width
                back[owner] += width
    return Count(there, back)


def count_pass(which: str, at: Owners, mesh: Mesh, layers: Layers) -> Count:
    """What a pass sends whose tokens are where they should be."""
    *shape, tensor = mesh
    ranks, both = range(shape[0] * shape[1]), 2 * DIM // tensor
    mine = [at == rank for rank in ranks]
    if which == "global":
        return fetched(at, [np.full(layers.size, True) for _ in ranks], both)
    if which in ("window", "shifted"):
        shift = layers.window // 2 if which == "shifted" else 0
        y, x = ((axis + shift) // layers.window for axis in np.indices(layers.size))
        windows = 1000 * y + x
        return fetched(at, [np.isin(windows, windows[some]) for some in mine], both)
    if layers.exchange == "heads":
        return dealt(at, (shape[0], shape[1]), tensor, which)
    if layers.exchange == "gather":
        axis = 1 if which == "row" else 0
        lines = [some.any(axis, keepdims=True) & np.full(layers.size, True) for some in mine]
        return fetched(at, lines, both)
    return moved(at, at, len(ranks))


def count_layers(mesh: Mesh, layers: Layers) -> list[Count]:
    shape = (mesh[0], mesh[1])
    ranks = shape[0] * shape[1]
    owned = {layout: owners(layers.size, shape, layout) for layout in Layout}

    def to(before: Layout, after: Layout) -> Count:
        hops = layers.swap == "hierarchical" and before is not after
        if hops and Layout.TILE not in (before, after):
            return to(before, Layout.TILE) + to(Layout.TILE, after)
        return moved(owned[before], owned[after], ranks)

    def enters(which: str, before: Layout) -> Layout:
        if which == "global":
            return before
        if layers.exchange != "swap" or which in ("window", "shifted"):
            return Layout.TILE
        return Layout.ROWS if which == "row" else Layout.COLS

    at, found = Layout.TILE, []
    for names in layers.passes:
        passes, sent = names.split("+"), Count(np.zeros(ranks, int), np.zeros(ranks, int))
        if layers.fusion == "sum":
            end = at
            for which in passes:
                end = enters(which, end)
            sent, at = sent + to(at, end), end
        for which in passes:
            goal = enters(which, at)
            sent = sent + to(at, goal) + count_pass(which, owned[goal], mesh, layers)
            if layers.fusion == "sum":
                sent = sent + to(goal, at)
            else:
                at = goal
        found.append(sent)
    return found


@on_each_mesh
def test_uneven_parts_send_the_tokens_that_others_lack(mesh):
    exchanges = [
        ("swap", "direct"),
        ("swap", "hierarchical"),
        ("heads", "auto"),
        ("gather", "auto"),
    ]
    many = [Layers(size, PASSES, *each, window=3) for size in UNEVEN for each in exchanges]
    assert_counts(mesh, many)


@pytest.mark.parametrize("mesh", [(2, 2, 1), (2, 3, 1)], ids=str)
def test_a_sum_of_passes_sends_the_tokens_that_others_lack(mesh):
    passes = ("row+col", "window+global+row", "col+shifted")
    many = [Layers((13, 10), passes, each, fusion="sum", window=3) for each in EXCHANGES]
    assert_counts(mesh, many)


def assert_counts(mesh: Mesh, many: list[Layers]) -> None:
    expected = [count_layers(mesh, layers) for layers in many]
    for rank, got in enumerate(sent_by(mesh, many)):
        at = rank // mesh[2]
        for layers, sent, counts in zip(many, got, expected, strict=True):
            sums = [(sum(there.values()), sum(back.values())) for there, back in sent]
            per_value = BATCH * layers.dtype.itemsize
            assert sums == [(n.there[at] * per_value, n.back[at] * per_value) for n in counts]
