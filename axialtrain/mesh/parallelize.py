"""How a model that was built serially is spread over the mesh. The only file that knows fairscale.

Weights are the same on every mesh by construction: the whole model is built first, then each rank
keeps its slice of the projections (Megatron-LM, arXiv 1909.08053, section 3: column-parallel, then
row-parallel, one all-reduce per pair).
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from fairscale.nn.model_parallel import initialize as fairscale_groups
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear
from fairscale.nn.model_parallel.mappings import (
    _reduce,
    copy_to_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.nn import functional as F

from axialtrain.mesh.crossing import Crossing
from axialtrain.mesh.exchange import Exchange
from axialtrain.mesh.mesh import Group, Mesh, check_divides
from axialtrain.mesh.projection import Arithmetic, Projection

# timm's names, which all our backbones share: (module, projections in, projection out). Where the
# passes of a layer have projections of their own, they are attn.0, attn.1.
SPLIT = {"attn": ("qkv", "proj"), "mlp": ("fc1", "fc2")}


def parallelize(
    model: nn.Module, mesh: Mesh, *, timeout: timedelta = timedelta(minutes=10)
) -> nn.Module:
    """Spread `model` over `mesh`, in place: token exchanges over row x col, weights over tensor.

    `attn.qkv` and `mlp.fc1` keep whole output rows (the fused QKV weight is packed head by head,
    so a contiguous slice is a set of whole heads), `attn.proj` and `mlp.fc2` the matching input
    columns. Sharded parameters carry `model_parallel = True`, from which DeepSpeed knows that
    their norms add up over the tensor axis.

    Tables per head stay whole and are narrowed to the heads of a rank (`Crossing`).

    Raises ValueError where the heads or the MLP width do not divide by mesh.tensor, or the heads
    not by what mesh.exchange=heads deals them out over, or where mesh.tensor has nothing to split.
    """
    for module in model.modules():
        if isinstance(module, Exchange):
            module.attach(mesh)
    if mesh.tensor.size == 1:
        return model
    split = _split_modules(model)
    crossings = [module for module in model.modules() if isinstance(module, Crossing)]
    if not split and not crossings:
        raise ValueError(
            f"mesh.tensor={mesh.tensor.size}: nothing in a {type(model).__name__} is in parts over "
            "the tensor axis: allowed is 1"
        )
    _check(model, mesh.tensor.size)
    _start_fairscale(mesh, timeout)
    for _, kind, module in split:
        first, last = SPLIT[kind]
        module.set_submodule(first, _column(module.get_submodule(first), mesh.tensor))
        module.set_submodule(last, _row(module.get_submodule(last), mesh.tensor))
    local: dict[str, Callable[[Tensor], Tensor]] = {
        "copied": _copied,
        "summed": _summed,
        "heads": partial(_heads_of, group=mesh.tensor),
    }
    for crossing in crossings:
        crossing.local = local[crossing.kind]
    return model


def _split_modules(model: nn.Module) -> list[tuple[str, str, nn.Module]]:
    """(name, attn or mlp, module) of the modules whose projections are split."""
    found = []
    for name, module in model.named_modules():
        named = re.search(r"(?:^|\.)(attn|mlp)(?:\.\d+)?$", name)
        if named and not isinstance(module, nn.ModuleList):
            found.append((name, named[1], module))
    return found


def _heads_of(table: Tensor, group: Group) -> Tensor:
    # Copy forward, sum backward: each rank has the gradient of its own heads only.
    return _copied(table).chunk(group.size)[group.rank]


def tensor_dims(model: nn.Module) -> dict[str, int]:
    """The dim along which each sharded parameter is split over the tensor axis, by name."""
    dims = {}
    for name, module in model.named_modules():
        if isinstance(module, ColumnParallelLinear):
            dims[f"{name}.weight"] = 0
            if module.bias is not None:
                dims[f"{name}.bias"] = 0
        elif isinstance(module, RowParallelLinear):
            dims[f"{name}.weight"] = 1
    return dims


def _check(model: nn.Module, tensor: int) -> None:
    for name, kind, module in _split_modules(model):
        first = module.get_submodule(SPLIT[kind][0])
        assert isinstance(first, nn.Linear), f"{name} is spread once"
        if kind == "attn":
            head_dim: Any = module.head_dim
            check_divides(f"{name}: heads", first.out_features // (3 * head_dim), tensor)
        else:
            check_divides(f"{name}: width", first.out_features, tensor)


def _start_fairscale(mesh: Mesh, timeout: timedelta) -> None:
    # fairscale keeps its groups in module globals and prints as it makes them; a process that
    # has had another mesh must drop that one first.
    if fairscale_groups.model_parallel_is_initialized():
        fairscale_groups.destroy_model_parallel()
    with contextlib.redirect_stdout(io.StringIO()):
        fairscale_groups.initialize_model_parallel(mesh.tensor.size)
    _set_pg_timeout(timeout, fairscale_groups.get_model_parallel_group())


def _slice(whole: Tensor, dim: int, group: Group) -> nn.Parameter:
    # A clone: a view would keep the storage of the whole matrix alive.
    mine = whole.detach().chunk(group.size, dim)[group.rank].clone()
    part = nn.Parameter(mine, requires_grad=whole.requires_grad)
    part.model_parallel = True  # type: ignore[attr-defined]
    return part


def _leave(weight: Tensor) -> Tensor:
    return weight  # fairscale's constructors fill a full matrix that is thrown away: skip it


@torch.library.custom_op("axialtrain::sum_over_tensor", mutates_args=())
def _sum_over_tensor(x: Tensor) -> Tensor:
    """fairscale's sum, as one operation of a graph.

    Traced, it would be calls of which no frame shows that a rank waits in a collective
    (`train.beats.waits`), and its mark_dirty can be traced in some places only.
    """
    return _reduce(None, x.clone(memory_format=torch.contiguous_format))


@_sum_over_tensor.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _CopiedInGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _sum_over_tensor(grads[0])


class _SummedInGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _sum_over_tensor(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _copied(x: Tensor) -> Tensor:
    """x itself, whose gradient is the sum over the tensor axis."""
    if torch.compiler.is_compiling():
        return _CopiedInGraph.apply(x)
    return copy_to_model_parallel_region(x)


def _summed(x: Tensor) -> Tensor:
    """Sum over the tensor axis, whose gradient goes to each rank as it is. x may be overwritten."""
    if torch.compiler.is_compiling():
        return _SummedInGraph.apply(x)
    return reduce_from_model_parallel_region(x)


class _Columns(ColumnParallelLinear):
    """Some of the outputs, by the arithmetic of the layer that it takes the place of."""

    arithmetic: Arithmetic = staticmethod(F.linear)

    def forward(self, x: Tensor, *more: Any) -> Any:
        # Identity forward, sum of the gradients over the tensor axis backward.
        x = _copied(x)
        return self.arithmetic(x, self.weight, self.bias, *(() if not more else (more,)))


class _Rows(RowParallelLinear):
    """Of some of the inputs, the sum over the tensor axis, whose gradient goes to each as it is."""

    arithmetic: Arithmetic = staticmethod(F.linear)

    def forward(self, x: Tensor) -> Tensor:
        out = _summed(self.arithmetic(x, self.weight, None))
        return out if self.bias is None else out + self.bias


def _column(linear: nn.Module, group: Group) -> nn.Module:
    assert isinstance(linear, nn.Linear)
    with torch.random.fork_rng(devices=[]):
        out = _Columns(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            gather_output=False,
            init_method=_leave,
        )
    if isinstance(linear, Projection):
        out.arithmetic = linear.arithmetic
    out.weight = _slice(linear.weight, 0, group)
    if linear.bias is not None:
        out.bias = _slice(linear.bias, 0, group)
    return out


def _row(linear: nn.Module, group: Group) -> nn.Module:
    assert isinstance(linear, nn.Linear)
    with torch.random.fork_rng(devices=[]):
        out = _Rows(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            input_is_parallel=True,
            init_method=_leave,
        )
    if isinstance(linear, Projection):
        out.arithmetic = linear.arithmetic
    out.weight = _slice(linear.weight, 1, group)
    if linear.bias is not None:
        # Replicated: added after the sum over the tensor axis, so each rank has its whole gradient.
        bias = linear.bias
        out.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return out
