#!/usr/bin/env bash
# Usage: BIN=DIR tools/e2e-smoke.sh [ENVOY-VERSION]
#
# Runs the whole story (TestStory) and what must hold with every Envoy (TestSmoke…)
# with that version of Envoy, or with the Envoy at $ENVOY. Fails where there are no
# such tests: silence is no pass.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -n "${1:-}" ]; then
	ENVOY=$(tools/get-envoy.sh "$1")
fi
export ENVOY BIN=${BIN:-$PWD/bin}
echo "smoke test with $("$ENVOY" --version | tr -d '\n')"
tests='^(TestStory|TestSmoke.*)$'
found=$(go test -tags e2e -list "$tests" ./test/e2e/...)
for name in TestStory TestSmoke; do
	grep -q "^$name" <<<"$found" || {
		echo "e2e-smoke: test/e2e has no $name" >&2
		exit 1
	}
done
go test -tags e2e -count=1 -timeout 10m -run "$tests" ./test/e2e/...
