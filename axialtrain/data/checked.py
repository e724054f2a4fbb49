"""JSON that may come from strangers: every field is checked as it is taken."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

SHOWN = 80  # characters of a wrong value that an error message repeats


def shown(value: object) -> str:
    """`value` for an error message: escaped, and short whatever it is."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def parsed(data: bytes | str, where: str) -> object:
    """The JSON value in `data`; ValueError if it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON, or cut short ({error})") from error


def plain(text: str) -> str:
    """`text` of a stranger, for people: what does not print, or is no text, is escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


@dataclass(frozen=True)
class Record:
    """A JSON object from `where`. Taking a wrong field raises a ValueError that names it."""

    where: str
    values: Mapping[str, object]

    @staticmethod
    def parse(data: bytes | str, where: str) -> Record:
        """The JSON object in `data`; ValueError if it is anything else."""
        return Record.of(parsed(data, where), where)

    @staticmethod
    def of(values: object, where: str) -> Record:
        if not isinstance(values, dict):
            raise ValueError(f"{where}: {shown(values)} stands where an object {{...}} belongs")
        return Record(where, values)

    def wrong(self, key: str, allowed: str) -> ValueError:
        value = shown(self.values[key]) if key in self.values else "missing"
        return ValueError(f"{self.where}: {key} is {value}, allowed is {allowed}")

    def integer(self, key: str, low: int, high: int) -> int:
        """The integer at `key`, within low..high inclusive."""
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(key, f"an integer from {low} to {high}")
        return value

    def integer_or_none(self, key: str, low: int, high: int) -> int | None:
        """The integer at `key`, within low..high inclusive, or None where null stands there."""
        if key in self.values and self.values[key] is None:
            return None
        return self.integer(key, low, high)

    def number(self, key: str, low: float, high: float) -> float:
        """The finite number at `key`, within low..high inclusive."""
        value = self.values.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.wrong(key, f"a number from {low} to {high}")
        if not low <= value <= high:  # false for NaN, too
            raise self.wrong(key, f"a number from {low} to {high}")
        return float(value)

    def text(self, key: str, pattern: re.Pattern[str], allowed: str) -> str:
        """The string at `key`, all of it matching `pattern`, which `allowed` puts into words."""
        value = self.values.get(key)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise self.wrong(key, allowed)
        return value

    def items(self, key: str, most: int) -> list[object]:
        """The list at `key`, of at most `most` items."""
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) > most:
            raise self.wrong(key, f"a list of at most {most} items")
        return value

    def records(self, key: str, most: int) -> list[Record]:
        """The list of objects at `key`; each names its index where it is wrong."""
        items = self.items(key, most)
        return [Record.of(item, f"{self.where}: {key}[{i}]") for i, item in enumerate(items)]
