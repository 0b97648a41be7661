#!/usr/bin/env bash
# Usage: BIN=DIR tools/e2e-smoke.sh [ENVOY-VERSION]
#
# Runs one end-to-end test, the whole story (TestStory), with that version of Envoy, or
# with the Envoy at $ENVOY. Fails where no such test exists: silence is no pass.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -n "${1:-}" ]; then
	ENVOY=$(tools/get-envoy.sh "$1")
fi
export ENVOY BIN=${BIN:-$PWD/bin}
echo "smoke test with $("$ENVOY" --version | tr -d '\n')"
tests=$(go test -tags e2e -list '^TestStory$' ./test/e2e/...)
grep -q '^TestStory$' <<<"$tests" || {
	echo "e2e-smoke: test/e2e has no TestStory" >&2
	exit 1
}
go test -tags e2e -count=1 -timeout 10m -run '^TestStory$' ./test/e2e/...
