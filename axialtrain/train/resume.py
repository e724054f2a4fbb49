"""Going on from a checkpoint: which one, whether it is of this run, and taking it over."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from axialtrain.data.loader import Loader
from axialtrain.data.order import OrderState
from axialtrain.mesh.collectives import gather_objects
from axialtrain.mesh.mesh import Group
from axialtrain.models.registry import TRANSFORMER, kind_of
from axialtrain.train.alike import RefusedError
from axialtrain.train.checkpoint import (
    FOLDER,
    Saved,
    Tensors,
    begun_with,
    find,
    identity_in,
    kept_in,
    moment_name,
    read,
)
from axialtrain.train.config import RunConfig
from axialtrain.train.optimizer import moment_keys
from axialtrain.train.progress import Progress
from axialtrain.train.storage import Folder

if TYPE_CHECKING:  # what is refused is refused before DeepSpeed is imported
    from axialtrain.train.engine import Engine

T = TypeVar("T")

SEEN = "images_at_a_time"  # key of a checkpoint's state, for models with batch norms


def folder_of(config: RunConfig, run_folder: Path) -> str:
    """Where the run keeps its checkpoints."""
    return config.checkpoint.folder or str(run_folder / FOLDER)


def found(config: RunConfig, run_folder: Path, *, verify: bool) -> tuple[Saved | None, list[str]]:
    """(the checkpoint that `resume` means, or None; what is wrong with those passed over).

    None with resume=auto where the run has none yet, unless it was begun by going on from another:
    then it does so again. verify: read all of it.
    Raises ValueError where `resume` names what holds none, or all are damaged, or they are of
    another run; OSError where the place does not answer.
    """
    if config.resume is None:
        return None, []
    if config.resume == "auto":
        folder = folder_of(config, run_folder)
        before = kept_in(run_folder)
        if before is not None and before != folder:
            raise ValueError(
                f"checkpoint.folder={config.checkpoint.folder}: the run in {run_folder} keeps its "
                f"checkpoints in {before}, allowed is the same"
            )
        saved, problems = find(folder, verify=verify)
        if saved is None and problems:
            raise ValueError(
                f"resume=auto: {'; '.join(problems)}. No checkpoint in {folder} is whole: to begin "
                "anew, give another hydra.run.dir (and checkpoint.folder)"
            )
        if saved is None:
            return _begun_again(config, run_folder, verify=verify)
        _check_owner(saved, config, run_folder)
        return saved, problems
    return _named(config.resume, f"resume={config.resume}", verify=verify)


def _named(resume: str, said: str, *, verify: bool) -> tuple[Saved | None, list[str]]:
    """The checkpoint of a run or at a place. said: how an error begins."""
    try:
        saved, problems = find(resume, verify=verify)
    except (ValueError, ImportError) as error:  # of a URL
        raise ValueError(f"{said}: {error}") from error
    if saved is None:
        raise ValueError(f"{said}: {'; '.join(problems) or 'holds no complete checkpoint'}")
    return saved, problems


def _begun_again(
    config: RunConfig, run_folder: Path, *, verify: bool
) -> tuple[Saved | None, list[str]]:
    """Of a run that was ended before its first save: what it was begun with counts."""
    resume, init = begun_with(run_folder)
    if resume is not None:
        said = f"resume={resume}, with which the run in {run_folder} was begun"
        saved, problems = _named(resume, said, verify=verify)
        return saved, [*problems, f"{run_folder} has no checkpoint yet: begun again with {resume}"]
    if init is not None and config.init != init:
        raise ValueError(
            f"init={config.init}: the run in {run_folder} was begun with init={init} and has no "
            "checkpoint yet, allowed is the same; to begin otherwise, give another hydra.run.dir"
        )
    return None, []


def _check_owner(saved: Saved, config: RunConfig, run_folder: Path) -> None:
    """Refuse what another run has saved into the `checkpoint.folder` of this one.

    A run's folder that is new becomes that of the run whose checkpoints are there, as on another
    machine. It may also be another one at the same path: of each machine's own disk.
    """
    identity, owner = identity_in(run_folder), saved.owner
    if config.checkpoint.folder is None or None in (identity, owner):
        return
    assert owner is not None
    if owner.identity != identity and owner.folder != str(run_folder.absolute()):
        raise ValueError(
            f"checkpoint.folder={config.checkpoint.folder}: holds checkpoints of the run in "
            f"{owner.folder}, not of that in {run_folder}: allowed is another one; to go on with "
            "them, give the hydra.run.dir of that run, or a new one"
        )


def agreed(
    look: Callable[[], tuple[Saved | None, list[str]]], world: Group
) -> tuple[Saved | None, list[str]]:
    """What `look` finds on rank 0, which alone reads all of it, for everybody. Collective.

    Raises RefusedError, on every rank, where it raises ValueError or OSError there.
    """

    def here() -> tuple[str | None, list[str]]:
        saved, problems = look()
        return (saved.where if saved else None), problems

    where, problems = told(here, world)
    return (None if where is None else read(Folder(where))), problems


def told(ask: Callable[[], T], world: Group) -> T:
    """What `ask` returns on rank 0, which alone calls it, on every rank. Collective.

    Raises RefusedError, on every rank, where it raises ValueError or OSError there.
    """
    answer: tuple[T | None, str] = (None, "")
    if world.rank == 0:
        try:
            answer = (ask(), "")
        except (ValueError, OSError) as error:
            answer = (None, str(error) or type(error).__name__)
    value, wrong = gather_objects(answer, world)[0]
    if wrong:
        raise RefusedError(wrong)
    return cast(T, value)


def check_fits(saved: Saved, config: RunConfig, loader: Loader) -> None:
    """Refuse a checkpoint of another model, task, optimizer or order of samples.

    Mesh, ZeRO stage, precision, learning rate and the length of the run may differ. Of a model with
    batch norms the images that are seen at a time may not: a step depends on them.
    Raises ValueError that names the key, the value and what is allowed.
    """
    state, where = saved.state, saved.where
    mine = {**state_of(config), "data": pixels_of(config)}
    theirs = {key: state.get(key) for key in mine}
    theirs["data"] = _part_of(state.get("data"), mine["data"])
    if isinstance(theirs["model"], Mapping):
        kind, saved_kind = kind_of(config.model), theirs["model"].get("name", TRANSFORMER)
        if kind != saved_kind:
            raise ValueError(
                f"model: is an {kind}, {where} was saved with an {saved_kind}, allowed is the same"
            )
    here, there = mine.pop(SEEN, None), theirs.pop(SEEN, None)
    if here != there:
        raise ValueError(
            f"train.micro_batch={config.train.micro_batch} with mesh.data={config.mesh.data}: the "
            f"model's batch norms see {here} images at a time, {where} was saved with {there}: "
            "allowed are two numbers of that product"
        )
    for name, (here, there) in _differences("", mine, theirs).items():
        raise ValueError(f"{name}={here}: {where} was saved with {there}, allowed is the same")
    Progress.of_state(state, where)
    updates = state.get("updates")
    if not isinstance(updates, int) or not 0 <= updates <= saved.step:
        raise ValueError(f"{where}: updates is {updates!r}, allowed is 0 to {saved.step}")
    try:
        order = OrderState.from_json(json.dumps(state["data"]["order"]), f"{where}: data.order")
        windows = state["data"]["windows"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: does not say where its data stands ({error!r})") from error
    if order.next_index != saved.step * config.train.batch:
        raise ValueError(f"{where}: step {saved.step} and its samples do not go together")
    if config.checkpoint.new_data:
        return
    hint = "; checkpoint.new_data=true goes on all the same"
    try:
        loader.resume(order)
    except ValueError as error:
        raise ValueError(f"resume={config.resume}: {error}{hint}") from error
    if windows != [config.data.window, len(loader.windows)]:
        raise ValueError(
            f"data.window={config.data.window}: {where} was saved with {windows[0]}{hint}"
        )


def state_of(config: RunConfig) -> dict[str, Any]:
    """What a run must have in common with one that it goes on from."""
    state: dict[str, Any] = {
        "seed": config.seed,
        "model": asdict(config.model),
        "task": asdict(config.task),
        "optim": {"name": config.optim.name, "moments": list(moment_keys(config.optim))},
        "train": {"batch": config.train.batch},
    }
    if config.model.batch_norm:
        state[SEEN] = config.train.micro_batch * config.mesh.data
    return state


def pixels_of(config: RunConfig) -> dict[str, Any]:
    """How pixels become numbers."""
    data = config.data
    return {"mean": data.mean, "std": data.std, "bands": data.bands}


def take_over(saved: Saved, engine: Engine) -> None:
    """Weights, moments and buffers of `saved`, into an engine on any mesh.

    Raises ValueError, before anything is changed, where the tensors are not the model's.
    """
    with saved.opened() as tensors:
        _check_tensors(saved, tensors, engine)
        engine.load(tensors.weight, tensors.moment, saved.state["updates"])


def _check_tensors(saved: Saved, tensors: Tensors, engine: Engine) -> None:
    there = {name: tuple(tensors.shape(name)) for name in tensors.weight_names}
    here = {name: tuple(shape) for name, shape in engine.shapes.items()}
    for name in sorted(there.keys() ^ here.keys()):
        who = "the checkpoint" if name in there else "the model"
        raise ValueError(f"{saved.where}: only {who} has {name}: it is of another model")
    for name, shape in here.items():
        if there[name] != shape:
            raise ValueError(f"{saved.where}: {name} is {there[name]}, the model's is {shape}")
    needed = {moment_name(name, key) for name, keys in engine.moments_of.items() for key in keys}
    if missing := sorted(needed - set(tensors.moment_names)):
        raise ValueError(f"{saved.where}: has no {missing[0]}: its optimizer is another")


def _differences(key: str, here: Any, there: Any) -> dict[str, tuple[Any, Any]]:
    """{key: (here, there)} of the values that differ, down to the key that does."""
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for name in here.keys() | there.keys():
            path = f"{key}.{name}" if key else name
            found |= _differences(path, here.get(name), there.get(name))
        return dict(sorted(found.items()))
    return {} if here == there else {key: (here, there)}


def _part_of(values: Any, like: Mapping[str, Any]) -> Any:
    return {key: values.get(key) for key in like} if isinstance(values, Mapping) else values
