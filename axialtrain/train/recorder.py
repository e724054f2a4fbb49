"""torch's flight recorder: the last collectives of a rank, for when a run hangs.

gloo's are in the recorder of every build, NCCL's in one of its own. NCCL dumps by itself, as a
pickle, when a collective times out; what we write is JSON, which is safe to read.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

# torch's old name of each setting; a user may have set either.
SETTINGS = {
    "TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE": "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
}
ENTRIES = 2000  # collectives that are remembered


def record_collectives(folder: Path) -> None:
    """Turn recording on, with NCCL's dumps under `folder`. To be called before the process group
    is made. What is set in the environment already is left as it is."""
    values = {
        "TORCH_FR_BUFFER_SIZE": str(ENTRIES),
        "TORCH_FR_DUMP_TEMP_FILE": str(folder / "nccl-rank-"),
    }
    for name, value in values.items():
        if name not in os.environ and SETTINGS[name] not in os.environ:
            os.environ[name] = value
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def dump_collectives(folder: Path, rank: int) -> list[Path]:
    """Write this rank's last collectives to folder/rank-N.json, and NCCL's, where torch was built
    with it, to folder/rank-N-nccl.json. Returns the files. Raises OSError where it cannot write."""
    from torch._C import _distributed_c10d as c10d  # not typed by torch

    folder.mkdir(parents=True, exist_ok=True)
    dumps = {f"rank-{rank}.json": c10d._dump_fr_trace_json(True, False)}  # type: ignore[attr-defined]
    if dist.is_nccl_available():
        dumps[f"rank-{rank}-nccl.json"] = c10d._dump_nccl_trace_json(True, False)  # type: ignore[attr-defined]
    for name, content in dumps.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in dumps]
