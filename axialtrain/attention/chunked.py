"""Attention in chunks of lines and queries, from batched matrix products.

No more logits than a chunk's exist at a time, and nothing of them is kept: backward computes a
chunk again. This is what takes a learned bias without a buffer of all logits, and what is fastest
where a fused kernel is slow in 16 bits (docs/attention.md, "Kernels").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from axialtrain.attention.bias import Bias, BiasOf

# 16-bit dtypes, and what a CPU must be able to do so that products in them are faster than in fp32.
# torch tells by these names (`torch.cpu.get_capabilities`), which are those of x86.
ARITHMETIC = {torch.bfloat16: ("avx512_bf16", "amx_bf16")}
# Asked once: in a graph of torch's compiler it could not be.
CPU = torch.cpu.get_capabilities()

# Logits that exist at a time on a CPU: what its caches hold (2 MB in fp32).
CPU_CHUNK = 2**19


def attend_in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    bias: Bias | None,
    scale: float,
    chunk: int,
) -> Tensor:
    """softmax(q k^T scale + bias) v; logits and softmax in fp32 at least, backward too.

    Products with weights or with gradients of logits take these as `products_dtype` says: in fp32
    at least, and what comes out is rounded once; or rounded to q's dtype before, as FlashAttention
    does (arXiv 2205.14135). Of a line in several chunks of queries, each chunk's share of the
    gradients of keys and values is then rounded, too; shares are added up in fp32.

    q: [B, X, Lq, N, K]; k, v: [B, X, L, N, K], in any order in memory. mask: bool [B, X, L], with
    a key in every line. bias: of the last keys; those before (of a prefix) have none. chunk: how
    many logits exist at a time. Gradients of first order only.
    Returns [B, X, Lq, N, K], in memory ordered as q.
    """
    tables, of = ((), None) if bias is None else (bias.tables, bias.of)
    out: Tensor = _Chunks.apply(q, k, v, mask, scale, chunk, of, *tables)
    return out


def _cpu_can(names: tuple[str, ...]) -> bool:
    return any(CPU.get(name) for name in names)


def products_dtype(q: Tensor, *others: Tensor) -> torch.dtype:
    """The dtype of products with weights: q's own where all have it, and the CPU has arithmetic in
    it; fp32 at least elsewhere."""
    wide = torch.promote_types(q.dtype, torch.float32)
    names = ARITHMETIC.get(q.dtype, ())
    if not names or q.device.type != "cpu":  # elsewhere it was not measured
        return wide
    alike = all(x.dtype is q.dtype for x in others)
    return q.dtype if alike and _cpu_can(names) else wide


class _Sizes(NamedTuple):
    """Of a chunk. Several lines hold all of their queries; several images all of their lines."""

    images: int
    lines: int
    queries: int


def _sizes(q: Tensor, k: Tensor, chunk: int) -> _Sizes:
    images, lines, queries, heads, _ = q.shape
    whole = chunk // (queries * heads * k.shape[2])  # lines in a chunk; 0: not even one
    return _Sizes(
        max(1, min(whole // lines, images)),
        max(1, min(whole, lines)),
        queries if whole else max(1, chunk // (heads * k.shape[2])),
    )


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        chunk: int,
        of: BiasOf | None,
        *tables: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, mask, *tables)
        ctx.scale, ctx.chunk, ctx.of = scale, chunk, of
        walk, out = _Walk(q, k, v, mask, scale, chunk, of, tables), torch.empty_like(q)
        with torch.autocast(q.device.type, enabled=False):
            for here in walk.lines():
                q1, k1 = (walk.wide(x[here]) for x in (q, k))
                v1 = walk.folded(v[here])
                for start, stop in walk.queries():
                    weights, _ = walk.weights(q1[:, start:stop], k1, here, start, stop)
                    _put(out[here], start, stop, walk.rounded(weights) @ v1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, *tables = ctx.saved_tensors
        scale = ctx.scale
        walk = _Walk(q, k, v, mask, scale, ctx.chunk, ctx.of, tuple(tables))
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            for here in walk.lines():
                # For products with weights, and for logits and their gradients.
                q1, k1, g1 = (walk.folded(x[here]) for x in (q, k, grad))
                q2, k2, g2 = (x.to(walk.dtype) for x in (q1, k1, g1))
                v2 = walk.wide(v[here])
                sums: tuple[Tensor, Tensor] | None = None  # gradients of keys and values
                for start, stop in walk.queries():
                    now = slice(start, stop)
                    weights, spare = walk.weights(q2[:, now], k2, here, start, stop)
                    of_v = walk.rounded(weights).transpose(1, 2) @ g1[:, now]
                    torch.bmm(g2[:, now], v2.transpose(1, 2), out=spare)
                    # In place: a row's sum is taken before its entries are written.
                    logits = torch.ops.aten._softmax_backward_data.out(
                        spare, weights, -1, spare.dtype, grad_input=spare
                    )
                    walk.learn(logits, start, stop)
                    rounded = walk.rounded(logits)
                    _put(dq[here], start, stop, _product(rounded, k1, scale))
                    of_k = _product(rounded.transpose(1, 2), q1[:, now], scale)
                    if sums is None:
                        sums = of_k.to(walk.dtype), of_v.to(walk.dtype)
                    else:
                        sums = sums[0].add_(of_k), sums[1].add_(of_v)
                assert sums is not None
                for x, total in zip((dk, dv), sums, strict=True):
                    _put(x[here], 0, x.shape[2], total)
            return dq, dk, dv, None, None, None, None, *walk.learned()


class _Walk:
    """The way through the chunks of a call, and the buffers that they share.

    dtype: of logits. products: of the products with weights, see `products_dtype`.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        chunk: int,
        of: BiasOf | None,
        tables: tuple[Tensor, ...],
    ) -> None:
        self.images, self.across, self.length, self.heads, _ = q.shape
        self.keys, self.mask, self.scale = k.shape[2], mask, scale
        self.of, self.tables = of, tables
        self.sizes = _sizes(q, k, chunk)
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.products = products_dtype(q, k, v)
        size = self.sizes.images * self.sizes.lines * self.sizes.queries * self.heads * self.keys
        self.buffers = [torch.empty(size, dtype=self.dtype, device=q.device) for _ in range(2)]
        narrow = self.products is not self.dtype
        self.narrow = torch.empty(size, dtype=self.products, device=q.device) if narrow else None
        # Of whole lines the bias is one for all chunks, and its gradient is added up over them.
        self.whole = self.sizes.queries == self.length
        self.bias = of(tables, 0, self.length) if of is not None and self.whole else None
        self.of_bias: Tensor | None = None
        self.of_tables: tuple[Tensor, ...] = ()

    def lines(self) -> Iterator[tuple[slice, slice]]:
        for image in range(0, self.images, self.sizes.images):
            for line in range(0, self.across, self.sizes.lines):
                yield (
                    slice(image, image + self.sizes.images),
                    slice(line, line + self.sizes.lines),
                )

    def queries(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.length, self.sizes.queries):
            yield start, min(start + self.sizes.queries, self.length)

    def folded(self, x: Tensor) -> Tensor:
        """[b, x, L, N, K] -> [b x N, L, K] as products with weights take it."""
        return _folded(x, self.products)

    def wide(self, x: Tensor) -> Tensor:
        """The same as logits take it."""
        return _folded(x, self.dtype)

    def rounded(self, weights: Tensor) -> Tensor:
        """Weights as their products take them: themselves, or what stays until the next call."""
        if self.narrow is None:
            return weights
        return self.narrow[: weights.numel()].view(weights.shape).copy_(weights)

    def weights(
        self, q: Tensor, k: Tensor, here: tuple[slice, slice], start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        """[lines x N, queries, keys], and a buffer of the same size that is free."""
        shape = (q.shape[0], q.shape[1], k.shape[1])
        size = shape[0] * shape[1] * shape[2]
        logits, weights = (buffer[:size].view(shape) for buffer in self.buffers)
        torch.baddbmm(logits, q, k.transpose(1, 2), beta=0, alpha=self.scale, out=logits)
        by_line = logits.unflatten(0, (-1, self.heads))
        if self.of is not None:
            bias = self.bias if self.whole else self.of(self.tables, start, stop)
            assert bias is not None
            by_line[..., self.keys - bias.shape[-1] :].add_(bias)
        if self.mask is not None:
            hidden = ~self.mask[here].flatten(0, 1)
            by_line.masked_fill_(hidden[:, None, None], -torch.inf)
        torch.softmax(logits, -1, out=weights)
        return weights, logits

    def learn(self, logits: Tensor, start: int, stop: int) -> None:
        """Take in the gradient of the logits of a chunk, summed over its lines."""
        if self.of is None:
            return
        of_bias = logits.unflatten(0, (-1, self.heads)).sum(0)
        if not self.whole:
            self._to_tables(of_bias, start, stop)
        elif self.of_bias is None:
            self.of_bias = of_bias
        else:
            self.of_bias += of_bias

    def learned(self) -> tuple[Tensor, ...]:
        if self.of_bias is not None:
            self._to_tables(self.of_bias, 0, self.length)
        return self.of_tables

    def _to_tables(self, of_bias: Tensor, start: int, stop: int) -> None:
        assert self.of is not None
        with torch.enable_grad():
            tables = tuple(table.detach().requires_grad_() for table in self.tables)
            bias = self.of(tables, start, stop)
            own = of_bias[..., self.keys - bias.shape[-1] :]
            found = torch.autograd.grad(bias, tables, own.to(bias.dtype))
        before = self.of_tables or tuple(torch.zeros_like(table) for table in tables)
        self.of_tables = tuple(x + y for x, y in zip(before, found, strict=True))


def _folded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[b, x, L, N, K] -> [b x N, L, K] in this dtype: a view where memory allows."""
    x = x.transpose(2, 3)
    if x.dtype != dtype:
        x = x.to(dtype, memory_format=torch.contiguous_format)
    return x.flatten(0, 2)


def _product(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """x y scale, rounded once. x: [M, I, J], y: [M, J, K]."""
    out = x.new_empty(x.shape[0], x.shape[1], y.shape[2])
    return torch.baddbmm(out, x, y, beta=0, alpha=scale, out=out)


def _put(out: Tensor, start: int, stop: int, values: Tensor) -> None:
    """Write [b x N, stop - start, K] to these tokens of out: [b, x, L, N, K]."""
    images, lines, _, heads, _ = out.shape
    out[:, :, start:stop] = values.unflatten(0, (images, lines, heads)).transpose(2, 3)
