#!/usr/bin/env bash
# Sets up once, then runs the tests.
# Usage: scripts/test.sh [fast] [pytest options]     fast = unit and contract tests only
#
# Two processes share the files, in the order of their names: most of a test is waiting for programs
# to start. A process takes up to 8 GB. `-n 0` has everything in one process, as a debugger wants it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh "${RLFT_EXTRAS:-cpu,resco},dev"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
pytest=(.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder)
if [[ ${1:-} == fast ]]; then
    shift
    exec "${pytest[@]}" -m "not vllm and not ray and not e2e and not gpu" "$@"
fi
export PYTHONPATH=$PWD/tests/worker_coverage${PYTHONPATH:+:$PYTHONPATH}
exec "${pytest[@]}" --cov --cov-report=term --cov-fail-under=85 "$@"
