"""Which checkpoint a run goes on from: its own, or what it was begun with, and no other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from small_checkpoints import a_run, checkpointed

from axialtrain.train.check import _check_new
from axialtrain.train.checkpoint import MARKER, Owner, newest
from axialtrain.train.config import CheckpointConfig
from axialtrain.train.resume import found

MINE, OTHER = "a" * 32, "b" * 32


def begun(folder, identity=None, **config):
    """A run's folder, as it is before the first save."""
    folder.mkdir(exist_ok=True)
    values = {"checkpoint": {"folder": None}, "resume": "auto", "init": None} | config
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    if identity is not None:
        (folder / ".run-id").write_text(identity)
    return folder


def look(folder, checkpoints=None, **config):
    """What resume=auto finds: (where, what is said of it)."""
    run = replace(a_run(), resume="auto", checkpoint=CheckpointConfig(folder=checkpoints), **config)
    saved, problems = found(run, folder, verify=True)
    return (None if saved is None else saved.where), problems


def a_checkpoint(run, step=17, owner=None):
    return checkpointed(run, a_run(), {}, step=step, owner=owner)


# --- A run that was ended before its first save ---------------------------------------------------


def test_it_is_begun_again_with_what_it_was_begun_with(tmp_path):
    other = a_checkpoint(tmp_path / "other")
    run = begun(tmp_path / "run", resume=str(tmp_path / "other"))
    where, (said,) = look(run)
    assert where == other
    assert said == f"{run} has no checkpoint yet: begun again with {tmp_path / 'other'}"
    own = a_checkpoint(run, step=18)
    assert look(run) == (own, []), "it goes on by itself, whatever became of the other"


def test_it_is_not_begun_with_nothing_instead(tmp_path):
    run = begun(tmp_path / "run", resume=str(tmp_path / "gone"))
    said = f"resume={tmp_path / 'gone'}, with which the run in {run} was begun: holds no complete"
    with pytest.raises(ValueError, match=said):
        look(run)


def test_nor_without_its_weights(tmp_path):
    run = begun(tmp_path / "run", init="weights.pth")
    said = rf"^init=None: the run in {run} was begun with init=weights\.pth and has no checkpoint"
    with pytest.raises(ValueError, match=said):
        look(run)
    with pytest.raises(ValueError, match=r"^init=other\.pth: the run in .* was begun with"):
        look(run, init="other.pth")
    assert look(run, init="weights.pth") == (None, [])
    own = a_checkpoint(run)
    assert look(run) == (own, []), "which has them"


@pytest.mark.parametrize("text", ["", "[1]", "resume: [1]\ninit: 3\n", "resume: auto\n", "{"])
def test_a_folder_that_says_nothing_begins_with_nothing(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    assert look(tmp_path) == (None, [])


def test_where_a_start_was_cut_short_is_a_new_folder(tmp_path):
    """Killed before it said with what it was begun, it can be given the same command again."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".lock").touch()
    _check_new(tmp_path)
    (tmp_path / "checkpoints" / "step-00000001").mkdir()
    with pytest.raises(ValueError, match="holds the checkpoints of a run"):
        _check_new(tmp_path)


# --- A folder of checkpoints that another run has -------------------------------------------------


def test_checkpoints_of_another_run_are_not_taken_over(tmp_path):
    """By one that lost against it, say, and is started again."""
    owner = Owner(OTHER, str(tmp_path / "winner"))
    place = str(tmp_path / "ck")
    a_checkpoint(place, owner=owner)
    run = begun(tmp_path / "run", MINE, checkpoint={"folder": place})
    said = f"^checkpoint.folder={place}: holds checkpoints of the run in {owner.folder}, not of"
    with pytest.raises(ValueError, match=said):
        look(run, place)


@pytest.mark.parametrize(
    ("identity", "owner"),
    [
        (MINE, Owner(MINE, "/moved/from/here")),  # requeued, on another mesh, in a moved folder
        (None, Owner(OTHER, "/on/another/machine")),  # that has nothing but its checkpoints
        (MINE, Owner(OTHER, "{}")),  # in a folder of the same name, of a disk of another machine
        (MINE, None),  # saved before checkpoints said whose they are
    ],
)
def test_a_run_goes_on_wherever_its_folder_is(identity, owner, tmp_path):
    place, folder = str(tmp_path / "ck"), tmp_path / "run"
    if owner is not None:
        owner = replace(owner, folder=owner.folder.format(folder))
    where = a_checkpoint(place, owner=owner)
    folder.mkdir()
    if identity is not None:
        begun(folder, identity, checkpoint={"folder": place})
    assert look(folder, place) == (where, [])


def test_checkpoints_that_somebody_put_into_the_runs_own_folder_are_its_own(tmp_path):
    run = begun(tmp_path / "run", MINE)
    where = a_checkpoint(run, owner=Owner(OTHER, "/elsewhere"))
    assert look(run) == (where, [])


@pytest.mark.parametrize(
    "run", [3, [], {}, {"identity": "../x", "folder": "y"}, {"identity": MINE, "folder": "\x1b[2J"}]
)
def test_an_owner_from_strangers_is_none(run, tmp_path):
    where = a_checkpoint(tmp_path)
    marker = Path(where) / MARKER
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"run": run}))
    assert newest(tmp_path).owner is None
