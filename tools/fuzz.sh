#!/usr/bin/env bash
# Usage: tools/fuzz.sh [TIME]
#
# Runs every fuzz target of the module for TIME (default 10s) each. An input
# that fails is left in testdata/fuzz of its package: commit it with the fix,
# and "go test" tries it ever after.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-10s}

log=$(mktemp)
trap 'rm -f "$log"' EXIT

# run PACKAGE TARGET: fuzzes one target. When the time is up in the middle of
# an input, the go command may report that as a failure ("context deadline
# exceeded") although no input failed; then it is run again, five times at most.
run() {
	local attempt
	for attempt in 1 2 3 4 5; do
		if go test -run '^$' -fuzz "^$2\$" -fuzztime "$time" "$1" 2>&1 | tee "$log"; then
			return 0
		fi
		if [ "$attempt" = 5 ] || ! grep -q 'context deadline exceeded' "$log" || grep -q 'Failing input written' "$log"; then
			return 1
		fi
	done
}

count=0
failed=()
while IFS=: read -r file line; do
	target=$(sed -E 's/^func (Fuzz[A-Za-z0-9_]*)\(.*/\1/' <<<"$line")
	package=./$(dirname "$file")
	count=$((count + 1))
	echo "fuzz $target in $package"
	run "$package" "$target" || failed+=("$package $target")
done < <(git ls-files -co --exclude-standard -- '*_test.go' | xargs -r grep -HE '^func Fuzz[A-Z0-9_][A-Za-z0-9_]*\(' || true)

if [ "$count" = 0 ]; then
	echo "fuzz: no target found" >&2
	exit 1
fi
if [ "${#failed[@]}" != 0 ]; then
	printf 'fuzz: failed: %s\n' "${failed[@]}" >&2
	exit 1
fi
echo "fuzz: $count targets, $time each, no failure"
