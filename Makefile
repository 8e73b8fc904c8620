# Two commands do everything, as root on Debian 12: 'make demo' and 'make test'. The others are their parts.

export PATH := $(PATH):/usr/local/go/bin:$(CURDIR)/.cache/tools
GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo development)
TOOLS   := $(CURDIR)/.cache/tools
SERVERS := $(TOOLS)/versitygw $(TOOLS)/registry
LDFLAGS := -s -w -X drafter/internal/cli.Version=$(VERSION)
TESTTIMEOUT ?= 40m
FUZZTIME ?= 30s
SLOWEST := ./network ./internal/migration ./internal/block ./peer # begin first, so that nobody waits for them at the end
COMMANDS := nat forwarder snapshotter packager runner peer registry mounter terminator checkpoint
GENERATED := agent internal/control docs/cli docs/man docs/licenses.md

# Runs tests, and says afterwards which were skipped. Tests that run in parallel wait, and need no CPU
# of their own. Without GORACE each program, helpers of tests included, would wait for a second at
# its end.
TESTS = rm -f .cache/skipped; : >.cache/skipped; code=0; \
	GORACE=atexit_sleep_ms=0 DRAFTER_SKIPPED=$(CURDIR)/.cache/skipped \
	$(GO) test -race -p 3 -parallel 4 -timeout $(TESTTIMEOUT) $(1) || code=$$?; \
	sort .cache/skipped; exit $$code

.PHONY: help demo test build setup tools servers lint vulnerabilities licenses generate check-generated unit e2e soak fuzz bench bench-quick bench-report profile benchmarks redis-image install release check-release changelog clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: setup build ## build, snapshot, resume, reach and move a VM with Redis; VMM=firecracker chooses that
	$(GO) run ./demo --vmm $(or $(VMM),auto)

test: setup build ## all tests but soak, with the race detector, and lint; it says how long each lane took
	@MAKE='$(MAKE)' ./.ci/lanes check-generated lint unit e2e

setup: ## install the Debian packages that are needed
	./.ci/setup

build: ## build bin/drafter, bin/drafter-guest and bin/drafter-bench
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/drafter
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o bin/ ./cmd/drafter-guest
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o bin/ ./cmd/drafter-bench

unit: servers ## the tests of packages: without VMs, and without root, who gets more of them
	@$(call TESTS,$(SLOWEST) $$($(GO) list ./... | grep -v '/e2e'))

e2e: servers ## the tests of the whole, with VMs, as root
	@$(call TESTS,./e2e/...)

servers: $(SERVERS) ## the S3 server and the OCI registry that tests talk to, in .cache/tools

$(SERVERS): $(TOOLS)/%: tools/servers/go.mod tools/servers/go.sum
	cd tools/servers && CGO_ENABLED=0 $(GO) build -ldflags '-s -w' -o $@ $$($(GO) list -f '{{.ImportPath}}' tool | grep '/$*$$')
	touch $@

tools: $(TOOLS)/golangci-lint $(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-go-ttrpc $(TOOLS)/govulncheck $(TOOLS)/go-licenses

$(TOOLS)/%: tools/go.mod tools/go.sum
	cd tools && CGO_ENABLED=0 $(GO) build -o $@ $$($(GO) list -f '{{.ImportPath}}' tool | grep -E '/$*(/v[0-9]+)?$$')
	touch $@

lint: $(TOOLS)/golangci-lint vulnerabilities ## golangci-lint, known vulnerabilities, and whether the modules are those of go.sum
	$(TOOLS)/golangci-lint run ./...
	cd tools && $(TOOLS)/golangci-lint run ./...
	$(GO) mod verify

vulnerabilities: $(TOOLS)/govulncheck ## known vulnerabilities in what the code calls, where the database can be reached
	./.ci/vulnerabilities

licenses: $(TOOLS)/go-licenses ## make docs/licenses.md anew, and fail on a licence that is not allowed
	./.ci/licenses

generate: tools build licenses ## make generated files anew: protobuf, CLI reference, man pages, list of licences
	protoc -I . --plugin=$(TOOLS)/protoc-gen-go --plugin=$(TOOLS)/protoc-gen-go-ttrpc \
		--go_out=. --go_opt=module=drafter --go-ttrpc_out=. --go-ttrpc_opt=module=drafter agent/agent.proto internal/control/control.proto
	sed -i 's,^package [a-z]*$$,\n&,' agent/agent_ttrpc.pb.go internal/control/control_ttrpc.pb.go # else its first comment is the package's
	$(GO) run ./internal/cli/docs

check-generated: generate ## fail when generated files are stale
	@test -z "$$(git status --porcelain -- $(GENERATED))" || { git --no-pager diff -- $(GENERATED); \
		echo "Generated files are stale: run 'make generate' and commit"; git status --porcelain -- $(GENERATED); exit 1; }

fuzz: ## every fuzz target for FUZZTIME (30s): the decoders of what comes from strangers
	GO='$(GO)' ./.ci/fuzz $(FUZZTIME)

soak: setup build servers fuzz ## the tests that find more the longer they run: fuzz targets, and real VMs with random faults; some two hours
	DRAFTER_SOAK=1 $(GO) test -race -timeout 2h ./internal/migration ./internal/block ./internal/memory ./vmm/qemu
	DRAFTER_SOAK=1 $(GO) test -timeout 90m -v -run 'TestSoakMigrations|TestSoakBadDays|TestKilledPeer|TestProtocols|TestThousandConnections|TestTwoMovesAtOnce' ./e2e

bench: setup build ## measure everything, beside QEMU's own live migration: far longer than bench-quick
	bin/drafter-bench
	$(MAKE) bench-report

bench-quick: setup build ## measure what the ratios need: some ten minutes
	bin/drafter-bench --quick
	$(MAKE) bench-report

bench-report: ## make docs/benchmarks.md and its charts of bench/results/latest.json
	$(GO) run ./bench/report

profile: setup build ## CPU and allocation profiles of live migrations, in out/profile
	mkdir -p out/profile
	DRAFTER=$(CURDIR)/bin/drafter $(GO) test -run xxx -bench Migration -benchtime 3x -cpuprofile $(CURDIR)/out/profile/cpu.pprof -memprofile $(CURDIR)/out/profile/memory.pprof \
		-o out/profile/bench.test ./bench
	@echo "Look at them with: go tool pprof -http localhost:8080 out/profile/bench.test out/profile/cpu.pprof"

benchmarks: ## Go benchmarks of the hot functions, for benchstat: run it before and after a change
	$(GO) test -run xxx -bench . -count 6 ./internal/block ./internal/wire ./internal/memory
	$(GO) test -run xxx -bench 'Engine|RawTCP' -benchtime 3x -count 6 ./bench

redis-image: ## an OCI image of Redis without any registry, in out/redis-image
	$(GO) run ./internal/redisimage/cmd --output out/redis-image

install: build ## install drafter and its links below /usr/local/bin
	install -m 755 bin/drafter bin/drafter-guest bin/drafter-bench /usr/local/bin/
	for c in $(COMMANDS); do ln -sf drafter /usr/local/bin/drafter-$$c; done

release: setup $(TOOLS)/nfpm $(TOOLS)/go-licenses ## binaries, Debian packages, blueprint and lists in out/release/VERSION; nothing is uploaded
	VERSION='$(VERSION)' COMMANDS='$(COMMANDS)' GO='$(GO)' ./.ci/release

check-release: release ## install the release's package into a small Debian, and try what is in it
	./.ci/setup qemu-user-static
	VERSION='$(VERSION)' ./.ci/check-release

changelog: ## move changelog/unreleased to changelog/VERSION.md: make changelog VERSION=0.1.0
	@test '$(origin VERSION)' != file || { echo 'Say which: make changelog VERSION=0.1.0' >&2; exit 1; }
	@test ! -e 'changelog/$(VERSION).md' || { echo 'changelog/$(VERSION).md is there already' >&2; exit 1; }
	./.ci/changelog '$(VERSION)' >'changelog/$(VERSION).md'
	rm -f changelog/unreleased/*.md

clean: ## remove what was built
	rm -rf bin out .cache
