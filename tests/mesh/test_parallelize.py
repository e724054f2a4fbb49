"""What a rank keeps of a model that was built serially, and which models a mesh refuses."""

from __future__ import annotations

import pytest
import torch
from distributed.launcher import run_ranks
from distributed.model_ranks import Case, build, per_head, refusals, spread, still_trained

from axialtrain.mesh.crossing import Crossing
from axialtrain.mesh.exchange import Exchange
from axialtrain.mesh.mesh import Mesh
from axialtrain.mesh.parallelize import parallelize

GRID = (6, 5)
SPLIT = {  # the dim of each sharded parameter of a layer
    "qkv.weight": 0,
    "qkv.bias": 0,
    "proj.weight": 1,
    "fc1.weight": 0,
    "fc1.bias": 0,
    "fc2.weight": 1,
}


@pytest.mark.parametrize("fusion", ["sequential", "sum"])
@pytest.mark.parametrize("share", [True, False])
def test_each_rank_keeps_its_slice_of_the_projections(share, fusion):
    """Of those that the passes share, or of each pass's own: `attn`, or `attn.0` and `attn.1`."""
    case = Case(GRID, ("row+col",), "relative", share=share, fusion=fusion)
    whole = dict(build(case).named_parameters())
    modules = ("attn",) if share else ("attn.0", "attn.1")
    expected = {
        f"backbone.blocks.{layer}.{module}.{name}": dim
        for layer in range(2)
        for module in (*modules, "mlp")
        for name, dim in SPLIT.items()
        if ("fc" in name) == (module == "mlp")
    }
    for rank, got in enumerate(run_ranks(spread, 2, case=case, mesh={"tensor": 2}, timeout=60)):
        assert got.dims == expected
        assert got.marked == expected.keys()
        assert got.parameters.keys() == whole.keys()
        for name, value in got.parameters.items():
            want = whole[name].detach()
            if name in expected:
                want = want.chunk(2, expected[name])[rank]
            assert torch.equal(value, want), name


def test_what_is_frozen_stays_frozen():
    names = {name for name, _ in build(Case((4, 4))).named_parameters()}
    expected = {name for name in names if "blocks.0." not in name}
    assert len(expected) < len(names)
    assert run_ranks(still_trained, 2, mesh={"tensor": 2}, timeout=60) == [expected] * 2


def test_one_process_keeps_the_model_as_it_is():
    model = build(Case(GRID))
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert parallelize(model, Mesh()) is model
    assert before == {name: id(parameter) for name, parameter in model.named_parameters()}
    assert all(one.mesh is not None for one in model.modules() if isinstance(one, Exchange))


def test_a_table_is_narrowed_to_the_heads_of_a_rank_and_has_one_gradient():
    table = torch.randn(4, 7, dtype=torch.float64)
    assert Crossing("heads")(table) is table
    for mesh in ({"tensor": 2}, {"col": 2, "tensor": 2}):
        ranks = run_ranks(per_head, torch.Size(mesh.values()).numel(), mesh=mesh, table=table)
        for rank, (mine, gradient) in enumerate(ranks):
            assert torch.equal(mine, table.chunk(2)[rank % 2])
            assert torch.equal(gradient, 2 * table)


def test_what_the_tensor_ranks_do_not_divide_is_refused_on_all():
    refused = {
        Case(GRID): "attn: heads=4: allowed are [1, 2, 4]",
        Case(GRID, share=False): "attn.0: heads=4: allowed are [1, 2, 4]",
        Case(GRID, dim=20, heads=5): "attn: heads=5: allowed are [1, 5]",
        Case(GRID, dim=24, heads=3, mlp_ratio=25 / 24): "mlp: width=25: allowed are [1, 5, 25]",
    }
    said = [f"mesh.tensor=3 does not divide backbone.blocks.0.{what}" for what in refused.values()]
    assert run_ranks(refusals, 3, cases=list(refused), mesh={"tensor": 3}, timeout=60) == [said] * 3


@pytest.mark.parametrize(
    ("mesh", "rows", "cols"),
    [
        ({"col": 4}, "row passes deal out the 6 heads over tensor x col = 1 x 4", ""),
        ({"row": 4}, "", "column passes deal out the 6 heads over tensor x row = 1 x 4"),
        (
            {"col": 2, "tensor": 2},
            "row passes deal out the 6 heads over tensor x col = 2 x 2",
            "",
        ),
        (
            {"row": 2, "tensor": 2},
            "",
            "column passes deal out the 6 heads over tensor x row = 2 x 2",
        ),
        ({"row": 2, "col": 2}, "", ""),
    ],
    ids=["col 4", "row 4", "col 2, tensor 2", "row 2, tensor 2", "2x2"],
)
def test_heads_that_cannot_be_dealt_out_are_refused_on_all(mesh, rows, cols):
    refused = {
        ("row",): rows,
        ("col",): cols,
        ("row+col",): rows or cols,
        ("window", "global+row"): rows,
        ("window", "shifted", "global"): "",
    }
    allowed = "allowed are multiples of 4, mesh.exchange=swap and mesh.exchange=gather"
    said = [what and f"mesh.exchange=heads: {what} ranks: {allowed}" for what in refused.values()]
    for share in (True, False):
        cases = [Case(GRID, pattern, dim=24, heads=6, share=share) for pattern in refused]
        ranks = run_ranks(refusals, 4, cases=cases, mesh=mesh, exchange="heads", timeout=60)
        assert ranks == [said] * 4


@pytest.mark.parametrize("exchange", ["swap", "gather"])
def test_other_exchanges_take_any_number_of_heads(exchange):
    cases = [Case(GRID, ("row+col",), dim=12, heads=3)]
    assert run_ranks(refusals, 4, cases=cases, mesh={"col": 4}, exchange=exchange) == [[""]] * 4
