#!/usr/bin/env bash
# The main job: sets up once, then prepares data, warms up, trains, evaluates and reports.
# Usage: scripts/run.sh [options of `rl-ft run`]     e.g. --out runs/first --set grpo.max_steps=40
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh" "${RLFT_EXTRAS:-cpu,resco}"
# The default recipe is tiny-cpu; left unsaid, so that --resume takes the one of its folder.
exec "$root/.venv/bin/rl-ft" run "$@"
