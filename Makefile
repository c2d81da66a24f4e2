# Every target does its own set-up: a virtual environment in this folder, packages from the package index.
#   make check                                     before each commit: lint, types, policy and core tests, under a minute
#   make test                                      everything
#   make check PYTHON=python3.13 VENV=.venv313     with another interpreter, in an environment for it
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo check test fuzz test-avx2 test-emulated test-arm64 qemu lint clean
.NOTPARALLEL:

demo: $(VENV)/.demo-installed
	$(BIN)/python examples/demo.py

check: $(VENV)/.dev-installed lint
	$(BIN)/python -m pytest tests/core tests/data tests/machine tests/policy --quick --numprocesses 2

test: $(VENV)/.dev-installed lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Mutated files and answers, and kills at random moments: nothing dies, hangs, lies or is lost. MUTANTS=N, KILLS=N, SEED=N.
fuzz: $(VENV)/.dev-installed
	$(BIN)/python -m tests.faults.fuzzing.fuzz --mutants $(or $(MUTANTS),20000) --seed $(or $(SEED),0)
	$(BIN)/python -m tests.faults.fuzzing.kills --kills $(or $(KILLS),1000) --seed $(or $(SEED),0)

# The suite as an x86 CPU without AVX-512 and VNNI runs it, at native speed; PYTEST_ARGS=tests/FILE.py runs that file.
test-avx2: $(VENV)/.dev-installed
	$(BIN)/python -m tests.support.masked_cpu $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# An INT8 file on an emulated x86 CPU without VNNI against this one: some minutes. MODEL=FILE asks of that file,
# ENGINE=openvino in that engine.
test-emulated: qemu $(VENV)/.dev-installed
	$(BIN)/python benchmarks/emulation/emulated_cpu.py $(MODEL) $(if $(ENGINE),--engine $(ENGINE))

qemu:
	@command -v qemu-x86_64-static >/dev/null || command -v qemu-x86_64 >/dev/null || \
	{ echo "an emulator is needed: apt-get install qemu-user-static" >&2; exit 1; }

# An INT8 file on an emulated arm64 device over SSH against this machine; as root. MODEL=FILE asks of that file, ROOT=DIR
# keeps the device's system for the next time.
test-arm64: $(VENV)/.dev-installed
	$(BIN)/python benchmarks/emulation/emulated_arm64.py $(MODEL) $(if $(ROOT),--root $(ROOT))

lint: $(VENV)/.dev-installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

# Installed again only when what is to be installed changed.
$(VENV)/.%-installed: setup.cfg pyproject.toml
	$(PYTHON) tools/preflight.py $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable ".[$*]"
	touch $@
