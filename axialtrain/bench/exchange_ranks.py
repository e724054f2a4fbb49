"""`axialtrain bench exchange`: starts local ranks, which swap layouts beside a bare all-to-all,
and run a layer with its swaps at once and in bands."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from axialtrain.bench.exchange import measure
from axialtrain.bench.overlap import measure_overlap
from axialtrain.bench.record import Goal, Result, ms, shown, write_json
from axialtrain.bench.setting import Case, Setting, dtype_name
from axialtrain.launch.local import start
from axialtrain.mesh.mesh import Mesh
from axialtrain.train.meet import meet

RANKS = 4
BANDS = (2, 4)  # of lines, beside 1
TIMEOUT = timedelta(minutes=2)
GOALS = {"rate": Goal(0.7, at_least=True), "bytes": Goal(0)}


def cases(setting: Setting) -> Iterator[Case]:
    """Swaps of grids that the mesh divides and of one that it does not, on 2 x 2 and on 1 x 4
    ranks; then a layer on 2 x 2 whose swaps travel in bands (`mesh.overlap`)."""
    dtypes = [torch.float32, torch.bfloat16]
    shapes = [(2, 2), (1, 4)]
    sizes = [(512, 512, 256), (500, 310, 256)]
    layers = [(64, 64, 192), (128, 128, 192)]
    if setting.quick:
        dtypes, shapes, sizes, layers = dtypes[1:], shapes[:1], [(8, 8, 4)], [(8, 8, 8)]
    for dtype in dtypes:
        for shape in shapes:
            for size in sizes:
                name = _name("", shape, size, dtype)
                yield Case(name, partial(_swaps, setting, shape, size, dtype, name))
        for size in layers:
            name = _name("layer, ", shapes[0], size, dtype)
            yield Case(name, partial(_bands, setting, shapes[0], size, dtype, name))


def _name(what: str, shape: tuple[int, int], size: tuple[int, int, int], dtype: torch.dtype) -> str:
    mesh, grid = "{} x {}".format(*shape), "{} x {}, D = {}".format(*size)
    return f"{what}{mesh} ranks, {grid}, {dtype_name(dtype)}"


def _swaps(
    setting: Setting,
    shape: tuple[int, int],
    size: tuple[int, int, int],
    dtype: torch.dtype,
    name: str,
) -> list[Result]:
    rates = _on_ranks(_rates, name, shape, size, dtype, setting.rounds, setting.limit)
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


def _bands(
    setting: Setting,
    shape: tuple[int, int],
    size: tuple[int, int, int],
    dtype: torch.dtype,
    name: str,
) -> list[Result]:
    found = []
    for one in _on_ranks(_overlaps, name, shape, size, dtype, setting.rounds, setting.limit):
        what = f"time with mesh.overlap={one['bands']}, of that with 1"
        beside = (
            f"{ms(one['bands_s'])} against {ms(one['once_s'])}, "
            f"{shown(one['sent_bytes'] / 1e6)} MB sent"
        )
        found.append(Result(name, what, one["ratio"], None, beside, one))
    return found


def _on_ranks(fn: Callable[..., Any], name: str, *arguments: Any) -> Any:
    """fn(*arguments) on each of RANKS ranks; what the first of them returned, through JSON."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        status = start(_rank, (file, fn, arguments), RANKS)
        if status in (130, 2 + 128):
            raise KeyboardInterrupt
        if status != 0:
            raise ValueError(f"exchange, {name}: the ranks ended with status {status}")
        return json.loads(file.read_bytes())


def _rank(file: Path, fn: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The body of a rank; the first writes what all of them found. Memory is kept (`start`)."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // RANKS))
    meet("gloo", TIMEOUT)
    found = fn(*arguments)
    if dist.get_rank() == 0:
        write_json(file, found)
    dist.barrier()
    dist.destroy_process_group()


def _rates(
    shape: tuple[int, int],
    size: tuple[int, int, int],
    dtype: torch.dtype,
    rounds: int,
    limit: float,
) -> list[dict[str, Any]]:
    mesh = Mesh(row=shape[0], col=shape[1], timeout=TIMEOUT)
    height, width, dim = size
    rates = measure(
        mesh, height=height, width=width, dim=dim, dtype=dtype, rounds=rounds, limit=limit
    )
    return [asdict(one) for one in rates]


def _overlaps(
    shape: tuple[int, int],
    size: tuple[int, int, int],
    dtype: torch.dtype,
    rounds: int,
    limit: float,
) -> list[dict[str, Any]]:
    height, width, dim = size
    found = measure_overlap(
        shape,
        BANDS,
        height=height,
        width=width,
        dim=dim,
        heads=max(2, dim // 64),
        dtype=dtype,
        rounds=rounds,
        limit=limit,
        timeout=TIMEOUT,
    )
    return [asdict(one) for one in found]
