"""What happens between optimizer steps so that nothing is lost: saving when it is due, ending when
the run is told to, and what becomes of a step that should not count."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from axialtrain.mesh.collectives import gather_objects, max_over
from axialtrain.train.alike import BadStepError, RefusedError
from axialtrain.train.checkpoint import Owner, find, identity_in
from axialtrain.train.faults import policy_of, told
from axialtrain.train.progress import Progress
from axialtrain.train.resume import agreed, pixels_of, state_of, take_over
from axialtrain.train.save import Checkpoints
from axialtrain.train.signals import Interrupted, Signals

if TYPE_CHECKING:
    from axialtrain.train.loop import Run

LOG = logging.getLogger(__name__)


class Keeper:
    """Keeps a run's state in `checkpoints`. signals: notes what tells this process to end.

    Every method but `stalled` is collective.
    """

    def __init__(self, checkpoints: Checkpoints, signals: Signals) -> None:
        self._stalled = 0.0
        self._checkpoints = checkpoints
        self._signals = signals
        self._owner: Owner | None = None  # this run, on rank 0
        self._saved: int | None = None  # the last step that was saved, or tried

    def begin(self, run: Run) -> None:
        """Save before the first step what a fault may ask for, or what came from another folder:
        a run that is killed now must find it in its own. Nothing is saved before it is known whose
        it is: that of the checkpoint that is gone on from, wherever the run's folder is now."""
        owner = None
        if run.tracker is not None:
            begun_by, where = self._checkpoints.begun_by, run.tracker.folder.absolute()
            identity = identity_in(where) or uuid.uuid4().hex
            if begun_by is not None:
                identity = begun_by.identity
            owner = Owner(identity, str(where))
        self._owner = owner
        with self._refusal(run):
            self._checkpoints.belong_to(owner)
        policies = (run.config.faults.nonfinite, run.config.faults.spike)
        if ("rollback" in policies or run.progress.step > 0) and self._checkpoints.empty:
            self._save(run, wait=True, must=True)

    def stalled(self) -> float:
        """Seconds for which saving kept training from going on, since this was asked last."""
        stalled, self._stalled = self._stalled, 0.0
        return stalled

    def keep(self, run: Run, *, best: bool, last: bool) -> None:
        """After a step that is complete. best: validation has just found it so.

        Raises Interrupted where the run was told to end, OSError where it could not be saved and
        that is to stop it.
        """
        every, step = run.config.checkpoint.every, run.progress.step
        started = time.perf_counter()
        # One small reduction a step, so that all ranks do the same.
        flags = torch.tensor(
            [float(self._signals.received is not None), float(not self._checkpoints.written)],
            device=run.device,
        )
        ending, writing = max_over(flags, run.mesh.world).bool().tolist()
        due = last or ending or best or (every > 0 and step % every == 0)
        committing = self._checkpoints.under_way and (due or not writing)
        if committing:
            self._commit(run, must=False)
        problem = ""
        if due and self._saved != step:
            try:
                self._save(run, wait=last or ending, must=last or ending)
            except OSError as error:
                if last or not ending:
                    raise
                problem = f"{error}. "
        if due or committing:
            self._stalled += time.perf_counter() - started
        if ending and not last:
            names = gather_objects(self._signals.received, run.mesh.world)
            signal = next(name for name in names if name is not None)
            where = self._checkpoints.folder
            raise Interrupted(
                f"told to end by {signal}: {problem}Step {step} is "
                f"{'lost' if problem else f'saved in {where}'}; resume=auto goes on"
            )

    def leave_out(self, run: Run, fault: str, loss: float, norm: float, samples: list[str]) -> None:
        """A step that changed nothing, because of `fault`. samples: of this data rank.

        Raises BadStepError where that is to stop the run.
        """
        faults, progress = run.config.faults, run.progress
        policy = policy_of(fault, faults)
        every = [name for part in gather_objects(samples, run.mesh.data) for name in part]
        what = told(fault, progress.step, loss, norm, every)
        progress.left_out += 1
        if run.tracker is not None:
            run.tracker.fault(
                {
                    "step": progress.step,
                    "fault": fault,
                    "loss": loss,
                    "grad_norm": norm,
                    "policy": policy,
                    "samples": every,
                }
            )
        if self._checkpoints.under_way:
            self._commit(run, must=False)
        if policy == "stop":
            raise BadStepError(f"{what}. faults.{fault}=stop ends the run")
        if progress.left_out > faults.limit:
            raise BadStepError(
                f"{what}. It is batch {progress.left_out} to be left out, faults.limit is "
                f"{faults.limit}"
            )
        done = "its batch is left out"
        if policy == "rollback":
            folder = self._checkpoints.folder.url
            saved, problems = agreed(lambda: find(folder), run.mesh.world)
            if saved is None:
                said = "; ".join(problems) or "there is none"
                raise BadStepError(f"{what}. No checkpoint to go back to: {said}")
            take_over(saved, run.engine)
            progress.losses = Progress.of_state(saved.state, saved.where).losses
            done += f", and the model is again that of step {saved.step}"
        if run.tracker is not None:
            LOG.warning("%s; %s", what, done)

    def _save(self, run: Run, *, wait: bool, must: bool) -> None:
        """wait: until it counts. must: raise where it cannot be written, whatever is configured."""
        step = run.progress.step
        if run.tracker is not None:
            run.tracker.sync()  # the lines of the steps that the checkpoint has
        self._saved = step
        with self._refusal(run):
            self._checkpoints.begin(run.engine, step, _state(run), run.progress.best_step)
        if wait or not run.config.checkpoint.asynchronous:
            self._commit(run, must=must)

    def _commit(self, run: Run, *, must: bool) -> None:
        try:
            with self._refusal(run):
                self._checkpoints.commit()
            self._say_whose(run)
        except OSError as error:
            if must or run.config.checkpoint.on_error == "stop":
                raise
            if run.tracker is not None:
                LOG.warning("%s; the run goes on (checkpoint.on_error=continue)", error)

    @contextmanager
    def _refusal(self, run: Run) -> Iterator[None]:
        """A run that was refused for another one's checkpoints does not go on with these later."""
        try:
            yield
        except RefusedError:
            self._say_whose(run)
            raise

    def _say_whose(self, run: Run) -> None:
        """In the run's folder, once it has saved: before, it may go on with what others saved."""
        if run.tracker is not None and self._owner is not None:
            run.tracker.identify(self._owner.identity)


def _state(run: Run) -> dict[str, Any]:
    """All that is needed to go on, beside the tensors. What is drawn at random follows from the
    seed, the step and the samples' numbers, so that no generator's state is needed."""
    config, step = run.config, run.progress.step
    return {
        **state_of(config),
        **run.progress.to_state(),
        "updates": run.engine.updates,
        "loss_scale": run.engine.loss_scale,
        "schedule": {**asdict(config.schedule), "lr": config.optim.lr, "steps": config.train.steps},
        "data": {
            **pixels_of(config),
            "order": json.loads(run.loader.state(step).to_json()),
            "windows": [config.data.window, len(run.loader.windows)],
        },
        "saved_on": {
            "mesh": config.mesh.degrees,
            "zero": config.zero.stage,
            "precision": config.train.precision,
        },
    }
