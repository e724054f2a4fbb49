#!/usr/bin/env bash
# Creates or reuses .venv and installs axialtrain into it, with every version of constraints.txt.
# Usage: launch/install.sh [EXTRAS]     for instance: launch/install.sh dev
set -euo pipefail
cd "$(dirname "$0")/.."

extras=${1:-}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "axialtrain needs Python 3.11 or newer; '$python' is $("$python" -V). Set PYTHON=..." >&2
  exit 2
}
[ -x .venv/bin/pip ] || "$python" -m venv .venv

# What is installed already stays: the stamp names what it was made from.
stamp=".venv/.installed-${extras:-plain}"
now=$(cat constraints.txt pyproject.toml | sha256sum)
[ "$(cat "$stamp" 2>/dev/null)" = "$now" ] && exit 0

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
echo "installing into .venv (some minutes, once)"
# torch first and pinned: what depends on it would otherwise bring the newest, with all of CUDA.
pip install --quiet --constraint constraints.txt torch setuptools wheel packaging ninja
# Built against the torch above, not against one of their own.
pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed fairscale
pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".${extras:+[$extras]}"
echo "$now" > "$stamp"
