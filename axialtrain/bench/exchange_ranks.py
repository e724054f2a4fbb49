"""`axialtrain bench exchange`: starts local ranks, which swap layouts beside a bare all-to-all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from axialtrain.bench.exchange import measure
from axialtrain.bench.record import Goal, Result, ms, shown, write_json
from axialtrain.bench.setting import Case, Setting, dtype_name
from axialtrain.launch.local import start
from axialtrain.mesh.mesh import Mesh
from axialtrain.train.meet import meet

RANKS = 4
TIMEOUT = timedelta(minutes=2)
GOALS = {"rate": Goal(0.7, at_least=True), "bytes": Goal(0)}


def cases(setting: Setting) -> Iterator[Case]:
    """Of grids that the mesh divides and of one that it does not, on 2 x 2 and on 1 x 4 ranks."""
    dtypes = [torch.float32, torch.bfloat16]
    shapes = [(2, 2), (1, 4)]
    sizes = [(512, 512, 256), (500, 310, 256)]
    if setting.quick:
        dtypes, shapes, sizes = dtypes[1:], shapes[:1], [(8, 8, 4)]
    for dtype in dtypes:
        for shape in shapes:
            for size in sizes:
                mesh, grid = "{} x {}".format(*shape), "{} x {}, D = {}".format(*size)
                name = f"{mesh} ranks, {grid}, {dtype_name(dtype)}"
                yield Case(name, partial(_started, setting, shape, size, dtype, name))


def _started(
    setting: Setting,
    shape: tuple[int, int],
    size: tuple[int, int, int],
    dtype: torch.dtype,
    name: str,
) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rates.json"
        status = start(_rank, (file, shape, size, dtype, setting.rounds), RANKS)
        if status in (130, 2 + 128):
            raise KeyboardInterrupt
        if status != 0:
            raise ValueError(f"exchange, {name}: the ranks ended with status {status}")
        rates = json.loads(file.read_bytes())
    found = []
    divides = size[0] % RANKS == 0 == size[1] % RANKS
    for rate in rates:
        what = f"{rate['way']}: rate, of a bare all-to-all's"
        sent = rate["sent_bytes"]
        beside = (
            f"{ms(rate['swap_s'])} against {ms(rate['bare_s'])}, "
            f"{shown(sent / 1e6)} MB among {rate['ranks']}"
        )
        found.append(Result(name, what, rate["ratio"], "rate", beside, rate))
    if divides:
        off = max(abs(rate["sent_bytes"] / rate["formula_bytes"] - 1) for rate in rates)
        what = "all: counted bytes, off the formula by at most"
        found.append(Result(name, what, off, "bytes"))
    return found


def _rank(
    file: Path,
    shape: tuple[int, int],
    size: tuple[int, int, int],
    dtype: torch.dtype,
    rounds: int,
) -> None:
    """The body of a rank; the first writes what all of them found."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // RANKS))
    meet("gloo", TIMEOUT)
    mesh = Mesh(row=shape[0], col=shape[1], timeout=TIMEOUT)
    height, width, dim = size
    rates = measure(mesh, height=height, width=width, dim=dim, dtype=dtype, rounds=rounds)
    if dist.get_rank() == 0:
        found: Any = [asdict(one) for one in rates]
        write_json(file, found)
    dist.barrier()
    dist.destroy_process_group()
