# The daily words. CI runs the same ones.

CARGO ?= cargo
# Schedules of the engine simulator; a quick local run may ask for fewer.
NAGAYA_SIMULATION_SCHEDULES ?= 10000
export NAGAYA_SIMULATION_SCHEDULES

.PHONY: demo build test test-cgroup-v2 check fmt fuzz bench clean packages test-packages

## demo: build in release mode, then create a sandbox, use it and remove it
demo: packages
	$(CARGO) build --locked --release -p nagaya
	./target/release/nagaya demo

## build: the release binary, at target/release/nagaya
build:
	$(CARGO) build --locked --release -p nagaya

## test: everything, with the real things
test: test-packages
	./scripts/test

## test-cgroup-v2: the driver contract in an emulated machine that has cgroup v2 only
test-cgroup-v2:
	./scripts/test-cgroup-v2

## fuzz: hostile bytes for every target of fuzz/, NAGAYA_FUZZ_S seconds each
fuzz:
	./scripts/fuzz

## check: formatting, lints, and licences and sources of dependencies
check: check-packages
	./scripts/check

fmt:
	$(CARGO) fmt --all

## bench: measure against peers in one run; raw samples go to bench/results/
bench: test-packages
	./bench/run

packages:
	./scripts/install-packages run

check-packages:
	./scripts/install-packages run check

test-packages:
	./scripts/install-packages run test

clean:
	$(CARGO) clean
