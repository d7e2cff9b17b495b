# All commands that contributors and CI need. `make` lists them.

SHELL   := /bin/bash
DEVENV  := bin/devenv
# Test packages that run at the same time share the servers and the processor.
TEST    := go test -race -timeout 20m -p 2
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
FUZZTIME ?= 60s

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Built on every use, which is cheap with Go's build cache. `go run` would not do:
# it forwards neither signals nor exit codes.
.PHONY: $(DEVENV)
$(DEVENV):
	@go build -buildvcs=false -o $@ ./internal/devenv/cmd/devenv

.PHONY: test
test: $(DEVENV) ## Start the services that are missing, run every test, end them
	@$(DEVENV) run -- $(TEST) ./...

.PHONY: soak
soak: $(DEVENV) ## Run a million messages through a worker and check that nothing is left behind: MESSAGES=…
	@$(DEVENV) run -only broker -- env MM_TEST_MESSAGES=$(or $(MESSAGES),1000000) go test -v -count=1 -timeout 60m -run '^TestManyMessagesLeaveNothingBehind$$' ./worker

.PHONY: test-newest
test-newest: $(DEVENV) ## The same with the newest RabbitMQ and PostgreSQL, as containers
	@$(DEVENV) run -newest -- $(TEST) ./...

.PHONY: test-change
test-change: $(DEVENV) ## Take back every change, in 550 cases, and all other tests of changes: SEED=… CASE=… LANES=…
	@$(DEVENV) run -only engine,newest-engine,compose,oldest-compose,broker,database -- env MM_TEST_CHANGE=all MM_TEST_CHANGE_SEED=$(SEED) MM_TEST_CHANGE_CASE=$(CASE) MM_TEST_CHANGE_LANES=$(LANES) \
		go test -v -timeout 120m -p 1 $(if $(CASE),-run TestEveryChangeIsTakenBack ./internal/changetest,./internal/changetest ./change/... ./compose/... ./tasks/orchestrator/...)

CHAOS_FLAGS = $(if $(SEED),-seed $(SEED)) $(if $(N),-n $(N)) $(if $(MINUTES),-minutes $(MINUTES)) \
	$(if $(TRIAL),-trial $(TRIAL)) $(if $(KINDS),-kinds $(KINDS)) $(if $(RUNS),-runs $(RUNS)) $(if $(LANES),-lanes $(LANES)) \
	$(if $(DEFECTS),-defects $(DEFECTS))
# A mixed fleet also needs Celery, in the release that MoonMind uses.
CHAOS_PYTHON = ,python -celery 5.4.0
# Some trials of the Spec workflow run the real codex.
CHAOS_CODEX = ,codex
# Trials with real compose need an engine.
CHAOS_ENGINE = ,engine,compose

.PHONY: chaos
chaos: $(DEVENV) ## Break workers and connections: SEED=… N=… MINUTES=… TRIAL=… KINDS=… RUNS=… LANES=… NEWEST=1
	@go build -o bin/chaos ./internal/chaos/program
	@$(DEVENV) run $(if $(NEWEST),-newest) -only broker,database$(if $(findstring real,$(KINDS)),$(CHAOS_ENGINE))$(if $(findstring spec,$(KINDS)),$(CHAOS_CODEX))$(if $(findstring mixed,$(KINDS)),$(CHAOS_PYTHON)) -- bin/chaos $(CHAOS_FLAGS)

.PHONY: chaos-proof
chaos-proof: $(DEVENV) ## Check that chaos finds each known defect: DEFECTS=…
	@go build -o bin/chaos ./internal/chaos/program
	@$(DEVENV) run -only broker,database$(CHAOS_ENGINE)$(CHAOS_PYTHON) -- bin/chaos -proof $(CHAOS_FLAGS)

.PHONY: defects
defects: ## Refresh the patches of the known defects; NAME=… [FILES="…" BREAKS="…"] opens or adds one
	@go run ./internal/chaos/defects/program $(if $(NAME),-name $(NAME)) $(if $(FILES),-files "$(FILES)") $(if $(BREAKS),-breaks "$(BREAKS)")

.PHONY: demo
demo: $(DEVENV) ## Show a repair and a rollback of a sample service, sent by a Python producer
	@go build -buildvcs=false -o bin/demo ./internal/demo
	@$(DEVENV) run -only engine,compose,python,broker,database -celery 5.7.0 -- bin/demo

.PHONY: demo-spec
demo-spec: $(DEVENV) ## Show the Spec workflow: codex, git and pull requests, with workers that are killed
	@go build -buildvcs=false -o bin/demo ./internal/demo
	@$(DEVENV) run -only broker,database,codex -- bin/demo -spec

.PHONY: demo-stop
demo-stop: ## End a demo that runs or waits in another terminal
	@go build -buildvcs=false -o bin/demo ./internal/demo
	@bin/demo -stop

.PHONY: test-stack
test-stack: image $(DEVENV) ## Start docker-compose.yaml, let its worker complete runs, one for itself too; as root: KILLS=…
	@$(DEVENV) run -images -only compose,python -- go test -tags stack -timeout 30m -p 1 \
		-run '^Test(Deployment|OwnService|HelperIsKilled|HelperSurvives)' ./internal/stack ./compose $(if $(KILLS),-kills $(KILLS))

.PHONY: services-up
services-up: $(DEVENV) ## Start the services, leave them running, print export lines
	@$(DEVENV) up

.PHONY: services-down
services-down: $(DEVENV) ## End the services that services-up has started
	@$(DEVENV) down

.PHONY: check
check: ## gofmt, vet, staticcheck, import rules
	@test -z "$$(gofmt -l . | tee /dev/stderr)" || { echo 'not formatted: run gofmt -w .' >&2; exit 1; }
	go vet ./...
	go vet -tags chaos ./...
	go build -C tools/lint -o ../../bin/staticcheck honnef.co/go/tools/cmd/staticcheck
	bin/staticcheck ./...
	go test ./internal/archtest

# Up to Go 1.26, an input that is still running at the end of the time can be
# reported as a failure, "context deadline exceeded" (golang/go#75804). A real
# failure names the failing input.
.PHONY: fuzz
fuzz: $(DEVENV) | bin ## Fuzz each decoder for FUZZTIME (60s)
	@$(DEVENV) run -only python -celery 5.7.0 -- $(MAKE) --no-print-directory fuzz-targets

.PHONY: fuzz-targets
fuzz-targets:
	@for package in $$(go list ./...); do \
		for target in $$(go test -list '^Fuzz' $$package | grep '^Fuzz'); do \
			echo "$$package $$target"; \
			go test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) $$package 2>&1 | tee bin/fuzz.log; \
			if [ "$${PIPESTATUS[0]}" != 0 ]; then \
				grep -q '^    context deadline exceeded' bin/fuzz.log && ! grep -q 'Failing input' bin/fuzz.log || exit 1; \
				echo 'the time ended while an input was running: not a failure'; \
			fi; \
		done; \
	done

BENCH_VARIABLES = $(if $(BENCH),BENCH=$(BENCH)) $(if $(CASES),CASES=$(CASES)) $(if $(ROUNDS),ROUNDS=$(ROUNDS)) $(if $(CONTENDERS),CONTENDERS=$(CONTENDERS))
BENCH_FLAGS = $(if $(filter short,$(BENCH)),-short) $(if $(CASES),-cases $(CASES)) $(if $(ROUNDS),-rounds $(ROUNDS)) $(if $(CONTENDERS),-contenders $(CONTENDERS)) $(if $(OUT),-out $(OUT),$(if $(BENCH)$(CASES)$(CONTENDERS),,-readme README.md))

.PHONY: bench
bench: $(DEVENV) ## Compare with Celery and with the floor: BENCH=short CASES=… CONTENDERS=… ROUNDS=… OUT=…
	@go build -o bin/bench ./internal/bench/program
	@$(DEVENV) run -only python,broker,database -celery 5.7.0 -- env MM_BENCH_VARIABLES="$(strip $(BENCH_VARIABLES))" bin/bench $(BENCH_FLAGS)

.PHONY: bench-compare
bench-compare: $(DEVENV) ## Compare the Go benchmarks with an older commit: BASE=main PACKAGES=./artifacts RUN=… COUNT=6
	@test -n "$(BASE)" || { echo 'usage: make bench-compare BASE=commit [PACKAGES=./artifacts] [RUN=Redaction] [COUNT=6]' >&2; exit 2; }
	@go build -C tools/benchstat -o ../../bin/benchstat golang.org/x/perf/cmd/benchstat
	@$(DEVENV) run -- internal/bench/compare.sh "$(BASE)" "$(or $(PACKAGES),./...)" "$(or $(RUN),.)" "$(or $(COUNT),6)"

.PHONY: bench-go
bench-go: $(DEVENV) ## Run the Go benchmarks
	@$(DEVENV) run -- go test -run '^$$' -bench . -benchmem ./...

.PHONY: build
build: ## Build the statically linked program into bin/
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$(VERSION)" -o bin/mm-orchestrator ./cmd/mm-orchestrator

bin:
	@mkdir -p bin

# The pinned compose program for the image, statically linked like the worker.
bin/docker-compose: tools/compose/go.sum
	CGO_ENABLED=0 go build -C tools/compose -trimpath -buildvcs=false \
		-ldflags "-s -w -X github.com/docker/compose/v5/internal.Version=$$(cd tools/compose && go list -m -f '{{.Version}}' github.com/docker/compose/v5)" \
		-o ../../$@ github.com/docker/compose/v5/cmd

.PHONY: image
image: build bin/docker-compose $(DEVENV) ## Build the worker's image, mm-orchestrator:local
	@VERSION=$(VERSION) $(DEVENV) run -images -only compose -- bin/docker-compose build orchestrator
