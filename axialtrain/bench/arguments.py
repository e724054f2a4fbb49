"""The command line of `axialtrain bench`, which `python -m axialtrain.bench` is too.

What is not measured is not imported: a machine with GPUs needs torch, numpy and einops only.
"""

from __future__ import annotations

import argparse
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from axialtrain.bench.setting import Setting

SUITES = {  # what each measures
    "attention": "attention along one axis, beside the plain formula and torch's fused attention",
    "layer": "the attention module, beside the `axial-attention` package's; a layer's traffic",
    "step": "training steps, and what share of them is matrix products and attention",
    "exchange": "how fast tokens change layout among local ranks; a layer with mesh.overlap",
    "memory": "what a layer holds at once on growing grids, and what a gigapixel would",
    "complexity": "time, memory and counted FLOP on growing grids, beside the formulas, plotted",
}
# The short ones first: what they leave of the time is for those after them.
ON_GPU = ("memory", "complexity", "layer", "step", "attention")
DEVICES = ("auto", "cpu", "cuda")
ROUNDS, LIMIT, DATA_SIDE, DATA_ROUNDS, DATA_STEPS = 7, 8.0, 16_384, 15, 20


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what there is to be measured."""
    benches = parser.add_subparsers(required=True, metavar="SUITE")
    for name, what in SUITES.items():
        one = benches.add_parser(name, help=what)
        one.add_argument("--out", required=True, type=Path, metavar="FILE", help="a new JSON file")
        one.add_argument(
            "--only", default="", metavar="TEXT", help="cases with that in their names"
        )
        _where(one)
        one.set_defaults(command=_suite, suite=name)
    every = benches.add_parser("all", help="all of these one after the other, and data")
    every.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="a new folder")
    every.add_argument(
        "--suites",
        nargs="+",
        metavar="SUITE",
        help="these of them, in this order; on a GPU those that it says something of",
    )
    _where(every)
    every.set_defaults(command=_all)

    page = benches.add_parser("page", help="put records into a page, as docs/benchmarks.md")
    page.add_argument("page", type=Path, metavar="FILE.md")
    page.add_argument("records", type=Path, nargs="+", metavar="FILE.json")
    page.set_defaults(command=_page)

    saving = benches.add_parser(
        "checkpoint", help="for how long saving keeps training from going on: [key=value ...]"
    )
    saving.add_argument("overrides", nargs="*", metavar="key=value")
    saving.add_argument("--out", required=True, type=Path, metavar="FILE", help="a new JSON file")
    saving.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    saving.set_defaults(command=_checkpoint)
    sharding = benches.add_parser("shard", help="how fast a scene becomes shards, in what memory")
    sharding.add_argument("--out", required=True, type=Path, metavar="FILE", help="a new JSON file")
    sharding.add_argument("--side", type=int, default=32768, help="px of the scene")
    sharding.add_argument("--jobs", type=int, default=1, help="processes")
    sharding.set_defaults(command=_shard)
    reading = benches.add_parser("data", help="how fast regions are read, and who waits for them")
    reading.add_argument("--out", required=True, type=Path, metavar="FILE", help="a new JSON file")
    reading.add_argument("--slide", type=Path, help="one of JPEG tiles, to be read as well")
    reading.add_argument("--side", type=int, default=DATA_SIDE, help="px of the scene")
    reading.add_argument("--rounds", type=int, default=DATA_ROUNDS, help="regions of each image")
    reading.add_argument(
        "--steps", type=int, default=DATA_STEPS, help="of a model that takes a second"
    )
    reading.set_defaults(command=_data)


def _where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: a GPU if there is")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="small sizes, to see that all runs")
    sizes.add_argument("--long", action="store_true", help="also what takes many minutes")
    parser.add_argument(
        "--malloc",
        choices=["kept", "default"],
        default="kept",
        help="whether memory is kept, as in our runs, or its pages are faulted in anew",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each comparison")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="s after which a comparison begins no round"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="after which no further case begins"
    )


def _setting(parsed: argparse.Namespace) -> Setting:
    from axialtrain.bench.setting import Setting, device_of
    from axialtrain.launch.local import keep_memory

    if parsed.rounds < 1:
        raise ValueError(f"--rounds {parsed.rounds}: allowed is at least 1")
    if not parsed.limit > 0:
        raise ValueError(f"--limit {parsed.limit}: allowed are numbers above 0")
    device = device_of(parsed.device)
    kept = parsed.own_process and parsed.malloc == "kept" and not parsed.quick
    if kept:
        keep_memory()  # as a run that trains does
    return Setting(
        device,
        quick=parsed.quick,
        long=parsed.long,
        rounds=parsed.rounds,
        limit=parsed.limit,
        malloc="kept" if kept else "default",
    )


def _command(parsed: argparse.Namespace, suite: str) -> str:
    """By which a person measures the same suite."""
    words = ["axialtrain", "bench", suite, "--out", f"{suite}.json"]
    if parsed.device != "auto":
        words += ["--device", parsed.device]
    if parsed.malloc != "kept":
        words += ["--malloc", parsed.malloc]
    words += [f"--{key}" for key in ("quick", "long") if getattr(parsed, key)]
    for key, usual in (("rounds", ROUNDS), ("limit", LIMIT), ("minutes", math.inf), ("only", "")):
        value = getattr(parsed, key, usual)
        if value != usual:
            words += [f"--{key}", str(value)]
    return shlex.join(words)


def _suite(parsed: argparse.Namespace) -> int:
    from axialtrain.bench.suites import bench_suite

    if parsed.device == "auto" and parsed.suite not in ON_GPU:
        parsed.device = "cpu"
    text, well = bench_suite(
        parsed.suite,
        parsed.out,
        setting=_setting(parsed),
        command=_command(parsed, parsed.suite),
        only=parsed.only,
        minutes=parsed.minutes,
    )
    print(text)
    return 0 if well else 1


def _all(parsed: argparse.Namespace) -> int:
    from axialtrain.bench.suites import bench_all

    setting = _setting(parsed)
    usual = ON_GPU if setting.on_gpu else (*SUITES, "data")
    text, well = bench_all(
        parsed.out,
        names=parsed.suites or usual,
        setting=setting,
        command=lambda suite: _command(parsed, suite),
        minutes=parsed.minutes,
        others={"data": lambda out: _data_of(out, quick=parsed.quick)},
    )
    print(text)
    return 0 if well else 1


def _page(parsed: argparse.Namespace) -> int:
    from axialtrain.bench.fill import fill

    print(fill(parsed.page, parsed.records))
    return 0


def _data_of(out: Path, *, quick: bool) -> str:
    """The bench of reading, which has a record of its own."""
    from axialtrain.bench.data import bench_data

    side, rounds, steps = (2048, 1, 1) if quick else (DATA_SIDE, DATA_ROUNDS, DATA_STEPS)
    return bench_data(out, slide=None, side=side, rounds=rounds, steps=steps)


def _checkpoint(parsed: argparse.Namespace) -> int:
    from axialtrain.bench.checkpoint import bench_checkpoint

    print(bench_checkpoint(parsed.overrides, parsed.out, every=parsed.every))
    return 0


def _shard(parsed: argparse.Namespace) -> int:
    from axialtrain.bench.shard import bench_shard

    print(bench_shard(parsed.out, side=parsed.side, jobs=parsed.jobs))
    return 0


def _data(parsed: argparse.Namespace) -> int:
    from axialtrain.bench.data import bench_data
    from axialtrain.launch.local import keep_memory

    if parsed.own_process:
        keep_memory()  # as a rank does, which reads regions
    print(
        bench_data(
            parsed.out,
            slide=parsed.slide,
            side=parsed.side,
            rounds=parsed.rounds,
            steps=parsed.steps,
        )
    )
    return 0
