"""How much of a training step is its own matrix products and attention kernels.

A step cannot be faster than the products that it asks for, called one after the other with nothing
between. They are collected from one step as it runs, with the shapes, strides and values that they
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

# Kernels that do the arithmetic that a FLOP counter counts; of attention, how their names begin.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
FUSED = ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "flex_attention")
NORMS = ("native_layer_norm", "native_layer_norm_backward", "_fused_rms_norm")

Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A kernel of the step. name: torch's, and of a product its shapes too.

    calls: in one step. seconds: of all of them; of a product bare, of another kernel as it was
    called. product: whether it is one.
    """

    name: str
    calls: int
    seconds: float
    product: bool


@dataclass(frozen=True)
class BareRate:
    """step_s: seconds of a step, the median. bare_s: of its products alone. share: the median of
    bare_s / step_s over the rounds, 1 where a step is nothing but products. rows: the products,
    then the other kernels, each from the largest.
    """

    step_s: float
    bare_s: float
    share: float
    rows: list[Row]

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
    products_of: Callable[[], None] | None = None,
) -> BareRate:
    """Time `step` and its matrix products and attention kernels alone, in turns.

    step: one whole training step; it is run rounds + 2 times. limit: s after which no further
        round begins, once there is one.
    products_of: the same step uncompiled, where `step` is compiled: what is inside of a compiled
        graph cannot be collected.
    Holds the arguments of one call of each kind of product, as large as they were.

    Raises ValueError where the step has no product (it may be compiled).
    """
    step()  # what is done once: allocations, plans, tables
    record = _Record()
    with record:
        (products_of or step)()
    if not record.products:
        raise ValueError(
            "bare_rate: the step calls no matrix product and no attention kernel that can be seen: "
            "allowed is an uncompiled step; give a compiled one's uncompiled twin as products_of"
        )
    steps: list[float] = []
    bare: list[dict[str, float]] = []
    begin = time.perf_counter()
    for number in range(rounds):
        if number and time.perf_counter() - begin > limit:
            break
        steps.append(_seconds(step, record.sync))
        bare.append(
            {name: _seconds(one.again, record.sync) for name, one in record.products.items()}
        )
    totals = [sum(one.values()) for one in bare]
    rows = [
        Row(name, one.calls, median(times[name] for times in bare), product=True)
        for name, one in record.products.items()
    ]
    rows += [Row(name, calls, spent, product=False) for name, (calls, spent) in record.rest.items()]
    return BareRate(
        step_s=median(steps),
        bare_s=median(totals),
        share=median(a / b for a, b in zip(totals, steps, strict=True)),
        rows=sorted(rows, key=lambda row: (not row.product, -row.seconds)),
    )


@dataclass(frozen=True)
class Traffic:
    """Bytes of a step's residual stream and norms. moved: what their kernels read and write.
    must: what has to be moved where each norm is one kernel with the residual sum before it.
    """

    moved: int
    must: int

    @property
    def ratio(self) -> float:
        return self.moved / self.must


def stream_traffic(step: Callable[[], None]) -> Traffic:
    """Count the bytes that a training step moves for its residual stream and its norms.

    Moved: the inputs and outputs of each norm, and of each kernel but a product that reads or
    writes a tensor of a norm's size: residual sums, masks, casts, sums of gradients.
    Must, for each norm, of M bytes: the forward reads the stream and a branch and writes their sum
    and its norm, 4 M; the backward reads the stream, its gradient and the norm's, and writes the
    stream's gradient before them, 4 M.
    """
    record = _Record()
    with record:
        step()
    sizes = {size for size, _ in record.norms}
    moved = sum(size for shapes, size in record.traffic if sizes & shapes)
    return Traffic(moved, sum(4 * size for _, size in record.norms))


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
    """Within it: products, by name and shapes, and what all other kernels take and move."""

    def __init__(self) -> None:
        super().__init__()
        self.products: dict[str, _Product] = {}
        self.rest: dict[str, tuple[int, float]] = {}
        self.norms: list[tuple[torch.Size, int]] = []  # size and bytes of each norm's input
        self.traffic: list[tuple[set[torch.Size], int]] = []  # of each kernel but products
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
            key = f"{name} {_shapes(args, kwargs)}"
            if key not in self.products:
                one = tree_map(_kept, (args, kwargs))
                self.products[key] = _Product(func, *one)
            self.products[key].calls += 1
            return func(*args, **kwargs)
        self.sync()
        begin = time.perf_counter()
        out = func(*args, **kwargs)
        self.sync()
        spent = time.perf_counter() - begin
        if not _is_view(out, tensors):
            calls, before = self.rest.get(name, (0, 0.0))
            self.rest[name] = (calls + 1, before + spent)
            self._count(name, tensors, out)
        return out

    def _count(self, name: str, tensors: list[Tensor], out: Any) -> None:
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if name.startswith("empty"):
            return
        if name.startswith(NORMS):
            stream = tensors[1 if name.endswith("backward") else 0]
            self.norms.append((stream.shape, stream.nbytes))
        written = [x for x in made if all(x is not y for y in tensors)]
        size = sum(_bytes(x) for x in (*tensors, *(written or made)))
        self.traffic.append(({x.shape for x in (*tensors, *made)}, size))


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


def _seconds(call: Call, sync: Call) -> float:
    sync()
    begin = time.perf_counter()
    call()
    sync()
    return time.perf_counter() - begin
