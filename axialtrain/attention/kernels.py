"""Which kernel attends, by device, dtype, length and head width, and what kernels cannot take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# auto: by the table below. fused: torch's scaled_dot_product_attention, whose backends
# torch.nn.attention.sdpa_kernel restricts. chunks: axialtrain/attention/chunked.py.
KERNELS = ("auto", "fused", "chunks")


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

# On a CPU, where fused kernels are slow: (dtype, lengths from). In fp32 they are the fastest at
# all lengths; in 16 bits their backward is not, see "Kernels" in docs/attention.md.
CPU_CHUNKS = {torch.bfloat16: 1, torch.float16: 1}


def kernel_for(q: Tensor, k: Tensor, kernel: str = "auto") -> str:
    """ "fused" or "chunks", for attention without bias. q, k: [B, X, L, N, K].

    Raises ValueError where `kernel` is not one of KERNELS.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r}: allowed are {list(KERNELS)}")
    if kernel != "auto":
        return kernel
    least = CPU_CHUNKS.get(q.dtype) if q.device.type == "cpu" else None
    # Traced, a chunk is a part of the graph: a compiled layer takes the one fused call.
    slow = least is not None and k.shape[2] >= least and not torch.compiler.is_compiling()
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
