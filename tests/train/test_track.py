"""What a run leaves for people: lines, pictures, and a W&B run that never stands in its way."""

import builtins
import json
import logging
import time

import numpy as np
import pytest
import wandb
from matplotlib.image import imread

from axialtrain.tasks.panels import Panel
from axialtrain.train.checkpoint import identity_in
from axialtrain.train.track import LoggerConfig, Tracker


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A user who has no W&B account and is not there to answer."""

    def asked(*_):
        raise AssertionError("a question was asked")

    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home" / "wandb"))
    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setattr("getpass.getpass", asked)


def track(folder, mode):
    """A short run's worth of what a tracker is told."""
    folder.mkdir()
    tracker = Tracker(LoggerConfig(mode), folder, "mine", "train: {steps: 2}")
    tracker.log(1, {"loss": 2.0, "lr": 0.1})
    tracker.log(2, {"loss": 1.5, "lr": 0.2, "miou": 0.25})
    pixels = np.zeros((6, 4, 3), np.uint8)
    pixels[..., 0] = 255
    tracker.prediction([Panel("image", pixels), Panel("prediction", pixels)], "after 2 steps")
    tracker.close()
    return tracker


def assert_left(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 2.0, "lr": 0.1},
        {"step": 2, "loss": 1.5, "lr": 0.2, "miou": 0.25},
    ]
    for name in ("loss.png", "prediction.png"):
        picture = imread(folder / name)
        assert min(picture.shape[:2]) > 100
        assert picture.std() > 0.01
    assert not list(folder.glob("*.tmp*"))


def test_without_wandb_there_are_lines_and_pictures(nobody, tmp_path):
    track(tmp_path / "run", "disabled")
    assert_left(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".lock",
        "config.yaml",
        "metrics.jsonl",
        "loss.png",
        "prediction.png",
    }


def test_lines_are_there_while_the_run_goes_on(nobody, tmp_path):
    tracker = Tracker(LoggerConfig("disabled"), tmp_path, "mine", "")
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0})
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "auto"])
def test_wandb_runs_offline_without_a_question(mode, nobody, tmp_path):
    tracker = track(tmp_path / "run", mode)
    assert_left(tmp_path / "run")
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    limit = time.monotonic() + 60
    while b"miou" not in kept.read_bytes():  # W&B's own process may write when the run has ended
        assert time.monotonic() < limit, kept.read_bytes()
        time.sleep(0.05)
    pictures = [path.name.split("_")[0] for path in kept.parent.glob("files/media/images/*.png")]
    assert sorted(pictures) == ["loss", "prediction"]
    assert tracker._wandb.settings.mode == "offline"
    assert tracker._wandb.name == "mine"
    assert dict(tracker._wandb.config) == {"train": {"steps": 2}}


def test_the_environment_can_turn_wandb_off(nobody, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert track(tmp_path / "run", "offline")._wandb is None
    assert_left(tmp_path / "run")


@pytest.mark.parametrize("error", [wandb.errors.CommError("no answer"), OSError(28, "no space")])
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_wandb_that_does_not_start_does_not_fail_the_run(
    mode, error, nobody, tmp_path, monkeypatch, caplog
):
    attempts = []

    def init(**options):
        attempts.append(options["mode"])
        raise error

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", init)
    with caplog.at_level(logging.WARNING, "axialtrain"):
        track(tmp_path / "run", mode)
    assert_left(tmp_path / "run")
    assert attempts == list(dict.fromkeys([mode, "offline"]))
    assert str(error) in caplog.text


def test_a_wandb_that_is_not_reached_goes_on_offline(nobody, tmp_path, monkeypatch):
    start = wandb.init

    def init(**options):
        if options["mode"] == "online":
            raise wandb.errors.CommError("no answer")
        return start(**options)

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", init)
    assert track(tmp_path / "run", "online")._wandb.settings.mode == "offline"
    assert_left(tmp_path / "run")


def test_a_mode_that_is_none_is_named():
    with pytest.raises(ValueError, match=r"logger\.mode='loud': allowed are .*offline"):
        LoggerConfig("loud")


def test_a_key_that_is_none_is_no_login(nobody, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "foo")
    assert track(tmp_path / "run", "online")._wandb.settings.mode == "offline"
    assert_left(tmp_path / "run")


@pytest.mark.parametrize("mode", ["sometimes", "offline"])
def test_disabled_in_the_config_wins(mode, nobody, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", mode)
    assert track(tmp_path / "run", "disabled")._wandb is None


def test_a_wandb_that_stops_midway_is_dropped(nobody, tmp_path, monkeypatch, caplog):
    tracker = Tracker(LoggerConfig("offline"), tmp_path, "mine", "")
    run = tracker._wandb

    def log(*_, **__):
        raise wandb.errors.CommError("gone")

    monkeypatch.setattr(run, "log", log)
    with caplog.at_level(logging.WARNING, "axialtrain"):
        tracker.log(1, {"loss": 1.0})
        tracker.log(2, {"loss": 1.0})
    assert caplog.text.count("gone") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    run.finish()


def quiet(folder, resumed=0):
    return Tracker(LoggerConfig("disabled"), folder, "mine", "", resumed=resumed)


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("axialtrain.train.track.PATIENCE", 0.1)
    first = quiet(tmp_path)
    with pytest.raises(ValueError, match=r"hydra\.run\.dir=.*another run writes there"):
        quiet(tmp_path)
    first.close()
    quiet(tmp_path).close()


def keeping(folder, checkpoints):
    folder.mkdir(parents=True, exist_ok=True)
    run_yaml = f"checkpoint: {{folder: {checkpoints}}}"
    return Tracker(LoggerConfig("disabled"), folder, "mine", run_yaml)


@pytest.mark.parametrize("given", [None, "ck"])
def test_two_runs_do_not_share_a_folder_of_checkpoints(given, tmp_path, monkeypatch):
    """Not one that was given, and not that of a run which was given none."""
    monkeypatch.setattr("axialtrain.train.track.PATIENCE", 0.1)
    where = tmp_path / given if given else tmp_path / "one" / "checkpoints"
    first = keeping(tmp_path / "one", where if given else "null")
    said = rf"checkpoint\.folder={where}: another run writes there: the one in {tmp_path / 'one'}$"
    with pytest.raises(ValueError, match=said):
        keeping(tmp_path / "two", where)
    assert [path.name for path in (tmp_path / "two").iterdir()] == [".lock"], "it began nothing"
    first.close()
    keeping(tmp_path / "two", where).close()
    assert [path.name for path in where.iterdir()] == [".lock"]


def test_a_run_may_keep_its_checkpoints_in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("axialtrain.train.track.PATIENCE", 0.1)
    keeping(tmp_path / "one", tmp_path / "one").close()
    keeping(tmp_path / "one", "s3://bucket/run").close()  # which cannot be locked


def test_the_folder_says_with_what_a_run_was_begun_before_it_is_one(tmp_path, monkeypatch):
    """Killed while W&B starts, it is begun again with the same (`resume.found`)."""

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("axialtrain.train.track._cut", killed)
    with pytest.raises(KeyboardInterrupt):
        Tracker(LoggerConfig("disabled"), tmp_path, "mine", "resume: /other")
    assert (tmp_path / "config.yaml").read_text() == "resume: /other"
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_folder_says_which_run_it_is_of(tmp_path):
    tracker = quiet(tmp_path)
    assert identity_in(tmp_path) is None, "before it has saved"
    for identity in ("1" * 32, "0" * 32):
        tracker.identify(identity)
        assert identity_in(tmp_path) == identity
    (tmp_path / ".run-id").write_text("not one of ours")
    assert identity_in(tmp_path) is None


def test_a_resumed_run_drops_the_lines_of_steps_that_it_takes_again(tmp_path):
    tracker = quiet(tmp_path)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": float(step)})
    tracker.fault({"step": 1, "fault": "spike"})
    tracker.fault({"step": 3, "fault": "nonfinite", "loss": float("nan")})
    assert json.loads((tmp_path / "faults.jsonl").read_text().splitlines()[1])["loss"] == "nan"
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 2, "lo')  # killed in the middle of a line

    tracker = quiet(tmp_path, resumed=2)
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2]
    assert steps_in(tmp_path / "faults.jsonl") == [1]
    tracker.log(3, {"loss": float("nan")})
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[2])["loss"] is None
    tracker.close()


def test_loss_png_says_that_the_run_came_to_its_end(tmp_path):
    tracker = quiet(tmp_path)
    assert not tracker.closed
    tracker.close()
    tracker = quiet(tmp_path)
    assert tracker.closed
    tracker.reopen()
    assert not tracker.closed
    tracker.close()


def test_wandb_shows_a_resumed_run_as_one(nobody, tmp_path):
    identities = []
    for _ in range(2):
        tracker = Tracker(LoggerConfig("offline"), tmp_path, "mine", "")
        identities.append(tracker._wandb.id)
        tracker.close()
    assert identities[0] == identities[1]
