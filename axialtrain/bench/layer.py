"""`axialtrain bench layer`: our attention module beside the `axial-attention` package's, and what
a whole layer moves beside its products.

The modules do what that package does: columns and rows see the same input, with projections of
their own, and are added up; no positions. Forward and backward to the input and all parameters.
Ours twice: as it is, and with passes computed again in bands, as `train.recompute_band` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from axialtrain.attention.config import AxialConfig, Pass
from axialtrain.attention.passes import AxialAttention
from axialtrain.bench.attention import DTYPES
from axialtrain.bench.bare import stream_traffic
from axialtrain.bench.peak import held_at_once
from axialtrain.bench.plain import drawn
from axialtrain.bench.record import Goal, Result, mib, ms, shown
from axialtrain.bench.setting import Case, Setting, dtype_name
from axialtrain.bench.timing import Way
from axialtrain.grid import Place
from axialtrain.models.by_band import in_bands
from axialtrain.models.layer import Layer

GOALS = {"time": Goal(1.0), "memory": Goal(0.5)}
PACKAGE = "axial_attention"
WIDTHS = (64, 256, 512, 768)  # D
BAND = 2048  # tokens


class Ours(nn.Module):
    """Columns plus rows, by two modules that know one pass each.

    band: tokens at a time that a pass is computed for, and again in backward; 0 for all at once.
    """

    def __init__(self, dim: int, heads: int, band: int = 0) -> None:
        super().__init__()
        self.band = band
        config = AxialConfig(["col+row"], "sum", share_projections=False, positions="none")
        self.passes = (Pass.COL, Pass.ROW)
        self.attn = nn.ModuleList(
            AxialAttention(dim, heads, (which,), config, qkv_bias=False) for which in self.passes
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, D] -> the same."""
        none = x.new_zeros(x.shape[0], 0, x.shape[3])

        def attended(number: int, some: Tensor) -> Tensor:
            place = Place(some.shape[1], some.shape[2])
            out: Tensor = self.attn[number](some, none, place, self.passes[number])[0]
            return out

        parts = []
        for number, which in enumerate(self.passes):
            if not self.band:
                parts.append(attended(number, x))
                continue
            along = which.dims[0]
            across, lines = 3 - along, self.band // (len(x) * x.shape[along])
            sizes = [part.shape[across] for part in x.split(max(1, lines), across)]
            run = partial(_band, attended, number)
            parts.append(in_bands(run, x, sizes, across, [self.attn[number]]))
        return parts[0] + parts[1]


def _band(attended: Callable[[int, Tensor], Tensor], number: int, some: Tensor, _: int) -> Tensor:
    return attended(number, some)  # backward runs it again, when the loop's `number` is another one


def missing(setting: Setting) -> list[str]:
    if find_spec(PACKAGE):
        return []
    return [
        "the package `axial-attention`, which is not here: install the extra bench "
        "(launch/install.sh bench); ours stand alone"
    ]


def cases(setting: Setting) -> Iterator[Case]:
    """Square grids; a grid of 256 x 256 only of the smaller widths, or in a long run. Then the
    residual stream and the norms of a layer of ours."""
    for dtype in DTYPES:
        for side in (12,) if setting.quick else (64, 128, 256):
            for dim in (16,) if setting.quick else WIDTHS:
                if side * dim > 128 * 768 and not (setting.long or setting.on_gpu):
                    continue
                name = f"{side} x {side}, D = {dim}, {dtype_name(dtype)}"
                yield Case(name, partial(_beside, setting, side, dim, dtype, name))
        side, dim = (12, 16) if setting.quick else (1024, 512) if setting.on_gpu else (128, 256)
        name = f"stream {side} x {side}, D = {dim}, {dtype_name(dtype)}"
        yield Case(name, partial(_stream, setting, side, dim, dtype, name))


def _beside(setting: Setting, side: int, dim: int, dtype: torch.dtype, name: str) -> list[Result]:
    heads = max(2, dim // 64)
    modules: dict[str, nn.Module] = {"ours": Ours(dim, heads), "in bands": Ours(dim, heads, BAND)}
    if find_spec(PACKAGE):
        from axial_attention import AxialAttention as Package

        modules["package"] = Package(dim, heads=heads, dim_index=-1)
    x = drawn(1, side, side, dim, device=setting.device, dtype=dtype)
    ways = {
        key: _there_and_back(module.to(setting.device, dtype), x) for key, module in modules.items()
    }
    rounds = setting.in_turns(ways)
    held = {key: held_at_once(way, setting.device)[0] for key, way in ways.items()}
    if "package" not in ways:
        what = "ours: time, s"
        beside, data = mib(held["ours"]), rounds.seconds | {"bytes": held}
        return [Result(name, what, rounds.median("ours"), None, beside, data)]
    found = []
    for way, words in (("ours", ""), ("in bands", " in bands")):
        time = f"{ms(rounds.median(way))} against {ms(rounds.median('package'))}"
        memory = f"{mib(held[way])} against {mib(held['package'])}"
        seconds = {key: rounds.seconds[key] for key in (way, "package")}
        both = {"bytes": {key: held[key] for key in (way, "package")}}
        ratio = rounds.ratio(way, "package")
        found += [
            Result(name, f"time{words}, of the package's", ratio, "time", time, seconds),
            Result(
                name,
                f"peak memory{words}, of the package's",
                held[way] / held["package"],
                "memory",
                memory,
                both,
            ),
        ]
    return found


def _stream(setting: Setting, side: int, dim: int, dtype: torch.dtype, name: str) -> list[Result]:
    """The residual stream and the norms of a whole layer: its bytes, and how fast they move."""
    torch.manual_seed(0)
    layer = Layer(dim, max(2, dim // 64), 4 * dim, AxialConfig(["row+col"]))
    layer.to(setting.device, dtype)
    x = drawn(1, side, side, dim, device=setting.device, dtype=dtype)
    weight, inputs = torch.ones_like(x), (x, *layer.parameters())

    def run() -> None:
        out, _ = layer(x, x.new_zeros(1, 0, dim), Place(side, side))
        torch.autograd.grad(out, inputs, weight)

    run()
    traffic = stream_traffic(run)
    goal = torch.empty_like(weight)
    copy_s = setting.in_turns({"copy": lambda: goal.copy_(weight)}).median("copy")
    copied = 2 * weight.nbytes / copy_s  # read, and written
    data = asdict(traffic) | {"copy_s": copy_s, "copy_bytes": 2 * weight.nbytes}
    return [
        Result(
            name,
            "bytes of residual stream and norms, of those that must move",
            traffic.ratio,
            None,
            f"{mib(traffic.moved)} against {mib(traffic.must)}",
            data,
        ),
        Result(
            name,
            "rate at which they move, of a plain copy's",
            traffic.rate / copied,
            None,
            f"{shown(traffic.rate / 1e9)} against {shown(copied / 1e9)} GB/s, "
            f"in {ms(traffic.seconds)}",
        ),
    ]


def _there_and_back(module: nn.Module, x: Tensor) -> Way:
    weight, inputs = torch.ones_like(x), (x, *module.parameters())

    def run() -> None:
        torch.autograd.grad(module(x), inputs, weight)

    return run
