#!/usr/bin/env bash
# A cluster of a head and two workers, a job that is submitted from outside with a token, and a worker
# that is killed in the middle: the job must end with status 0 all the same.
#
# Usage: scripts/run_cluster_test.sh [options]
#   --docker         containers of the image rl-ft:test, by cluster/compose.yaml or, without compose,
#                    by docker run; BASE_IMAGE as in scripts/run_integration_test.sh
#   --local          three nodes on loopback, in .venv; the default is --docker if an engine answers
#   --kill ACTOR     the worker that dies is the one that holds this: GeneratorService (default),
#                    LookupPool, RayTrainWorker, or none for no death at all
#   --skip-prepare   take base model and test data of integration/, as --keep-output leaves them here
#                    and in scripts/run_integration_test.sh
#   --keep-output    leave integration/ instead of removing what was made
#   --verbose        show what the steps print
#   --help           this text
#
# RLFT_EXTRAS, RLFT_INSTALLED   as in scripts/run_integration_test.sh
# RAY_AUTH_TOKEN   the secret of the cluster (default: a new one)
#
# The ports 8265 and 6379 must be free, and with --local no other Ray may run here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wrong() {
    echo "run_cluster_test: $*" >&2
    exit 2
}

mode='' victim=GeneratorService skip_prepare='' keep='' verbose=''
while (($#)); do
    case $1 in
        --docker) mode=docker ;;
        --local) mode=local ;;
        --kill)
            victim=${2:-}
            [[ $victim =~ ^(GeneratorService|LookupPool|RayTrainWorker|none)$ ]] ||
                wrong "--kill wants one of the actors that --help names, or none, got '$victim'"
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

out=$PWD/integration
if [[ -n $skip_prepare ]]; then
    [[ -d $out/base/sft && -d $out/testdata/data ]] ||
        wrong "--skip-prepare expects base and testdata in $out, as --keep-output leaves them"
elif [[ -n $(find "$out" -mindepth 1 2>/dev/null) ]]; then
    wrong "$out is there already: go on with its data by --skip-prepare, or remove it"
fi
if [[ $mode == local && -e /tmp/ray/ray_current_cluster ]]; then
    wrong "expected no Ray on this machine, found the cluster $(</tmp/ray/ray_current_cluster)" \
        "(/tmp/ray/ray_current_cluster); end it first, or use --docker"
fi

image=rl-ft:test project=rl-ft-cluster-$$ address=http://127.0.0.1:8265
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
export RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
mkdir -p "$out"
rm -rf "$out/cluster"

nodes=() summary=()
finish() {
    local status=$? node
    printf '%s\n' "" "cluster test ($mode, killed: $victim):" "${summary[@]}"
    if [[ $mode == docker ]]; then
        docker ps --all --quiet --filter "name=^$project-" | xargs -r docker rm --force >/dev/null
        docker network rm "${project}_default" >/dev/null 2>&1 || true
        docker volume rm "${project}_runs" >/dev/null 2>&1 || true
    else
        for node in "${nodes[@]}"; do kill -KILL -- "-$node" 2>/dev/null || true; done
        rm -f /tmp/ray/ray_current_cluster
    fi
    if [[ -n $keep ]]; then
        echo "output: $out"
    elif [[ -n $skip_prepare ]]; then
        rm -rf "$out/cluster" "$out"/cluster-*.log
    else
        rm -rf "$out"
    fi
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

number=0
step() { # step NAME COMMAND...: numbered, timed, logged; ends the test if it fails
    local name=$1 started=$SECONDS failed=''
    shift
    number=$((number + 1))
    log=$out/cluster-$number.log
    echo "[$number/6] $name"
    if [[ -n $verbose ]]; then
        "$@" > >(tee "$log") 2>&1 || failed=1
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
    place=/app/runs
    client() { # a container beside the cluster, which reaches it as anybody on this machine does
        docker run --rm --init --network host --shm-size 2g --user "$(id -u):0" \
            --env RAY_AUTH_MODE --env RAY_AUTH_TOKEN --volume "$out:$place" "$image" "$@"
    }
else
    place=$out
    bin=$PWD/.venv/bin
    if [[ -n ${RLFT_INSTALLED:-} ]]; then
        command -v rl-ft >/dev/null || wrong "RLFT_INSTALLED is set, and no rl-ft is on PATH"
        bin=$(dirname "$(command -v rl-ft)")
    fi
    export PATH=$bin:$PATH
    client() { "$@"; }
fi

environment() {
    if [[ $mode == docker ]]; then
        EXTRAS=cpu,resco,dev scripts/build_image.sh "$image"
    elif [[ -z ${RLFT_INSTALLED:-} ]]; then
        scripts/setup.sh "${RLFT_EXTRAS:-cpu,resco},dev"
    fi
}

test_data() {
    [[ -z $skip_prepare ]] || return 0
    client rl-ft prepare --recipe small-base --out "$place/base" &&
        client rl-ft sft --out "$place/base" &&
        client python scripts/prepare_test_data.py --out "$place/testdata"
}

container() { # container NAME PORT COMMAND...: what cluster/compose.yaml says, without compose
    local name=$1 port=$2
    shift 2
    docker run --detach --name "$project-$name" --network "${project}_default" --init \
        ${port:+--network-alias head --publish "127.0.0.1:$port:8265"} \
        --user "$(id -u):0" --cap-drop ALL --security-opt no-new-privileges --shm-size 1g \
        --env RAY_AUTH_MODE --env RAY_AUTH_TOKEN --env RAY_USAGE_STATS_ENABLED \
        --volume "$out:/app/runs" "$image" "$@"
}

node() { # node LAST_NUMBER_OF_ITS_ADDRESS OPTIONS...: on loopback, in a process group of its own
    setsid ray start --block --node-ip-address "127.0.0.$1" --object-store-memory 200000000 \
        --dashboard-agent-listen-port "$((52364 + $1))" "${@:2}" &
    nodes+=($!)
}

start_nodes() {
    if [[ $mode == local ]]; then
        node 1 --head --port 6379 --num-cpus 0 --dashboard-host 127.0.0.1
        within 120 ray health-check --address 127.0.0.1:6379 || return
        node 2 --address 127.0.0.1:6379 --num-cpus 4
        # Two that start at once on one machine take the same sockets.
        within 300 has_nodes 2 || return
        node 3 --address 127.0.0.1:6379 --num-cpus 4
    elif docker compose version >/dev/null 2>&1; then
        RLFT_IMAGE=$image RLFT_RUNS=$out RLFT_UID=$(id -u) RLFT_CPUS=$(nproc) \
            docker compose --project-name "$project" --file cluster/compose.yaml up --detach
    else
        docker network create "${project}_default"
        container head-1 8265 ray start --head --block --port 6379 --dashboard-host 0.0.0.0 \
            --num-cpus 0
        container worker-1 '' ray start --address head:6379 --block --num-cpus 4
        container worker-2 '' ray start --address head:6379 --block --num-cpus 4
    fi
}

alive() { # how many nodes the cluster has; none while nobody answers
    client ray list nodes --address "$address" --filter state=ALIVE --format json 2>/dev/null |
        python3 -c 'import json, sys; print(len(json.load(sys.stdin)))' 2>/dev/null || echo 0
}

within() { # within SECONDS COMMAND...: until it succeeds
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || { echo "gave up waiting for: $*"; return 1; }
        sleep 2
    done
}

has_nodes() { [[ $(alive) == "$1" ]]; }

cluster() {
    start_nodes && within 300 has_nodes 3
}

turned_away() { # turned_away REASON: a client is, and for this reason
    local said
    said=$(client ray job list --address "$address" 2>&1) && return 1
    echo "$said"
    [[ $said == *"$1 authentication token"* ]]
}

refused() {
    RAY_AUTH_MODE=disabled RAY_AUTH_TOKEN='' turned_away Missing &&
        RAY_AUTH_TOKEN=wrong turned_away Invalid
}

num_steps() { # GRPO steps that the run has recorded
    grep -cs '"stage": "grpo/.*"loss"' "$out/cluster/metrics.jsonl" || true
}

kill_worker() { # the node that holds the actor
    local actors ip name
    actors=$(client ray list actors --address "$address" --format json --detail \
        --filter "class_name=$victim" --filter state=ALIVE) || return
    ip=$(client ray list nodes --address "$address" --format json | python3 -c '
import json, sys
actors, nodes = json.loads(sys.argv[1]), {n["node_id"]: n for n in json.load(sys.stdin)}
print(nodes[actors[0]["node_id"]]["node_ip"] if actors else "")' "$actors")
    echo "killing the node $ip, which holds $victim, after $(num_steps) steps"
    if [[ $mode == local ]]; then
        [[ $ip =~ ^127\.0\.0\.[23]$ ]] || { echo "$victim is on no worker"; return 1; }
        kill -KILL -- "-${nodes[${ip##*.} - 1]}"
        return
    fi
    for name in "$project-worker-1" "$project-worker-2"; do
        if [[ $(docker inspect -f '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' \
            "$name") == "$ip" ]]; then
            docker kill "$name"
            return
        fi
    done
    echo "$victim is on no worker"
    return 1
}

job() { # submitted from outside; its status is what `ray job submit` ends with
    client ray job submit --address "$address" -- rl-ft run --recipe small-scale \
        --set ray.address=auto --set "model.name_or_path=$place/base/sft/max_pressure" \
        --set "prepare.dataset=$place/testdata/data" \
        --set grpo.max_steps=40 --set grpo.save_steps=5 --out "$place/cluster" &
    local submitted=$! killed=''
    while kill -0 "$submitted" 2>/dev/null; do
        if [[ -z $killed && $victim != none ]] && (($(num_steps) >= 7)); then
            kill_worker || { kill "$submitted"; return 1; }
            killed=1
        fi
        sleep 1
    done
    wait "$submitted" || return
    [[ -n $killed || $victim == none ]] || { echo "the job ended before a worker died"; return 1; }
}

verdict() { # every step recorded once, the model where it belongs, and the nodes that should be
    python3 - "$out/cluster/metrics.jsonl" <<'P' &&
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
steps = [x["step"] for x in lines if x["stage"].startswith("grpo/") and "loss" in x["values"]]
assert steps == list(range(1, 41)), f"expected the steps 1 to 40 once each, got {steps}"
P
        [[ -f $out/cluster/grpo/max_pressure/model/model.safetensors ]] &&
        [[ -f $out/cluster/report.html ]] &&
        within 60 has_nodes "$([[ $victim == none ]] && echo 3 || echo 2)"
}

step "environment" environment
step "base model and test data" test_data
step "cluster: a head and two workers" cluster
step "no token, no entry" refused
step "job: submitted from outside, a worker dies in the middle" job
step "verdict: steps, model, report, nodes" verdict
