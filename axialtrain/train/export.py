"""`axialtrain export`: the weights of a run in one plain file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save

from axialtrain.models.own_weights import described, to_timm
from axialtrain.train import checkpoint
from axialtrain.train.start import NAMES
from axialtrain.train.storage import Folder

PIXELS = ("mean", "std", "bands")  # of the group data: how pixels became numbers


def export(where: str, out: Path, *, names: str = "axialtrain", best: bool = False) -> str:
    """Write the weights of a run's last checkpoint, or of one checkpoint, to `out`, as safetensors.

    where: a run, its folder of checkpoints or one of them, a path or URL.
    names: "axialtrain", those of the serial model of the run's task, or "timm", those and the
        packing of timm's VisionTransformer (see `to_timm`).
    best: the checkpoint that was best in validation instead of the last.

    The file's metadata say whose names it has, the step, and as JSON the configs of model and task,
    from which `init` knows what it is of, and how pixels became numbers. It has its name when all
    of it is there.
    Returns what there is to say, the last line about the file.
    Raises ValueError where there is no such checkpoint, or `out` is there already or no name of a
    safetensors file; OSError where it cannot be written.
    """
    if names not in NAMES:
        raise ValueError(f"--names {names}: allowed are {', '.join(NAMES)}")
    if out.suffix != ".safetensors" or re.match(r"\w+:/", str(out)):  # a URL, less a slash
        raise ValueError(f"--out {out}: allowed is the path of a new file, NAME.safetensors")
    _refuse_existing(out)
    saved = checkpoint.newest(where, best=best)
    config = described(saved.state.get("model"), saved.where)
    state = saved.weights()
    said = []
    if names == "timm":
        state, kept = to_timm(state, config, saved.where)
        if kept:
            said.append(f"timm has no place for, names and packing are ours: {', '.join(kept)}")
    metadata = {"format": "pt", "names": names, "step": str(saved.step)}
    metadata |= {
        "model": json.dumps(asdict(config)),
        "task": json.dumps(_flat(saved.state.get("task"))),
    }
    data = saved.state.get("data")
    if isinstance(data, Mapping) and all(key in data for key in PIXELS):
        metadata["data"] = json.dumps({key: data[key] for key in PIXELS})
    # safetensors takes no two views of one memory, which timm's tokens are.
    state = {name: value.clone().contiguous() for name, value in state.items()}
    content = save(state, metadata=metadata)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _refuse_existing(out)
        Folder(out.parent).write(out.name, content)
    except OSError as error:  # a full disk's does not name the file
        raise OSError(f"--out {out}: cannot be written: {error}") from error
    said.append(
        f"{saved.where}, step {saved.step}: {len(state)} tensors, "
        f"{sum(value.nbytes for value in state.values())} bytes, {names} names, in {out}"
    )
    return "\n".join(said)


def _flat(task: Any) -> dict[str, Any] | None:
    """Without its groups: what taught the model, and from which path, is not said to everybody."""
    if not isinstance(task, Mapping):
        return None
    return {key: value for key, value in task.items() if isinstance(value, str | int | float)}


def _refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ValueError(f"--out {out}: is there already: allowed is a new file")
