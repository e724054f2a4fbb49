"""A device that is not the CPU, on a machine that has no other: what runs on it runs on a GPU too.

Its tensors hold their numbers on the CPU, and say of themselves that they are elsewhere. Kernels
are the CPU's, and take what a GPU's would: all tensors from the device, or single numbers from the
host. So code that makes a tensor in the wrong place fails here as it would there, and what makes
the host wait for the device is written down. torch takes the ways through it that are for devices
it knows nothing of: attention is the formula.

A process that knows the device is not what it was: torch takes it for an accelerator, and pins
memory for it, say. So it has a process of its own, in which `begin` has been called: see
`a_process`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import axialtrain

NAME = "elsewhere"
DEVICE = torch.device("privateuseone", 0)  # NAME, once `begin` was called
TIMEOUT = 300.0  # s

Run = Callable[..., Any]  # (function of a module, its keywords) -> what it gives there

_MOVES = ("aten::_to_copy", "aten::copy_")
# What tells the host something of numbers on the device, or sizes of what depends on them.
_WAITS = (
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select",
    "aten::bincount", "aten::_unique2", "aten::unique_dim", "aten::repeat_interleave",
)  # fmt: skip
_PACKAGE = f"{Path(axialtrain.__file__).parent}/"


@contextmanager
def a_process() -> Iterator[Run]:
    """run(fn, **kwargs): what fn gives in a process that knows DEVICE, as one rank of gloo."""
    with ProcessPoolExecutor(1, get_context("spawn"), begin) as pool:

        def run(fn: Callable[..., Any], **kwargs: Any) -> Any:
            try:
                return pool.submit(fn, **kwargs).result(TIMEOUT)
            except TimeoutError:
                # Or the tests' end would wait for it. Those that follow are told that it died.
                for process in pool._processes.values():
                    process.kill()
                raise

        yield run


def begin() -> None:
    """Once, in a process of its own."""
    torch.set_num_threads(1)
    _setup_privateuseone_for_python_backend(NAME)
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


class Tensors(Tensor):
    """A tensor on DEVICE; `own`: its numbers."""

    own: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, own: Tensor) -> Tensors:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            own.shape,
            strides=own.stride(),
            storage_offset=own.storage_offset(),
            dtype=own.dtype,
            device=DEVICE,
        )
        made.own = own
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.own!r} on {DEVICE}"

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch's asks for the memory

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("a tensor of DEVICE outside of `Elsewhere`")


class Elsewhere(TorchDispatchMode):
    """Within it DEVICE can compute. waits: where the host waited for it, as "file:function"."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.name().partition(".")[0]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in given if isinstance(x, Tensors)]
        goal = kwargs.get("device")
        stays = bool(there) if goal is None else torch.device(goal).type == NAME
        if name == "aten::copy_":
            stays = isinstance(args[0], Tensors)
        if there and name not in _MOVES:
            _check(name, given)
        sent = stays and name in _MOVES and any(x.device.type == "cpu" for x in given)
        blocks = not (kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,)))
        if (sent and blocks) or (there and (not stays or name in _WAITS or _by_mask(name, args))):
            self.waits.append(_where())
        if stays and goal is not None:
            kwargs["device"] = "cpu"
        if name == "aten::_conj":  # lazily it is a bit, which no kernel below this looks at
            func = torch.ops.aten._conj_physical.default
        out = func(*tree_map(_own, args), **tree_map(_own, kwargs))
        if not stays:
            return out
        known = {id(x.own): x for x in there}  # what is written in place is given back itself
        return tree_map(lambda x: _there(x, known), out)


def elsewhere(module: nn.Module) -> nn.Module:
    """The module itself, with its parameters and buffers on DEVICE."""
    for one in module.modules():
        for name, parameter in one._parameters.items():
            if parameter is not None:
                moved = Tensors(parameter.detach())
                one._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in one._buffers.items():
            if buffer is not None:
                one._buffers[name] = Tensors(buffer)
    return module


def home(x: Tensor) -> Tensor:
    """The numbers of a tensor of DEVICE, on the CPU."""
    assert isinstance(x, Tensors), "it is on the CPU"
    return x.own.detach()


def _check(name: str, given: list[Tensor]) -> None:
    for x in given:
        if not isinstance(x, Tensors) and x.dim():
            raise RuntimeError(f"{name}: a tensor {tuple(x.shape)} on the CPU, others on {DEVICE}")


def _by_mask(name: str, args: Any) -> bool:
    """Whether the size of what is indexed depends on numbers."""
    if name not in ("aten::index", "aten::index_put", "aten::index_put_"):
        return False
    return any(index is not None and index.dtype is torch.bool for index in args[1])


def _own(x: Any) -> Any:
    return x.own if isinstance(x, Tensors) else x


def _there(x: Any, known: dict[int, Tensors]) -> Any:
    if not isinstance(x, Tensor):
        return x
    return known[id(x)] if id(x) in known else Tensors(x)


def _where() -> str:
    """The function of the package that is at work."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        name = frame.f_code.co_name
        if file.startswith(_PACKAGE) and not name.startswith("<"):  # a comprehension's
            return f"{file.removeprefix(_PACKAGE)}:{name}"
        frame = frame.f_back
    return "backward"
