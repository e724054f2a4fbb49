"""docs/benchmarks.md: its commands are commands, and each suite has its part."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from repository import REPOSITORY

from axialtrain.bench.arguments import SUITES
from axialtrain.bench.fill import begin, end, fill, records_in
from axialtrain.bench.page import check_part
from axialtrain.bench.record import HEAD, Goal, Record, Result, write_json
from axialtrain.cli import _parser, main

PAGE = REPOSITORY / "docs" / "benchmarks.md"
COMMANDS = re.findall(r"^`?(axialtrain bench (?!SUITE)[^`#\n]*)", PAGE.read_text(), re.MULTILINE)


def part(suite: str) -> str:
    return PAGE.read_text().partition(begin(suite))[2].partition(end(suite))[0]


def test_there_are_commands():
    assert len(COMMANDS) >= 4 + len(SUITES)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_one(command):
    words = shlex.split(command)
    assert _parser().parse_args(words[1:]).command is not None


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_has_its_part_its_command_date_and_table(suite):
    check_part(PAGE, begin(suite), end(suite), key="page")
    text = part(suite)
    if "**Not yet measured.**" in text:
        assert f"`axialtrain bench {suite} --out {suite}.json" in text
        return
    assert text.lstrip().startswith(f"`axialtrain bench {suite} --out {suite}.json")
    assert re.search(r"^20\d\d-\d\d-\d\d, .*threads, .*torch \d", text, re.MULTILINE)
    head = next(line for line in text.splitlines() if line.startswith("|"))
    assert [cell.strip() for cell in head.strip("|").split("|")] == list(HEAD)


def test_it_says_what_was_never_on_a_gpu():
    text = part("gpu")
    assert "**Not yet measured.**" in text or "NVIDIA" in text


def test_the_scripts_that_it_names_are_there():
    for name in re.findall(r"launch/\w+\.sh", PAGE.read_text()):
        assert (REPOSITORY / name).is_file()


# --- How it is filled -----------------------------------------------------------------------------


def record(suite: str, command: str, **machine: str) -> Record:
    results = [Result("a", "of x", 0.25, "half", "1 ms", {"x": 1}), Result("a", "px/s", 7.0)]
    where = {"cpu": "a CPU", "threads": 2, "malloc": "kept"} | machine
    return Record.today(suite, command, where, {"half": Goal(0.5)}, results=results)


def a_page(folder) -> Path:
    page = folder / "page.md"
    lines = [f"{begin(one)}\nold {one}\n{end(one)}" for one in ("layer", "memory", "gpu")]
    page.write_text("\n".join(["before", *lines, "after\n"]))
    return page


def test_a_record_comes_back_as_it_was_written(tmp_path):
    one = record("layer", "axialtrain bench layer")
    write_json(tmp_path / "a.json", one.as_dict())
    assert records_in(tmp_path / "a.json") == [one]


def test_a_page_gets_what_the_commands_printed(tmp_path, capsys):
    page = a_page(tmp_path)
    some = record("layer", "axialtrain bench layer --only a")
    more = record("layer", "axialtrain bench layer --only b")
    every = record("memory", "axialtrain bench memory", gpu="NVIDIA X")
    write_json(tmp_path / "a.json", some.as_dict())
    write_json(tmp_path / "b.json", more.as_dict())
    whole = {"suites": {"memory": every.as_dict(), "data": {"side": 1}}}
    write_json(tmp_path / "all.json", whole)
    files = [str(tmp_path / name) for name in ("a.json", "b.json", "all.json")]
    assert main(["bench", "page", str(page), *files]) == 0
    assert capsys.readouterr().out == f"written: {page}: layer, gpu\n"
    before, of_layer, between, of_gpu, after = re.split(
        r"<!-- axialtrain bench (?:layer|gpu): .*", page.read_text()
    )
    assert before == "before\n"
    for one in (some, more):
        assert f"`{one.command}`\n\n{one.about}:\n\n{one.markdown()}\n" in of_layer
    assert of_layer.index("--only a") < of_layer.index("--only b")
    assert "old memory" in between
    assert "NVIDIA X, python" in of_gpu
    assert every.markdown() in of_gpu
    assert "old" not in of_layer + of_gpu
    assert after == "\nafter\n"


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"suite": "speed"}', '{"suite": "layer"}', '{"suites": 3}']
)
def test_what_is_no_record_is_named(tmp_path, capsys, content):
    page, file = a_page(tmp_path), tmp_path / "a.json"
    old = page.read_text()
    file.write_text(content)
    assert main(["bench", "page", str(page), str(file)]) == 2
    assert f"axialtrain: {file}: allowed is what `axialtrain bench" in capsys.readouterr().err
    assert page.read_text() == old


def test_a_page_without_the_part_is_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    write_json(tmp_path / "a.json", record("layer", "x").as_dict())
    with pytest.raises(ValueError, match=r"page .*: allowed is a page with the lines"):
        fill(page, [tmp_path / "a.json"])
    assert page.read_text() == "nothing"
