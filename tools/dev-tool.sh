#!/usr/bin/env bash
# Usage: tools/dev-tool.sh NAME
#
# Prints the path of a development tool, after building it at the version
# pinned below unless it is in the cache already:
# ${XDG_CACHE_HOME:-$HOME/.cache}/kuma-dev/tools/NAME@VERSION+GO/NAME.
set -euo pipefail

case ${1:-} in
gofumpt) module=mvdan.cc/gofumpt version=v0.12.0 ;;
staticcheck) module=honnef.co/go/tools/cmd/staticcheck version=v0.8.2 ;;
*)
	echo "dev-tool: usage: tools/dev-tool.sh gofumpt|staticcheck" >&2
	exit 2
	;;
esac

# A checker can read only the code of Go versions up to the one it was built with.
dir=${XDG_CACHE_HOME:-${HOME:?dev-tool: HOME is not set, nor is XDG_CACHE_HOME}/.cache}/kuma-dev/tools/$1@$version+$(go env GOVERSION)
if [ ! -x "$dir/$1" ]; then
	mkdir -p "$dir"
	work=$(mktemp -d "$dir/.new-XXXXXX")
	trap 'rm -rf "$work"' EXIT
	echo "building $1 $version" >&2
	(cd "$work" && GOFLAGS= GOBIN=$work CGO_ENABLED=0 go install "$module@$version") >&2
	mv "$work/$1" "$dir/$1"
fi
echo "$dir/$1"
