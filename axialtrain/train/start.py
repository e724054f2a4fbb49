"""What a run starts from: the weights that `init` names.

timm's by name or in a file; those of a run or a checkpoint of ours; or a file that `axialtrain
export` wrote, which says in its metadata what it is of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from axialtrain.models.own_weights import described, fitted, from_timm_names, of_timm
from axialtrain.models.timm_weights import from_timm, matching, read_timm
from axialtrain.train import checkpoint
from axialtrain.train.config import RunConfig

NAMES = ("axialtrain", "timm")  # whose names the tensors of an exported file have
LARGEST_JSON = 2**16  # characters in which a file describes its model; ours take under 1,000
# What gives a head of the same shape another meaning.
_OF_HEADS = ("name", "classes", "cells")


def start_of(
    model: nn.Module, config: RunConfig, *, verify: bool = True
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The weights that `init` gives to the model, the names of those that are drawn anew, and of
    those that the model has no place for.

    verify: compare the checksums of a checkpoint.
    Raises ValueError, naming `init` and what differs, where they do not fit.
    """
    if config.init is None:
        return {}, [], []
    where = f"init={config.init}"
    of_model: Any
    of_task: Any
    if _of_run(config.init):
        saved = _newest(config.init, where, verify=verify)
        state, of_model, of_task = (
            saved.weights(),
            saved.state.get("model"),
            saved.state.get("task"),
        )
        names = "axialtrain"
    else:
        if not config.init.startswith("timm:") and not Path(config.init).is_file():
            raise ValueError(
                f"{where}: no such file: allowed are a file of weights, a run or checkpoint, and "
                "timm:NAME"
            )
        said = metadata_of(config.init)
        if said is None:
            of_timm(config.model, where)  # before anything is fetched
        state = read_timm(config.init, where)
        if said is None:
            return matching(model, from_timm(state, config.model, where), where)
        names = said["names"]
        of_model, of_task = (json_of(said.get(key, "null"), where) for key in ("model", "task"))
    own = described(of_model, where)
    if names == "timm":
        state = from_timm_names(state, own, where)
    elif names not in NAMES:
        raise ValueError(f"{where}: has the names of {names[:80]!r}: allowed are {list(NAMES)}")
    same = _same_heads(of_task, asdict(config.task))
    return fitted(model, state, own=own, config=config.model, same_task=same, where=where)


def pinned(config: RunConfig) -> str | None:
    """`init`, or the one checkpoint that a run has last now: all ranks must start from the same."""
    if config.init is None or not _of_run(config.init):
        return config.init
    return str(_newest(config.init, f"init={config.init}").where)


def _of_run(init: str) -> bool:
    """Whether it names a run or a checkpoint: a folder, or a URL."""
    return not init.startswith("timm:") and ("://" in init or Path(init).is_dir())


def _newest(init: str, where: str, *, verify: bool = True) -> checkpoint.Saved:
    try:
        return checkpoint.newest(init, verify=verify)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def metadata_of(init: str) -> dict[str, str] | None:
    """What `axialtrain export` wrote beside the tensors; None for a file of anybody else."""
    if not init.endswith(".safetensors"):
        return None
    try:
        with safe_open(init, framework="pt") as file:
            said = file.metadata() or {}
    except (OSError, SafetensorError):
        return None  # who reads the tensors says what is wrong
    return said if {"names", "model"} <= said.keys() else None


def json_of(text: str, where: str, largest: int = LARGEST_JSON) -> Any:
    """What a file says of its model. largest: characters that are read.

    Raises ValueError, naming `where`, where it is not JSON.
    """
    try:
        if len(text) > largest:
            raise ValueError(f"{len(text)} characters, allowed are {largest}")
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: does not describe its model: {error}") from error


def _same_heads(found: Any, wanted: Mapping[str, Any]) -> bool:
    """Whether heads that fit mean the same; a file that does not tell its task is believed."""
    if found is None:
        return True
    return isinstance(found, Mapping) and all(
        found.get(key) == wanted.get(key) for key in _OF_HEADS
    )
