#!/usr/bin/env bash
# Lint, types, the rooms, the tests. Arguments go to pytest:
#   ./launch/test.sh                  everything
#   ./launch/test.sh -m 'not slow'    the quick part
#   ./launch/test.sh -n 0 -x          in one process, to the first that fails
set -euo pipefail
cd "$(dirname "$0")/.."
launch/install.sh dev

# One thread a process: the tests start several, and oversubscribed cores only slow each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
echo "ruff"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
echo "mypy";  .venv/bin/mypy
echo "rooms"; .venv/bin/lint-imports
# Two processes, each of them whole files: while a test waits for what it has started, another runs.
echo "tests"; .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
