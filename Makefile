# Every target creates .venv if it is missing, and uses it.
# On a machine with a GPU use the image of the Dockerfile instead, which has its own torch.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The first of these with a supported version.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
# Installed first, so that no dependency selects another build. May hold arguments of pip:
#     make test TORCH="torch==2.13.0 --index-url <where the CPU-only wheels are>"
TORCH ?= torch==2.13.0

# For the newest megatron-core that pyproject.toml allows: 0.17 and later require Python 3.12. Also searches pyenv.
LATEST_PYTHON ?= $(shell for p in python3.12 python3 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo "$$p" && break; done)

OUT ?= runs/demo
SEED ?= 1

BIN := .venv/bin
STAMP := .venv/.installed
SGLANG := .sglang/.installed
LATEST := .venv-latest/.installed
GPU := .venv-gpu/.installed
SHELL_FILES = $(wildcard .ci/run docker/*.sh findings/*.sh slurm/*.sh tools/*/*.sh)
COMPOSE_FILES = docker-compose.yml docs/elasticsearch/docker-compose.yml

# Two test processes on any number of cores: one of them mostly waits for ranks (tests/conftest.py).
PARALLEL ?= -n 2 --no-loadscope-reorder

# Ranks of one test share the machine's few cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test test-latest test-sglang test-elasticsearch test-slurm test-gpu check docs docs-pages format bench clean

help:
	@echo "make demo   train on CPU, TP=2; writes \$$OUT/summary.json and a report (OUT=$(OUT) SEED=$(SEED))"
	@echo "make test   unit, loopback, distributed and end-to-end tests"
	@echo "make test-sglang  tests with real SGLang servers on the CPU (installs them into .sglang, 2.4 GB)"
	@echo "make test-elasticsearch  tests with a real server of Elasticsearch's protocol (noida-db, 12 MB, in .venv)"
	@echo "make test-slurm  tests with a real Slurm of two nodes on this machine (Debian's packages, as root), and SGLang"
	@echo "make test-latest  unit and distributed tests on Python 3.12 with the newest megatron-core (in .venv-latest, 5.5 GB)"
	@echo "make test-gpu     tests that need four GPUs: docs/gpu-first-run.md"
	@echo "make check  format, lint, types, import floors, shell scripts, image and compose files"
	@echo "make docs   the documentation site; make docs-pages regenerates the pages made from code"
	@echo "make format reformat the files for make check"
	@echo "make bench  benchmarks, one JSON object each; that of rollouts uses the model of make demo in OUT"
	@echo "make clean  delete .venv, caches and runs/demo"

demo: $(STAMP)
	$(BIN)/python -m examples.tiny.run --out $(OUT) --seed $(SEED)

test: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) tests/unit tests/loopback tests/distributed tests/e2e

test-latest: $(LATEST)
	.venv-latest/bin/python -m pytest tests/unit tests/distributed

test-gpu:
	@nvidia-smi --list-gpus || { echo "make test-gpu needs GPUs, and nvidia-smi finds none here" >&2; exit 1; }
	$(MAKE) $(GPU)
	.venv-gpu/bin/python -m pytest tests/gpu

test-sglang: $(STAMP) $(SGLANG)
	$(BIN)/python -m pytest tests/integration/sglang

test-elasticsearch: $(STAMP)
	$(BIN)/python -m pytest tests/integration/elasticsearch

test-slurm: $(STAMP) $(SGLANG)
	tools/slurm_local/install.sh
	$(BIN)/python -m pytest tests/integration/slurm

docs: $(STAMP)
	$(BIN)/python tools/make_docs.py --check
	$(BIN)/python docs/figures/method.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "documentation: site/index.html"

docs-pages: $(STAMP)
	$(BIN)/python tools/make_docs.py
	$(BIN)/python docs/figures/method.py

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/shellcheck $(SHELL_FILES)
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec $(COMPOSE_FILES)

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python tools/bench_retrieval.py
	$(BIN)/python tools/bench_step.py
	if [ -d $(OUT)/warm_start/hf ]; then $(BIN)/python tools/bench_rollout.py examples/tiny/config.yaml run_dir=$(OUT); \
	else echo "tools/bench_rollout.py needs the model of make demo, and $(OUT) has none" >&2; fi

clean:
	rm -rf site .venv .venv-latest .venv-gpu .sglang .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info runs/demo

# $(call require,PROGRAM,VERSIONS,SETTING): check the Python before anything is downloaded. An existing .venv wins.
require = @found=$$("$(1)" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || found="no Python"; \
	case " $(2) " in *" $$found "*) ;; *) \
		echo "Python $(subst $() $(), or ,$(2)) is needed, and '$(1)' is $$found: $(if $(filter .%/python,$(1)),make clean and )make $(3)=/path/to/python" >&2; exit 1;; esac

$(STAMP): pyproject.toml constraints.txt
	$(call require,$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)),3.11 3.12,PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,demo]'
	touch $@

$(LATEST): pyproject.toml constraints.txt
	$(call require,$(if $(wildcard .venv-latest/bin/python),.venv-latest/bin/python,$(LATEST_PYTHON)),3.12,LATEST_PYTHON)
	test -x .venv-latest/bin/python || "$(LATEST_PYTHON)" -m venv .venv-latest
	.venv-latest/bin/python -m pip install --quiet $(TORCH)
	.venv-latest/bin/python -m pip install --quiet -c <(grep -v '^megatron-core==' constraints.txt) -e '.[dev,demo]'
	touch $@

# On top of a GPU image's packages, so that its torch, megatron-core, transformer-engine and SGLang are tested.
$(GPU): constraints.txt
	test -x .venv-gpu/bin/python || python3 -m venv --system-site-packages .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet -c constraints.txt pytest pytest-timeout hypothesis
	touch $@

# SGLang requires other versions of the trainer's libraries, so it gets its own environment.
$(SGLANG): tools/sglang_cpu/install.sh tools/sglang_cpu/requirements.txt
	$(call require,$(if $(wildcard .sglang/venv/bin/python),.sglang/venv/bin/python,$(PYTHON)),3.11 3.12,PYTHON)
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" tools/sglang_cpu/install.sh .sglang
