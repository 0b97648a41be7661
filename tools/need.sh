#!/usr/bin/env bash
# Usage: tools/need.sh PACKAGE[=PROGRAM]...
#
# Sees to it that programs are there which tests use beside Go and Envoy. Where
# one is missing (it is called like its package, unless PROGRAM says otherwise),
# Debian's package is installed.
set -euo pipefail

missing=()
for need in "$@"; do
	command -v "${need#*=}" >/dev/null || missing+=("${need%%=*}")
done
[ "${#missing[@]}" != 0 ] || exit 0

by_hand() {
	echo "need: can't install ${missing[*]}; install that by hand and put it on the PATH" >&2
	exit 1
}

echo "need: installing ${missing[*]}" >&2
command -v apt-get >/dev/null || by_hand
as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo -n)
"${as_root[@]}" apt-get -o DPkg::Lock::Timeout=300 update -qq >&2 || by_hand
"${as_root[@]}" apt-get -o DPkg::Lock::Timeout=300 install -y -qq "${missing[@]}" >&2 || by_hand
