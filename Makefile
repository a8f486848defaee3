# SPDX-License-Identifier: Apache-2.0
#
# Everything that is done to this project is done by one of these targets.
# `make help` lists them.

SHELL         := bash
.SHELLFLAGS   := -euo pipefail -c
MAKEFLAGS     += --no-print-directory
.DEFAULT_GOAL := help

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
GO      ?= go
TOOL    := $(GO) tool -modfile=tools/go.mod
# The same source gives the same binary, wherever it is built.
BUILD   := CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false
AGENT   := boxes/build/embedded/lab-agent
EXAMPLE := Labfile.example
# gotestsum: one line per package while it runs, failures in full, a summary at the end.
TEST    := $(TOOL) gotestsum --format pkgname --hide-summary=skipped --

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: up
up: deps build ## install what is missing, build, and start the machines of Labfile.example
	bin/lab up -f $(EXAMPLE)
	@tools/next $(EXAMPLE)

.PHONY: down
down: ## destroy the machines of Labfile.example
	bin/lab destroy -f $(EXAMPLE) --yes

.PHONY: build
build: ## build bin/lab, static, with lab-agent inside
	$(BUILD) -ldflags '-s -w -buildid=' -o $(AGENT) ./cmd/lab-agent
	$(BUILD) -ldflags '-s -w -X main.version=$(VERSION)' -o bin/lab ./cmd/lab

.PHONY: deps
deps: ## install what this host lacks to run machines (only what is missing)
	@tools/deps run

.PHONY: check
check: build lint unit ## build, vet, lint and run all tests that need no machine

.PHONY: lint
lint: ## vet, staticcheck, gofumpt, and whether go.mod is tidy
	$(GO) vet -tags e2e ./...
	$(TOOL) staticcheck -tags e2e ./...
	@unformatted=$$($(TOOL) gofumpt -l $$(git ls-files '*.go')); \
	[[ -z $$unformatted ]] || { echo "gofumpt would change:" $$unformatted >&2; exit 1; }
	$(GO) mod tidy -diff
	cd tools && $(GO) mod tidy -diff

.PHONY: golangci
golangci: ## the linters of .golangci.yml, whose program takes minutes to build once
	$(GO) tool -modfile=tools/golangci/go.mod golangci-lint run

.PHONY: unit
unit: ## run all tests that need no machine, with the race detector
	@tools/deps gcc libc-headers qemu-img mke2fs debugfs busybox libvirtd virtlogd libvirt-qemu virsh virt-xml-validate xmllint ssh sshd script bash zsh fish
	$(TEST) -race ./...

.PHONY: e2e
e2e: build ## run the tests that build boxes and boot machines, two at a time (PARALLEL=4 for four)
	@tools/deps run test
	LAB_BIN=$(CURDIR)/bin/lab $(TEST) -tags e2e -count=1 -parallel $(or $(PARALLEL),2) -timeout 60m \
		$$(grep -rl --include='*_test.go' '^//go:build e2e' . | xargs -n1 dirname | sort -u)

.PHONY: test
test: deps check e2e ## everything: check, then real machines

.PHONY: fuzz
fuzz: ## run every fuzz target for 20 seconds (FUZZTIME=1m for longer)
	@tools/fuzz $(or $(FUZZTIME),20s)

.PHONY: bench
bench: deps build ## measure what docs/performance.md reports
	@tools/deps test
	@tools/deps bench || echo "bench: nothing is measured against what is missing" >&2
	$(GO) test -run '^$$' -bench . -count 1 ./internal/engine ./internal/drift
	LAB_BIN=$(CURDIR)/bin/lab $(GO) test -tags e2e -run '^$$' -bench . -benchtime 1x -count 1 -timeout 90m ./internal/e2e

.PHONY: changelog
changelog: ## print what the next release brings, from docs/changelog/unreleased
	@tools/changelog

.PHONY: clean
clean: ## remove what was built here (labs and boxes stay: see lab destroy, lab gc)
	rm -rf bin $(AGENT)
