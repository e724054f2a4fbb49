"""`python -m axialtrain.bench SUITE`: `axialtrain bench`, also where there is little but torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from axialtrain.bench.arguments import arguments
from axialtrain.launch.errors import EXPECTED, say


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit status, as the command does."""
    parser = argparse.ArgumentParser(
        prog="python -m axialtrain.bench", description="Measure, and write what was measured."
    )
    arguments(parser)
    parsed = parser.parse_args(words)
    parsed.own_process = words is None
    try:
        return int(parsed.command(parsed))
    except EXPECTED as error:
        return say(error)
    except KeyboardInterrupt:
        print("axialtrain: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
