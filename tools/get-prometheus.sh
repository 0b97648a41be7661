#!/usr/bin/env bash
# Usage: tools/get-prometheus.sh
#
# Prints the path of a Prometheus server, after building it unless it is in the
# cache already: ${XDG_CACHE_HOME:-$HOME/.cache}/kuma-dev/prometheus/VERSION+GO/prometheus.
# It is built from its Go module, at the version and with the sums of
# tools/prometheus/go.mod and go.sum; that takes some minutes. Of the ways of
# discovery it has that of Kuma alone, and no web page, which is not in the
# module. Several runs at once do not disturb one another.
# A Prometheus of your own is used as: make test-long PROMETHEUS=/its/path
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
package=github.com/prometheus/prometheus

fail() {
	printf 'get-prometheus: %s\n' "$@" >&2
	exit 1
}

version=$(awk -v p="$package" '{ sub(/^require /, "") } $1 == p { print $2; exit }' "$here/prometheus/go.mod")
[ -n "$version" ] || fail "tools/prometheus/go.mod names no version of $package"
dir=${XDG_CACHE_HOME:-${HOME:?get-prometheus: HOME is not set, nor is XDG_CACHE_HOME}/.cache}/kuma-dev/prometheus/$version+$(go env GOVERSION)
if [ -x "$dir/prometheus" ]; then
	echo "$dir/prometheus"
	exit 0
fi

mkdir -p "$dir"
if command -v flock >/dev/null; then
	exec 9>"$dir/.lock" # one build is enough; released when this process ends
	flock 9
	if [ -x "$dir/prometheus" ]; then
		echo "$dir/prometheus"
		exit 0
	fi
fi
work=$(mktemp -d "$dir/.new-XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "building Prometheus $version, which takes some minutes" >&2
(cd "$here/prometheus" && GOFLAGS=-mod=readonly CGO_ENABLED=0 go build -trimpath -tags remove_all_sd,enable_xds_sd -ldflags '-s -w' -o "$work/prometheus" "$package/cmd/prometheus") >&2 ||
	fail "Prometheus $version could not be built, see above: is the Go module proxy within reach (GOPROXY)?"
"$work/prometheus" --version >/dev/null 2>&1 || fail "the Prometheus that was built does not start here"
mv -f "$work/prometheus" "$dir/prometheus"
echo "$dir/prometheus"
