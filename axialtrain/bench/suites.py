"""The suites by name: run one or all, write what they measured."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from axialtrain.bench import attention, complexity, exchange_ranks, layer, memory, step
from axialtrain.bench.record import Goal, Record, Result, machine, new_file, write_json, written
from axialtrain.bench.setting import Case, Setting
from axialtrain.data.whole import replacing

Draw = Callable[[Sequence[Result], Path], None]


@dataclass(frozen=True)
class Suite:
    """cases: what it measures, in order. missing: what cannot be measured here, and why. on_gpu:
    whether it has anything to say of one GPU. of_runs: whether it starts ranks, which keep memory
    whatever the setting says. draw: writes a picture of the results."""

    goals: Mapping[str, Goal]
    cases: Callable[[Setting], Iterable[Case]]
    missing: Callable[[Setting], list[str]] = lambda _: []
    on_gpu: bool = True
    of_runs: bool = False
    draw: Draw | None = None


SUITES = {
    "attention": Suite(
        attention.GOALS,
        attention.cases,
    ),
    "layer": Suite(
        layer.GOALS,
        layer.cases,
        layer.missing,
    ),
    "step": Suite(
        step.GOALS,
        step.cases,
        step.missing,
    ),
    "exchange": Suite(
        exchange_ranks.GOALS,
        exchange_ranks.cases,
        on_gpu=False,
        of_runs=True,
    ),
    "memory": Suite(
        memory.GOALS,
        memory.cases,
    ),
    "complexity": Suite(
        complexity.GOALS,
        complexity.cases,
        complexity.missing,
        draw=complexity.draw,
    ),
}


def check_suites(names: Sequence[str], allowed: Iterable[str], setting: Setting) -> None:
    """Raise ValueError where one is unknown, or says nothing of a GPU that is to be measured."""
    allowed = [
        name for name in allowed if not setting.on_gpu or (name in SUITES and SUITES[name].on_gpu)
    ]
    for name in names:
        if name not in allowed:
            where = " on a GPU" if setting.on_gpu else ""
            raise ValueError(f"suite {name}: allowed{where} are {', '.join(allowed)}")


def bench_suite(
    name: str,
    out: Path,
    *,
    setting: Setting,
    command: str,
    only: str = "",
    minutes: float = math.inf,
) -> tuple[str, bool]:
    """Run, measure, and write `out`, JSON. Returns the table, and whether no case failed.

    command: by which a person does the same. only: a part of the names of cases that are wanted.
    minutes: after which no further case begins.
    Raises ValueError where `out` is there already, nothing has that name, or time is none.
    """
    new_file(out)
    check_suites([name], SUITES, setting)
    check_minutes(minutes)
    out.parent.mkdir(parents=True, exist_ok=True)
    record = measured(name, setting, command, only=only, minutes=minutes)
    return write(record, out, goals=not setting.quick), not record.failed


def check_minutes(minutes: float) -> None:
    if not minutes > 0:
        raise ValueError(f"--minutes {minutes}: allowed are numbers above 0")


def measured(
    name: str, setting: Setting, command: str, *, only: str = "", minutes: float = math.inf
) -> Record:
    """The record of a suite, whose cases say on the way which of them runs.

    One that fails is named, and the others go on: a GPU may be lent for minutes.
    """
    suite = SUITES[name]
    cases = [case for case in suite.cases(setting) if only in case.name]
    if not cases:
        names = ", ".join(case.name for case in suite.cases(setting))
        raise ValueError(f"--only {only}: no case of {name} has that in its name: {names}")
    until = time.monotonic() + 60 * minutes
    where = machine(setting.device) | {"malloc": "kept" if suite.of_runs else setting.malloc}
    results: list[Result] = []
    left_out, failed = [], []
    for number, case in enumerate(cases, 1):
        if time.monotonic() > until:
            left_out.append(case.name)
            continue
        print(f"{name}, {number} of {len(cases)}: {case.name}", flush=True)
        said = ""
        try:
            results += case.run()
        except Exception as error:  # a kernel that is not there, memory that does not suffice, ...
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if said:  # only now is nothing held by the error any more
            failed.append(f"{case.name}: {said}")
            print(f"failed: {failed[-1]}", file=sys.stderr, flush=True)
            with suppress(RuntimeError):  # after a fault of CUDA's nothing works
                torch.cuda.empty_cache()
    return Record.today(
        name,
        command,
        where,
        suite.goals,
        results=results,
        left_out=left_out,
        failed=failed,
        missing=suite.missing(setting),
    )


def write(record: Record, out: Path, *, goals: bool) -> str:
    """The record and its picture. Returns the table; errors and goals as `written` and `markdown`
    have them."""
    text = written(out, record.as_dict(), record.markdown(goals=goals))
    draw = SUITES[record.suite].draw
    if draw is not None:
        draw(record.results, out.with_suffix(".png"))
    return text


def bench_all(
    out: Path,
    *,
    names: Sequence[str],
    setting: Setting,
    command: Callable[[str], str],
    minutes: float = math.inf,
    others: Mapping[str, Callable[[Path], str]],
) -> tuple[str, bool]:
    """Run suites one after the other into the new folder `out`. Returns all tables, and whether no
    case failed.

    A suite's NAME.json is there when it has ended, and it is in all.json and all.md. minutes: of
    all, of which each suite may have its part and what those before it left. others: commands with
    records of their own, which get the file to write and return a table.
    Raises ValueError where `out` is there already, or a name is unknown.
    """
    check_suites(names, [*SUITES, *others], setting)
    check_minutes(minutes)
    if out.exists():
        raise ValueError(f"--out {out}: allowed is a new folder")
    out.mkdir(parents=True)
    until = time.monotonic() + 60 * minutes
    lines = [f"# Measured on {date.today().isoformat()}"]
    if setting.quick:
        lines.append("\nOn small sizes (--quick), to see that all runs: goals are for larger ones.")
    records: dict[str, object] = {}
    well = True
    for number, name in enumerate(names):
        file = out / f"{name}.json"
        if name in others:
            lines.append(f"\n## {name}\n\n```\n{others[name](file)}\n```")
            records[name] = json.loads(file.read_bytes())
        else:
            left = max((until - time.monotonic()) / 60, 0) / (len(names) - number)
            record = measured(name, setting, command(name), minutes=left)
            write(record, file, goals=not setting.quick)
            records[name] = record.as_dict()
            well = well and not record.failed
            lines.append(
                f"\n## {name}\n\n{record.about}:\n\n{record.markdown(goals=not setting.quick)}"
            )
        write_json(out / "all.json", {"date": date.today().isoformat(), "suites": records})
        with replacing(out / "all.md") as table:
            table.write(("\n".join(lines) + "\n").encode())
    return "\n".join([*lines, f"written: {out}"]), well
