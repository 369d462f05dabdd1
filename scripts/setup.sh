#!/usr/bin/env bash
# Makes .venv with everything at pinned versions; does nothing when it is there already.
# Usage: scripts/setup.sh [EXTRAS]     (default: cpu,resco; a GPU machine: gpu,resco)
#
# RLFT_PYTHON      interpreter to use instead of the first suitable one found
# UV_TORCH_BACKEND where uv takes torch from (default for the cpu extra: PyTorch's CPU index,
#                  or a +cpu wheel in the folder that PIP_FIND_LINKS / UV_FIND_LINKS names)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:-cpu,resco}

fail() {
    echo "setup: $*" >&2
    exit 2
}

find_python() {
    local candidate
    for candidate in ${RLFT_PYTHON:-python3.11 python3.12 python3 python}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' \
            >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    fail "expected Python 3.11 or 3.12 as ${RLFT_PYTHON:-python3.11, python3.12 or python3}," \
        "found none; install one or name it: RLFT_PYTHON=/path/to/python3.11"
}

wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1)
stamp=.venv/.installed-$extras
if [[ -x .venv/bin/rl-ft && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    exit 0
fi
other=$([[ ,$extras, == *,gpu,* ]] && echo cpu || echo gpu)
if compgen -G ".venv/.installed-$other*" >/dev/null; then
    fail "the $other build is in .venv and excludes this one; remove it first: rm -rf .venv"
fi

if [[ ! -x .venv/bin/python ]]; then
    python=$(find_python)
    echo "setup: new .venv with $("$python" --version)" >&2
    "$python" -m venv .venv || fail "python -m venv failed; on Debian: apt-get install python3-venv"
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt uv

# uv does not read pip's settings: hand over where the user's pip finds packages.
pip_setting() { .venv/bin/python -m pip config get "global.$1" 2>/dev/null | tr '\n' ' ' || true; }
UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(pip_setting find-links)}}
UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$(pip_setting index-url)}}
for name in UV_FIND_LINKS UV_DEFAULT_INDEX; do
    value=${!name%% } # one trailing blank from pip_setting
    if [[ -n $value ]]; then export "$name=$value"; else unset "$name"; fi
done
if [[ -z ${UV_TORCH_BACKEND:-} && ,$extras, == *,cpu,* ]] &&
    ! compgen -G "${UV_FIND_LINKS:-/nonexistent}/torch-*+cpu*.whl" >/dev/null; then
    export UV_TORCH_BACKEND=cpu
fi
# Without compiled bytecode every Ray worker pays for it at import.
export UV_COMPILE_BYTECODE=1

.venv/bin/uv pip install --python .venv/bin/python --constraint constraints.txt \
    --editable ".[$extras]"
echo "$wanted" >"$stamp"
# An environment for the tests serves the main job as well.
echo "$wanted" >".venv/.installed-${extras%,dev}"
