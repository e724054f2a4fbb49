"""The ranks that `axialtrain doctor` is started on, meeting at the store of their launcher.

Everything goes through rank 0, which waits for a bounded time and names who did not come: there is
no collective, since one rank that is missing would make all others wait.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore

POLL = 0.05  # s
PATIENCE = 86400.0  # s; who waits has a deadline for all of it
LINGER = 5.0  # s for which rank 0 keeps the store for ranks that have still to read the end


class Meeting:
    """This rank's way to the others. Made of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    timeout: seconds to wait for the others at each step. present: the ranks that came, once `meet`
    has returned. Raises OSError where the store cannot be reached, ValueError where the environment
    does not say where it is.
    """

    def __init__(self, timeout: float) -> None:
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.timeout = timeout
        self.present: list[int] = []
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise ValueError(f"{name} is not set: start the ranks with torchrun or deepspeed")
        self.address, self.port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            store = TCPStore(
                self.address,
                self.port,
                is_master=self.rank == 0 and not held,
                timeout=timedelta(seconds=timeout),
                # Rank 0 must be able to name who does not come.
                wait_for_workers=False,
                multi_tenant=True,
            )
        except RuntimeError as error:  # torch's DistError
            said = str(error).splitlines()[0]
            raise OSError(f"the store at {self.address}:{self.port}: {said}") from error
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store: Store = PrefixStore(f"axialtrain/doctor/{restarts}", store)

    def meet(self) -> None:
        """Find out who is here. Raises OSError where rank 0 does not answer."""
        self._set(f"here/{self.rank}", b"")
        if self.rank == 0:
            end = time.monotonic() + self.timeout
            missing = set(range(self.world))
            while missing and time.monotonic() < end:
                missing = {rank for rank in missing if not self.store.check([f"here/{rank}"])}
                time.sleep(POLL if missing else 0)
            self.present = [rank for rank in range(self.world) if rank not in missing]
        self.present = self.share("present", self.present, seconds=2 * self.timeout)

    def share(self, name: str, value: Any, *, seconds: float = PATIENCE) -> Any:
        """Rank 0's `value`, on every rank. Raises OSError where it does not come.

        Rank 0 may be waiting for another one; when it ends, its store or its launcher ends us.
        """
        if self.rank == 0:
            self._set(name, pickle.dumps(value))
            return value
        return pickle.loads(self._wait(name, seconds))

    def gather(self, name: str, value: Any, *, seconds: float | None = None) -> dict[int, Any]:
        """On rank 0 each present rank's `value`, of those that come in time; else nothing."""
        self._set(f"{name}/{self.rank}", pickle.dumps(value))
        if self.rank != 0:
            return {}
        found: dict[int, Any] = {}
        end = time.monotonic() + (seconds or 2 * self.timeout)
        for rank in self.present:
            try:
                found[rank] = pickle.loads(
                    self._wait(f"{name}/{rank}", max(POLL, end - time.monotonic()))
                )
            except OSError:
                continue
        return found

    def leave(self, status: int) -> int:
        """The exit status that rank 0 gives to all; it keeps its store until they have read it."""
        try:
            status = int(self.share("status", status))
            self._set(f"left/{self.rank}", b"")
            if self.rank == 0:
                end = time.monotonic() + min(LINGER, self.timeout)
                left = [f"left/{rank}" for rank in self.present]
                while not self.store.check(left) and time.monotonic() < end:
                    time.sleep(POLL)
        except (OSError, RuntimeError):
            return 1
        return status

    def _set(self, name: str, value: bytes) -> None:
        self.store.set(name, value)

    def _wait(self, name: str, seconds: float) -> bytes:
        try:
            self.store.wait([name], timedelta(seconds=seconds))
            return self.store.get(name)
        except RuntimeError as error:
            raise OSError(f"no {name} within {seconds:.0f} s") from error


def ring(ranks: Sequence[int], own: int, hosts: Sequence[str], most: int) -> list[int]:
    """The ranks that `own` is to reach: all others, or, of more than `most`, the next one and the
    next one of another host."""
    others = [rank for rank in ranks if rank != own]
    if len(ranks) <= most:
        return others
    after = sorted(others, key=lambda rank: (rank < own, rank))
    host = hosts[ranks.index(own)]
    elsewhere = [rank for rank in after if hosts[ranks.index(rank)] != host]
    return list(dict.fromkeys(after[:1] + elsewhere[:1]))
