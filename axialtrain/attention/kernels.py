"""Which kernel attends, by device, dtype and length, and what kernels cannot take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from axialtrain.attention.config import KERNELS


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
# are the fastest at all lengths; in 16 bits their backward is slow, and chunks are faster until
# they have so few queries that widening all keys is most of the work: at 8 heads of 4096 keys they
# are, at 8 of 16384 not.
CPU_CHUNKS = {torch.bfloat16: 2**15, torch.float16: 2**15}


def kernel_for(q: Tensor, k: Tensor, kernel: str = "auto") -> str:
    """ "fused" or "chunks", for attention without bias. q, k: [B, X, L, N, K].

    Raises ValueError where `kernel` is not one of KERNELS.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r}: allowed are {list(KERNELS)}")
    if kernel != "auto":
        return kernel
    most = CPU_CHUNKS.get(q.dtype, 0) if q.device.type == "cpu" else 0
    # Traced, a chunk is a part of the graph: a compiled layer takes the one fused call.
    slow = k.shape[2] * k.shape[3] <= most and not torch.compiler.is_compiling()
    return "chunks" if slow else "fused"


def lines_at_a_time(q: Tensor, k: Tensor, across: bool) -> tuple[int, int]:
    """(images, lines) that fused kernels take in one call. q, k: [B, X, L, N, K].

    across: whether lines are folded into the heads, not into the batch.
    """
    images, lines, queries, heads, width = q.shape
    limits = LIMITS.get(q.device.type)
    if limits is None:
        return images, lines
    most = limits.elements // (max(queries, k.shape[2]) * heads * width)  # lines of all images
    if across:
        lines = max(1, min(lines, limits.heads // heads, most))
        return max(1, min(images, limits.batch, most // lines)), lines
    most = min(most, limits.batch)
    lines = max(1, min(lines, most))
    return max(1, min(images, most // lines)), lines
