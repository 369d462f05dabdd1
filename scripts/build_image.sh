#!/usr/bin/env bash
# Builds the container image from cluster/Dockerfile.
# Usage: scripts/build_image.sh [--gpu] [--base IMAGE] [NAME[:TAG]] [-- OPTIONS OF docker build]
#        (default name: rl-ft:cpu, with --gpu rl-ft:gpu)
#
# --gpu          build cluster/Dockerfile.gpu
# --base IMAGE   start from this image; so does BASE_IMAGE (default: the Dockerfile's)
# --help         show this
# EXTRAS         extras of pyproject.toml to install (default: the Dockerfile's; for the tests
#                cpu,resco,dev)
# RLFT_CA_CERTS  PEM file of certificates to trust during the build (default: SSL_CERT_FILE, PIP_CERT)
# UV_DEFAULT_INDEX, UV_FIND_LINKS, UV_TORCH_BACKEND, PIP_INDEX_URL and PIP_FIND_LINKS mean what they
#                mean to scripts/setup.sh; a folder of wheels is copied into the build
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "build_image: $*" >&2
    exit 2
}

flavour=cpu file=cluster/Dockerfile base=${BASE_IMAGE:-} name=''
while (($#)); do
    case $1 in
    --gpu) flavour=gpu file=cluster/Dockerfile.gpu ;;
    --base)
        base=${2:-}
        [[ -n $base ]] || fail "expected an image after --base, got nothing"
        shift
        ;;
    --help)
        sed -n '2,/^set/s/^# \{0,1\}//p' scripts/build_image.sh
        exit 0
        ;;
    --)
        shift
        break
        ;;
    -*) fail "unknown option $1; see --help" ;;
    *)
        [[ -z $name ]] || fail "expected one NAME[:TAG], got $name and $1"
        name=$1
        ;;
    esac
    shift
done
name=${name:-rl-ft:$flavour}

docker info >/dev/null 2>&1 ||
    fail "no container engine answers (docker info); install one, start it, be in group docker"
base=${base:-$(sed -n 's/^ARG BASE_IMAGE=//p' "$file")}
docker image inspect "$base" >/dev/null 2>&1 || docker pull "$base" ||
    fail "the base image $base is not here and cannot be pulled; name another one (--base IMAGE)," \
        "or make one: sudo scripts/make_base_image.sh, then --base rl-ft-base:bookworm"

# A build sees neither the user's pip settings nor folders outside: hand them over, in .site.
pip_setting() { python3 -m pip config get "global.$1" 2>/dev/null | tr '\n' ' ' || true; }
links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(pip_setting find-links)}}
index=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$(pip_setting index-url)}}
export UV_DEFAULT_INDEX=${index%% } PIP_INDEX_URL=${index%% } UV_FIND_LINKS='' BASE_IMAGE=$base
[[ ! -e .site ]] ||
    fail "$PWD/.site is there already: for your own build with it, run docker build; else remove it"
trap 'rm -rf .site' EXIT
mkdir -p .site/wheels .site/certs
for link in ${links//,/ }; do
    if [[ -d $link ]]; then
        cp --link "$link"/*.whl .site/wheels/ 2>/dev/null || cp "$link"/*.whl .site/wheels/
    else
        UV_FIND_LINKS+=${UV_FIND_LINKS:+,}$link
    fi
done
certs=${RLFT_CA_CERTS:-${SSL_CERT_FILE:-${PIP_CERT:-}}}
if [[ -n $certs ]]; then cp "$certs" .site/certs/site.pem; fi

arguments=(--file "$file" --tag "$name")
for setting in BASE_IMAGE EXTRAS UV_DEFAULT_INDEX PIP_INDEX_URL UV_FIND_LINKS UV_TORCH_BACKEND; do
    if [[ -n ${!setting:-} ]]; then arguments+=(--build-arg "$setting"); fi
done
commit=$(git rev-parse HEAD 2>/dev/null || true)
[[ -z $(git status --porcelain --untracked-files=no 2>/dev/null) ]] || commit+=+changes
docker build "${arguments[@]}" --build-arg "REVISION=$commit" \
    --label "org.opencontainers.image.revision=$commit" "$@" .
