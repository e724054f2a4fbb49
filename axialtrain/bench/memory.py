"""`axialtrain bench memory`: what one layer holds at once, forward and backward, on growing grids.

Beside it: the logits of full attention, which is what a layer without a fused kernel would hold.
Then the arithmetic of a step whose image is a gigapixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import torch
from torch import nn

from axialtrain.attention.config import AxialConfig
from axialtrain.bench.peak import held_at_once
from axialtrain.bench.plain import drawn
from axialtrain.bench.record import Goal, Result, mib, shown
from axialtrain.bench.setting import Case, Setting
from axialtrain.grid import Place
from axialtrain.models.layer import Layer
from axialtrain.models.memory import step_memory
from axialtrain.models.recompute import Recompute
from axialtrain.models.transformer import AxialTransformerConfig

DTYPE = torch.bfloat16
GIGAPIXEL = {"depth": 12, "dim": 512, "heads": 8, "patch": 16}  # experiment gigapixel_h200
SIDES = (32_768, 65_536)  # px
# Of experiment gigapixel_h200, and of four_gigapixels_h200, whose pixels wait on the host.
KEPT = dict(zip(SIDES, (Recompute(band=65_536), Recompute(2, 0.85, band=65_536)), strict=True))
H200 = 130 * 2**30  # bytes that a step may take of its 141 GB

# Twice the tokens, and lines that are longer by 2^1/2: an L^2 term would show as growth.
GOALS = {"growth": Goal(1.1), "gigapixel": Goal(H200 / 2**30), "host": Goal(128)}


def cases(setting: Setting) -> Iterator[Case]:
    yield Case("one layer", partial(_layer, setting))


def _layer(setting: Setting) -> list[Result]:
    # What a token and channel needs is the same at every width, and a CPU is slow in bf16.
    dim, heads = (16, 2) if setting.quick else (128, 2)
    if setting.on_gpu and not setting.quick:
        dim, heads = GIGAPIXEL["dim"], GIGAPIXEL["heads"]
    grids = (
        (8, 16) if setting.quick else (64, 128, 256, 512, 1024) if setting.on_gpu else (32, 64, 128)
    )
    torch.manual_seed(0)
    layer = Layer(dim, heads, 4 * dim, AxialConfig(["row+col"])).to(setting.device, DTYPE)
    found, per_token = [], {}
    for side in grids:
        held = _held(layer, side, dim, setting)
        tokens = side * side
        per_token[side] = held / tokens
        full = heads * tokens**2 * DTYPE.itemsize
        data = {"bytes": held, "tokens": tokens, "full": full}
        beside = f"{mib(held)}; the logits of full attention are {mib(full)}"
        name = f"{side} x {side}, D = {dim}, bf16"
        found.append(
            Result(
                name,
                "peak of a layer, B a token and channel",
                per_token[side] / dim,
                None,
                beside,
                data,
            )
        )
    name = f"{grids[0]} x {grids[0]} to {grids[-1]} x {grids[-1]}"
    growth = per_token[grids[-1]] / per_token[grids[0]]
    found.append(Result(name, "growth of the peak of a token", growth, "growth"))
    for side in () if setting.quick else SIDES:
        found += _gigapixel(side)
    return found


def _held(layer: nn.Module, side: int, dim: int, setting: Setting) -> int:
    x = drawn(1, side, side, dim, device=setting.device, dtype=DTYPE)
    weight, inputs = torch.ones_like(x), (x, *layer.parameters())

    def run() -> None:
        out, _ = layer(x, x.new_zeros(1, 0, dim), Place(side, side))
        torch.autograd.grad(out, inputs, weight)

    if setting.on_gpu:
        run()  # what is compiled once; on a CPU bf16 takes its time
    return held_at_once(run, setting.device)[0]


def _gigapixel(side: int) -> list[Result]:
    """A step of experiment gigapixel_h200, or of four times its pixels, by the arithmetic of
    `axialtrain.models.memory`, weights apart."""
    patch, dim, depth, heads = (GIGAPIXEL[key] for key in ("patch", "dim", "depth", "heads"))
    config = AxialTransformerConfig(patch=patch, dim=dim, depth=depth, heads=heads)
    tokens = (side // config.patch_px) ** 2
    memory = step_memory(config, KEPT[side], tokens=tokens, parameters=0)
    beside = (
        f"{_gib(memory.kept)} GiB of inputs kept, {_gib(memory.layers)} of the layers that run "
        f"again, {_gib(memory.gradients)} of gradients, {_gib(memory.pixels)} of pixels, "
        f"{_gib(memory.band)} of a band"
    )
    name = f"{side} x {side} px, D = {config.dim}"
    what, data = "by arithmetic: GiB of a step on one GPU", asdict(memory)
    return [
        Result(name, what, memory.device / 2**30, "gigapixel", beside, data),
        Result(name, "by arithmetic: GiB of its host", memory.of_host / 2**30, "host"),
    ]


def _gib(count: int) -> str:
    return shown(count / 2**30)
