# make test    everything a change must pass; installs what tests need (Debian) and says so
# make long    the same tests in their long forms and a minute for each fuzz target, some two hours; prints the figures
# make bench   side by side, a quarter of an hour: nothing, plain forwarders, the peers that are installed, portal
# make build   bin/portal, static

GO       ?= go
FUZZTIME ?= 3s
PACKAGES ?= ./...
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)

# A clone that belongs to somebody else must build too: git refuses to describe it, and the
# go command would fail on that. The version goes in by -ldflags instead.
export GOFLAGS := $(strip $(shell $(GO) env GOFLAGS) -buildvcs=false)
GOFMT   = $(shell $(GO) env GOROOT)/bin/gofmt

.PHONY: build test long bench needs check format vet staticcheck unit plain fuzz clean
.NOTPARALLEL:

build:
	CGO_ENABLED=0 $(GO) build -trimpath -tags urfave_cli_no_docs -ldflags '-s -w -X main.version=$(VERSION)' -o bin/portal ./cmd/portal

test: needs check unit plain fuzz
	@echo 'make test: passed'

long: needs check
	GO='$(GO)' .ci/long $(PACKAGES)
	@echo 'make long: passed'

bench:
	.ci/needs bench
	$(GO) build -o bin/bench ./tests/bench
	exec bin/bench -o bench.json -svg bench.svg

needs:
	.ci/needs test

check: format vet staticcheck

# gofmt -l exits 0 when it lists files, and lists none when it cannot parse one: look at both.
format:
	@echo 'gofmt -l .'
	@files=$$($(GOFMT) -l .) && if [ -n "$$files" ]; then echo "gofmt would change:"; echo "$$files"; exit 1; fi

vet:
	$(GO) vet $(PACKAGES)

staticcheck:
	$(GO) tool -modfile=tools/go.mod staticcheck $(PACKAGES)

unit:
	$(GO) test -race -shuffle=on -timeout 10m $(PACKAGES)

# What the race detector makes ten times slower, or hides: every byte of the handshake, the cost
# of a frame and of an idle stream, what input that lies makes a decoder allocate, the system calls
# that are made as they are, the model across a relay a thousand times.
plain:
	$(GO) test $(V) -count=1 ./internal/channel ./internal/socket ./internal/stream ./routing
	$(GO) test $(V) -count=1 -run 'Forwarding|ModelAcross' ./relay
	$(GO) test $(V) -count=1 -run 'AllocatesLittle|AllocateLittle|HostileReaches' ./abac ./cmd/portal ./identity ./inlet ./internal/alloc ./internal/authority ./internal/control ./internal/pgwire ./relay

fuzz:
	FUZZTIME=$(FUZZTIME) GO='$(GO)' .ci/fuzz $(PACKAGES)

clean:
	rm -rf bin bench.json bench.svg long.log
