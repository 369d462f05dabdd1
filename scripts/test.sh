#!/usr/bin/env bash
# Sets up once, then runs the tests.
# Usage: scripts/test.sh [fast] [pytest options]     fast = unit and contract tests only
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh "${RLFT_EXTRAS:-cpu,resco},dev"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ ${1:-} == fast ]]; then
    shift
    exec .venv/bin/python -m pytest -m "not vllm and not ray and not e2e and not gpu" "$@"
fi
export PYTHONPATH=$PWD/tests/worker_coverage${PYTHONPATH:+:$PYTHONPATH}
exec .venv/bin/python -m pytest --cov --cov-report=term --cov-fail-under=85 "$@"
