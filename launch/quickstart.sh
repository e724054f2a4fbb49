#!/usr/bin/env bash
# From nothing to a trained model: installs, draws scenes, shards them, trains on a 2 x 2 mesh of
# local processes, leaves pictures. Arguments go to `axialtrain quickstart` (key=value ...).
set -euo pipefail
cd "$(dirname "$0")/.."
launch/install.sh
exec .venv/bin/axialtrain quickstart "$@"
