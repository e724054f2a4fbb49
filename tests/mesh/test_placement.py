"""Which axes cross hosts, and what is better, against counting by hand and by brute force."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from axialtrain.grid import Layout, Place
from axialtrain.mesh.mesh import MeshConfig
from axialtrain.mesh.placement import AXES, arguments, placed, placed_on_nodes


def on_nodes(nodes: int, processes: int, **degrees: int):
    return placed_on_nodes(degrees, nodes, processes)


def test_tensor_across_hosts_becomes_bands_of_rows():
    placement = on_nodes(2, 8, tensor=16)
    assert placement.crossing == ("tensor",)
    assert placement.warning == (
        "tensor crosses hosts, and it sums activations twice in each layer. Better take "
        "mesh=2x1 mesh.data=1 mesh.tensor=8: what then crosses hosts is row"
    )


def test_rows_across_hosts_are_right():
    placement = on_nodes(2, 8, row=2, col=8)
    assert placement.crossing == ("row",)
    assert placement.better is None
    assert placement.warning is None


def test_columns_across_hosts_become_rows():
    placement = on_nodes(2, 8, col=16)
    assert placement.better is not None
    assert placement.better.degrees == {"data": 1, "row": 2, "col": 8, "tensor": 1}
    assert placement.warning == (
        "col crosses hosts, and it exchanges tokens in each row pass. Better take "
        "mesh=2x8 mesh.data=1 mesh.tensor=1: what then crosses hosts is row"
    )


def test_columns_over_single_processes_are_as_good_as_rows():
    assert on_nodes(2, 1, col=2).warning is None


def test_replicas_across_hosts_are_right():
    placement = on_nodes(4, 4, data=4, row=1, col=2, tensor=2)
    assert placement.crossing == ("data",)
    assert placement.warning is None


def test_ranks_dealt_out_to_hosts_in_turns_are_numbered_anew():
    placement = placed({"col": 2, "tensor": 2}, ["a", "b", "a", "b"])
    assert placement.better is not None
    assert placement.better.by_host
    assert placement.warning == (
        "tensor crosses hosts, and it sums activations twice in each layer. Better number the "
        "ranks host by host: what then crosses hosts is col"
    )


def test_an_order_and_a_mesh_at_once():
    placement = placed({"tensor": 4}, ["a", "b", "a", "b"])
    assert placement.warning == (
        "tensor crosses hosts, and it sums activations twice in each layer. Better number the "
        "ranks host by host and take mesh=2x1 mesh.data=1 mesh.tensor=2: what then crosses hosts "
        "is row"
    )


def test_groups_that_do_not_fill_a_host():
    """Six columns on hosts of eight: two of four images are cut by the border of a host."""
    placement = on_nodes(3, 8, data=4, col=6)
    assert str(placement.axes["col"]) == "crosses hosts in 2 of 4 groups"
    assert placement.axes["col"].apart == 2 * 2 * 2 * 4
    assert str(placement.axes["row"]) == "of one rank"
    assert str(on_nodes(3, 8, data=6, col=4).axes["col"]) == "inside a host"


def test_a_mesh_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"has 8 ranks: allowed is one for each of the 6"):
        on_nodes(3, 2, row=8)


def test_arguments_make_the_mesh():
    degrees = {"data": 3, "row": 2, "col": 5, "tensor": 4}
    assert arguments(degrees) == "mesh=2x5 mesh.data=3 mesh.tensor=4"


# Brute force: everything from the coordinates of pairs of ranks, nothing from strides.


def coordinates(degrees: Mapping[str, int]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(degrees[axis]) for axis in AXES)))


def pairs_apart(axis: str, degrees: Mapping[str, int], hosts: Sequence[str]) -> int:
    index = AXES.index(axis)
    every = coordinates(degrees)
    return sum(
        hosts[i] != hosts[j] and one[:index] + one[index + 1 :] == two[:index] + two[index + 1 :]
        for (i, one), (j, two) in itertools.product(enumerate(every), repeat=2)
    )


def cost(degrees: Mapping[str, int], hosts: Sequence[str]) -> tuple[int, int]:
    tensor, row, col = (pairs_apart(axis, degrees, hosts) for axis in ("tensor", "row", "col"))
    return tensor, row + col


@st.composite
def meshes_on_hosts(draw: st.DrawFn) -> tuple[dict[str, int], list[str]]:
    degrees = {axis: draw(st.integers(1, 4)) for axis in AXES}
    size = len(coordinates(degrees))
    assume(size <= 16)
    kind = draw(st.sampled_from(["even", "uneven", "any"]))
    names = "abcdef"
    if kind == "even":
        nodes = draw(st.sampled_from([n for n in range(1, 7) if size % n == 0]))
        return degrees, [names[rank * nodes // size] for rank in range(size)]
    hosts = draw(st.lists(st.sampled_from(names), min_size=size, max_size=size))
    return degrees, sorted(hosts) if kind == "uneven" else hosts


@given(meshes_on_hosts())
def test_axes_against_pairs_of_ranks(case):
    degrees, hosts = case
    placement = placed(degrees, hosts)
    every = coordinates(degrees)
    for rank, at in enumerate(every):
        assert placement.coordinates(rank) == dict(zip(AXES, at, strict=True))
    for index, (name, axis) in enumerate(placement.axes.items()):
        assert name == AXES[index] == axis.name
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, at in enumerate(every):
            groups.setdefault(at[:index] + at[index + 1 :], []).append(rank)
        assert sorted(axis.groups) == sorted(tuple(group) for group in groups.values())
        assert axis.crossing == sum(
            len({hosts[rank] for rank in group}) > 1 for group in groups.values()
        )
        assert axis.apart == pairs_apart(name, degrees, hosts)
    assert placement.crossing == tuple(a for a in AXES if placement.axes[a].crossing)


@settings(max_examples=60)
@given(meshes_on_hosts())
def test_what_is_better_is_the_best_that_there_is(case):
    degrees, hosts = case
    in_order = [host for first in dict.fromkeys(hosts) for host in hosts if host == first]
    bands = degrees["row"] * degrees["col"] * degrees["tensor"]
    meshes = [
        {"data": degrees["data"], "row": row, "col": bands // (row * tensor), "tensor": tensor}
        for tensor in range(1, degrees["tensor"] + 1)
        if degrees["tensor"] % tensor == 0
        for row in range(1, bands // tensor + 1)
        if bands % (row * tensor) == 0
    ]
    widest = max(m["tensor"] for m in meshes if cost(m, in_order)[0] == 0)
    best = min(cost(m, in_order) for m in meshes if m["tensor"] == widest)

    placement = placed(degrees, hosts)
    better = placement.better
    if better is None:
        assert cost(degrees, hosts) <= best
        assert placement.warning is None
        return
    assert better.degrees in meshes
    assert better.degrees["tensor"] == widest
    if better.by_host:
        assert cost(better.degrees, hosts) > best
    else:  # hosts of uneven sizes may be luckier than in order
        assert cost(better.degrees, hosts) <= best
    assert cost(better.degrees, in_order) == best < cost(degrees, hosts)
    assert placement.warning is not None
    assert better.by_host == ("host by host" in placement.warning)
    assert (better.degrees != degrees) == (arguments(better.degrees) in placement.warning)
    assert better.by_host or better.degrees != degrees
    assert MeshConfig(**better.degrees).size == len(hosts)


# --- From whole rows to whole columns -------------------------------------------------------------


def between_hosts(
    rows: int, cols: int, hosts: Sequence[str], ways: Sequence[Layout]
) -> tuple[int, int]:
    """Tokens and messages that cross hosts on the way through `ways`, counted rank by rank on a
    grid that the mesh divides."""
    side = rows * cols
    ranks = list(itertools.product(range(rows), range(cols)))
    tokens = messages = 0
    for before, after in itertools.pairwise(ways):
        for (one, left), (other, right) in itertools.product(enumerate(ranks), repeat=2):
            source = Place(side, side, before, (rows, cols), left).rect
            goal = Place(side, side, after, (rows, cols), right).rect
            sent = source.intersect(goal).area
            if sent and hosts[one] != hosts[other]:
                tokens, messages = tokens + sent, messages + 1
    return tokens, messages


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda rows: st.integers(1, 4).flatmap(
            lambda cols: st.tuples(
                st.just(rows),
                st.just(cols),
                st.lists(st.sampled_from("abc"), min_size=rows * cols, max_size=rows * cols),
            )
        )
    )
)
def test_the_way_from_rows_to_columns_is_the_one_with_less_between_hosts(drawn):
    rows, cols, hosts = drawn
    direct = between_hosts(rows, cols, hosts, (Layout.ROWS, Layout.COLS))
    hops = between_hosts(rows, cols, hosts, (Layout.ROWS, Layout.TILE, Layout.COLS))
    assert hops[0] >= direct[0]  # never fewer bytes
    chosen = placed({"row": rows, "col": cols}, hosts).swap
    assert chosen == ("hierarchical" if hops < direct else "direct")


@pytest.mark.parametrize(
    ("nodes", "processes", "degrees", "expected"),
    [
        (1, 8, {"row": 2, "col": 4}, "direct"),  # no bytes between hosts
        (2, 4, {"row": 2, "col": 4}, "hierarchical"),  # col stays inside
        (2, 8, {"row": 4, "col": 4}, "hierarchical"),  # two bands of rows on each
        (2, 4, {"data": 2, "row": 2, "col": 2}, "direct"),  # an image on each
        (4, 4, {"data": 2, "row": 2, "col": 4}, "hierarchical"),  # an image on two
        (2, 4, {"row": 2, "col": 2, "tensor": 2}, "hierarchical"),
        (2, 4, {"row": 8}, "direct"),  # there is one way only
        (2, 4, {"col": 8}, "direct"),
        (4, 2, {"row": 2, "col": 4}, "direct"),  # both axes cross: two hops send more
    ],
    ids=str,
)
def test_the_way_from_rows_to_columns(nodes, processes, degrees, expected):
    assert on_nodes(nodes, processes, **degrees).swap == expected


def test_a_mesh_takes_the_way_of_its_placement_where_none_was_asked_for():
    degrees = {"row": 2, "col": 2}
    placement = on_nodes(2, 2, **degrees)
    for asked, expected in (("auto", "hierarchical"), ("direct", "direct")):
        config = MeshConfig(**degrees, swap=asked)
        assert config.placed_on(placement).swap == expected
        assert config.placed_on(placement).degrees == config.degrees
