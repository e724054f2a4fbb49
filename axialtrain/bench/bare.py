"""How much of a training step is its own matrix products and attention kernels.

A step cannot be faster than the products that it asks for, called one after the other with nothing
between. They are collected from a step as it runs, with the shapes, strides and values that they
had, and then timed bare. What the step takes beyond is everything else, and is shown by kernel.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from axialtrain.bench.timing import Clock, Rounds

# Kernels that do the arithmetic that a FLOP counter counts; of attention, how their names begin.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
FUSED = ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "flex_attention")
LOOKS = 3  # steps that are looked into, of whose other kernels the medians count
NORMS = ("native_layer_norm", "native_layer_norm_backward", "_fused_rms_norm")

Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A kernel of the step. name: torch's, and of a product its shapes too.

    calls: in one step. seconds: of all of them, a median; of a product bare, of another kernel as
    it was called in steps that were looked into, and are slower. product: whether it is one.
    """

    name: str
    calls: int
    seconds: float
    product: bool


@dataclass(frozen=True)
class BareRate:
    """rounds: of a step ("step") and of its products alone ("bare"). rows: the products, then the
    other kernels, each from the largest.
    """

    rounds: Rounds
    rows: list[Row]

    @property
    def step_s(self) -> float:
        return self.rounds.median("step")

    @property
    def bare_s(self) -> float:
        return self.rounds.median("bare")

    @property
    def share(self) -> float:
        """Of the products in a step; 1 where it is nothing else."""
        return self.rounds.ratio("bare", "step")

    def table(self, most: int = 20) -> str:
        """The largest rows as a table, in the shares of a step that they take."""
        lines = ["| kernel | calls | ms | of a step |", "|---|---:|---:|---:|"]
        for product in (True, False):
            rows = [row for row in self.rows if row.product is product]
            lines += [
                f"| {row.name} | {row.calls} | {row.seconds * 1e3:.1f} "
                f"| {row.seconds / self.step_s:.1%} |"
                for row in rows[:most]
            ]
            what = "all products, bare" if product else "all other kernels, as they were called"
            total = sum(row.seconds for row in rows)
            lines.append(
                f"| **{what}** | {sum(row.calls for row in rows)} | {total * 1e3:.1f} "
                f"| {total / self.step_s:.1%} |"
            )
        return "\n".join(lines)


def bare_rate(
    step: Callable[[], None],
    *,
    rounds: int = 5,
    limit: float = math.inf,
    clock: Clock = time.perf_counter,
) -> BareRate:
    """Time `step` and its matrix products and attention kernels alone, in turns.

    step: one whole training step, not compiled: what is inside of a compiled graph cannot be
        collected. It is run rounds + LOOKS + 1 times.
    limit: s after which no further round begins, once there is one.
    clock: says the time, in s; a GPU is waited for.
    Holds the arguments of one call of each kind of product, as large as they were.

    Raises ValueError where the step has no product (it may be compiled).
    """
    step()  # what is done once: allocations, plans, tables
    records = _looked_into(step, clock)
    record = records[0]
    if not record.products:
        raise ValueError(
            "bare_rate: the step calls no matrix product and no attention kernel that can be seen: "
            "allowed is a step that has some and is not compiled"
        )
    steps: list[float] = []
    bare: list[dict[str, float]] = []
    begin = clock()
    for number in range(rounds):
        if number and clock() - begin > limit:
            break
        steps.append(_seconds(step, record.sync, clock))
        bare.append(
            {name: _seconds(one.again, record.sync, clock) for name, one in record.products.items()}
        )
    rows = [
        Row(name, one.calls, median(times[name] for times in bare), product=True)
        for name, one in record.products.items()
    ]
    for name, (calls, _) in record.rest.items():
        spent = median(one.rest[name][1] for one in records if name in one.rest)
        rows.append(Row(name, calls, spent, product=False))
    return BareRate(
        Rounds({"step": steps, "bare": [sum(times.values()) for times in bare]}),
        sorted(rows, key=lambda row: (not row.product, -row.seconds)),
    )


def _looked_into(step: Callable[[], None], clock: Clock) -> list[_Record]:
    """The records of LOOKS steps, of which the first holds arguments of products."""
    records = []
    for number in range(LOOKS):
        with _Record(clock, keep=number == 0) as record:
            step()
        records.append(record)
    return records


@dataclass(frozen=True)
class Traffic:
    """Bytes of a step's residual stream and norms. moved: what their kernels read and write.
    must: what has to be moved where each norm is one kernel with the residual sum before it.
    seconds: of these kernels as they were called, the median of the steps looked into.
    """

    moved: int
    must: int
    seconds: float

    @property
    def ratio(self) -> float:
        return self.moved / self.must

    @property
    def rate(self) -> float:
        """Bytes moved in a second."""
        return self.moved / self.seconds


def stream_traffic(step: Callable[[], None], *, clock: Clock = time.perf_counter) -> Traffic:
    """Count the bytes that a training step moves for its residual stream and its norms.

    Moved: the inputs and outputs of each norm, and of each kernel but a product that reads or
    writes a tensor of a norm's size: residual sums, masks, casts, sums of gradients.
    Must, for each norm, of M bytes: the forward reads the stream and a branch and writes their sum
    and its norm, 4 M; the backward reads the stream, its gradient and the norm's, and writes the
    stream's gradient before them, 4 M.
    step: is run LOOKS times. clock: see `bare_rate`.
    Raises ValueError where it has no norm that can be seen (it may be compiled).
    """
    records = _looked_into(step, clock)
    if not records[0].norms:
        raise ValueError(
            "stream_traffic: the step calls no norm that can be seen: allowed is a step that has "
            "some and is not compiled"
        )
    streams = [_of_stream(record) for record in records]
    moved = sum(size for size, _ in streams[0])
    seconds = median(sum(spent for _, spent in stream) for stream in streams)
    return Traffic(moved, sum(4 * size for _, size in records[0].norms), seconds)


def _of_stream(record: _Record) -> list[tuple[int, float]]:
    """Bytes and seconds of the kernels that touch a tensor of a norm's size."""
    sizes = {size for size, _ in record.norms}
    return [(size, spent) for shapes, size, spent in record.traffic if sizes & shapes]


@dataclass
class _Product:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    calls: int = 0

    def again(self) -> None:
        for _ in range(self.calls):
            self.function(*self.args, **self.kwargs)


class _Record(TorchDispatchMode):
    """Within it: products, by name and shapes, and what all other kernels take and move.

    keep: whether arguments of products are held, to call these again.
    """

    def __init__(self, clock: Clock, *, keep: bool) -> None:
        super().__init__()
        self.clock, self.keep = clock, keep
        self.products: dict[str, _Product] = {}
        self.rest: dict[str, tuple[int, float]] = {}
        self.norms: list[tuple[torch.Size, int]] = []  # size and bytes of each norm's input
        # Sizes, bytes and seconds of each kernel but products.
        self.traffic: list[tuple[set[torch.Size], int, float]] = []
        self.cuda = False

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::").partition(".")[0]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.cuda |= any(x.is_cuda for x in tensors)
        if name in PRODUCTS or name.startswith(FUSED):
            if self.keep:
                key = f"{name} {_shapes(args, kwargs)}"
                if key not in self.products:
                    one = tree_map(_kept, (args, kwargs))
                    self.products[key] = _Product(func, *one)
                self.products[key].calls += 1
            return func(*args, **kwargs)
        self.sync()
        begin = self.clock()
        out = func(*args, **kwargs)
        self.sync()
        spent = self.clock() - begin
        if not _is_view(out, tensors):
            calls, before = self.rest.get(name, (0, 0.0))
            self.rest[name] = (calls + 1, before + spent)
            self._count(name, tensors, out, spent)
        return out

    def _count(self, name: str, tensors: list[Tensor], out: Any, spent: float) -> None:
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if name.startswith("empty"):
            return
        if name.startswith(NORMS):
            stream = tensors[1 if name.endswith("backward") else 0]
            self.norms.append((stream.shape, stream.nbytes))
        written = [x for x in made if all(x is not y for y in tensors)]
        size = sum(_bytes(x) for x in (*tensors, *(written or made)))
        self.traffic.append(({x.shape for x in (*tensors, *made)}, size, spent))


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What tells calls of a product apart: sizes, strides, dtypes, and all that is no tensor."""
    words = []
    for x in tree_flatten((args, kwargs))[0]:
        if isinstance(x, Tensor):
            size = "x".join(map(str, x.shape)) or "scalar"
            kind = str(x.dtype).removeprefix("torch.")
            words.append(f"{kind}[{size}]" + ("" if x.is_contiguous() else f"/{_strides(x)}"))
        elif x is not None and not isinstance(x, bool):
            words.append(str(x))
    return " ".join(words)


def _strides(x: Tensor) -> str:
    return ",".join(map(str, x.stride()))


def _kept(x: Any) -> Any:
    """A tensor of the same values and strides in memory of its own, other things as they are."""
    if not isinstance(x, Tensor) or x.numel() == 0:
        return x
    extent = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    flat = x.detach().as_strided((extent,), (1,), x.storage_offset()).clone()
    return flat.as_strided(x.shape, x.stride())


def _bytes(x: Tensor) -> int:
    """Bytes of the elements that are there: those of an expanded tensor once."""
    count = 1
    for size, step in zip(x.shape, x.stride(), strict=True):
        count *= size if step else 1
    return count * x.element_size()


def _is_view(out: Any, tensors: list[Tensor]) -> bool:
    """Whether a kernel only looked at what was there. One that writes in place gives it back."""
    if not isinstance(out, Tensor) or any(out is x for x in tensors):
        return False
    storage = out.untyped_storage()._cdata
    return any(x.untyped_storage()._cdata == storage for x in tensors)


def _seconds(call: Call, sync: Call, clock: Clock) -> float:
    sync()
    begin = clock()
    call()
    sync()
    return clock() - begin
