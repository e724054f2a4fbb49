"""Any mesh, same model: output, input and parameter gradients against serial, in fp64.

The product of all that a model and a mesh can be is nearly two million cases. Those that run are a
covering array: any two values of two factors meet in one of them, and so do any three values of
three of the main factors (passes, positions, exchange, mesh, mask, grid, tensor). It is found
greedily: as long as something has not met, it starts a case, and each further factor gets the value
that makes the most new meetings, drawn among equals with a fixed seed. Pairs come first, so that
the quick run, which takes the first QUICK cases, has eight of ten.

What cannot be is left out: separate projections and skipped passes where no layer has two passes,
and a pooled prefix token where there is none. So is 2 x 3 x tensor 2, of whose 12 ranks two cases
are written out.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from distributed.launcher import run_ranks
from distributed.model_ranks import CHANCE, PATCH, Case, Gradients, serial, sharded

from axialtrain.grid import Layout, Place

FACTORS: dict[str, list[Any]] = {
    "passes": [
        "row+col", "col+row", "row", "col", "row,col", "window", "shifted", "global", "row+global",
        "window,row+col,shifted,global",
    ],
    "positions": ["rope", "none", "axial", "relative", "clipped"],
    "exchange": ["direct", "hierarchical", "heads", "gather"],
    "mesh": ["1x2", "2x1", "2x2", "2x3"],
    "holes": [None, False, True],
    "grid": [(13, 10), (7, 5), (12, 6)],
    "tensor": [1, 2],
    "head": ["tokens", "mean", "prefix", "attention"],
    "prefix": [0, 2],
    "fusion": ["sequential", "sum"],
    "share": [True, False],
    "skip_axis": [0.0, 0.6],
    "drop_path": [0.0, 0.5],
}  # fmt: skip
MAIN = list(FACTORS)[:7]
QUICK = 20

Choice = dict[str, Any]  # a value of some factors, or of each
Meeting = tuple[tuple[str, Any], ...]  # the same of two or three, in the order of FACTORS


def can_be(choice: Choice) -> bool:
    """Whether these values may stand in one case."""
    if "+" not in choice.get("passes", "+") and (
        choice.get("share") is False or choice.get("skip_axis")
    ):
        return False
    if choice.get("head") == "prefix" and choice.get("prefix") == 0:
        return False
    return (choice.get("mesh"), choice.get("tensor")) != ("2x3", 2)


def groups_of(names: list[str]) -> list[tuple[str, ...]]:
    """The factors whose values should meet: any two, and three of the main ones."""
    main = [name for name in names if name in MAIN]
    return [*itertools.combinations(names, 2), *itertools.combinations(main, 3)]


def meetings(choice: Choice) -> set[Meeting]:
    names = [name for name in FACTORS if name in choice]
    return {tuple((name, choice[name]) for name in group) for group in groups_of(names)}


def all_meetings() -> list[Meeting]:
    found = []
    for group in groups_of(list(FACTORS)):
        for values in itertools.product(*(FACTORS[name] for name in group)):
            meeting = tuple(zip(group, values, strict=True))
            if can_be(dict(meeting)):
                found.append(meeting)
    return found


@functools.cache
def covering_choices() -> list[Choice]:
    rng = random.Random(0)
    missing = dict.fromkeys(sorted(all_meetings(), key=lambda one: (len(one), rng.random())))
    found = []
    while missing:
        choice = dict(next(iter(missing)))
        for name in [name for name in FACTORS if name not in choice]:
            options = [choice | {name: value} for value in FACTORS[name]]
            options = [option for option in options if can_be(option)]
            new = [len(meetings(option) & missing.keys()) for option in options]
            choice = rng.choice(
                [option for option, n in zip(options, new, strict=True) if n == max(new)]
            )
        for meeting in meetings(choice):
            missing.pop(meeting, None)
        found.append(choice)
    return found


def case_of(choice: Choice) -> Case:
    passes, positions = tuple(choice["passes"].split(",")), choice["positions"]
    heads = 6 if choice["mesh"] == "2x3" else 4  # so many can be dealt out, by rows and columns
    same = ("grid", "holes", "head", "prefix", "fusion", "share", "skip_axis", "drop_path")
    return Case(
        pattern=passes,
        positions="relative" if positions == "clipped" else positions,
        span=3 if positions == "clipped" else None,
        depth=max(2, len(passes)),
        dim=4 * heads,
        heads=heads,
        **{name: choice[name] for name in same},
    )


def degrees(mesh: str, tensor: int = 1) -> dict[str, int]:
    row, col = mesh.split("x")
    return {"row": int(row), "col": int(col), "tensor": tensor}


expected_of = functools.lru_cache(maxsize=None)(serial)


def assert_close(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    assert got.shape == want.shape, what
    if want.numel() == 0:
        return
    error = (got - want).abs().max() / want.abs().max().clamp_min(1e-30)
    assert error <= 1e-10, f"{what}: {error:.1e} of its largest value"


def check(
    case: Case, mesh: dict[str, int], exchange: str = "swap", swap: str = "auto"
) -> list[Gradients]:
    expected = expected_of(case)
    world = torch.Size(mesh.values()).numel()
    ranks: list[Gradients] = run_ranks(
        sharded, world, case=case, mesh=mesh, exchange=exchange, swap=swap, timeout=120
    )
    output = torch.full_like(expected.output, torch.nan)
    grad = torch.full_like(expected.input, torch.nan)
    for got in ranks:
        top, bottom, left, right = got.rect
        rows, cols = slice(top * 2, bottom * 2), slice(left * 2, right * 2)
        if case.head == "tokens":
            output[:, rows, cols] = got.output
        else:  # of the whole image, and every rank takes the same
            assert torch.equal(got.output, ranks[0].output)
            output = got.output
        rows, cols = slice(top * PATCH, bottom * PATCH), slice(left * PATCH, right * PATCH)
        grad[:, rows, cols] = got.input
        assert torch.equal(got.prefix, ranks[0].prefix)
        assert_close(got.prefix, expected.prefix, "prefix tokens")
        assert got.parameters.keys() == expected.parameters.keys()
        for name, want in expected.parameters.items():
            assert_close(got.parameters[name], want, name)
        # Where only prefix tokens are read, the last layer's tables for the image have no use.
        assert got.unused == expected.unused
        assert not got.unused or (case.head, case.positions) == ("prefix", "relative")
        assert got.norm == pytest.approx(expected.norm, rel=1e-10)
    assert_close(output, expected.output, "output")
    assert_close(grad, expected.input, "input gradient")
    tensor = mesh.get("tensor", 1)
    for rank, got in enumerate(ranks):
        assert set(got.sharded) == {n for n in got.parameters if tensor > 1 and is_sharded(n)}
        # Replicated parameters have one gradient, or tensor ranks would drift apart.
        peer = ranks[rank - rank % tensor]
        for name in got.parameters.keys() - got.sharded.keys():
            assert torch.equal(got.parameters[name], peer.parameters[name]), name
    return ranks


def is_sharded(name: str) -> bool:
    split = r"attn(\.\d)?\.(qkv\.weight|qkv\.bias|proj\.weight)"
    return bool(re.search(rf"\.({split}|mlp\.(fc1\.weight|fc1\.bias|fc2\.weight))$", name))


def ids(choice: Choice) -> str:
    """The main factors by their values, the others where they are not the first."""
    words = [str(choice[name]) for name in MAIN]
    words += [f"{n}={choice[n]}" for n in FACTORS if n not in MAIN and choice[n] != FACTORS[n][0]]
    return "-".join(words)


def check_choice(choice: Choice) -> None:
    swap = choice["exchange"] in ("direct", "hierarchical")
    check(
        case_of(choice),
        degrees(choice["mesh"], choice["tensor"]),
        exchange="swap" if swap else choice["exchange"],
        swap=choice["exchange"] if swap else "auto",
    )


@pytest.mark.parametrize("choice", covering_choices()[:QUICK], ids=ids)
def test_gradients(choice):
    check_choice(choice)


@pytest.mark.slow
@pytest.mark.parametrize("choice", covering_choices()[QUICK:], ids=ids)
def test_gradients_of_the_other_cases(choice):
    check_choice(choice)


@pytest.mark.parametrize("mesh", [{"row": 2, "col": 2}, {"row": 2, "tensor": 2}], ids=str)
def test_gradients_of_an_mlp_in_chunks(mesh):
    """Against the serial MLP of all tokens; five tokens divide no rank's part."""
    case = Case((13, 10), prefix=2)
    want = serial(case)
    got = check(replace(case, mlp_chunk=5), mesh)
    for name, gradient in want.parameters.items():
        assert_close(got[0].parameters[name], gradient, name)


TWELVE = {"row": 2, "col": 3, "tensor": 2}


@pytest.mark.slow
def test_gradients_of_heads_on_twelve_ranks():
    passes = ("window", "row+col", "shifted", "global")
    sizes = {"depth": 4, "dim": 48, "heads": 12}
    check(Case((13, 10), passes, "relative", **sizes, prefix=2), TWELVE, "heads")


@pytest.mark.slow
def test_gradients_of_tokens_on_twelve_ranks():
    case = Case((7, 5), positions="axial", share=False, prefix=2, head="prefix", skip_axis=0.6)
    check(case, TWELVE, swap="hierarchical")


def test_all_that_can_meet_meets():
    choices = covering_choices()
    assert all(choice.keys() == FACTORS.keys() and can_be(choice) for choice in choices)
    met = set().union(*(meetings(choice) for choice in choices))
    assert met == set(all_meetings())


def test_the_quick_cases_have_every_value_and_eight_pairs_of_ten():
    quick = covering_choices()[:QUICK]
    for name, values in FACTORS.items():
        assert {choice[name] for choice in quick} == set(values), name
    pairs = {meeting for meeting in all_meetings() if len(meeting) == 2}
    met = pairs & set().union(*(meetings(choice) for choice in quick))
    assert len(met) >= 0.8 * len(pairs)


def test_what_is_left_out_at_random_is_so_in_these_cases():
    """A first and a second pass, and of some image, but not of all, a branch."""
    assert {CHANCE.skipped(layer, 2, 0.6) for layer in range(4)} == {0, 1, None}
    for depth in (2, 4):
        layers = range(1, depth)
        kept = [CHANCE.kept(i, branch, 0.5 * i / (depth - 1)) for i in layers for branch in (0, 1)]
        assert any(0 in factors and max(factors) > 1 for factors in kept)


def test_an_empty_part_and_a_split_that_cuts_nothing_are_among_the_cases():
    def parts(size: tuple[int, int], layout: Layout, mesh: tuple[int, int]) -> set[int]:
        return {Place(*size, layout, mesh, at).rect.area for at in np.ndindex(mesh)}

    assert 0 in parts((7, 5), Layout.COLS, (2, 3))
    assert all(len(parts((12, 6), layout, (2, 3))) == 1 for layout in Layout)
    assert all(len(parts((13, 10), layout, (2, 2))) > 1 for layout in Layout)
