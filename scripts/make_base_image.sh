#!/usr/bin/env bash
# Makes a base image out of Debian packages alone, for sites that reach no image registry.
# Usage: sudo scripts/make_base_image.sh [NAME[:TAG]]     (default: rl-ft-base:bookworm)
#
# --help         show this
# DEBIAN_MIRROR  where packages come from (default: http://deb.debian.org/debian)
# RLFT_CA_CERTS  PEM file with certificates that the image is to trust besides Debian's
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
suite=bookworm

fail() {
    echo "make_base_image: $*" >&2
    exit 2
}

case ${1:-} in
--help)
    sed -n '2,/^set/s/^# \{0,1\}//p' scripts/make_base_image.sh
    exit 0
    ;;
-*) fail "expected [NAME[:TAG]], got $1; see --help" ;;
esac
name=${1:-rl-ft-base:$suite}
[[ $EUID == 0 ]] || fail "debootstrap needs root, this is $(id -un); run it with sudo"
command -v debootstrap >/dev/null ||
    fail "debootstrap is missing; on Debian: apt-get install debootstrap"
docker info >/dev/null 2>&1 ||
    fail "no container engine answers (docker info); install docker.io and start dockerd"

# Python, and what cluster/Dockerfile would install: its build then needs no mirror.
packages=$(tr -d '\\\n' <cluster/Dockerfile | sed 's/.*SYSTEM_PACKAGES="\([^"]*\)".*/\1/')
packages=$(xargs <<<"$packages")
root=$(mktemp -d)
trap 'rm -rf --one-file-system "$root"' EXIT
chmod 755 "$root"
echo "make_base_image: Debian $suite with python3, python3-venv, $packages" >&2
debootstrap --variant=minbase --include="python3,python3-venv,${packages// /,}" \
    "$suite" "$root" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >"$root/debootstrap.out" ||
    fail "debootstrap failed: $(tail -n 5 "$root/debootstrap.out")"
if [[ -n ${RLFT_CA_CERTS:-} ]]; then
    cp "$RLFT_CA_CERTS" "$root/usr/local/share/ca-certificates/site.crt"
    chroot "$root" update-ca-certificates >/dev/null
fi
rm -rf "$root"/var/cache/apt/*.bin "$root"/var/cache/apt/archives/*.deb \
    "$root"/var/lib/apt/lists/* "$root"/var/log/*.log \
    "$root"/usr/share/{doc,man,locale,info}/* "$root/debootstrap.out"
tar --directory "$root" --numeric-owner --exclude='./dev/*' --exclude='./proc/*' \
    --exclude='./sys/*' --create . | docker import --change 'CMD ["bash"]' - "$name" >/dev/null
echo "make_base_image: $name, $(docker image inspect --format '{{.Size}}' "$name" |
    awk '{printf "%d MB", $1 / 1e6}')" >&2
