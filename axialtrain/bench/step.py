"""`axialtrain bench step`: training steps of models by name in one process, and how much of their
time is their own matrix products and attention kernels.

A step is forward, loss, backward and AdamW on the weights in the dtype of the model: without the
engine, whose masters in fp32 and whose exchange are not measured here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from axialtrain.bench.bare import bare_rate
from axialtrain.bench.memory import GIGAPIXEL, H200, KEPT, SIDES
from axialtrain.bench.peak import held_at_once
from axialtrain.bench.plain import drawn
from axialtrain.bench.record import Goal, Result, ms, shown
from axialtrain.bench.setting import Case, Setting, dtype_name
from axialtrain.grid import Place
from axialtrain.mesh.mesh import MeshConfig
from axialtrain.models.recompute import Recompute
from axialtrain.models.registry import create_model, model_config
from axialtrain.models.transformer import AxialTransformer, AxialTransformerConfig, encode
from axialtrain.train.compiled import compile_layers, compiles_passes

GOALS = {
    "share": Goal(0.6, at_least=True),
    "gigapixel s": Goal(8),
    "gigapixel GiB": Goal(H200 / 2**30),
    "gigapixel rate": Goal(0.5, at_least=True),
}
CLASSES = 10
FOUR_HOST = 113 * 2**30  # bytes of the host, see experiment four_gigapixels_h200
SQUARE = 8192  # side of the matrices whose product says what a GPU can do

# (model, side of the image in px, dtypes)
ON_CPU = (
    ("axial_vit_tiny_patch16", 1024),
    ("axial_vit_small_patch16", 512),
    ("axial_resnet26s", 224),
)
ON_GPU = (
    ("axial_vit_small_patch16", 4096),
    ("axial_vit_base_patch16", 4096),
    ("axial_resnet50s", 224),
)


def cases(setting: Setting) -> Iterator[Case]:
    models = ON_GPU if setting.on_gpu else ON_CPU
    dtype = torch.bfloat16 if setting.on_gpu else torch.float32
    for name, side in (("axial_vit_tiny_patch32", 64),) if setting.quick else models:
        case = f"{name}, {side} px, {dtype_name(dtype)}"
        yield Case(case, partial(_model, setting, name, side, dtype, case))
    if _room(setting):
        one = SIDES[0]
        yield Case("gigapixel", partial(gigapixel, setting, one, KEPT[one], **GIGAPIXEL))
        if setting.long:  # compiling takes a minute or more
            compiled = partial(gigapixel, setting, one, KEPT[one], True, **GIGAPIXEL)
            yield Case("gigapixel, compiled", compiled)
        if setting.long and _host_room():  # a step takes a minute
            yield Case("four gigapixels", partial(_four, setting))


def missing(setting: Setting) -> list[str]:
    if _room(setting):
        if setting.long and not _host_room():
            return [f"four gigapixels, which need {FOUR_HOST / 2**30:.0f} GiB of the host's memory"]
        return []
    return [
        f"the gigapixel step, which needs a GPU of {H200 / 2**30:.0f} GiB: its arithmetic is in "
        "`axialtrain bench memory`"
    ]


def _room(setting: Setting) -> bool:
    if not setting.on_gpu or setting.quick:
        return False
    return torch.cuda.get_device_properties(setting.device).total_memory > H200


def _host_room() -> bool:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >= FOUR_HOST


def training_step(
    name: str, side: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    """A step of the model `name`, with classes, on one drawn image of side x side px."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=CLASSES).to(device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    pixels = drawn(1, side, side, 3, device=device, dtype=dtype).detach()
    target = torch.zeros(1, dtype=torch.long, device=device)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(pixels).float(), target).backward()
        optimizer.step()

    return run


def _model(setting: Setting, name: str, side: int, dtype: torch.dtype, case: str) -> list[Result]:
    step = training_step(name, side, setting.device, dtype)
    rate = bare_rate(step, rounds=setting.rounds, limit=setting.limit)
    # Timed in steps that are looked into, and so slower: their shares of each other.
    others = [row for row in rate.rows if not row.product]
    every = sum(row.seconds for row in others)
    most = ", ".join(
        f"{row.name} {row.seconds / every:.0%}"
        for row in sorted(others, key=lambda row: -row.seconds)[:4]
    )
    beside = f"{ms(rate.bare_s)} of {ms(rate.step_s)}; of all else: {most}"
    rows = [
        {"name": row.name, "calls": row.calls, "seconds": row.seconds, "product": row.product}
        for row in rate.rows
    ]
    data = rate.rounds.seconds | {"kernels": rows}
    config = model_config(name)
    found = [
        Result(case, "share of bare products and attention", rate.share, "share", beside, data)
    ]
    if isinstance(config, AxialTransformerConfig):
        tokens = (side // config.patch_px) ** 2
        found.append(Result(case, "tokens/s", tokens / rate.step_s))
    found.append(Result(case, "px/s", side * side / rate.step_s))
    return found


def gigapixel(
    setting: Setting,
    side: int,
    kept: Recompute,
    compiled: bool = False,
    /,
    *,
    depth: int,
    dim: int,
    heads: int,
    patch: int,
) -> list[Result]:
    """A step of one image of side x side px in bf16, of which `kept` says what is kept: as
    experiments gigapixel_h200 and four_gigapixels_h200 do. compiled: as with train.compile, on a
    GPU: what follows storages on a CPU sees no graph."""
    device, dtype = setting.device, torch.bfloat16
    torch.manual_seed(0)
    config = AxialTransformerConfig(patch=patch, dim=dim, depth=depth, heads=heads)
    model = AxialTransformer(config).to(device, dtype)
    if compiled:
        compile_layers(model, by_pass=compiles_passes(config, MeshConfig(), kept.band))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    pixels = torch.ones(1, side, side, 3, dtype=dtype)  # on the host, as a run has them
    if setting.on_gpu and side == SIDES[0]:  # and pinned, where it can read ahead
        pixels = pixels.pin_memory()
    place = Place(side // patch, side // patch)

    def run() -> None:
        optimizer.zero_grad()
        x = model.patch_embed(pixels, None, kept.band)
        none = x.new_zeros(1, 0, dim)
        tokens, _ = encode(
            list(model.blocks), model.norm, model.exchange, x, none, place, None, None, None,
            recompute=kept,
        )  # fmt: skip
        tokens.mean(dtype=torch.float32).backward()
        optimizer.step()

    size = 64 if setting.quick else SQUARE
    a, b = (drawn(size, size, device=device, dtype=dtype, seed=seed).detach() for seed in (0, 1))
    rounds = setting.in_turns({"step": run, "product": lambda: a @ b})
    held, _ = held_at_once(run, device)
    if setting.on_gpu:  # with what was there before: weights, moments
        held = torch.cuda.max_memory_allocated(device)
    flop = 3 * _forward_flop(place, config)  # what is run again is work, and none of the step's
    able = 2 * size**3 / rounds.median("product")
    name = f"{side} x {side} px, D = {dim}, {depth} layers, bf16{', compiled' * compiled}"
    rate = flop / rounds.median("step")
    times = (3 + (kept.every > 0) + (kept.band > 0)) / 3  # backward is two forwards
    again = f"{shown(times * rate / 1e12)} with what is run again"
    beside = f"{shown(rate / 1e12)} of {shown(able / 1e12)} TFLOP/s; {again}"
    return [
        Result(name, "rate, of that of a large product", rate / able, "gigapixel rate", beside),
        Result(name, "s of a step", rounds.median("step"), "gigapixel s", data=rounds.seconds),
        Result(name, "peak, GiB", held / 2**30, "gigapixel GiB", data={"bytes": held}),
    ]


def _four(setting: Setting) -> list[Result]:
    """Of four gigapixels, of whose time nothing was promised."""
    side = SIDES[1]
    found = gigapixel(setting, side, KEPT[side], **GIGAPIXEL)
    return [replace(one, goal=None) if one.goal == "gigapixel s" else one for one in found]


def _forward_flop(place: Place, config: AxialTransformerConfig) -> int:
    """Projections 8 T D^2 and attention 4 T L D of either pass, the MLP 16 T D^2."""
    tokens, lengths = place.height * place.width, place.height + place.width
    layer = 2 * 8 * tokens * config.dim**2 + 4 * tokens * lengths * config.dim
    return config.depth * (layer + 4 * tokens * config.dim * config.mlp_width)
