#!/usr/bin/env bash
# The pipeline on small data, from nothing to a verdict: a model that can speak, test data, ten steps
# of supervised start, ten of GRPO, then what logs and files say. About five minutes on two cores.
#
# Usage: scripts/run_integration_test.sh [options]
#   --docker         build the image rl-ft:test and run everything in it; BASE_IMAGE names what it
#                    stands on where no registry is reachable (scripts/make_base_image.sh)
#   --local          run here, in .venv; the default is --docker if an engine answers
#   --format NAME    how junctions are asked: phase (default), phase_duration or extend
#   --skip-prepare   take base model and test data of an earlier run with --keep-output; its own
#                    training there is made anew
#   --keep-output    leave integration/, and the image, instead of removing what was made
#   --verbose        show what the steps print
#   --help           this text
#
# RLFT_EXTRAS      what .venv is to have (default: cpu,resco), as in scripts/run.sh
# RLFT_INSTALLED   take the rl-ft on PATH instead of .venv: so does the image
#
# Ends with status 0 if every step passed; the step that fails shows the end of its log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wrong() {
    echo "run_integration_test: $*" >&2
    exit 2
}

mode='' format=phase skip_prepare='' keep='' verbose=''
while (($#)); do
    case $1 in
        --docker) mode=docker ;;
        --local) mode=local ;;
        --format)
            format=${2:-}
            [[ $format =~ ^(phase|phase_duration|extend)$ ]] ||
                wrong "--format wants phase, phase_duration or extend, got '$format'"
            shift
            ;;
        --skip-prepare) skip_prepare=1 ;;
        --keep-output) keep=1 ;;
        --verbose) verbose=1 ;;
        --help)
            sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *) wrong "unknown option $1; see --help" ;;
    esac
    shift
done
if [[ -z $mode ]]; then
    docker info >/dev/null 2>&1 && mode=docker || mode=local
fi

image=rl-ft:test container=rl-ft-integration-$$
out=$PWD/integration
if [[ -n $skip_prepare ]]; then
    [[ -d $out/base/sft && -d $out/testdata/data ]] ||
        wrong "--skip-prepare expects base and testdata in $out, as --keep-output leaves them"
elif [[ -n $(find "$out" -mindepth 1 ! -name 'docker-*.log' 2>/dev/null) ]]; then
    wrong "$out is there already: go on with its data by --skip-prepare, or remove it"
fi
mkdir -p "$out"

had_image='' summary=()
finish() {
    local status=$?
    printf '%s\n' "" "integration test ($mode, $format):" "${summary[@]}"
    if [[ $mode == docker ]]; then
        docker rm --force "$container" >/dev/null 2>&1 || true
        [[ -n $keep$had_image ]] || docker image rm --force "$image" >/dev/null 2>&1 || true
    fi
    if [[ -n $keep ]]; then
        echo "output: $out"
    elif [[ -n $skip_prepare ]]; then
        rm -rf "$out/run" "$out"/*.log
    else
        rm -rf "$out"
    fi
    exit "$status"
}
trap finish EXIT

number=0
step() { # step NAME COMMAND...: numbered, timed, logged; ends the test if it fails
    local name=$1 started=$SECONDS failed=''
    shift
    number=$((number + 1))
    log=$out/$mode-$number.log
    echo "[$number/$total] $name"
    if [[ -n $verbose ]]; then
        "$@" 2>&1 | tee "$log" || failed=1
    else
        "$@" >"$log" 2>&1 || failed=1
    fi
    if [[ -n $failed ]]; then
        summary+=("  FAILED  $name")
        echo "--- the last 50 lines of its log"
        tail -n 50 "$log"
        exit 1
    fi
    summary+=("  passed  $name ($((SECONDS - started)) s)")
}

if [[ $mode == docker ]]; then
    total=2
    had_image=$(docker image ls --quiet "$image")
    # Its output lies here, so this script alone says what is kept of it.
    options=(--local --format "$format" --keep-output)
    if [[ -n $skip_prepare ]]; then options+=(--skip-prepare); fi
    if [[ -n $verbose ]]; then options+=(--verbose); fi
    step "build the image" env EXTRAS=cpu,resco,dev scripts/build_image.sh "$image"
    # With an init that passes signals on: Ctrl-C ends the container, too.
    step "run everything in it" docker run --rm --init --env TINI_KILL_PROCESS_GROUP=1 \
        --name "$container" --network none --shm-size 2g --user "$(id -u):0" \
        --volume "$out:/app/integration" "$image" \
        scripts/run_integration_test.sh "${options[@]}"
    [[ -n $verbose ]] || cat "$log"
    exit
fi

if [[ -n ${RLFT_INSTALLED:-} ]]; then
    command -v rl-ft >/dev/null || wrong "RLFT_INSTALLED is set, and no rl-ft is on PATH"
    bin=$(dirname "$(command -v rl-ft)")
else
    bin=$PWD/.venv/bin
fi
base=(--out "$out/base")
run=(--out "$out/run")

environment() {
    if [[ -z ${RLFT_INSTALLED:-} ]]; then
        scripts/setup.sh "${RLFT_EXTRAS:-cpu,resco},dev" || return
    fi
    "$bin/rl-ft" recipes
}
base_model() {
    "$bin/rl-ft" prepare --recipe small-base --set "decision_format=$format" "${base[@]}" &&
        "$bin/rl-ft" sft "${base[@]}"
}
supervised() {
    "$bin/rl-ft" prepare --recipe small-scale --set "decision_format=$format" \
        --set "model.name_or_path=$out/base/sft/max_pressure" \
        --set "prepare.dataset=$out/testdata/data" "${run[@]}" &&
        "$bin/rl-ft" sft "${run[@]}"
}
verdict() {
    RLFT_SMALL_SCALE=$out "$bin/python" -m pytest -q tests/e2e/test_small_scale.py
}

rm -rf "$out/run"
total=$((skip_prepare ? 5 : 7))
step "environment" environment
if [[ -z $skip_prepare ]]; then
    step "base model: one that can speak" base_model
    step "test data: 50 decision states, 20 lessons" \
        "$bin/python" scripts/prepare_test_data.py --format "$format" --out "$out/testdata"
fi
step "dataset: every row read, some measured again" "$bin/rl-ft" data check "$out/testdata/data"
step "supervised start: 10 steps on 20 lessons" supervised
step "GRPO: 10 steps on 50 states, 2 candidates" "$bin/rl-ft" grpo "${run[@]}"
step "verdict: logs, statistics, files, answers" verdict
