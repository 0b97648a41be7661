#!/usr/bin/env bash
# Usage: tools/race.sh
#
# Runs the unit tests of every package that starts goroutines or shares memory
# between them (and so can have a race) under the race detector.
set -euo pipefail
cd "$(dirname "$0")/.."

compiler=$(go env CC)
command -v "${compiler%% *}" >/dev/null || {
	echo "race: the race detector needs a C compiler, and $compiler is not there (Debian: apt-get install gcc libc6-dev)" >&2
	exit 1
}
mapfile -t packages < <(git ls-files -co --exclude-standard -- '*.go' | grep -E '^(cmd|internal|test)/' | grep -vE '^test/(e2e|prometheus)/' |
	while read -r f; do [ ! -f "$f" ] || echo "$f"; done |
	xargs -r grep -lE '^[[:space:]]*go [A-Za-z_(]|\.Go\(|\<sync\.|\<atomic\.' |
	xargs -r -n 1 dirname | sort -u | while read -r dir; do
		# a package without tests has nothing to run
		! compgen -G "$dir/*_test.go" >/dev/null || echo "./$dir"
	done)
[ "${#packages[@]}" != 0 ] || {
	echo "race: no package with goroutines found" >&2
	exit 1
}
CGO_ENABLED=1 go test -race -timeout 30m "${packages[@]}"
