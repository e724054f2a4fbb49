"""Which kernel attends, by device, dtype and length, and what kernels cannot take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from axialtrain.attention.chunked import products_dtype
from axialtrain.attention.config import BIASED_KERNELS, FLEX_WIDTH, KERNELS


@dataclass(frozen=True)
class Limits:
    """The most that fused kernels take in one call, after the fold of lines.

    batch: flash has it in a grid dimension of CUDA, as memory-efficient has the heads.
    elements: batch x heads x length x width, which flash's backward counts in 32 bits.
    """

    batch: int
    heads: int
    elements: int


LIMITS = {"cuda": Limits(batch=2**16 - 1, heads=2**16 - 1, elements=2**31 - 1)}

# On a CPU, where fused kernels are slow: the most keys of a line, of all heads. In fp32 fused ones
# copy nothing, and chunks are not faster everywhere; in 16 bits their backward is slow, and chunks
# are faster until they have so few queries that widening all keys is most of the work: at 8 heads
# of 4096 keys they are, at 8 of 16384 not.
CPU_CHUNKS = {torch.bfloat16: 2**15, torch.float16: 2**15}

# The same of each head, where the CPU has arithmetic in 16 bits, which fused kernels use, too: of
# their time chunks took 0.5 at 64 and 128 keys, 0.8 at 256, 0.94 at 512 and 1.15 at 1024, with 2
# and with 8 heads.
CPU_CHUNKS_IN_16_BITS = 2**9


# With a learned bias: the dtypes that FlexAttention has kernels for, by device, for heads of
# FLEX_WIDTH channels at least. Elsewhere products in chunks take it.
FLEX = {"cuda": (torch.bfloat16, torch.float16, torch.float32)}


def kernel_for(q: Tensor, k: Tensor, kernel: str = "auto", *, biased: bool = False) -> str:
    """ "fused" or "chunks"; with a learned bias "flex" or "chunks". q, k: [B, X, L, N, K].

    Raises ValueError where `kernel` is not one of KERNELS, with a bias of BIASED_KERNELS, or cannot
    take these.
    """
    allowed = BIASED_KERNELS if biased else KERNELS
    if kernel not in allowed:
        what = "with" if biased else "without"
        raise ValueError(f"kernel={kernel!r}: allowed are {list(allowed)} {what} a learned bias")
    if biased:
        return _biased(q, kernel)
    if kernel != "auto":
        return kernel
    # Traced, a chunk is a part of the graph: a compiled layer takes the one fused call.
    if q.device.type != "cpu" or q.dtype not in CPU_CHUNKS or torch.compiler.is_compiling():
        return "fused"
    keys, heads = k.shape[2:4]
    if products_dtype(q, k) is q.dtype:
        return "chunks" if keys <= CPU_CHUNKS_IN_16_BITS else "fused"
    return "chunks" if keys * heads <= CPU_CHUNKS[q.dtype] else "fused"


def _biased(q: Tensor, kernel: str) -> str:
    device, width = q.device.type, q.shape[-1]
    takes = q.dtype in FLEX.get(device, ()) and width >= FLEX_WIDTH
    if kernel == "flex" and not takes:
        able = {name: [str(one) for one in dtypes] for name, dtypes in FLEX.items()}
        raise ValueError(
            f"kernel='flex' for {q.dtype} on {device}, heads of {width} channels: allowed are "
            f"{able}, {FLEX_WIDTH} channels at least, or kernel='chunks'"
        )
    if kernel != "auto":
        return kernel
    # It adds up the gradient of a bias in no fixed order.
    return "flex" if takes and not torch.are_deterministic_algorithms_enabled() else "chunks"


def lines_at_a_time(q: Tensor, k: Tensor, across: bool, kernel: str = "fused") -> tuple[int, int]:
    """(images, lines) that a fused kernel takes in one call. q, k: [B, X, L, N, K].

    across: whether lines lie across memory. "fused" then folds them into the heads, not into the
    batch; "flex" folds all lines into the batch, which of several images is no view then.
    """
    images, lines, queries, heads, width = q.shape
    if kernel == "flex" and across:
        images = 1
    limits = LIMITS.get(q.device.type)
    if limits is None:
        return images, lines
    most = limits.elements // (max(queries, k.shape[2]) * heads * width)  # lines of all images
    if kernel == "flex":
        # Of less than 128 queries, all heads of the batch stand in one grid dimension.
        most = min(most, limits.batch // heads)
    elif across:
        lines = max(1, min(lines, limits.heads // heads, most))
        return max(1, min(images, limits.batch, most // lines)), lines
    most = min(most, limits.batch)
    lines = max(1, min(lines, most))
    return max(1, min(images, most // lines)), lines
