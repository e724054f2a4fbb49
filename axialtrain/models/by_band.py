"""A function of bands of a tensor, of which nothing is kept for backward but the tensor itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from axialtrain.mesh.projection import Sum, autocasts

Run = Callable[[Tensor, int], Tensor]  # (a band, its number) -> what it gives


def in_bands(
    run: Run, x: Tensor, sizes: Sequence[int], dim: int, modules: Iterable[nn.Module]
) -> Tensor:
    """torch.cat([run(band, number) of each band], dim), written into one tensor.

    x: cut along `dim` into bands of `sizes`, at least one, of which some may be empty; as long
        there as the result, which may be of another size, dtype and device otherwise.
    run: draws nothing at random but from counters, and uses no parameters but those of `modules`.
    Adjoint: each band is run again, and gone back through before the next one is: of what `run`
    keeps, that of one band exists at a time. Gradients of parameters are added up over the bands in
    fp32 at least, and are zero where `run` does not use them. First order only.
    """
    found = {id(one): one for module in modules for one in module.parameters()}
    trained = [one for one in found.values() if one.requires_grad]
    out: Tensor = _InBands.apply(run, tuple(sizes), dim, x, *trained)
    return out


class _InBands(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Run, sizes: tuple[int, ...], dim: int, x: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.run, ctx.sizes, ctx.dim = run, sizes, dim
        # Not saved: what hooks of saved tensors give back is no parameter any more.
        ctx.parameters = parameters
        ctx.cast = _casts(x, *parameters)
        out = None
        for number, (some, part) in enumerate(_parts(x, sizes, dim)):
            done = run(part, number)
            if out is None:
                shape = list(done.shape)
                shape[dim] = x.shape[dim]
                out = done.new_empty(shape)
            out[some] = done
        assert out is not None, "there is one band at least"
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3]
        of_x = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else None
        sums = [Sum(one) for one in ctx.parameters]
        for number, (some, part) in enumerate(_parts(x, ctx.sizes, ctx.dim)):
            seen = part.detach().requires_grad_(wanted)
            inputs = [seen, *ctx.parameters] if wanted else list(ctx.parameters)
            with torch.enable_grad(), ctx.cast():
                done = ctx.run(seen, number)
            found: list[Tensor | None] = [None] * len(inputs)
            if done.requires_grad:
                found = list(torch.autograd.grad(done, inputs, grad[some], allow_unused=True))
            del done  # or its graph would be there beside that of the next band
            if of_x is not None:
                of_seen = found.pop(0)
                of_x[some] = 0.0 if of_seen is None else of_seen
            for total, one in zip(sums, found, strict=True):
                if one is not None:
                    total.add(one)
        return None, None, None, of_x, *(total.total() for total in sums)


def _parts(
    x: Tensor, sizes: tuple[int, ...], dim: int
) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """Where each band is, and the band."""
    start = 0
    for size in sizes:
        some = (*[slice(None)] * dim, slice(start, start + size))
        yield some, x[some]
        start += size


def _casts(*tensors: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """Of what is computed again: autocast as it is now, where the model is."""
    kind = tensors[-1].device.type
    if not autocasts(kind):
        return nullcontext
    on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype, enabled=on)
