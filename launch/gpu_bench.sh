#!/usr/bin/env bash
# Everything that is measured on one GPU, and the tests marked `gpu`, in less than 8 minutes:
#   launch/gpu_bench.sh                     # into gpu_bench/, which must not be there yet
#   OUT=runs/h200 launch/gpu_bench.sh       # into another new folder
# It needs Python with torch, numpy, einops and pytest (and einops' and pytest's own), and nothing of
# axialtrain installed. It leaves all.json and all.md (one record and one table of all suites, with
# date and versions) and tests.txt, and ends with 0 where all ran and all tests passed.
# PYTHON        python3 without
# MINUTES       for the suites, 4.5 without: cases that are left then are named as not measured
# TEST_SECONDS  for the tests, 120 without
# Arguments go to `python -m axialtrain.bench all`; --device cpu --quick tries the script itself.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(command -v "${PYTHON:-python3}") || { echo "PYTHON=${PYTHON:-python3} is not here" >&2; exit 2; }
OUT=${OUT:-gpu_bench} device=cuda marked=gpu
for argument; do [ "$argument" != cpu ] || { device=cpu marked='not gpu'; }; done
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 # none is needed

status=0
# A case that hangs takes no more than its minutes: the suites before it are written by then.
timeout --foreground --signal=INT --kill-after=10 330 "$PYTHON" -u -m axialtrain.bench all --out "$OUT" \
  --device "$device" --limit 1 --minutes "${MINUTES:-4.5}" \
  --suites memory complexity layer step attention "$@" || status=$?
[ -f "$OUT/all.json" ] || exit "$status" # refused, or nothing was measured
echo "tests"
timeout --foreground "${TEST_SECONDS:-120}" "$PYTHON" -m pytest -c tests/gpu/gpu.ini -q -p no:cacheprovider \
  -m "$marked" tests/gpu ${TESTS:+-k "$TESTS"} > "$OUT/tests.txt" 2>&1 || status=$?
tail -n 5 "$OUT/tests.txt"
printf '\n## tests\n\n%s\n' "$(tail -n 1 "$OUT/tests.txt")" >> "$OUT/all.md"
exit "$status"
