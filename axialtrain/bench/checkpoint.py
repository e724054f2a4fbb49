"""`axialtrain bench checkpoint`: for how long saving keeps training from going on.

Three runs of the same steps by the command line itself: without checkpoints but the last, with them
written before the next step, and with them written beside it.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from axialtrain.bench.record import new_file, written

MODES = {
    "none": ["checkpoint.every=0"],
    "synchronous": ["checkpoint.asynchronous=false"],
    "asynchronous": ["checkpoint.asynchronous=true"],
}


def bench_checkpoint(overrides: Sequence[str], out: Path, *, every: int) -> str:
    """Run, measure, and write `out`, JSON. Returns the table.

    overrides: of `axialtrain train`. every: steps between checkpoints. The first step, and the
    last save, which waits for itself, do not count.
    Raises ValueError where `out` is there already, or a run fails.
    """
    folder = new_file(out)
    results = {}
    for mode, keys in MODES.items():
        print(f"running: {mode}", flush=True)
        command = [
            *(sys.executable, "-m", "axialtrain.cli", "train", f"checkpoint.every={every}"),
            *overrides,
            *keys,
            f"hydra.run.dir={folder / mode}",
        ]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            raise ValueError(f"{mode}: the run ended with status {done.returncode}")
        results[mode] = _measured(folder / mode, 0 if mode == "none" else every)
    size = _bytes(folder / "synchronous" / "checkpoints")
    record = {
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "safetensors")},
        "machine": platform.machine(),
        "overrides": list(overrides),
        "every": every,
        "bytes": size,
        "results": results,
    }
    lines = [f"{'saving':<13}{'step s':>9}{'stall s':>9}{'largest':>9}{'saves':>7}{'share':>8}"]
    for mode, result in results.items():
        lines.append(
            f"{mode:<13}{result['step_s']:>9.3f}{result['stall_s']:>9.3f}"
            f"{result['largest_stall_s']:>9.3f}{result['saves']:>7}{result['share']:>8.1%}"
        )
    lines.append(f"a checkpoint: {size / 1e6:.1f} MB")
    return written(out, record, "\n".join(lines))


def _measured(run: Path, every: int) -> dict[str, Any]:
    """step_s: the median. stall_s: of one save, from the copy to the marker, on average. share: of
    all stalls in the time of the steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    saves = sum(line["step"] % every == 0 for line in lines[:-1]) if every else 0
    steps = [line["seconds"] for line in lines[1:]]
    stalls = [line["save_seconds"] for line in lines if "save_seconds" in line]
    return {
        "step_s": median(steps),
        "stall_s": sum(stalls) / max(saves, 1),
        "largest_stall_s": max(stalls, default=0.0),
        "saves": saves,
        "share": sum(stalls) / (sum(steps) + sum(stalls)),
    }


def _bytes(checkpoints: Path) -> int:
    """Of the newest checkpoint."""
    newest = max(checkpoints.iterdir())
    return sum(path.stat().st_size for path in newest.iterdir())
