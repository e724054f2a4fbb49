"""A config key's way: `configs/` and the command line -> one composed config -> `RunConfig`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import axialtrain
from axialtrain.mesh.mesh import MeshConfig
from axialtrain.models.registry import KINDS, list_models, model_config
from axialtrain.tasks.classification import ClassificationConfig
from axialtrain.tasks.panoptic import PanopticConfig
from axialtrain.tasks.reconstruction import ReconstructionConfig
from axialtrain.tasks.segmentation import SegmentationConfig
from axialtrain.train.checkpoint import begun_with
from axialtrain.train.config import RunConfig


def compose_run(
    overrides: Sequence[str], processes: int | None = None
) -> tuple[RunConfig, Path, str]:
    """(the checked config, the run folder, the config as YAML) of a command line of overrides.

    `resume` is auto, too, where the folder is of a run that was begun with this very one: a command
    that is given again goes on. The YAML says with which a run was begun, not auto.

    processes: how many an outer launcher has started, for mesh.data=auto; None where none did.
    Raises ValueError that names the key, the value and what is allowed.
    """
    _store_schemas()
    # Hydra takes a bare number for an integer, and a group's option must be a string.
    overrides = [re.sub(r"^zero=(\d+)$", r"zero='\1'", override) for override in overrides]
    named = {path.stem for path in (config_folder() / "mesh").glob("*.yaml")}
    for override in overrides:
        # mesh=RxC for any R and C, without a file for each; configs/mesh holds named ones.
        if override.removeprefix("mesh=") in named:
            continue
        if shape := re.fullmatch(r"mesh=(\d+)x(\d+)", override):
            row, col = map(int, shape.groups())
            node = {"row": row, "col": col}
            ConfigStore.instance().store(group="mesh", name=f"{row}x{col}", node=node)
        elif override.startswith("mesh="):
            raise ValueError(f"{override}: allowed are mesh=single and mesh=RxC, like mesh=2x3")
    filling = "mesh.data=auto" in overrides
    overrides = [override for override in overrides if override != "mesh.data=auto"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        try:
            composed = compose("train", overrides, return_hydra_config=True)
            folder = Path(composed.hydra.run.dir).absolute()
            # One that has the time in it is another one at each start, whoever wrote it.
            own = _run_dir(composed)
            standard = _run_dir(OmegaConf.load(config_folder() / "train.yaml"))
            chosen = own != standard and "${now:" not in own
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(_unknown(error, overrides) or _plain(error)) from error
    OmegaConf.set_struct(composed, False)
    composed.pop("hydra")
    if filling:
        composed.mesh.data = 1
        composed.mesh.data = _data_ranks(_checked(composed).mesh, processes)
    where = composed.checkpoint.folder
    if where is not None and not str(where).strip():
        raise ValueError(
            "checkpoint.folder is empty: give checkpoint.folder=PATH, checkpoint.folder=URL or "
            "checkpoint.folder=null"
        )
    if where is not None:
        composed.checkpoint.folder = _anywhere(str(where))
    config = _checked(composed)
    if config.resume == "auto" and not chosen:
        folder = _newest_run(folder)
    if config.resume is not None:
        resume, composed.resume = _resumed(config.resume, folder)
        config = replace(config, resume=resume)
    return config, folder, OmegaConf.to_yaml(composed, resolve=True)


def _run_dir(config: Any) -> Any:
    """Hydra's folder of the run as it is written, before ${...} is filled in."""
    run: Any = OmegaConf.to_container(config.hydra.run, resolve=False)
    return run["dir"]


def _resumed(resume: str, folder: Path) -> tuple[str, str]:
    """(what `resume` is to the run in `folder`; with what that run was begun)."""
    begun, _ = begun_with(folder)
    if resume == "auto":
        return "auto", begun or "auto"
    again = begun is not None and _anywhere(begun) == _anywhere(resume)
    return "auto" if again else resume, _anywhere(resume)


def _anywhere(where: str) -> str:
    """A path or URL, for whoever reads it in another folder."""
    return where if "://" in where else str(Path(where).absolute())


@cache
def _store_schemas() -> None:
    """Give Hydra the dataclasses behind the files, once: it keeps them."""
    store = ConfigStore.instance()
    run = OmegaConf.structured(RunConfig)
    run.model = None  # the group says which kind it is, and thereby which keys there are
    store.store(name="run_schema", node=run)
    store.store(group="task", name="segmentation_schema", node=SegmentationConfig)
    store.store(group="task", name="reconstruction_schema", node=ReconstructionConfig)
    store.store(group="task", name="classification_schema", node=ClassificationConfig)
    store.store(group="task", name="panoptic_schema", node=PanopticConfig)
    for kind, schema in KINDS.items():
        store.store(group="model", name=f"{kind}_schema", node=schema)
    for name in list_models():  # model=NAME, beside the files of configs/model
        store.store(group="model", name=name, node=model_config(name))


def _data_ranks(mesh: MeshConfig, processes: int | None) -> int:
    """As many as the processes that are there make: after a loss of machines, fewer."""
    if processes is None:
        raise ValueError("mesh.data=auto: needs torchrun or deepspeed, allowed is a whole number")
    if processes % mesh.size:
        raise ValueError(
            f"mesh.data=auto: {processes} processes were started, allowed are multiples of "
            f"{mesh.size} (row x col x tensor)"
        )
    return processes // mesh.size


def _newest_run(folder: Path) -> Path:
    """The newest run beside `folder`, which is named by the time; `folder` where there is none."""
    siblings = folder.parent.iterdir() if folder.parent.is_dir() else ()
    runs = [path for path in siblings if (path / "config.yaml").exists()]
    return max(runs, key=lambda path: path.name, default=folder)


def _checked(composed: DictConfig) -> RunConfig:
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ValueError(f"{missing[0]} is not set: give {missing[0]}=...")
    _refuse_unknown(composed, "")
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ValueError(_plain(error)) from error
    assert isinstance(config, RunConfig)
    return config


def _refuse_unknown(given: Any, prefix: str) -> None:
    """Hydra's `+key=value` adds keys that no dataclass has: nothing would read them."""
    schema = OmegaConf.get_type(given)
    if not isinstance(given, DictConfig) or not is_dataclass(schema):
        return
    allowed = [field.name for field in fields(schema)]
    for key, value in given.items():
        path = prefix + str(key)
        if key not in allowed:
            raise ValueError(f"unknown key {path}: allowed are {allowed}")
        _refuse_unknown(value, f"{path}.")


def config_folder() -> Path:
    """`configs/`: inside the package when it was installed, beside it in a checkout."""
    package = Path(axialtrain.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _unknown(error: Exception, overrides: Sequence[str]) -> str | None:
    """What to say of a key that is not there beside those that the chosen groups have."""
    unknown = re.search(r"Could not override '([\w.]+)'", str(error))
    if unknown is None:
        return None
    groups = [path.name for path in config_folder().iterdir() if path.is_dir()]
    groups.append("hydra.searchpath")  # where a group's own files may be
    node: Any = compose("train", [one for one in overrides if one.partition("=")[0] in groups])
    path = ""
    for key in unknown[1].split("."):
        path = f"{path}.{key}".removeprefix(".")
        if not isinstance(node, DictConfig) or key not in node:
            break
        node = node[key]
    allowed = f": allowed are {sorted(map(str, node))}" if isinstance(node, DictConfig) else ""
    return f"unknown key {path}{allowed}"


def _plain(error: Exception) -> str:
    """Hydra's message without the lines that speak of its own classes and search path."""
    text = str(error)
    if isinstance(error.__cause__, OmegaConfBaseException):
        text += f"\n{error.__cause__.msg}"  # why a value was not taken
    text = re.sub(r"\s*\w+_schema\n", "\n", text)  # the dataclasses behind the options
    text = re.sub("To sweep over it, .*", "Sweeps are not offered: start run after run", text)
    text = text.replace(" is not a ListConfig, list or tuple", ", allowed is a list, [...]")
    lines = [line.strip() for line in text.splitlines()]
    noise = (
        "full_key:",
        "object_type=",
        "reference_type=",
        "To append",
        "Set the env",
        "Config search",
        "provider=",
    )
    return "; ".join(line for line in lines if line and not line.startswith(noise))
