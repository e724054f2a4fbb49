"""Each suite as a command, on small sizes: what its record and its table hold."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from planted_time import Time

from axialtrain.bench import arguments, suites
from axialtrain.bench.__main__ import main as alone
from axialtrain.bench.layer import Ours
from axialtrain.bench.record import Goal, Result
from axialtrain.bench.setting import Case, Setting
from axialtrain.bench.timing import ratio
from axialtrain.cli import main

CPU = torch.device("cpu")


def run(suite: str, tmp_path, *options: str) -> dict:
    """The record of the command."""
    out = tmp_path / f"{suite}.json"
    words = ["bench", suite, "--quick", "--rounds", "2", "--device", "cpu", "--out", str(out)]
    assert main([*words, *options]) == 0
    record = json.loads(out.read_bytes())
    assert (record["suite"], record["left_out"]) == (suite, [])
    assert record["command"].startswith(f"axialtrain bench {suite} --out {suite}.json --device cpu")
    for row in record["results"]:
        if row["goal"] is not None:
            goal = record["goals"][row["goal"]]
            value, limit = row["value"], goal["limit"]
            assert row["met"] == (value >= limit if goal["at_least"] else value <= limit)
    return record


def values(record: dict, what: str) -> list[float]:
    found = [row["value"] for row in record["results"] if what in row["what"]]
    assert found, what
    return found


def test_the_help_names_what_there_is():
    assert list(arguments.SUITES) == list(suites.SUITES)
    assert {name for name, suite in suites.SUITES.items() if suite.on_gpu} == set(arguments.ON_GPU)


@pytest.fixture
def tiny(monkeypatch):
    """A suite of one case, which takes no time and misses its goal."""
    goals = {"most": Goal(0.5)}
    case = Case("a", lambda: [Result("a", "of b", 0.9, "most")])
    suite = suites.Suite(goals, lambda setting: [case])
    monkeypatch.setitem(suites.SUITES, "step", suite)
    return suite


@pytest.mark.parametrize(("sizes", "said"), [(["--quick"], False), ([], True)])
def test_goals_are_for_the_sizes_that_they_were_set_for(tmp_path, capsys, tiny, sizes, said):
    words = ["--device", "cpu", *sizes, "--out"]
    assert main(["bench", "step", *words, str(tmp_path / "a.json")]) == 0
    assert ("**no**" in capsys.readouterr().out) == said
    assert main(["bench", "all", "--suites", "step", *words, str(tmp_path / "all")]) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "all" / "all.md").read_text().strip() in out
    assert (("**no**" in out), ("goals are for larger ones" in out)) == (said, not said)


def test_a_disk_that_fills_meanwhile_leaves_the_table(tmp_path, monkeypatch, capsys, tiny):
    def full(handle):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    words = ["bench", "step", "--device", "cpu", "--out"]
    assert main([*words, str(tmp_path / "a.json")]) == 2
    said = capsys.readouterr()
    assert "| a " in said.out
    assert f"--out {tmp_path}/a.json: cannot be written: No space" in said.err
    assert main([*words, "/proc/a.json"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "--out /proc/a.json: no file can be written there" in said.err


@pytest.mark.slow
def test_attention(tmp_path, capsys):
    record = run("attention", tmp_path)
    dtypes = {row["case"].rpartition(", ")[2] for row in record["results"]}
    assert dtypes == {"fp32", "bf16"}
    for axis in ("row", "column"):
        for what, goal in (
            (f"{axis} pass, of the plain formula", "formula"),
            (f"{axis} relative, of a RoPE pass", "relative"),
            (f"{axis} masked, of an unmasked pass, 70% masked, lines sorted before", "masked"),
        ):
            rows = [row for row in record["results"] if row["what"] == what]
            assert len(rows) == 2
            for row in rows:
                assert row["goal"].startswith(goal)
                mine, other = row["data"].values()
                assert row["value"] == pytest.approx(ratio(mine, other))
    assert len(values(record, "column pass, of a row pass")) == 2
    assert all(one > 0 for one in values(record, "of the rate of torch's own on contiguous lines"))
    copies = [row for row in record["results"] if "copies in the profile" in row["what"]]
    # In bf16 a CPU attends in chunks, which widen what they read: the record says how often.
    assert [row["value"] for row in copies if row["case"].endswith("fp32")] == [0, 0]
    assert len(copies) == 4
    assert len(values(record, "times faster than full attention")) == 2
    said = capsys.readouterr().out
    assert "attention, 1 of 8: core 12 x 12, 2 x 8, fp32" in said
    assert "| row pass, of the plain formula " in said
    assert f"written: {tmp_path / 'attention.json'}" in said


def test_layer(tmp_path):
    record = run("layer", tmp_path)
    for way, words in (("ours", ""), ("in bands", " in bands")):
        results = record["results"]
        times = [row for row in results if row["what"] == f"time{words}, of the package's"]
        memory = [row for row in results if row["what"] == f"peak memory{words}, of the package's"]
        assert len(times) == len(memory) == 2  # dtypes
        for row in times:
            assert row["value"] == ratio(row["data"][way], row["data"]["package"])
        for row in memory:
            held = row["data"]["bytes"]
            assert row["value"] == held[way] / held["package"]
            assert held[way] >= 12 * 12 * 16 * 2  # what it gives, at least
    moved = values(record, "bytes of residual stream and norms, of those that must move")
    # Sums of gradients, masks and casts (all of a norm in bf16 on a CPU) come on top of what must.
    assert all(1 < one < 5 for one in moved), moved
    assert len(values(record, "rate at which they move, of a plain copy's")) == len(moved) == 2
    assert record["versions"]["axial-attention"]
    assert record["missing"] == []


def test_the_module_in_bands_is_the_same():
    """13 x 10 tokens in bands of 4 rows or 3 columns, of which some are smaller."""
    torch.manual_seed(0)
    whole, bands = Ours(16, 2).double(), Ours(16, 2, band=40).double()
    bands.load_state_dict(whole.state_dict())
    x = torch.randn(1, 13, 10, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 13, 10, 16, dtype=torch.float64)
    want, got = (
        [out, *torch.autograd.grad(out, (x, *module.parameters()), weight)]
        for module in (whole, bands)
        for out in (module(x),)
    )
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_layer_without_the_package_stands_alone_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("axialtrain.bench.layer.find_spec", lambda _: None)
    record = run("layer", tmp_path, "--only", "12 x 12, D = 16, fp32")
    (alone, *stream) = record["results"]
    assert alone["what"] == "ours: time, s"
    assert {row["case"] for row in stream} == {"stream 12 x 12, D = 16, fp32"}
    assert "axial-attention" in record["missing"][0]


@pytest.mark.slow
def test_step(tmp_path):
    record = run("step", tmp_path)
    (share,) = values(record, "share of bare products and attention")
    data = record["results"][0]["data"]
    assert share == ratio(data["bare"], data["step"])
    kernels = data["kernels"]
    assert any(row["product"] for row in kernels)
    assert not all(row["product"] for row in kernels)
    seconds = median(data["step"])
    assert values(record, "px/s") == [pytest.approx(64 * 64 / seconds)]
    assert values(record, "tokens/s") == [pytest.approx(4 / seconds)]
    assert "gigapixel" in record["missing"][0]


def test_the_gigapixel_step_runs_small():
    """Where there is a GPU for it, the same with other numbers."""
    from axialtrain.bench.memory import KEPT
    from axialtrain.bench.step import gigapixel

    setting = Setting(CPU, quick=True, rounds=1)
    for side, way in KEPT.items():
        small = replace(way, band=8)
        found = gigapixel(setting, side // 1024, small, depth=2, dim=16, heads=2, patch=16)
        assert [one.goal for one in found] == ["gigapixel rate", "gigapixel s", "gigapixel GiB"]
        assert all(one.value > 0 for one in found)


def test_memory(tmp_path):
    record = run("memory", tmp_path)
    assert len(values(record, "peak of a layer, B a token and channel")) == 2
    (growth,) = values(record, "growth of the peak of a token")
    assert 0.8 < growth <= record["goals"]["growth"]["limit"]


def test_the_arithmetic_of_a_gigapixel():
    from axialtrain.bench.memory import GOALS, SIDES, _gigapixel

    (one, host), (four, its_host) = (_gigapixel(side) for side in SIDES)
    parts = ("weights", "pixels", "kept", "layers", "gradients", "band")
    tokens = 2048 * 2048 * 512 * 2  # bytes, once
    assert (one.goal, four.goal) == ("gigapixel", "gigapixel")
    assert (one.data["kept"], one.data["host"], one.data["layers"]) == (0, 0, 24 * tokens)
    assert one.value == pytest.approx(sum(one.data[part] for part in parts) / 2**30)
    # Of its 6 inputs of two layers 5 wait on the host, beside the pixels.
    assert (four.data["kept"], four.data["host"]) == (4 * tokens, 5 * 4 * tokens)
    assert four.data["layers"] == 4 * 4 * tokens
    for found in (one, four):
        assert GOALS["gigapixel"].met(found.value)
    for found in (host, its_host):
        assert GOALS["host"].met(found.value)


@pytest.mark.slow
def test_complexity(tmp_path):
    record = run("complexity", tmp_path)
    assert values(record, "counted FLOP, off the formula by") == [0] * 6
    assert all(one > 0 for one in values(record, "full: time, of axial attention's"))
    assert len(values(record, "exponent of time over tokens")) == 1
    assert (tmp_path / "complexity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_exchange(tmp_path):
    record = run("exchange", tmp_path)
    swaps, layer = "2 x 2 ranks, 8 x 8, D = 4, bf16", "layer, 2 x 2 ranks, 8 x 8, D = 8, bf16"
    assert {row["case"] for row in record["results"]} == {swaps, layer}
    for bands in (2, 4):
        assert len(values(record, f"time with mesh.overlap={bands}, of that with 1")) == 1
    for way in ("tile -> rows", "rows -> cols", "cols -> tile"):
        (rate,) = values(record, f"{way}: rate, of a bare all-to-all's")
        assert rate > 0
    assert values(record, "counted bytes, off the formula by at most") == [0]


# --- The runner -----------------------------------------------------------------------------------


def fake(monkeypatch, sleep=lambda: None) -> list[str]:
    """A suite of three cases, each of which sleeps; which ran."""
    ran: list[str] = []

    def case(name: str) -> list[Result]:
        ran.append(name)
        sleep()
        return [Result(name, "of x", 0.5, "half")]

    monkeypatch.setitem(
        suites.SUITES,
        "memory",
        suites.Suite(
            {"half": Goal(0.5)}, lambda _: [Case(n, lambda n=n: case(n)) for n in ("a", "ab", "b")]
        ),
    )
    return ran


def test_only_some_cases(tmp_path, monkeypatch):
    ran = fake(monkeypatch)
    record = run("memory", tmp_path, "--only", "a")
    assert ran == ["a", "ab"]
    assert record["command"].endswith("--only a")


def test_what_time_does_not_suffice_for_is_named(tmp_path, monkeypatch, capsys):
    clock = Time()
    monkeypatch.setattr(suites, "time", SimpleNamespace(monotonic=clock))
    ran = fake(monkeypatch, partial(clock.sleep, 31.0))
    out = tmp_path / "a.json"
    words = ["bench", "memory", "--out", str(out), "--device", "cpu"]
    assert main([*words, "--minutes", "1"]) == 0  # in which two of them begin
    assert ran == ["a", "ab"]
    assert json.loads(out.read_bytes())["left_out"] == ["b"]
    assert "Not measured, as time was up: b." in capsys.readouterr().out


def test_a_case_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    ran = fake(monkeypatch)
    whole = suites.SUITES["memory"].cases

    def failing() -> list[Result]:
        raise torch.OutOfMemoryError("tried to allocate\n64 GiB")

    def cases(setting: Setting) -> list[Case]:
        return [Case("c", failing), *whole(setting)]

    monkeypatch.setitem(suites.SUITES, "memory", suites.Suite({"half": Goal(0.5)}, cases))
    out = tmp_path / "a.json"
    assert main(["bench", "memory", "--out", str(out), "--device", "cpu"]) == 1
    assert ran == ["a", "ab", "b"]
    record = json.loads(out.read_bytes())
    assert record["failed"] == ["c: OutOfMemoryError: tried to allocate 64 GiB"]
    assert len(record["results"]) == 3
    said = capsys.readouterr()
    assert "**Failed**: c: OutOfMemoryError" in said.out
    assert "failed: c: OutOfMemoryError" in said.err


def test_all_leave_a_record_each_and_one_of_all(tmp_path, monkeypatch, capsys):
    ran = fake(monkeypatch)
    monkeypatch.setattr(
        "axialtrain.bench.arguments._data_of",
        lambda out, quick: (out.write_text('{"side": 1}'), "the table of data")[1],
    )
    out = tmp_path / "all"
    words = ["bench", "all", "--out", str(out), "--quick", "--device", "cpu"]
    assert main([*words, "--suites", "memory", "data"]) == 0
    assert ran == ["a", "ab", "b"]
    assert sorted(path.name for path in out.iterdir()) == [
        "all.json", "all.md", "data.json", "memory.json",
    ]  # fmt: skip
    every = json.loads((out / "all.json").read_bytes())["suites"]
    assert every == {
        "memory": json.loads((out / "memory.json").read_bytes()),
        "data": {"side": 1},
    }
    text = (out / "all.md").read_text()
    assert "## memory" in text
    assert "the table of data" in text
    assert text.strip() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attention", "--out", "a.txt"], "--out a.txt: allowed is a new file, NAME.json"),
        (["attention", "--out", "there.json"], "--out there.json: allowed is a new file"),
        (["all", "--out", "folder"], "--out folder: allowed is a new folder"),
        (["all", "--out", "a", "--suites", "speed"], "suite speed: allowed are attention, layer,"),
        (["layer", "--out", "a.json", "--rounds", "0"], "--rounds 0: allowed is at least 1"),
        (["layer", "--out", "a.json", "--limit", "0"], "--limit 0.0: allowed are numbers above 0"),
        (["layer", "--out", "a.json", "--minutes", "-1"], "--minutes -1.0: allowed are numbers"),
        (["layer", "--out", "a.json", "--only", "x9"], "--only x9: no case of layer has that"),
    ],
)
def test_what_cannot_be_is_named(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").touch()
    (tmp_path / "folder").mkdir()
    assert main(["bench", *words, "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "there.json"]


def test_what_says_nothing_of_a_gpu_is_not_measured_on_one():
    suites.check_suites(list(arguments.ON_GPU), suites.SUITES, Setting(torch.device("cuda")))
    with pytest.raises(ValueError, match="suite exchange: allowed on a GPU are attention, layer"):
        suites.check_suites(["exchange"], suites.SUITES, Setting(torch.device("cuda")))
    with pytest.raises(ValueError, match="suite data: allowed on a GPU are attention, layer"):
        every = [*suites.SUITES, "data"]
        suites.check_suites(["data"], every, Setting(torch.device("cuda")))


@pytest.mark.parametrize("entry", [main, lambda words: alone(words[1:])], ids=["command", "module"])
def test_a_suite_that_is_none(capsys, entry):
    with pytest.raises(SystemExit, match="2"):
        entry(["bench", "speed", "--out", "a.json"])
    said = capsys.readouterr().err
    assert "'speed'" in said
    assert "attention" in said


def test_the_module_says_what_is_wrong_in_a_sentence(tmp_path, capsys):
    assert alone(["memory", "--out", str(tmp_path / "a.txt")]) == 2
    message = f"axialtrain: --out {tmp_path}/a.txt: allowed is a new file, NAME.json"
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("entry", [main, lambda words: alone(words[1:])], ids=["command", "module"])
def test_what_is_interrupted_leaves_nothing(tmp_path, monkeypatch, capsys, entry):
    def interrupted() -> list[Result]:
        raise KeyboardInterrupt

    suite = suites.Suite({}, lambda _: [Case("a", interrupted)])
    monkeypatch.setitem(suites.SUITES, "memory", suite)
    words = ["bench", "memory", "--device", "cpu", "--out", str(tmp_path / "a.json")]
    assert entry(words) == 130
    assert capsys.readouterr().err == "axialtrain: interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_there(tmp_path, capsys):
    out = tmp_path / "a.json"
    assert main(["bench", "attention", "--out", str(out), "--device", "cuda"]) == 2
    message = (
        "axialtrain: --device cuda: no GPU is here that torch can use: allowed are cpu, auto\n"
    )
    assert capsys.readouterr().err == message
