"""`axialtrain bench complexity`: time, memory and counted FLOP of axial, full and window attention
over growing square grids, beside the formulas.

q, k and v are given; forward and backward. FLOP are counted where every kernel is one of matrix
products: on a CPU, torch counts none of its fused kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from axialtrain.attention.area import attend_windows
from axialtrain.attention.axis import attend
from axialtrain.bench.peak import held_at_once
from axialtrain.bench.plain import Attention, there_and_back, triple
from axialtrain.bench.record import Goal, Result, mib, ms, shown
from axialtrain.bench.setting import Case, Setting
from axialtrain.data.whole import replacing
from axialtrain.grid import Rect

HEADS, WIDTH = 2, 64
WINDOW = 8  # tokens
COUNTED = (8, 16, 32, 64)  # sides of the grids whose FLOP are counted, with all logits at once
GOALS = {"exponent": Goal(1.6), "flop": Goal(0)}


def _axial(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, 2) + attend(q, k, v, 1)


def _full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grid = q.shape[1:3]
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(1, grid)


def _window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grid = Rect(0, q.shape[1], 0, q.shape[2])
    return attend_windows(q, k, v, grid, grid, WINDOW, 0)


@dataclass(frozen=True)
class Kind:
    """keys: of a query, in how many tokens a square grid of that side has. slope: the exponent of
    its cost over the tokens. most: the largest side that is timed, on a CPU and in a long run."""

    attention: Attention
    keys: Callable[[int], int]
    slope: float
    most: tuple[int, int]


KINDS = {
    "axial": Kind(_axial, lambda side: 2 * side, 1.5, (256, 512)),
    "full": Kind(_full, lambda side: side * side, 2.0, (128, 128)),
    "window": Kind(_window, lambda side: WINDOW * WINDOW, 1.0, (256, 512)),
}


def flop(kind: str, side: int, heads: int = HEADS, width: int = WIDTH) -> int:
    """4 H W keys D of a forward, twice that of its backward."""
    return 12 * side * side * KINDS[kind].keys(side) * heads * width


def missing(setting: Setting) -> list[str]:
    return [] if find_spec("matplotlib") else ["the plot, as `matplotlib` is not installed here"]


def cases(setting: Setting) -> Iterator[Case]:
    yield Case("FLOP", partial(_counted, setting))
    yield Case("time and memory", partial(_measured, setting))


def _counted(setting: Setting) -> list[Result]:
    """How far the counted FLOP are from the formula: not at all."""
    found = []
    for kind, one in KINDS.items():
        for side in COUNTED[:2] if setting.quick else COUNTED:
            way = there_and_back(one.attention, *_inputs(side, setting))
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                way()
            got, want = counter.get_total_flops(), flop(kind, side)
            beside = f"{got:,} counted, {want:,} by the formula"
            data = {"kind": kind, "side": side, "counted": got, "formula": want}
            what = f"{kind}: counted FLOP, off the formula by"
            name = f"{side} x {side}"
            found.append(Result(name, what, abs(got / want - 1), "flop", beside, data))
    return found


def _measured(setting: Setting) -> list[Result]:
    found: list[Result] = []
    of_axial = []
    for side in _sides(setting):
        ways = {
            kind: there_and_back(one.attention, *_inputs(side, setting))
            for kind, one in KINDS.items()
            if side <= one.most[setting.long] or (setting.on_gpu and kind != "full")
        }
        rounds = setting.in_turns(ways)
        of_axial.append((side * side, rounds.median("axial")))
        for kind, way in ways.items():
            held, _ = held_at_once(way, setting.device)
            seconds = rounds.median(kind)
            data = {"kind": kind, "side": side, "seconds": seconds, "bytes": held}
            what, value = "axial: ns a token", seconds * 1e9 / side**2
            beside = f"{ms(seconds)}, {mib(held)}, {shown(flop(kind, side) / 1e9)} GFLOP"
            if kind != "axial":
                what, value = f"{kind}: time, of axial attention's", rounds.ratio(kind, "axial")
                beside += f"; FLOP {shown(flop(kind, side) / flop('axial', side))} of its"
            found.append(Result(f"{side} x {side}", what, value, None, beside, data))
    slope = exponent(*zip(*of_axial, strict=True))
    name = f"{_sides(setting)[0]}² to {_sides(setting)[-1]}²"
    found.append(
        Result(name, "axial: exponent of time over tokens", slope, "exponent", "in theory 1.5")
    )
    return found


def _sides(setting: Setting) -> tuple[int, ...]:
    if setting.quick:
        return (8, 16)
    if setting.on_gpu:
        return (64, 128, 256, 512, 1024)
    return (32, 64, 128, 256, 512) if setting.long else (32, 64, 128, 256)


def _inputs(side: int, setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.bfloat16 if setting.on_gpu else torch.float32
    return triple(1, side, side, HEADS, WIDTH, device=setting.device, dtype=dtype)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of a line through the logarithms, by least squares."""
    x, y = ([math.log(one) for one in many] for many in (sizes, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return over / sum((a - mean_x) ** 2 for a in x)


def draw(results: Sequence[Result], path: Path) -> None:
    """Time, memory and FLOP over tokens, in logarithms: points as measured, lines as in theory.

    A line of the time has the slope of its formula and goes through the last point; those of memory
    are 1; those of FLOP are the formula itself. Nothing where matplotlib is not installed, or
    nothing was measured.
    """
    timed = [one.data for one in results if "seconds" in one.data]
    if not timed or not find_spec("matplotlib"):
        return
    from matplotlib.figure import Figure

    counted = [one.data for one in results if "counted" in one.data]
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    units = (("seconds", "s", 1.0), ("bytes", "MiB", 2.0**20))
    for axes, (key, unit, scale) in zip(panels, units, strict=False):
        for number, (kind, one) in enumerate(KINDS.items()):
            points = [(row["side"] ** 2, row[key] / scale) for row in timed if row["kind"] == kind]
            _points(axes, points, kind, number)
            slope = one.slope if key == "seconds" else 1.0
            _line(axes, points, slope, number)
        axes.set_ylabel(unit)
    for number, kind in enumerate(KINDS):
        points = [(row["side"] ** 2, row["counted"]) for row in counted if row["kind"] == kind]
        _points(panels[2], points, kind, number)
        sides = sorted({row["side"] for row in (*timed, *counted)})
        panels[2].plot(
            [side * side for side in sides],
            [flop(kind, side) for side in sides],
            color=f"C{number}",
            linestyle="--",
            linewidth=1,
        )
    panels[2].set_ylabel("FLOP")
    for axes, title in zip(
        panels, ("time, forward and backward", "memory held at once", "counted FLOP"), strict=True
    ):
        axes.set(xscale="log", yscale="log", xlabel="tokens of the grid", title=title)
        axes.grid(alpha=0.3)
    panels[0].legend(title="points: measured\nlines: theory", loc="lower right")
    with replacing(path) as file:
        figure.savefig(file, dpi=110, format="png")


def _points(axes: Any, points: Sequence[tuple[float, float]], kind: str, number: int) -> None:
    if points:
        axes.plot(
            *zip(*points, strict=True), "os^"[number], color=f"C{number}", label=kind, markersize=5
        )


def _line(axes: Any, points: Sequence[tuple[float, float]], slope: float, number: int) -> None:
    """Through the last point."""
    if points:
        last, value = points[-1]
        sizes = [size for size, _ in points]
        line = [value * (size / last) ** slope for size in sizes]
        axes.plot(sizes, line, color=f"C{number}", linestyle="--", linewidth=1)
