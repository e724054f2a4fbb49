"""The command line of `axialtrain doctor`, without the imports of the command itself."""

from __future__ import annotations

import argparse
from pathlib import Path

TIMEOUT = 20.0  # s, for each thing that may not answer
DESCRIPTION = (
    "Looks at what a run needs: packages, devices, limits, the environment, file system and object "
    "stores; and of several ranks (under torchrun or deepspeed, or with mesh=RxC on local "
    "processes) who cannot be reached and how fast each axis of the mesh is. Ends with 0 where all "
    "is well, 1 where there are troubles, 2 where it could not be run."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command line."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="mesh=RxC alone, or those of `axialtrain train`",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record of it")
    parser.add_argument(
        "--store",
        action="append",
        default=[],
        metavar="URL|DIR",
        help="a folder to list and to read from; may be given several times",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="SECONDS",
        help="of each thing that may not answer",
    )
