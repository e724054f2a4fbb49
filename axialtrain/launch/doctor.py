"""`axialtrain doctor`: what keeps a run from starting or makes it slow, and what to do about it.

Alone, as one of the ranks of a launcher, or on local processes of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

from axialtrain.data.sets import sets_of
from axialtrain.data.whole import check_place
from axialtrain.launch.doctor_arguments import TIMEOUT
from axialtrain.launch.errors import own_rank
from axialtrain.launch.examine import Plan, examine
from axialtrain.launch.local import processes_of_outer_launcher, start
from axialtrain.train.compose import compose_run

_NO_SHARDS = "data.shards=none"  # for a mesh alone: a run's configuration must name some


def doctor(parsed: argparse.Namespace) -> int:
    """The command. Returns its exit status: 0 all is well, 1 there are troubles.

    Raises ValueError for what cannot be asked.
    """
    if parsed.json is not None and not parsed.json.absolute().parent.is_dir():
        raise ValueError(f"json is {parsed.json}, allowed is a file in a folder that is there")
    if parsed.json is not None:
        check_place(parsed.json, f"json is {parsed.json}")
    if not 0.5 <= parsed.timeout <= 3600:
        raise ValueError(f"timeout is {parsed.timeout:g}, allowed are seconds from 0.5 to 3600")
    started = processes_of_outer_launcher()
    plan = plan_of(parsed.overrides, started)
    plan = replace(
        plan,
        stores=tuple(dict.fromkeys([*plan.stores, *parsed.store])),
        timeout=parsed.timeout,
        json=None if parsed.json is None else parsed.json.absolute(),
    )
    size = 1 if plan.degrees is None else prod(plan.degrees.values())
    if started is not None or size == 1:
        return examine(plan)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "status"
        status = start(_local_rank, (plan, answer), size)
        if status == 0:
            return int(answer.read_text())
        return 1 if status == 1 else 2  # it was told to end, say


def plan_of(overrides: Sequence[str], started: int | None) -> Plan:
    """What `overrides` ask to look at. started: processes of an outer launcher, None without.

    Raises ValueError as `compose_run` does.
    """
    if not overrides:
        return Plan(None, Path("runs").absolute(), timeout=TIMEOUT)
    names = {override.partition("=")[0] for override in overrides}
    no_shards = names.isdisjoint({"experiment", "data.shards"})
    given = [*overrides, _NO_SHARDS] if no_shards else list(overrides)
    config, folder, _ = compose_run(given, started)
    stores = [] if no_shards else [one.url for one in sets_of(config.data.shards)]
    if config.data.validation is not None:
        stores.append(config.data.validation)
    has_mesh = any(name.partition(".")[0] in ("mesh", "experiment") for name in names)
    return Plan(
        config.mesh.degrees if has_mesh else None,
        folder,
        timeout=TIMEOUT,
        stores=tuple(stores),
        checkpoints=config.checkpoint.folder,
        device=config.launcher.device,
        threads=config.launcher.threads,
    )


def _local_rank(plan: Plan, answer: Path) -> None:
    """A rank of our own. To `start` an exit status says which rank failed: rank 0 writes down the
    one that it found."""
    status = examine(plan)
    if own_rank() == 0:
        answer.write_text(str(status))
