"""The Python that the pages of docs/ show runs, each page from its first block to its last."""

from __future__ import annotations

import re

import pytest
import torchvision_ops  # noqa: F401 (lets timm be imported)
from repository import REPOSITORY

PAGES = {
    page.name: re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    for page in sorted((REPOSITORY / "docs").glob("*.md"))
}


def test_there_are_blocks():
    assert len(PAGES["attention.md"]) == 3


@pytest.mark.parametrize("page", [name for name, blocks in PAGES.items() if blocks])
def test_the_blocks_of_a_page_run(page):
    names: dict[str, object] = {}
    for number, block in enumerate(PAGES[page]):
        exec(compile(block, f"docs/{page}, block {number}", "exec"), names)
