"""Programs that are not Python packages: where a test finds them, and what happens without."""

from __future__ import annotations

import os
import shutil

import pytest


def program(name: str) -> str:
    """The path of a program of `.ci/packages`; where it is missing, the test is skipped on a
    person's machine and fails in CI, so that no test is skipped for ever."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is not None:
        return path
    message = f"{name} is not installed: .ci/packages installs it"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def root() -> None:
    """Go on as root alone, who may make network namespaces; others skip the test, CI fails it."""
    if os.geteuid() != 0:
        message = "network namespaces are made by root alone"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
