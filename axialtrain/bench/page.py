"""A part of a page of the documentation that a command writes, between two lines."""

from __future__ import annotations

from pathlib import Path

from axialtrain.data.whole import replacing


def check_part(page: Path, begin: str, end: str, *, key: str) -> None:
    """Raise ValueError where the page has no such lines. key: of the command line, for it."""
    _around(page, begin, end, key)


def replace_part(page: Path, begin: str, end: str, text: str, *, key: str) -> None:
    """Put `text` in place of what stands between the lines.

    The page has its name when all of it is there. Raises ValueError as `check_part` does.
    """
    before, after = _around(page, begin, end, key)
    with replacing(page) as file:
        file.write(f"{before}{begin}\n{text}\n{end}{after}".encode())


def _around(page: Path, begin: str, end: str, key: str) -> tuple[str, str]:
    text = page.read_text() if page.is_file() else ""
    before, first, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise ValueError(f"{key} {page}: allowed is a page with the lines {begin} and {end}")
    return before, after
