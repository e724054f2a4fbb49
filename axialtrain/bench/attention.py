"""`axialtrain bench attention`: attention along one axis, q, k and v given, forward and backward.

Beside it, in turns: the plain formula; torch's fused attention on a batch of lines as it likes them
best, contiguous, with each of its backends; positions, masks; and attention to the whole image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from axialtrain.attention.axis import attend
from axialtrain.attention.masks import LineMasks
from axialtrain.attention.positions import rotate_tokens
from axialtrain.bench.peak import held_at_once
from axialtrain.bench.plain import drawn, formula, there_and_back, tissue, triple
from axialtrain.bench.record import Goal, Result, mib, ms, shown
from axialtrain.bench.setting import Case, Setting, dtype_name
from axialtrain.bench.timing import Rounds, Way
from axialtrain.grid import Rect

DTYPES = (torch.float32, torch.bfloat16)
AXES = {"row": 2, "column": 1}  # the dim of [B, H, W, N, K] along which tokens attend
SHARE = 0.3  # of the tokens, that are no background

GOALS = {
    "formula fp32": Goal(0.5),
    "formula bf16": Goal(0.95),
    "column": Goal(1.1),
    "column gpu": Goal(1.05),
    "buffer": Goal(1.0),
    "copies": Goal(0),
    "relative": Goal(3),
    "masked": Goal(0.45),
    "full": Goal(20, at_least=True),
    "sdpa gpu": Goal(0.85, at_least=True),
    "relative gpu": Goal(0.6, at_least=True),
}

# On a CPU torch has one fused kernel, and chooses it by itself.
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
CHUNK = 2**24  # bytes of logits that may exist at once beside tensors of q's size
MOST_LOGITS = 2**30  # that the plain formula may make at once


def cases(setting: Setting) -> Iterator[Case]:
    """Square grids on a CPU, lines of growing length and as many tokens each on a GPU."""
    dtypes = DTYPES[::-1] if setting.on_gpu else DTYPES  # what a GPU is for first
    for dtype in dtypes:
        for lines, length, heads, width in sizes(setting):
            name = f"{lines} x {length}, {heads} x {width}, {dtype_name(dtype)}"
            one = partial(_One, setting, lines, length, heads, width, dtype, name)
            for what, part in PARTS.items():
                yield Case(f"{what} {name}", partial(_measured, one, part))
    for dtype in dtypes:
        for side in _whole_images(setting):
            name = f"{side} x {side}, {dtype_name(dtype)}"
            yield Case(f"full {name}", partial(_against_full, setting, side, dtype, name))


def sizes(setting: Setting) -> list[tuple[int, int, int, int]]:
    """(lines, tokens of a line, heads, head width)."""
    if setting.quick:
        return [(12, 12, 2, 8)]
    if not setting.on_gpu:
        return [(side, side, 2, 64) for side in (64, 128, 256)]
    tokens, dim = 2**18, 512
    return [
        (tokens // length, length, dim // width, width)
        for width in (64, 128)
        for length in (256, 512, 1024, 2048, 4096)
    ]


def _whole_images(setting: Setting) -> list[int]:
    if setting.quick:
        return [12]
    return [64, 128, 256] if setting.long or setting.on_gpu else [64, 128]


class _One:
    """One size and dtype. Lines are rows of [1, lines, L, N, K], columns of [1, L, lines, N, K]."""

    def __init__(
        self,
        setting: Setting,
        lines: int,
        length: int,
        heads: int,
        width: int,
        dtype: torch.dtype,
        name: str,
    ) -> None:
        self.setting, self.name, self.dtype = setting, name, dtype
        self.lines, self.length, self.heads, self.width = lines, length, heads, width
        make = partial(triple, device=setting.device, dtype=dtype)
        self.inputs = {
            "row": make(1, lines, length, heads, width),
            "column": make(1, length, lines, heads, width),
        }
        self.batch = make(lines, heads, length, width)

    def passes(self) -> dict[str, Way]:
        return {
            f"{axis} pass": there_and_back(partial(attend, dim=dim), *self.inputs[axis])
            for axis, dim in AXES.items()
        }

    def formulas(self) -> dict[str, Way]:
        if self.lines * self.heads * self.length**2 > MOST_LOGITS:
            return {}
        return {
            f"{axis} formula": there_and_back(partial(formula, dim=dim), *self.inputs[axis])
            for axis, dim in AXES.items()
        }

    def fused(self) -> dict[str, Way]:
        """torch's, of a contiguous batch of lines, with each backend that takes it."""
        if not self.setting.on_gpu:
            return {"own": there_and_back(F.scaled_dot_product_attention, *self.batch)}
        found = {}
        for name, backend in BACKENDS.items():
            way = there_and_back(partial(_with, backend), *self.batch)
            try:
                way()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # no kernel of it for this dtype, width or GPU
                continue
            found[name] = way
        return found

    def core(self) -> list[Result]:
        passes, formulas, fused = self.passes(), self.formulas(), self.fused()
        rounds = self.setting.in_turns(passes | formulas | fused)
        over = partial(_over, self.name, rounds)
        found = []
        on_gpu = self.setting.on_gpu
        largest = self.length == max(length for _, length, _, _ in sizes(self.setting))
        for axis in AXES:
            if formulas:
                goal = f"formula {dtype_name(self.dtype)}" if largest and not on_gpu else None
                found.append(over(f"{axis} pass", f"{axis} formula", "of the plain formula", goal))
            best = min(fused, key=rounds.median) if fused else None
            if best is not None:
                goal = "sdpa gpu" if on_gpu else None
                what = f"of the rate of torch's {best} on contiguous lines"
                found.append(over(f"{axis} pass", best, what, goal, rate=True))
        goal = "column gpu" if on_gpu else "column"
        found.append(over("column pass", "row pass", "of a row pass", goal))
        return found

    def memory(self) -> list[Result]:
        """What is held at once, and what is copied."""
        found = []
        device = self.setting.device
        formulas = self.formulas()
        for axis, way in self.passes().items():
            held, largest = held_at_once(way, device)
            q = self.batch[0].nbytes
            data = {"bytes": held, "largest": largest, "q": q}
            logits = self.lines * self.heads * self.length**2 * self.batch[0].element_size()
            if largest is not None:
                beside = f"{mib(largest)}, all logits {mib(logits)}"
                what = f"{axis}: largest buffer, of q or a chunk"
                value = largest / max(q, CHUNK)
                found.append(Result(self.name, what, value, "buffer", beside, data))
            if formulas:
                other, _ = held_at_once(formulas[axis.replace("pass", "formula")], device)
                beside = f"{mib(held)} against {mib(other)}"
                what = f"{axis}: peak, of the plain formula's"
                found.append(Result(self.name, what, held / other, None, beside, data))
            copies = _copies(way)
            what = f"{axis}: copies in the profile"
            found.append(Result(self.name, what, copies, "copies", data={"copies": copies}))
        return found

    def variants(self) -> list[Result]:
        """Positions and masks: beside the plain pass, and each other."""
        ways, device = self.passes(), self.setting.device
        for axis, dim in AXES.items():
            q, k, v = self.inputs[axis]
            _, height, width, _, _ = q.shape
            rect = Rect(0, height, 0, width)
            table = drawn(self.heads, 2 * self.length - 1, device=device)
            mask = tissue(height, width, SHARE, device=device)

            def rotary(
                q: Tensor, k: Tensor, v: Tensor, rect: Rect = rect, dim: int = dim
            ) -> Tensor:
                q, k = rotate_tokens((q, k), rect, (dim,))
                return attend(q, k, v, dim)

            biased = partial(attend, dim=dim, bias=table)
            # Its lines are sorted in the first round, as by the first layer of a model.
            masked = partial(attend, dim=dim, masks=LineMasks.along(dim, mask, mask))
            ways[f"{axis} rope"] = there_and_back(rotary, q, k, v)
            ways[f"{axis} relative"] = there_and_back(biased, q, k, v, table)
            ways[f"{axis} masked"] = there_and_back(masked, q, k, v)
        fused = self.fused() if self.setting.on_gpu else {}
        rounds = self.setting.in_turns(ways | fused)
        over = partial(_over, self.name, rounds)
        goal = None if self.setting.on_gpu else "relative"
        found = []
        for axis in AXES:
            found.append(over(f"{axis} rope", f"{axis} pass", "of a pass without positions"))
            found.append(over(f"{axis} relative", f"{axis} rope", "of a RoPE pass", goal))
            what = f"of an unmasked pass, {1 - SHARE:.0%} masked, lines sorted before"
            found.append(over(f"{axis} masked", f"{axis} pass", what, "masked"))
            if fused:
                best = min(fused, key=rounds.median)
                what = f"of the rate of torch's {best} without bias"
                found.append(over(f"{axis} relative", best, what, "relative gpu", rate=True))
        return found


PARTS = {"core": _One.core, "memory": _One.memory, "positions and masks": _One.variants}


def _measured(one: Callable[[], _One], part: Callable[[_One], list[Result]]) -> list[Result]:
    """The tensors are made when their turn comes."""
    return part(one())


def _against_full(setting: Setting, side: int, dtype: torch.dtype, name: str) -> list[Result]:
    """A row and a column pass of a square image, and attention of each token to all others."""
    heads, width = (2, 8) if setting.quick else (1, 64)
    q, k, v = triple(1, side, side, heads, width, device=setting.device, dtype=dtype)
    every = triple(1, heads, side * side, width, device=setting.device, dtype=dtype)

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, 2) + attend(q, k, v, 1)

    rounds = setting.in_turns(
        {
            "row and column": there_and_back(both, q, k, v),
            "full": there_and_back(F.scaled_dot_product_attention, *every),
        }
    )
    goal = "full" if side == 128 and not setting.on_gpu else None
    faster = rounds.ratio("full", "row and column")
    beside = f"{_both(rounds, 'row and column', 'full')}; HW/(H+W) is {shown(side / 2)}"
    what = "row and column, times faster than full attention"
    data = rounds.seconds | {"formula": side / 2}
    return [Result(name, what, faster, goal, beside, data)]


def _with(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def _copies(way: Way) -> int:
    """How often a kernel copies in it."""
    way()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        way()
    return sum(event.count for event in profiled.key_averages() if event.key == "aten::copy_")


def _both(rounds: Rounds, way: str, other: str) -> str:
    return f"{ms(rounds.median(way))} against {ms(rounds.median(other))}"


def _over(
    case: str,
    rounds: Rounds,
    way: str,
    other: str,
    what: str,
    goal: str | None = None,
    *,
    rate: bool = False,
) -> Result:
    """way's time over the other's, or its rate over the other's."""
    value = rounds.ratio(other, way) if rate else rounds.ratio(way, other)
    data = {name: rounds.seconds[name] for name in (way, other)}
    return Result(case, f"{way}, {what}", value, goal, _both(rounds, way, other), data)
