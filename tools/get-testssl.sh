#!/usr/bin/env bash
# Usage: tools/get-testssl.sh
#
# Prints the path of testssl.sh, the scanner of TLS servers that the long tests
# use. Where it is not installed, Debian's package is.
set -euo pipefail

find_it() { command -v testssl || command -v testssl.sh; }

if ! find_it >/dev/null; then
	echo "get-testssl: installing the package testssl.sh" >&2
	sudo=()
	[ "$(id -u)" = 0 ] || sudo=(sudo -n)
	"${sudo[@]}" apt-get -o DPkg::Lock::Timeout=300 update -qq >&2
	"${sudo[@]}" apt-get -o DPkg::Lock::Timeout=300 install -y -qq testssl.sh >&2 || {
		echo "get-testssl: can't install testssl.sh; install it by hand (https://testssl.sh) and put it on the PATH" >&2
		exit 1
	}
fi
find_it
