"""What attention must compute, written out: one query and one head at a time, in fp64."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

# (row and column of a query, rows and columns of all tokens) -> which of them are its keys
Sees = Callable[[int, int, Tensor, Tensor], Tensor]
# (head, how far below and to the right of the query each key lies) -> the bias of each
Bias = Callable[[int, Tensor, Tensor], Tensor]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def triple(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v."""
    q, k, v = (tokens(*shape, seed=10 * seed + i) for i in range(3))
    return q, k, v


def some(*shape: int, share: float = 0.6, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def line(dim: int) -> Sees:
    """Rows (2): the keys of a query are the tokens of its row. Columns (1): of its column."""
    return (lambda i, j, ys, xs: ys == i) if dim == 2 else (lambda i, j, ys, xs: xs == j)


def window(size: int, shift: int = 0) -> Sees:
    """The tokens between the same two cuts, which lie at the coordinates n * size - shift."""

    def sees(i: int, j: int, ys: Tensor, xs: Tensor) -> Tensor:
        alike_down = (ys + shift) // size == (i + shift) // size
        return alike_down & ((xs + shift) // size == (j + shift) // size)

    return sees


def everything(i: int, j: int, ys: Tensor, xs: Tensor) -> Tensor:
    return torch.ones_like(ys, dtype=torch.bool)


def entry(table: Tensor, n: int, distance: Tensor) -> Tensor:
    """Of a table [N, 2 S - 1] whose entries are those of distances 1 - S ... S - 1."""
    reach = table.shape[1] // 2
    return table[n, distance.clamp(-reach, reach) + reach]


def line_bias(table: Tensor, dim: int) -> Bias:
    return lambda n, down, right: entry(table, n, right if dim == 2 else down)


def area_bias(vertical: Tensor, horizontal: Tensor) -> Bias:
    return lambda n, down, right: entry(vertical, n, down) + entry(horizontal, n, right)


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sees: Sees,
    *,
    at: tuple[int, int] = (0, 0),
    mask: Tensor | None = None,
    bias: Bias | None = None,
    scale: float | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """softmax(q k^T scale + bias) v; zeros for a query without keys.

    q: [B, h, w, N, K], the first of them at `at`; k, v: [B, H, W, N, K] of the whole image.
    mask: bool [B, H, W], which tokens can be keys. prefix: keys and values [B, n, N, K] that every
    query has beside those that it sees, without bias.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ys, xs = torch.meshgrid(*map(torch.arange, k.shape[1:3]), indexing="ij")
    ys, xs = ys.flatten(), xs.flatten()
    out = []
    for b, i, j, n in itertools.product(*map(range, q.shape[:4])):
        row, column, query = at[0] + i, at[1] + j, q[b, i, j, n]
        seen = sees(row, column, ys, xs)
        if mask is not None:
            seen = seen & mask[b].flatten()
        y, x = ys[seen], xs[seen]
        values, logits = v[b, y, x, n], k[b, y, x, n] @ query * scale
        if bias is not None:
            logits = logits + bias(n, y - row, x - column)
        if prefix is not None:
            logits = torch.cat((prefix[0][b, :, n] @ query * scale, logits))
            values = torch.cat((prefix[1][b, :, n], values))
        if len(logits):
            weights = (logits - logits.detach().max()).exp()
            out.append(weights / weights.sum() @ values)
        else:
            out.append(torch.zeros_like(query))
    return torch.stack(out).view(q.shape)


def assert_agree(got: Tensor, want: Tensor, *inputs: Tensor, tolerance: float = 1e-11) -> None:
    """Values agree, and so do the gradients of all inputs."""
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(99), dtype=got.dtype)
    found = torch.autograd.grad((got * weight).sum(), inputs)
    expected = torch.autograd.grad((want * weight).sum(), inputs, materialize_grads=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
