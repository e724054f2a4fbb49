"""What `axialtrain doctor` finds: facts, and troubles with what to do about each."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from axialtrain.data.passing import without_secrets
from axialtrain.data.whole import replacing

SHOWN = 8  # ranks that a line names


@dataclass(frozen=True)
class Trouble:
    """check: the one that found it. where: rank and host. what is wrong; fix: what to do."""

    check: str
    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.check}, {self.where}: {self.what}: {self.fix}"


@dataclass
class Found:
    """What one check finds in one process. where: names that process in troubles."""

    check: str
    where: str
    facts: list[str] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)

    def fact(self, text: str) -> None:
        self.facts.append(text)

    def trouble(self, what: str, fix: str, *, where: str | None = None) -> None:
        self.troubles.append(Trouble(self.check, where or self.where, what, fix))


Check = Callable[[Found], None]


def looked(name: str, where: str, check: Check, *, seconds: float) -> Found:
    """What `check` finds, within `seconds`. Raises nothing: one that fails, or does not end, is a
    trouble, and what it found before stays.

    It runs in a thread, which is left behind where it does not end: a lost file server hangs
    whoever asks it.
    """
    found = Found(name, where)
    failed: list[BaseException] = []

    def body() -> None:
        try:
            check(found)
        except Exception as error:  # whatever it is, the other checks go on
            failed.append(error)

    thread = threading.Thread(target=body, name=f"doctor-{name}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        late = Found(name, where, list(found.facts), list(found.troubles))
        late.trouble(
            f"no answer within {seconds:g} s",
            "find out what hangs there (a file server, a name server, a driver), or give it longer "
            "with --timeout",
        )
        return late
    if failed:
        found.trouble(shown(failed[0]), "correct what this message names, and ask again")
    return found


@dataclass
class Report:
    """All that was found. ranks: that were asked; hosts: of those that answered.

    records: of what was measured, for the JSON.
    """

    ranks: int
    hosts: list[str]
    found: list[Found] = field(default_factory=list)
    records: dict[str, Any] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, list[str]]:
        """By check, each line once; who says it, where not all who looked do."""
        sayers: dict[str, dict[str, list[str]]] = {}
        for found in self.found:
            lines = sayers.setdefault(found.check, {})
            for fact in dict.fromkeys(found.facts):
                lines.setdefault(fact, []).append(found.where)
        looked_there = Counter(found.check for found in self.found if found.facts)
        return {
            check: [
                fact if len(who) == looked_there[check] else f"{_some(who)}: {fact}"
                for fact, who in lines.items()
            ]
            for check, lines in sayers.items()
            if lines
        }

    @property
    def troubles(self) -> list[Trouble]:
        """Each once, with all who have it."""
        alike: dict[tuple[str, str, str], list[str]] = {}
        for found in self.found:
            for one in found.troubles:
                alike.setdefault((one.check, one.what, one.fix), []).append(one.where)
        return [
            Trouble(check, _some(list(dict.fromkeys(who))), what, fix)
            for (check, what, fix), who in alike.items()
        ]

    @property
    def status(self) -> int:
        """The exit status: 0 all well, 1 troubles."""
        return 1 if self.troubles else 0

    def __str__(self) -> str:
        hosts = list(dict.fromkeys(self.hosts))
        on = f"{_many(len(hosts), 'host')} ({', '.join(hosts)})"
        lines = [f"axialtrain doctor: {_many(self.ranks, 'rank')} on {on}"]
        for check, facts in self.facts.items():
            lines += ["", check, *(f"  {line}" for fact in facts for line in fact.splitlines())]
        troubles = self.troubles
        lines += ["", f"{_many(len(troubles), 'trouble')}:" if troubles else "All is well."]
        lines += [f"  {number}. {one}" for number, one in enumerate(troubles, 1)]
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """A record of it, as JSON. OSError where it cannot be written."""
        record = {
            "well": not self.troubles,
            "ranks": self.ranks,
            "hosts": self.hosts,
            "facts": self.facts,
            "troubles": [asdict(trouble) for trouble in self.troubles],
            **self.records,
        }
        with replacing(path) as file:
            file.write((json.dumps(record, indent=1) + "\n").encode())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def shown(error: BaseException) -> str:
    """An error in one line, without the passwords and signatures of the URLs in it."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return re.sub(r"(?i)[a-z][a-z0-9+.-]*://\S+", lambda url: without_secrets(url[0]), text)


def here(rank: int | None) -> str:
    """This process, in words."""
    host = socket.gethostname()
    return host if rank is None else f"rank {rank} on {host}"
