"""The damage that a run meets in what it reads: agreed on by all ranks, and within a budget."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace

import torch

from axialtrain.data.batch import Batch
from axialtrain.data.damage import Damage, DamageConfig
from axialtrain.mesh.collectives import gather_objects, max_over
from axialtrain.mesh.mesh import Mesh
from axialtrain.tasks.segmentation import IGNORE
from axialtrain.train.alike import DamagedError
from axialtrain.train.track import DAMAGES, Tracker

LOG = logging.getLogger(__name__)
SHOWN = 8  # pieces of damage that a message repeats


class Damages:
    """What `data.damage` asks for, in the loop.

    tracker: of the first rank, None on the others; it keeps the damage, and knows what was found
    before a run was continued. Made on all ranks at once.
    """

    def __init__(
        self, config: DamageConfig, mesh: Mesh, tracker: Tracker | None, device: torch.device
    ) -> None:
        self.config = config
        self._mesh = mesh
        self._device = device
        self._tracker = tracker
        self._met: list[Damage] = []  # on this rank, since ranks agreed
        self._known: dict[tuple[str, str, int, int], Damage] = {}  # on all ranks alike
        if config.policy != "raise":
            before = gather_objects([] if tracker is None else tracker.damages, mesh.world)[0]
            self._known = {damage.key: damage for damage in before}

    @property
    def tiles(self) -> int:
        """How many different tiles are left out so far."""
        return sum(damage.tiles for damage in self._known.values())

    @property
    def images(self) -> int:
        """How many images are left out so far."""
        every = self.config.policy == "skip_image"
        return len({d.image for d in self._known.values() if every or d.part == "image"})

    def settle(self, batch: Batch, *, held_out: bool = False) -> Batch:
        """The batch as it counts; held_out: of validation, whose images may have the names of
        others. With the policy skip_image, samples that meet damage on any rank
        are those of a filler. Collective with that policy, and on a tensor axis."""
        if self.config.policy == "raise":
            return batch
        found = [damage for sample in batch.faults for damage in sample]
        if held_out:
            found = [replace(damage, image=f"validation/{damage.image}") for damage in found]
        self._met += found
        counts = torch.tensor([len(sample) for sample in batch.faults])
        counts = counts.to(batch.weight.device, non_blocking=True)
        if self._mesh.tensor.size > 1:
            ends = max_over(torch.stack((counts, -counts)).float(), self._mesh.tensor)
            if not torch.equal(ends[0], -ends[1]):
                raise ValueError(
                    f"one of {', '.join(batch.ids)} is damaged for one of the tensor ranks, which "
                    f"read the same bytes, and not for another: {self._met}. A disk, a cache or "
                    "memory is at fault: it would not be the same the next time"
                )
        if self.config.policy == "mask":
            return batch
        keep = max_over(counts.float(), self._mesh.spatial) == 0
        if bool(keep.all()):
            return batch
        pixels = keep[:, None, None]
        # In place: pixels of a gigapixel that wait on the host have no room for a copy.
        batch.pixels[~keep.to(batch.pixels.device)] = 0.0
        return replace(
            batch,
            labels=None if batch.labels is None else batch.labels.where(pixels, IGNORE),
            present=batch.present & pixels,
            valid=batch.valid & pixels,
            weight=batch.weight * keep,
            instances=None if batch.instances is None else batch.instances.where(pixels, 0),
        )

    def agree(self, step: int) -> None:
        """After the batches of a step, counted from 1: collective.

        Raises DamagedError, on all ranks alike, where more is damaged than a run may leave out.
        """
        if self.config.policy == "raise":
            return
        some = torch.tensor([float(bool(self._met))], device=self._device)
        if not max_over(some, self._mesh.world).item():
            return
        parts = gather_objects(self._met, self._mesh.world)
        self._met = []
        new = {d.key: d for part in parts for d in part if d.key not in self._known}
        if not new:
            return
        found = sorted(new.values())
        self._known |= new
        if self._tracker is not None:
            self._tracker.damage([{"step": step, **asdict(damage)} for damage in found])
            for damage in found[:SHOWN]:
                LOG.warning("step %d: left out, as it is damaged: %s", step, damage)
        for key, count, most in (
            ("tiles", self.tiles, self.config.tiles),
            ("images", self.images, self.config.images),
        ):
            if count > most:
                listed = "; ".join(map(str, found[:SHOWN]))
                more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
                raise DamagedError(
                    f"step {step}: {count} {key} are damaged, data.damage.{key} is {most}. "
                    f"{DAMAGES} in the run's folder lists them; found last: {listed}{more}"
                )
