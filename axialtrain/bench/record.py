"""What a measurement leaves: one record for all suites, as JSON and as a table for people."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from axialtrain.data.whole import check_place, replacing

HEAD = ("case", "measured", "is", "goal", "met", "beside")
_WITHOUT_GOALS = (0, 1, 2, 5)  # of these


@dataclass(frozen=True)
class Goal:
    """What a result must be: at most `limit`, or at least."""

    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {shown(self.limit)}"


@dataclass(frozen=True)
class Result:
    """One number of a case.

    case: sizes and dtype. what: the value in words; a ratio wherever something can be set beside
    it. goal: the key of its goal, None where nothing was promised. beside: what the ratio was made
    of, in words. data: the same as numbers, in s and bytes.
    """

    case: str
    what: str
    value: float
    goal: str | None = None
    beside: str = ""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """What a suite measured on one day and machine.

    command: by which it was measured. left_out: the cases that time did not suffice for. failed:
    those that ended with an error, and it. missing: what could not be measured here, and why.
    """

    date: str
    suite: str
    command: str
    versions: dict[str, str]
    machine: dict[str, Any]
    goals: dict[str, Goal]
    results: list[Result]
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @classmethod
    def today(
        cls,
        suite: str,
        command: str,
        machine: dict[str, Any],
        goals: Mapping[str, Goal],
        **rest: Any,
    ) -> Record:
        """With what is installed here. rest: `results` and the others."""
        return cls(
            date=date.today().isoformat(),
            suite=suite,
            command=command,
            versions=versions(),
            machine=machine,
            goals=dict(goals),
            **rest,
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON: results that have a goal say whether it is met."""
        whole = asdict(self)
        for row, result in zip(whole["results"], self.results, strict=True):
            if result.goal is not None:
                row["met"] = self.goals[result.goal].met(result.value)
        return whole

    def markdown(self, *, goals: bool = True) -> str:
        """The table, then what it does not hold. goals: whether it sets results beside them, which
        are for the sizes of a run without --quick."""
        rows: list[tuple[str, ...]] = [HEAD]
        for one in self.results:
            goal = None if one.goal is None else self.goals[one.goal]
            met = "" if goal is None else "yes" if goal.met(one.value) else "**no**"
            says = "" if goal is None else str(goal)
            rows.append((one.case, one.what, shown(one.value), says, met, one.beside))
        if not goals:
            rows = [tuple(row[at] for at in _WITHOUT_GOALS) for row in rows]
        lines = [aligned(rows)]
        if self.left_out:
            lines.append(f"\nNot measured, as time was up: {'; '.join(self.left_out)}.")
        lines += [f"\n**Failed**: {one}" for one in self.failed]
        lines += [f"\nNot measured: {one}." for one in self.missing]
        return "\n".join(lines)

    @property
    def about(self) -> str:
        """Date, machine and versions in a line."""
        where = self.machine.get("gpu", f"{self.machine['cpu']}, {self.machine['threads']} threads")
        if "gpu" not in self.machine:
            where += f", malloc {self.machine['malloc']}"
        packages = ", ".join(f"{name} {one}" for name, one in self.versions.items())
        return f"{self.date}, {where}, {packages}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown that reads as one in a terminal too; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join(
        [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
    )


def shown(value: float) -> str:
    """Three digits, or all of a larger number."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ms(seconds: float) -> str:
    return f"{shown(seconds * 1e3)} ms"


def mib(count: float) -> str:
    return f"{shown(count / 2**20)} MiB"


def versions() -> dict[str, str]:
    """Of Python and of what is measured, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "einops", "axial-attention", "axialtrain"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """load: of the last minutes, when this is asked: before what is measured makes its own."""
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": list(os.getloadavg()),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["gpu_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return found


def _cpu() -> str:
    """Its name, and what it calculates with: in bf16 ratios are others where it can."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    name = names[0] if names else platform.machine()
    able = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {able}" + " and bf16" * bool({"avx512_bf16", "amx_bf16"} & set(flags))


def new_file(out: Path) -> Path:
    """The folder beside `out` that a measurement may work in, which is not there yet.

    Raises ValueError where it is, or `out` is no new JSON file, or none can be written there.
    """
    folder = out.with_suffix("")
    if out.suffix != ".json" or out.exists() or folder.exists():
        raise ValueError(f"--out {out}: allowed is a new file, NAME.json, with no folder NAME")
    check_place(out, f"--out {out}")
    return folder


def write_json(path: Path, record: Mapping[str, Any] | list[Any]) -> None:
    """The file appears whole."""
    with replacing(path) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())


def written(out: Path, record: Mapping[str, Any], table: str) -> str:
    """Write the record; returns the table, and where the record is.

    Where it cannot be written any more, the table is printed: what was measured took its time.
    Raises OSError, naming `out`.
    """
    try:
        write_json(out, record)
    except OSError as error:
        print(table, flush=True)
        raise OSError(f"--out {out}: cannot be written: {error}") from error
    return f"{table}\nwritten: {out}"
