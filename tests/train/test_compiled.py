"""train.compile: layers in one graph each, the same numbers, one graph for each size."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from sysconfig import get_path

import pytest
import torch
from distributed.launcher import run_ranks
from distributed.model_ranks import Case, serial, sharded
from torch import Tensor, nn

from axialtrain.attention.config import AxialConfig
from axialtrain.grid import Place
from axialtrain.mesh import projection
from axialtrain.mesh.mesh import Mesh, MeshConfig
from axialtrain.mesh.parallelize import parallelize
from axialtrain.models.chance import Chance
from axialtrain.models.recompute import Recompute
from axialtrain.models.registry import model_config
from axialtrain.models.transformer import AxialTransformer, AxialTransformerConfig
from axialtrain.train import compiled
from axialtrain.train.checkpoint import newest
from axialtrain.train.compiled import _lacking, check_compile, compile_layers, compiles_passes
from axialtrain.train.compose import compose_run

pytestmark = pytest.mark.slow  # compiling

PATCH, DIM, DEPTH = 2, 16, 2
SIZES = [(5, 7), (8, 3)]


class Counting:
    """torch's aot_eager, which needs no compiler, and the graphs that it was given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]):
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        for node in graph.graph.nodes:  # inductor makes no kernels of complex numbers
            found = node.meta.get("example_value")
            assert not (isinstance(found, Tensor) and found.is_complex()), node
        return aot_eager(graph, inputs)


def gxx() -> None:
    """Skip where there is no C++ compiler, as on a fresh machine of CI: inductor needs one."""
    if shutil.which("g++") is None or not Path(get_path("include"), "Python.h").exists():
        pytest.skip("inductor needs g++ and Python.h, which are not here")


def transformer(**options) -> AxialTransformer:
    torch.manual_seed(0)
    model = AxialTransformer(
        AxialTransformerConfig(**{"patch": PATCH, "dim": DIM, "depth": DEPTH, "heads": 2} | options)
    ).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def gradients(
    model: AxialTransformer,
    size: tuple[int, int],
    *,
    holes: bool = False,
    chance: Chance | None = None,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, size[0] * PATCH, size[1] * PATCH, 3, generator=generator)
    pixels = pixels.to(next(model.parameters()).dtype)
    valid = torch.rand(2, *size, generator=generator) < 0.8 if holes else None
    model.zero_grad()
    chance = chance or Chance(0, 0, (1, 2))
    out, prefix = model(pixels.requires_grad_(), valid, Place(*size), chance=chance)
    (out.square().sum() + prefix.square().sum()).backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters()}
    return found | {"out": out.detach(), "pixels": pixels.grad}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 1, "prefix_tokens": 2, "layer_scale": 0.5, "mlp_chunk": 11},
        {
            "depth": 1,
            "axial_config": {"pattern": ["col+row"], "fusion": "sum", "positions": "none"},
        },
    ],
    ids=["rope", "prefix, layer scale, MLP in chunks", "summed"],
)
def test_compiled_layers_have_the_gradients_of_plain_ones(options):
    plain, graphed = transformer(**options), transformer(**options)
    parallelize(graphed, Mesh())
    assert compile_layers(graphed, backend=Counting()) == options.get("depth", DEPTH)
    assert list(graphed.state_dict()) == list(plain.state_dict()), "weights keep their names"
    for holes in (False, True):
        want = gradients(plain, SIZES[0], holes=holes)
        assert_close(gradients(graphed, SIZES[0], holes=holes), want)


BY_PASS = {
    "a line": ({}, Recompute(band=1)),
    "uneven, and again": ({"layer_scale": 0.5, "mlp_chunk": 11}, Recompute(2, band=25)),
    "windows beside": (
        {"depth": 1, "axial_config": {"pattern": ["row+window"], "window": 3}},
        Recompute(band=16),
    ),
}


DRAWS = {"depth": 3, "drop_path": 0.5, "prefix_tokens": 1, "axial_config": {"skip_axis": 0.9}}


def test_what_is_drawn_comes_between_graphs():
    """Passes that are left out, and branches that are dropped, of some images; and evaluation."""
    plain, graphed = transformer(**DRAWS), transformer(**DRAWS)
    chances = [Chance(0, step, (1, 2)) for step in range(4)]
    left_out = {one.skipped(layer, 2, 0.9) for one in chances for layer in range(3)}
    assert left_out == {None, 0, 1}
    backend = Counting()
    compile_layers(graphed, by_pass=True, backend=backend)
    for chance in chances:
        want = gradients(plain, SIZES[0], holes=True, chance=chance)
        assert_close(gradients(graphed, SIZES[0], holes=True, chance=chance), want)
    training = backend.graphs
    assert training >= 4  # a pass of rows and one of columns, taken and left out
    assert_close(gradients(graphed.eval(), SIZES[0]), gradients(plain.eval(), SIZES[0]))
    assert backend.graphs > training


@pytest.mark.parametrize(("options", "recompute"), BY_PASS.values(), ids=BY_PASS)
def test_compiled_passes_have_the_gradients_of_plain_layers(options, recompute):
    plain, graphed = transformer(**options), transformer(**options)
    graphed.recompute = recompute
    backend = Counting()
    assert compile_layers(graphed, by_pass=True, backend=backend) == options.get("depth", DEPTH)
    assert list(graphed.state_dict()) == list(plain.state_dict()), "weights keep their names"
    for holes in (False, True):
        want = gradients(plain, SIZES[0], holes=holes)
        before = backend.graphs
        assert_close(gradients(graphed, SIZES[0], holes=holes), want)
        assert backend.graphs > before


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name] - want[name]).abs().max()
        assert error <= 1e-10 * want[name].abs().max().clamp_min(1e-30), name


@pytest.mark.parametrize("able", ["AVX2", "AVX512", "as it is"])
def test_in_bf16_too(able, monkeypatch):
    """Rounded at the same places, whether the CPU calculates in bf16 or not."""
    if able != "as it is":
        monkeypatch.setattr(projection, "CPU", able)
    options = {"depth": 1, "axial_config": {"pattern": ["row"], "kernel": "fused"}}
    plain, graphed = transformer(**options).bfloat16(), transformer(**options).bfloat16()
    compile_layers(graphed, backend=Counting())
    want = gradients(plain, SIZES[0])
    got = gradients(graphed, SIZES[0])
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name] - want[name]).float().norm() / want[name].float().norm()
        assert error <= 2**-7, name


def test_all_bands_of_all_layers_share_their_graphs():
    """Each pass, with a graph and without one: forward, and again in backward."""
    found = {}
    for lines in (2, 4):  # rows and columns of the 8 x 8 tokens of two images
        torch._dynamo.reset()
        backend, model = Counting(), transformer()
        model.recompute = Recompute(band=2 * 8 * lines)
        compile_layers(model, by_pass=True, backend=backend)
        for _ in range(2):
            gradients(model, (8, 8))
        found[lines] = backend.graphs
    assert found == {2: 4, 4: 4}


MESHES = {
    "bands of a part": (
        Case((13, 10), recompute=Recompute(band=40)),
        {"row": 2, "col": 2},
    ),
    "a pass a layer": (Case((13, 10), ("row", "col")), {"row": 2, "col": 2}),
    "heads in parts": (Case((13, 10), depth=1, mlp_chunk=100), {"col": 2, "tensor": 2}),
    "heads in parts, bands, draws": (
        Case((13, 10), recompute=Recompute(band=1), skip_axis=0.9, drop_path=0.5, mlp_chunk=11),
        {"tensor": 2},
    ),
    "layers of heads in parts": (
        Case((13, 10), depth=1, fusion="sum", prefix=2),
        {"tensor": 2},
    ),
}


@pytest.mark.parametrize(("case", "mesh"), MESHES.values(), ids=MESHES)
def test_a_compiled_model_is_the_same_on_a_mesh(case, mesh):
    """Parts of uneven size, masked."""
    want = serial(replace(case, recompute=Recompute()))
    case = replace(case, compiled=True)
    for got in run_ranks(sharded, prod(mesh.values()), case=case, mesh=mesh, timeout=200):
        top, bottom, left, right = (2 * edge for edge in got.rect)
        for name, one, other in (
            ("output", got.output, want.output[:, top:bottom, left:right]),
            ("input", got.input, want.input[:, top:bottom, left:right]),
            ("prefix", got.prefix, want.prefix),
        ):
            if other.numel():
                assert_close({name: one}, {name: other})
        assert got.parameters.keys() == want.parameters.keys()
        assert_close(got.parameters, want.parameters)
        assert abs(got.norm - want.norm) <= 1e-10 * want.norm


def test_the_compiler_of_runs_has_the_gradients_of_plain_layers(tmp_path, monkeypatch):
    gxx()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    one = {"depth": 1, "axial_config": {"pattern": ["row"]}}  # each kernel takes g++ a second
    plain, graphed = transformer(**one).float(), transformer(**one).float()
    compile_layers(graphed)
    want = gradients(plain, SIZES[0], holes=False)
    got = gradients(graphed, SIZES[0], holes=False)
    for name in want:
        error = (got[name] - want[name]).abs().max()
        assert error <= 1e-5 * want[name].abs().max(), name


def test_a_compiled_run_takes_the_step_of_a_plain_one(axialtrain, small_shards, tmp_path):
    """Through the command. The one step is so large that weights afterwards are its gradient."""
    gxx()
    given = [
        "experiment=quickstart", "mesh=single", "model.dim=16", "model.depth=1",
        "model.axial_config.pattern=[row]", "optim=sgd", "optim.lr=1e4", "optim.momentum=0",
        "optim.clip=0", "schedule=constant", "train.steps=1", "logger=none",
        "data.validation=null", f"data.shards={small_shards}",
    ]  # fmt: skip
    found = []
    for compiled_too in (False, True):
        folder = tmp_path / f"compiled-{compiled_too}"
        done = axialtrain(
            "train", *given, f"train.compile={compiled_too}", f"hydra.run.dir={folder}",
            cwd=tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        found.append((newest(folder).weights(), last))
    assert list(tmp_path.glob("cache/*")), "nothing was compiled"
    (want, plain), (got, graphed) = found
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name] - want[name]).abs().max()
        assert error <= 1e-5 * want[name].abs().max(), name
    for key in ("loss", "grad_norm"):
        assert graphed[key] == pytest.approx(plain[key], rel=1e-5), key


def test_limits_are_raised_for_layers_alone():
    """While one is called: a graph for each of more sizes than torch allows by itself."""
    limits = torch._dynamo.config
    before = (limits.recompile_limit, limits.accumulated_recompile_limit)
    backend, model = Counting(), transformer(depth=1)
    with limits.patch(recompile_limit=1, accumulated_recompile_limit=1):
        compile_layers(model, backend=backend)
        assert (limits.recompile_limit, limits.accumulated_recompile_limit) == (1, 1)
        for size in ((1, 1), (2, 1), (1, 2)):
            gradients(model, size, holes=False)
        assert (limits.recompile_limit, limits.accumulated_recompile_limit) == (1, 1)
    assert backend.graphs == 3
    assert (limits.recompile_limit, limits.accumulated_recompile_limit) == before


class LeftOut(Chance):
    """Leaves out the pass in step 0, and none in another."""

    def skipped(self, layer: int, passes: int, share: float) -> int | None:
        return 0 if self.step == 0 else None


def test_limits_are_enough_for_bands_of_two_sizes(monkeypatch):
    """With a pass and without, forward, again with a graph, and in evaluation: of 5 rows 2 or 1 at
    a time."""
    monkeypatch.setattr(compiled, "GRAPHS", 1)
    with pytest.warns(UserWarning, match="skip_axis"):  # by itself it leaves out one of two
        model = transformer(depth=1, axial_config={"pattern": ["row"], "skip_axis": 0.5})
    backend = Counting()
    model.recompute = Recompute(band=2 * 7 * 2)
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        compile_layers(model, by_pass=True, backend=backend)
        for step in range(2):
            gradients(model, SIZES[0], chance=LeftOut(0, step, (1, 2)))
        model.eval()
        with torch.no_grad():
            model(torch.zeros(2, 10, 14, 3, dtype=torch.float64), None, Place(*SIZES[0]))
    assert backend.graphs == compiled.OF_PASS


def test_each_size_makes_one_graph_of_a_layer_and_no_more():
    backend, model = Counting(), transformer()
    compile_layers(model, backend=backend)
    gradients(model, SIZES[0], holes=False)
    once = backend.graphs
    assert 1 <= once <= DEPTH
    gradients(model, SIZES[1], holes=False)
    assert backend.graphs == 2 * once
    for size in SIZES * 2:
        gradients(model, size, holes=False)
    assert backend.graphs == 2 * once, "a size that came before"


def test_a_mesh_of_one_rank_changes_nothing():
    backend, model = Counting(), transformer()
    parallelize(model, Mesh())
    compile_layers(model, backend=backend)
    for _ in range(2):
        gradients(model, SIZES[0], holes=True)
    assert 1 <= backend.graphs <= DEPTH


def test_a_model_without_our_layers_is_refused():
    with pytest.raises(ValueError, match="has no layer of an axial transformer"):
        compile_layers(nn.Linear(2, 2))


def test_summed_passes_are_one_graph_or_none():
    with pytest.raises(ValueError, match="summed passes are compiled as a layer alone"):
        compile_layers(transformer(axial_config={"fusion": "sum"}), by_pass=True)


def test_passes_are_compiled_where_something_comes_between_them():
    plain = AxialTransformerConfig()
    assert not compiles_passes(plain, MeshConfig(data=2, tensor=2), 0)
    for mesh, band in (({"row": 2}, 0), ({"col": 2}, 0), ({}, 64)):
        assert compiles_passes(plain, MeshConfig(**mesh), band)
    for drawn in ({"drop_path": 0.1}, {"axial_config": AxialConfig(skip_axis=0.1)}):
        assert compiles_passes(AxialTransformerConfig(**drawn), MeshConfig(), 0)


def test_a_compiled_layer_is_pickled_without_what_was_compiled():
    for by_pass in (False, True):
        layer = transformer().blocks[0]
        compile_layers(layer, by_pass=by_pass, backend=Counting())
        other = pickle.loads(pickle.dumps(layer))
        assert other.compiled_pass is None
        assert list(other.state_dict()) == list(layer.state_dict())


@pytest.mark.parametrize(
    ("model", "mesh", "stage", "said"),
    [
        ({}, {"row": 2, "exchange": "heads"}, 0, r"mesh\.row=2, with mesh\.exchange=heads"),
        ({}, {"col": 2, "overlap": 2}, 0, r"mesh\.col=2, with mesh\.overlap=2, .* allowed is 1, m"),
        (
            {"prefix_tokens": 1},
            {"row": 2},
            0,
            r"model\.prefix_tokens=1, .* allowed is 0, mesh\.row",
        ),
        ({"axial_config": {"fusion": "sum"}}, {"col": 2}, 0, r"fusion=sum, .* is sequential, mesh"),
        (
            {"axial_config": {"pattern": ["row", "window"]}},
            {"col": 2},
            0,
            r"allowed is row and col",
        ),
        ({}, {}, 3, r"zero\.stage=3, .* allowed are 0, 1, 2"),
        (
            {"drop_path": 0.1, "axial_config": {"fusion": "sum"}},
            {},
            1,
            r"model\.drop_path=0\.1, .*fusion=sum, .* allowed is model\.drop_path=0, f",
        ),
        (
            {"axial_config": {"fusion": "sum", "skip_axis": 0.2}},
            {},
            1,
            r"model\.axial_config\.skip_axis=0\.2, .* is model\.axial_config\.skip_axis=0, f",
        ),
        (
            {"axial_config": {"positions": "relative", "span": 4}},
            {},
            0,
            r"positions=relative, .* are rope",
        ),
    ],
    ids=[
        "exchange",
        "overlap",
        "prefix",
        "sum",
        "window",
        "zero",
        "drop_path",
        "skip_axis",
        "relative",
    ],
)
def test_what_has_no_graph_is_refused(model, mesh, stage, said):
    config = AxialTransformerConfig(dim=16, heads=2, **model)
    with pytest.raises(ValueError, match=said):
        check_compile(config, MeshConfig(**mesh), stage)


def test_all_axes_of_the_mesh_and_zero_up_to_two_and_draws_go_with_it():
    for stage in (0, 1, 2):
        drawn = AxialTransformerConfig(drop_path=0.1, axial_config=AxialConfig(skip_axis=0.1))
        check_compile(drawn, MeshConfig(data=4, row=2, col=2, tensor=2), stage)
    everything = AxialTransformerConfig(
        prefix_tokens=1, axial_config=AxialConfig(pattern=["row+window"], fusion="sum")
    )
    check_compile(everything, MeshConfig(exchange="heads"), 0)
    check_compile(everything, MeshConfig(overlap=2), 0)


def test_what_torch_compiles_with_is_named_where_it_lacks(monkeypatch, tmp_path):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (sys.executable,))  # answers --version
    monkeypatch.setattr("axialtrain.train.compiled.get_path", lambda name: str(tmp_path))
    assert _lacking("cpu") == f"Python headers ({tmp_path / 'Python.h'})"
    (tmp_path / "Python.h").touch()
    assert _lacking("cpu") == ""
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "g++"),))
    assert _lacking("cpu").startswith("C++ compiler")
    assert _lacking("cuda") == ""


def test_a_run_without_a_compiler_is_refused_before_it_starts(axialtrain, small_shards, tmp_path):
    done = axialtrain(
        "train", "experiment=quickstart", "model.dim=16", "model.depth=1", "mesh.row=2",
        "mesh.col=1", "train.compile=true", "logger=none", "data.validation=null",
        f"data.shards={small_shards}", "hydra.run.dir=here",
        cwd=tmp_path, CXX=str(tmp_path / "g++"),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if "train.compile=true" in line]
    assert "has no C++ compiler" in said
    assert "allowed are a host that has it, or train.compile=false" in said
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "here" / "config.yaml").exists()


def test_bands_go_with_it():
    train = compose_run(["data.shards=x", "train.compile=true", "train.recompute_band=64"])[0].train
    assert (train.compile, train.recompute_band) == (True, 64)


def test_another_kind_of_model_is_refused():
    with pytest.raises(ValueError, match="allowed are axial transformers"):
        check_compile(model_config("axial_resnet26s"), MeshConfig(), 0)
