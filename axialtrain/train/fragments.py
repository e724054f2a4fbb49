"""Where DeepSpeed keeps a parameter while it is trained: which part of it is this rank's, the fp32
master of that part, and the moments beside it. One function for each way in which it does so.

DeepSpeed's public accessors cannot read or write moments before the first step, nor write at ZeRO 3
where a size does not divide, nor reach anything at ZeRO 0; all of these are read here from what its
optimizers hold. Every tensor below is a view: writing to it is writing to the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + len(master)) of a flattened parameter, as this rank trains them.

    master: fp32 [size], in `flat` from `offset` on. flat: the tensor that the torch optimizer
    updates, and by which it knows the moments.
    """

    start: int
    master: Tensor
    flat: Tensor
    offset: int

    @property
    def part(self) -> slice:
        """Of the flattened parameter."""
        return slice(self.start, self.start + self.master.numel())

    def moment(self, optimizer: torch.optim.Optimizer, key: str) -> Tensor:
        """[size], beside `master`."""
        whole: Tensor = optimizer.state[self.flat][key]
        return whole.view(-1).narrow(0, self.offset, self.master.numel())


def of_plain(param: nn.Parameter) -> Fragment:
    """ZeRO 0 in fp32: the optimizer is torch's, and the parameter is its own master."""
    return Fragment(0, param.data.view(-1), param, 0)


def of_whole_masters(wrapper: Any, param: nn.Parameter) -> Fragment:
    """ZeRO 0 in bf16: the wrapper has an fp32 copy of each parameter."""
    for params, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
        for mine, master in zip(params, masters, strict=True):
            if mine is param:
                return Fragment(0, master.data.view(-1), master, 0)
    raise AssertionError("every trained parameter has a master")


def of_partition(wrapper: Any, param: nn.Parameter) -> Fragment | None:
    """ZeRO 1 and 2: the parameters of a group lie end to end, and each rank has one stretch."""
    mapping: Any = param._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    flat = wrapper.single_partition_of_fp32_groups[mapping.param_group_index]
    address = mapping.hp_fragment_address
    master = flat.data.narrow(0, address.start, address.numel)
    return Fragment(mapping.lp_fragment_address.start, master, flat, address.start)


def of_slice(wrapper: Any, param: nn.Parameter) -> Fragment | None:
    """ZeRO 3: each parameter is cut into equal slices, the last ones padded or all padding."""
    group, offset, size = wrapper.grad_position[wrapper.get_param_id(param)]
    start, whole = _slice_of(param, size)
    if start >= whole:
        return None
    flat = wrapper.fp32_partitioned_groups_flat[group]
    master = flat.data.narrow(0, offset, min(size, whole - start))
    return Fragment(start, master, flat, offset)


def set_slice(param: nn.Parameter, value: Tensor, *, kept_whole: bool) -> None:
    """Write what ZeRO 3 runs the forward with: this rank's slice, in the parameter's own dtype.

    value: the whole parameter. kept_whole: it is too small to be cut, or gathered at the moment.
    """
    piece: Tensor = param.ds_tensor  # type: ignore[attr-defined]
    start, whole = _slice_of(param, piece.numel())
    if start < whole:
        size = min(piece.numel(), whole - start)
        piece.data.view(-1)[:size].copy_(value.reshape(-1)[start : start + size])
    if kept_whole:
        param.data.copy_(value.view_as(param.data))


def _slice_of(param: Any, size: int) -> tuple[int, int]:
    """(first element of this rank's slice of `size`, elements of the whole parameter)."""
    return torch.distributed.get_rank(param.ds_process_group) * size, param.ds_numel
