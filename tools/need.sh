#!/usr/bin/env bash
# Usage: tools/need.sh PACKAGE[=PROGRAM[:PATTERN]]...
#
# Sees to it that programs are there which tests use beside Go and Envoy. Where
# one is missing (it is called like its package, unless PROGRAM says otherwise,
# and may be at a path that matches PATTERN instead of on the PATH), Debian's
# package is installed. No service that comes with it is started.
set -euo pipefail

missing=()
for need in "$@"; do
	program="${need#*=}"
	command -v "${program%%:*}" >/dev/null && continue
	[[ $program == *:* ]] && compgen -G "${program#*:}" >/dev/null && continue
	missing+=("${need%%=*}")
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
# Debian asks this program before it starts a service; 101 is no.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
	trap '"${as_root[@]}" rm -f "$policy"' EXIT
	printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" install -m 755 /dev/stdin "$policy" || by_hand
fi
"${as_root[@]}" apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "${missing[@]}" >&2 || by_hand
