"""`axialtrain bench page`: puts what was measured, here or elsewhere, into a page of the
documentation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from axialtrain.bench.page import check_part, replace_part
from axialtrain.bench.record import Goal, Record, Result
from axialtrain.bench.suites import SUITES

GPU = "gpu"  # the part for what was measured on one, of all suites


def begin(part: str) -> str:
    """The line of a page before a part that is filled."""
    return f"<!-- axialtrain bench {part}: begin -->"


def end(part: str) -> str:
    return f"<!-- axialtrain bench {part}: end -->"


def fill(page: Path, files: Sequence[Path]) -> str:
    """Replace the parts of `page` that records in `files` are for. Returns what was done.

    files: JSON of a suite, or of `bench all`. Several records of a suite, such as of some of its
    cases each, follow one another. Pictures are drawn beside the page.
    Raises ValueError where a file holds no such record, or the page no such part.
    """
    parts: dict[str, list[Record]] = {}
    for file in files:
        for record in records_in(file):
            parts.setdefault(GPU if "gpu" in record.machine else record.suite, []).append(record)
    for part in parts:
        check_part(page, begin(part), end(part), key="page")
    for part, records in parts.items():
        text = "\n".join(_shown(record, page, part) for record in records)
        replace_part(page, begin(part), end(part), text, key="page")
    return f"written: {page}: {', '.join(parts)}"


def _shown(record: Record, page: Path, part: str) -> str:
    lines = [f"\n`{record.command}`\n\n{record.about}:\n\n{record.markdown()}\n"]
    draw = SUITES[record.suite].draw
    if draw is not None:
        name = f"{record.suite}.png" if part == record.suite else f"{record.suite}_{part}.png"
        draw(record.results, page.with_name(name))
        if page.with_name(name).exists():
            lines.append(f"![{record.suite}, plotted]({name})\n")
    return "\n".join(lines)


def records_in(file: Path) -> list[Record]:
    """Of the suites: what has a record of its own (data) is left out."""
    try:
        found: Any = json.loads(file.read_bytes())
        every = found["suites"].values() if "suites" in found else [found]
        return [_record(one) for one in every if "suite" in one or one is found]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{file}: allowed is what `axialtrain bench SUITE` or `bench all` wrote: "
            f"{type(error).__name__}: {error}"
        ) from error


def _record(values: dict[str, Any]) -> Record:
    if values["suite"] not in SUITES:
        raise ValueError(f"suite {values['suite']}")
    goals = {name: Goal(**goal) for name, goal in values["goals"].items()}
    keys = ("case", "what", "value", "goal", "beside", "data")
    results = [Result(**{key: row[key] for key in keys}) for row in values["results"]]
    return Record(**values | {"goals": goals, "results": results})
