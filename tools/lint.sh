#!/usr/bin/env bash
# Usage: tools/lint.sh
#
# Checks form and finds mistakes without running anything: gofumpt, go vet and
# staticcheck over both modules, the tidiness of go.mod, the syntax of scripts.
# Every check runs, also after one has failed.
set -euo pipefail
cd "$(dirname "$0")/.."

gofumpt=$(tools/dev-tool.sh gofumpt)
staticcheck=$(tools/dev-tool.sh staticcheck)
status=0

# check NAME COMMAND...: a command that must succeed.
check() {
	local name=$1 start=$SECONDS
	shift
	if "$@"; then
		echo "lint: $name: ok ($((SECONDS - start))s)"
	else
		echo "lint: $name: FAILED" >&2
		status=1
	fi
}

formatted() {
	local bad
	bad=$(git ls-files -co --exclude-standard -- '*.go' | grep -v '\.pb\.go$' | while read -r f; do [ ! -f "$f" ] || echo "$f"; done | xargs -r "$gofumpt" -l -modpath kuma)
	[ -z "$bad" ] || {
		printf 'not in the form of gofumpt (mend with: make fmt):\n%s\n' "$bad" >&2
		return 1
	}
}

scripts() {
	local ok=0 f
	while read -r f; do
		bash -n "$f" || ok=1
	done < <(git ls-files -co --exclude-standard -- '*.sh' .ci/run)
	return "$ok"
}

in_meshload() { (cd bench/meshload && "$@"); }
in_prometheus() { (cd test/prometheus && "$@"); }

check gofumpt formatted
check 'go vet' go vet -tags e2e ./...
check staticcheck "$staticcheck" -tags e2e ./...
check 'go mod tidy' go mod tidy -diff
check 'shell syntax' scripts
check 'go vet bench/meshload' in_meshload go vet ./...
check 'staticcheck bench/meshload' in_meshload "$staticcheck" ./...
check 'go vet test/prometheus' in_prometheus go vet -tags long ./...
check 'staticcheck test/prometheus' in_prometheus "$staticcheck" -tags long ./...
exit "$status"
