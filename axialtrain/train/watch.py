"""Watching the other ranks, so that one that is lost or hangs ends the run, with its name.

Every rank beats into the store of the process group, and reads there three keys at a time, however
many ranks there are: its neighbour's beat, rank 0's, and the failure that somebody told of. The
neighbours make a ring, so each rank has one that notices when it is silent; all learn of it from
the one key. All beats are read only when something has failed.

A thread talks to the store, another judges: when the machine of the store stands still, a request
to it never returns, whatever its timeout.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from torch.distributed import Store

from axialtrain.train.beats import (
    FAILURE,
    Beat,
    at_fault,
    heard,
    in_step,
    position,
    tell,
    waits,
    watch_store,
)
from axialtrain.train.recorder import dump_collectives

LOST = 69  # exit status (EX_UNAVAILABLE) of a rank that ends because of another, who is named
GRACE = 5.0  # s that a rank which learnt of a failure leaves to its main thread and its launcher
NO_ANSWER = "it gives no answer"
SURVEY = 3  # intervals between the two readings that tell who is silent


class RankLostError(ConnectionError):
    """A collective failed here through another rank; the message names it, its host and step."""


class Watch:
    """This rank's beats, and its eyes on others. Started right after the process group.

    store: the process group's. timeout: seconds of silence after which a rank, or the store, is
    lost; computing is not silence, for the threads beat meanwhile. folder: of the flight
    recorder's dumps, None for none.
    """

    def __init__(
        self, store: Store, rank: int, world: int, *, timeout: float, folder: Path | None
    ) -> None:
        self.rank, self.world, self.timeout, self.folder = rank, world, timeout, folder
        # A second, so that a failure ends all within seconds; longer where a thousand ranks and
        # more would keep the store busy, shorter where the timeout is short (in tests).
        self.interval = min(max(1.0, world / 1000), timeout / 10)
        self.step: int | None = None
        self._host = socket.gethostname()
        self._store = watch_store(store)
        self._count = 0
        self._zero: Beat | None = None
        self.failure: str | None = None  # what ends the run, as told by the first who noticed
        self._mine = False  # whether that was this rank
        self._broken: str | None = None  # what the store's connection died of
        self._asking = False
        self._to_tell: str | None = None
        self._wanted = threading.Event()
        self._answered = threading.Event()
        self._survey: str | None = None
        self._stop = threading.Event()
        self._talker = threading.Thread(target=self._talk, name="axialtrain-beat", daemon=True)
        self._judge = threading.Thread(target=self._end, name="axialtrain-watch", daemon=True)
        self._talker.start()
        self._judge.start()

    # What the main thread calls

    def at(self, step: int) -> None:
        """The main thread is in this optimizer step."""
        self.step = step

    def report(self) -> str:
        """Who is at fault, with host, step and position, when a collective has failed here.

        Takes a few intervals: who is silent shows only with time.
        """
        self._asking = True
        try:
            self._ask()
            if self.failure is not None:
                return self.failure
            if self._survey is not None:
                return self._survey
            return self._store_is_gone()
        finally:
            self._asking = False

    def failed(self, error: BaseException) -> RankLostError | None:
        """Tell the others that this rank's main thread raises `error`, so that they end soon.

        Returns the error to raise instead (from `error`) where `error` is that of a collective,
        whose cause is another rank; None where it is this rank's own.
        """
        own = not from_collective(error)
        self._asking = True
        try:
            if self.folder is not None and not own:
                _dump(self.folder, self.rank)
            said = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            here = f"rank {self.rank} on {self._host} failed {in_step(self.step)}: {said}"
            who = here if own else self.report()
            self._asking = True
            self._tell(who)
            if self._store_is_deaf():
                atexit.register(end_agent)  # when the message is out
            if own:
                return None
            if self._mine or self.failure is None:
                return RankLostError(f"{who} (here, {in_step(self.step)}: {said})")
            return RankLostError(self.failure)
        finally:
            self._asking = False

    def close(self) -> None:
        """Say goodbye, unless something failed, and end the threads."""
        self._stop.set()
        self._wanted.set()
        if self._broken != NO_ANSWER:  # else it waits for ever
            self._talker.join(GRACE)
        self._judge.join(GRACE)

    def _tell(self, sentence: str) -> None:
        self._to_tell = sentence
        self._ask()
        if self.rank == 0 and not _launcher_holds_store():
            self._stop.wait(SURVEY * self.interval)  # the store ends with us: others read it first

    def _ask(self) -> None:
        """Wait for the talking thread's next answer; not for ever, as the store may hang."""
        self._answered.clear()
        self._wanted.set()
        end = time.monotonic() + (SURVEY + 3) * self.interval + GRACE
        while self._broken is None and time.monotonic() < end:
            if self._answered.wait(self.interval):
                return
        self._broken = self._broken or NO_ANSWER

    # The thread that talks

    def _talk(self) -> None:
        target = (self.rank + 1) % self.world
        last: Beat | None = None
        silence, before = 0.0, time.monotonic()
        try:
            while not self._stop.is_set():
                self._beat()
                self._hear()
                # Time in which we ourselves were stopped (Ctrl-Z, a paused machine) is no silence
                # of theirs.
                now = time.monotonic()
                silence += min(now - before, 2 * self.interval)
                before = now
                beat = None if target == self.rank else heard(self._store, target)
                if target == self.rank or beat != last:
                    silence, last = 0.0, beat
                if beat is not None and beat.gone:
                    target, last = (target + 1) % self.world, None
                elif silence > self.timeout and self.failure is None:
                    sentence = f"{self._look()}, for {self.timeout:g} s or more"
                    if heard(self._store, target) == last:  # not just continued, as we may be
                        self._publish(sentence)
                self._answer()
                self._wanted.wait(self.interval)
            if self.failure is None:
                self._beat(gone=True)
        except RuntimeError as error:  # torch's DistError among them
            self._broken = str(error).splitlines()[0]
            self._answered.set()

    def _beat(self, *, gone: bool = False) -> None:
        own = [thread.ident or 0 for thread in (self._talker, self._judge)]
        where, collective = position(own)
        self._count += 1
        tell(
            self._store,
            Beat(
                rank=self.rank,
                host=self._host,
                pid=os.getpid(),
                count=self._count,
                step=self.step,
                where=where,
                collective=collective,
                asking=self._asking,
                gone=gone,
            ),
        )

    def _hear(self) -> None:
        self._zero = heard(self._store, 0)
        if self.failure is None and self._store.check([FAILURE]):
            self.failure = json.loads(self._store.get(FAILURE))["what"]

    def _publish(self, sentence: str) -> None:
        """The first that tells of a failure is believed; the others come in its wake."""
        mine = json.dumps({"rank": self.rank, "what": sentence})
        first = json.loads(self._store.compare_set(FAILURE, "", mine))
        self._mine = first["rank"] == self.rank
        self.failure = first["what"]

    def _answer(self) -> None:
        if not self._wanted.is_set():
            return
        self._wanted.clear()
        if self._to_tell is not None and self.failure is None:
            self._publish(self._to_tell)
        elif self.failure is None:
            self._survey = self._look()
        self._answered.set()

    def _look(self) -> str:
        before = [heard(self._store, rank) for rank in range(self.world)]
        for _ in range(SURVEY):  # others may be looking at us
            self._stop.wait(self.interval)
            self._beat()
        self._hear()
        after = [heard(self._store, rank) for rank in range(self.world)]
        return self.failure or at_fault(before, after, self.rank)

    # The thread that judges

    def _end(self) -> None:
        counted, unanswered, learnt, before = self._count, 0.0, 0.0, time.monotonic()
        while not self._stop.wait(min(self.interval, 1.0)):
            now = time.monotonic()
            passed, before = min(now - before, 2 * self.interval), now
            unanswered = 0.0 if counted != self._count else unanswered + passed
            counted = self._count
            if self.failure is not None and not self._asking:
                learnt += passed
            if learnt > GRACE:
                # Whoever told of it says why; here only where that was us.
                self._exit(self.failure if self._mine else None)
            if unanswered > self.timeout and not self._asking:
                self._broken = self._broken or NO_ANSWER
                self._exit(self._store_is_gone())

    def _store_is_gone(self) -> str:
        """The sentence for when nobody can be asked."""
        why = self._broken or NO_ANSWER
        if _launcher_holds_store():
            return f"the launcher's store is gone: {why}"
        if self._zero is None:
            return f"the store is gone: {why}; rank 0 held it, and never told where it stands"
        return f"the store is gone: {why}; it was with {self._zero}"

    def _store_is_deaf(self) -> bool:
        """Whether the launcher's store, on another host, answers nothing; a connection that is
        broken ends the launcher's part of this host by itself."""
        return _launcher_holds_store() and self._broken == NO_ANSWER and not _store_is_here()

    def _exit(self, sentence: str | None) -> None:
        if sentence is not None:
            print(f"axialtrain: rank {self.rank}: {sentence}", file=sys.stderr, flush=True)
        if self.folder is not None:
            # beside us: it may wait for a lock that a hung collective holds
            writer = threading.Thread(target=_dump, args=(self.folder, self.rank), daemon=True)
            writer.start()
            writer.join(GRACE)
        if self._store_is_deaf():
            end_agent()
        os._exit(LOST)


def from_collective(error: BaseException) -> bool:
    """Whether `error` came out of a collective: gloo's are RuntimeErrors without a class."""
    if not isinstance(error, RuntimeError):
        return False
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        if waits(trace.tb_frame.f_code):
            return True
        trace = trace.tb_next
    return False


def end_agent() -> None:
    """SIGKILL to torchrun's agent of this host, which waits for an answer of the same store until
    TCP gives up, in a quarter of an hour, and hears no signal meanwhile.

    Not where it may start us again: it does, if the connection is back by then.
    """
    restarts, most = (
        int(os.environ.get(f"TORCHELASTIC_{name}", "0"))
        for name in ("RESTART_COUNT", "MAX_RESTARTS")
    )
    if "TORCHELASTIC_RUN_ID" not in os.environ or restarts < most:
        return
    agent = os.getppid()
    with suppress(OSError):  # another rank of this host has ended it
        command = Path(f"/proc/{agent}/cmdline").read_bytes()
        if b"torch.distributed.run" in command or b"torchrun" in command:
            os.kill(agent, signal.SIGKILL)


def _store_is_here() -> bool:
    """Whether MASTER_ADDR is an address of this host: only such can be bound."""
    with suppress(OSError):
        for family, kind, protocol, _, place in socket.getaddrinfo(
            os.environ.get("MASTER_ADDR", ""), 0, type=socket.SOCK_STREAM
        ):
            with suppress(OSError), socket.socket(family, kind, protocol) as tried:
                tried.bind(place)
                return True
    return False


def _launcher_holds_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _dump(folder: Path, rank: int) -> None:
    try:
        dump_collectives(folder, rank)
    except (OSError, RuntimeError) as error:  # a full disk must not hide why the run ends
        print(f"axialtrain: rank {rank}: no flight record: {error}", file=sys.stderr, flush=True)
