"""From shards to the batches of one rank: its own part of the windows of its own data rank.

Which window stands where in which batch follows from (seed, optimizer step) alone; the mesh only
says who reads which part of it. So the union of what all ranks read is, on every mesh, what one
process reads. There is no collective here.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from axialtrain.data.augment import Drawn, draw, sizes_shown
from axialtrain.data.batch import Batch, pinned
from axialtrain.data.colours import Colours
from axialtrain.data.config import DataConfig
from axialtrain.data.damage import Damage
from axialtrain.data.mixing import MixedShards
from axialtrain.data.normalise import Normalise, normalisation
from axialtrain.data.order import OrderState, Stream
from axialtrain.data.region import Shards
from axialtrain.data.store import UNLABELLED
from axialtrain.data.streams import stream_of, windows_of
from axialtrain.data.strips import put, strips
from axialtrain.data.tile_reader import TileReader
from axialtrain.data.tile_windows import TileWindows
from axialtrain.data.turns import View
from axialtrain.data.windows import Window, Windows
from axialtrain.grid import Place, tokens_across


@dataclass(frozen=True)
class _Slot:
    """One place in a micro-batch: which window, under which index, and whether it counts; what
    was drawn for it, and what of its image it shows therefore."""

    window: Window
    sample: int
    filler: bool
    drawn: Drawn
    view: View


def memory_bytes() -> int:
    """Of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def default_workers(prefetch: int) -> int:
    """Threads that read and decode on one of the ranks of this machine, where nobody has said.

    The rank's share of the cores, but for one, on which it computes; and not more than there are
    batches to be read at a time.
    """
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # of torchrun and our launcher; of deepspeed
    ranks = next((int(os.environ[name]) for name in names if name in os.environ), 1)
    return max(1, min(len(os.sched_getaffinity(0)) // ranks - 1, prefetch + 1))


class Steps:
    """Optimizer steps, each an iterator of its micro-batches, which are read as they are taken.

    A step must be taken to its end before the next. `close`, or an error in reading, ends the
    threads that read; so does dropping it and its steps.
    """

    def __init__(
        self, batches: Generator[Batch, None, None], steps: int, accumulation: int
    ) -> None:
        self._batches = batches
        self._steps = steps
        self._accumulation = accumulation
        self._left = 0  # micro-batches of the step that was handed out last

    def __iter__(self) -> Steps:
        return self

    def __next__(self) -> Iterator[Batch]:
        if self._left:
            raise RuntimeError(f"{self._left} micro-batches of the step before are not taken yet")
        if self._steps <= 0:
            self.close()
            raise StopIteration
        self._steps -= 1
        self._left = self._accumulation
        return self._step()

    def close(self) -> None:
        self._batches.close()

    def _step(self) -> Iterator[Batch]:
        while self._left:
            self._left -= 1
            yield next(self._batches)  # none of ours is kept while the next one is read


class Loader:
    """The batches of one rank.

    shards, config: what is read and how. patch: px of a token. mesh_shape: (row, col) of the mesh,
    at: this rank's coordinates in it. data_rank of data_ranks: which samples are this rank's.
    batch: samples of one optimizer step over all ranks; micro_batch: of one data rank at a time.

    pin: whether batches lie in memory that is copied to a GPU while it computes. dtype: of the
    pixels, which a model in bf16 would round all the same. lean: read strip by strip (`strips`).

    accumulation: micro-batches of one optimizer step. bands: of its batches. bytes_read,
    tiles_decoded: for the batches that were handed out. ValueError, alike on all ranks, if the
    images are not of one kind of pixels, or mean, std, bands or augment not for that kind; if the
    windows are too many, if any one's grid is smaller than the mesh, or if what a rank holds of
    them is more than a machine's memory.
    """

    def __init__(
        self,
        shards: Shards | MixedShards,
        config: DataConfig,
        *,
        patch: int,
        mesh_shape: tuple[int, int],
        at: tuple[int, int],
        data_rank: int,
        data_ranks: int,
        batch: int,
        micro_batch: int,
        seed: int,
        pin: bool = False,
        dtype: torch.dtype = torch.float32,
        lean: bool = False,
    ) -> None:
        for key, value in (
            ("patch", patch),
            ("batch", batch),
            ("micro_batch", micro_batch),
            ("data_ranks", data_ranks),
        ):
            if value < 1:
                raise ValueError(f"{key} is {value}, allowed is at least 1")
        assert 0 <= data_rank < data_ranks, (data_rank, data_ranks)
        self.shards = shards
        self.config = config
        self.patch = patch
        self.mesh_shape = mesh_shape
        self.at = at
        self.data_rank = data_rank
        self.data_ranks = data_ranks
        self.batch = batch
        self.micro_batch = micro_batch
        self._pin = pin
        self._dtype = dtype
        self._lean = lean
        self.accumulation = -(-batch // (micro_batch * data_ranks))
        normalise = Normalise(shards.kind, *normalisation(shards, config), config.bands)
        self.bands = normalise.kind.bands
        self._colours = Colours(config.augment, normalise)
        self.windows: Windows | TileWindows
        self.order: Stream
        self._reader: Shards | MixedShards | TileReader = shards
        if config.tiles.each:
            self.windows = TileWindows(shards, config.tiles, mesh_shape)
            self.order, self._plan = self.windows.order(seed), self.windows.plan
            self._reader = self.windows.reader
        else:
            self.windows = windows_of(shards, config)
            self.order, self._plan = stream_of(
                shards, self.windows, config, seed=seed, batch=batch, patch=patch
            )
        self.bytes_read = 0
        self.tiles_decoded = 0
        self.grids = self._check_sizes()

    def steps(self, first: int, last: int) -> Steps:
        """For each optimizer step first..last-1, its micro-batches on this data rank."""
        jobs = (
            self._slots_of_step(step, accumulated)
            for step in range(first, last)
            for accumulated in range(self.accumulation)
        )
        return Steps(self._ahead(jobs), last - first, self.accumulation)

    def once(self) -> Generator[Batch, None, None]:
        """All windows once, in plain order; as many batches on every data rank."""
        at_once = self.micro_batch * self.data_ranks
        jobs = (self._slots_of_pass(k) for k in range(-(-len(self.windows) // at_once)))
        with closing(self._ahead(jobs)) as batches:
            yield from batches

    def state(self, step: int) -> OrderState:
        """Where the order stands when `step` optimizer steps are complete."""
        return OrderState(step * self.batch, self.order.seed, self.shards.digest, plan=self._plan)

    def resume(self, state: OrderState) -> int:
        """The optimizer step with which a run saved at `state` goes on.

        ValueError if these are other shards, another seed, a batch that does not divide, or a key
        that the order follows from differs.
        """
        if state.manifest != self.shards.digest:
            raise ValueError(
                "data.shards is not what the saved run read (another manifest), allowed is the same"
            )
        for key in sorted(self._plan.keys() | state.plan.keys()):
            if self._plan.get(key) != state.plan.get(key):
                raise ValueError(
                    f"{key} is not what the saved run had, and the order of its samples follows "
                    "from it: allowed is the same"
                )
        if state.seed != self.order.seed:
            raise ValueError(f"seed is {self.order.seed}, allowed is the saved run's {state.seed}")
        step, rest = divmod(state.next_index, self.batch)
        if rest:
            raise ValueError(
                f"train.batch is {self.batch}, allowed is a divisor of the {state.next_index} "
                f"samples that the saved run has taken"
            )
        return step

    def _check_sizes(self) -> list[tuple[int, int]]:
        """The grids that batches may have, smallest and largest among them, in tokens.

        ValueError if a window's grid is smaller than the mesh, or too large for the memory.

        Judged by the largest part that any rank can have, so that all ranks refuse alike.
        """
        places: dict[tuple[int, int], Place] = {}
        for window in self.windows.of_each_size():
            if (window.rect.height, window.rect.width) in places:
                continue
            for shown in sizes_shown(
                self.config.augment, window.rect.height, window.rect.width, fixed=self._fixed
            ):
                try:
                    places[shown] = self._place([shown])
                except ValueError as error:
                    raise ValueError(f"data.window: sample {window.id}: {error}") from None
        sizes = [(place.height, place.width) for place in places.values()]
        if self.micro_batch > 1:  # the highest and the widest may meet in one, and pad each other
            sizes.append((max(height for height, _ in sizes), max(width for _, width in sizes)))
        rows, cols = self.mesh_shape
        tokens = max(-(-height // rows) * -(-width // cols) for height, width in sizes)
        pixels = tokens * self.patch**2 * self.micro_batch
        # Besides those that are read ahead, one is being read and one is the consumer's.
        count = self.config.prefetch + 2
        of_pixel = (
            self.bands * self._dtype.itemsize
            + 1
            + self.shards.has_labels
            + 4 * self.shards.has_instances
        )
        held = count * pixels * of_pixel
        if held > memory_bytes():
            size = "null" if self.config.window is None else str(list(self.config.window))
            raise ValueError(
                f"data.window is {size}: {count} micro-batches (data.prefetch + 2) of one rank of "
                f"mesh row={rows} col={cols} take up to {held / 1e9:.3f} GB, allowed are the "
                f"{memory_bytes() / 1e9:.3f} GB of this machine's memory"
            )
        return sizes

    def _slots_of_step(self, step: int, accumulated: int) -> list[_Slot]:
        slots = []
        for j in self._positions(accumulated):
            sample = step * self.batch + j % self.batch
            window = self.windows[self.order[sample]]
            drawn = draw(self.config.augment, self.order.seed, sample)
            slots.append(self._slot(window, sample, j >= self.batch, drawn))
        return slots

    def _slots_of_pass(self, index: int) -> list[_Slot]:
        count = len(self.windows)
        return [
            self._slot(self.windows[j % count], j % count, j >= count, Drawn())
            for j in self._positions(index)
        ]

    def _slot(self, window: Window, sample: int, filler: bool, drawn: Drawn) -> _Slot:
        row = self.shards.row(window.name)
        view = drawn.view(window.rect, (row.height, row.width), fixed=self._fixed)
        return _Slot(window, sample, filler, drawn, view)

    @property
    def _fixed(self) -> bool:
        """Whether all samples are of one size."""
        return self.config.window is not None

    def _positions(self, index: int) -> range:
        """Positions, among those of all data ranks, of this rank's micro-batch number `index`."""
        start = (index * self.data_ranks + self.data_rank) * self.micro_batch
        return range(start, start + self.micro_batch)

    def _ahead(self, jobs: Iterator[list[_Slot]]) -> Generator[Batch, None, None]:
        """Batches in the order of `jobs`, `config.prefetch` of them read ahead by threads.

        Threads, not processes: reading and decoding release the interpreter's lock. Closing the
        iterator, or an error in it, ends them.
        """
        pending: deque[Future[tuple[Batch, int, int]]] = deque()
        workers = self.config.workers or default_workers(self.config.prefetch)
        pool = ThreadPoolExecutor(workers, thread_name_prefix="axialtrain-data")
        try:
            while True:
                for slots in islice(jobs, self.config.prefetch + 1 - len(pending)):
                    pending.append(pool.submit(self._load, slots))
                if not pending:
                    return
                batch, bytes_read, tiles_decoded = pending.popleft().result()
                self.bytes_read += bytes_read
                self.tiles_decoded += tiles_decoded
                # Where memory is short, none is kept beside the consumer's.
                handed = [batch]
                del batch
                yield handed.pop()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _place(self, sizes: Sequence[tuple[int, int]]) -> Place:
        """Of a micro-batch of samples of (height, width) px: the grid is the largest of theirs,
        smaller ones are padded."""
        height = max(tokens_across(height, self.patch) for height, _ in sizes)
        width = max(tokens_across(width, self.patch) for _, width in sizes)
        return Place(height, width, shape=self.mesh_shape, at=self.at)

    def _load(self, slots: list[_Slot]) -> tuple[Batch, int, int]:
        """The micro-batch, and the bytes read and tiles decoded for it. Runs in a thread."""
        place = self._place([slot.view.size for slot in slots])
        mine = place.rect.scaled(self.patch)  # px, from the window's corner
        size = (len(slots), mine.height, mine.width)
        pixels = torch.zeros(*size, self.bands, dtype=self._dtype)
        labels = np.full(size, UNLABELLED, np.uint8) if self.shards.has_labels else None
        instances = np.zeros(size, np.int32) if self.shards.has_instances else None
        present = np.zeros(size, np.bool_)
        bytes_read = tiles_decoded = 0
        spare = self.config.damage.policy != "raise"
        faults: list[tuple[Damage, ...]] = [()] * len(slots)
        for i, slot in enumerate(slots):
            view = slot.view
            part = place.pixels(self.patch, *view.size)
            if slot.filler or part.empty:
                continue
            for strip in strips(part) if self._lean else [part]:
                region = self._reader.region(slot.window.name, view.source(strip), spare=spare)
                # a tile that two strips have a part of is damaged in both
                faults[i] = tuple(dict.fromkeys((*faults[i], *region.damaged)))
                here = (i, *strip.slices(mine))
                present[here] = True if region.whole else view.shown(region.present)
                shown = view.shown(region.pixels)
                values = self._colours(shown, present[here], slot.drawn, strip)
                put(pixels, here, values)
                if labels is not None and region.labels is not None:
                    labels[here] = view.shown(region.labels)
                if instances is not None and region.instances is not None:
                    instances[here] = view.shown(region.instances)
                bytes_read += region.bytes_read
                tiles_decoded += region.tiles_decoded
        p, (h, w) = self.patch, (place.rect.height, place.rect.width)
        batch = Batch(
            pixels=pixels,
            labels=None if labels is None else torch.from_numpy(labels),
            present=torch.from_numpy(present),
            valid=torch.from_numpy(present.reshape(-1, h, p, w, p).any((2, 4))),
            weight=torch.tensor([float(not slot.filler) for slot in slots]),
            place=place,
            ids=tuple(slot.window.id for slot in slots),
            samples=torch.tensor([slot.sample for slot in slots]),
            targets=self._targets(slots),
            instances=None if instances is None else torch.from_numpy(instances),
            faults=tuple(faults) if spare else (),
        )
        return (pinned(batch) if self._pin else batch), bytes_read, tiles_decoded

    def _targets(self, slots: list[_Slot]) -> Tensor | None:
        if not self.shards.has_image_labels:
            return None
        labels = [self.shards.row(slot.window.name).label for slot in slots]
        return torch.tensor(labels, dtype=torch.int64)
