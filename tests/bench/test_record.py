"""What a suite leaves: goals met or not, tables, machines; and where it may be written."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest
import torch

from axialtrain.bench.page import check_part, replace_part
from axialtrain.bench.record import (
    Goal,
    Record,
    Result,
    aligned,
    machine,
    new_file,
    shown,
    write_json,
    written,
)

CPU = torch.device("cpu")


def record(**rest) -> Record:
    results = [
        Result("a, fp32", "of the formula", 0.45, "most", "1 ms against 2 ms", {"bytes": 7}),
        Result("b, fp32", "of the formula", 0.55, "most"),
        Result("b, fp32", "rate", 0.9, "least"),
        Result("b, fp32", "tokens/s", 12345.6),
    ]
    goals = {"most": Goal(0.5), "least": Goal(0.85, at_least=True)}
    return Record.today(
        "attention", "axialtrain bench x", machine(CPU), goals, results=results, **rest
    )


def test_a_result_with_a_goal_says_whether_it_is_met(tmp_path):
    write_json(tmp_path / "a.json", record().as_dict())
    found = json.loads((tmp_path / "a.json").read_bytes())
    assert [row.get("met") for row in found["results"]] == [True, False, True, None]
    assert found["results"][0]["data"] == {"bytes": 7}
    assert found["goals"]["most"] == {"limit": 0.5, "at_least": False}
    assert (found["date"], found["suite"]) == (date.today().isoformat(), "attention")
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert len(found["machine"]["load"]) == 3
    assert "gpu" not in found["machine"]


def test_the_table():
    lines = record(left_out=["c", "d"], missing=["the plot, as x"]).markdown().splitlines()
    assert [cell.strip() for cell in lines[0].split("|")] == [
        "", "case", "measured", "is", "goal", "met", "beside", "",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[2].split("|")][3:7] == [
        "0.45", "<= 0.5", "yes", "1 ms against 2 ms",
    ]  # fmt: skip
    assert "**no**" in lines[3]
    assert ">= 0.85" in lines[4]
    assert "12346" in lines[5]
    assert lines[-3:] == [
        "Not measured, as time was up: c; d.",
        "",
        "Not measured: the plot, as x.",
    ]
    assert len({len(line) for line in lines[:6]}) == 1


def test_a_limit_is_met_by_itself():
    assert Goal(1.0).met(1.0)
    assert not Goal(1.0).met(1.0001)
    assert Goal(1.0, at_least=True).met(1.0)
    assert not Goal(1.0, at_least=True).met(0.9999)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.12345, "0.123"), (12.345, "12.3"), (123.4, "123"), (98765.4, "98765")],
)
def test_three_digits(value, text):
    assert shown(value) == text


def test_cells_are_aligned():
    assert aligned([("a", "bb"), ("ccc", "d")]) == "| a   | bb |\n|-----|----|\n| ccc | d  |"


def test_only_a_new_file_with_room_beside_it(tmp_path):
    assert new_file(tmp_path / "new.json") == tmp_path / "new"
    (tmp_path / "there.json").touch()
    (tmp_path / "folder").mkdir()
    for name in ("there.json", "folder.json", "new.txt"):
        with pytest.raises(ValueError, match=r"--out .*: allowed is a new file, NAME\.json"):
            new_file(tmp_path / name)


@pytest.mark.parametrize("folder", ["/proc", "{tmp}/file", "{tmp}/file/below"])
def test_where_nothing_can_be_written_nothing_is_measured(tmp_path, folder):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out .*new\.json: no file can be written there \("):
        new_file(Path(folder.format(tmp=tmp_path)) / "new.json")
    new_file(tmp_path / "folder" / "below" / "new.json")  # which can be made
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_cannot_be_written_any_more_is_printed(tmp_path, capsys):
    assert written(tmp_path / "a.json", {"a": 1}, "table") == f"table\nwritten: {tmp_path}/a.json"
    with pytest.raises(OSError, match=r"^--out .*gone/a\.json: cannot be written: .*No such file"):
        written(tmp_path / "gone" / "a.json", {"a": 1}, "table")
    assert capsys.readouterr().out == "table\n"


def test_without_goals_nothing_is_said_of_them():
    rows = [line.split("|") for line in record().markdown(goals=False).splitlines()]
    assert [cell.strip() for cell in rows[0]] == ["", "case", "measured", "is", "beside", ""]
    assert [cell.strip() for cell in rows[2]][2:5] == [
        "of the formula",
        "0.45",
        "1 ms against 2 ms",
    ]
    assert {len(row) for row in rows} == {6}


def test_a_part_of_a_page_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<a>\nold\n</a>\nafter\n")
    replace_part(page, "<a>", "</a>", "new", key="--page")
    assert page.read_text() == "before\n<a>\nnew\n</a>\nafter\n"
    assert list(tmp_path.iterdir()) == [page]
    for part in (check_part, lambda *a, **k: replace_part(*a, "x", **k)):
        with pytest.raises(
            ValueError, match=r"--page .*page\.md: allowed is a page with the lines"
        ):
            part(page, "<b>", "</b>", key="--page")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("fpu avx2", "A CPU, AVX2"),
        ("fpu avx512_bf16 avx2", "A CPU, AVX2 and bf16"),
        ("fpu amx_bf16x", "A CPU, AVX2"),
    ],
)
def test_a_record_says_what_a_cpu_calculates_with(monkeypatch, flags, says):
    cpus = f"processor : 0\nmodel name : A CPU\nflags : {flags}\n" * 2
    monkeypatch.setattr("pathlib.Path.read_text", lambda _: cpus)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert machine(CPU)["cpu"] == says
