# Needs make and Python 3.11 or newer; everything else goes into .venv. The first run installs, later ones start at once.
#   make demo            the whole way of a picture, camera to answer, then stop
#   make run             keep the service up on this machine
#   make test check      the tests; format, lint, types, import contracts
#   make corpus          2,000 damaged files through ingest, and how each of them ended (about 15 minutes)
#   make soak            half an hour of cameras that fail at random, and a verdict
#   make crashes         200 kills of processes of the store, 24 of parts of the whole service or all of it, under load, and
#                        a look for everything acknowledged (20 minutes)
#   make bench           measurements into tests/benchmarks/RESULTS.md
# PYTHON=python3.12 picks the interpreter. TORCH_INDEX=https://download.pytorch.org/whl/cpu takes torch's smaller CPU build.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?=
TORCH_INDEX ?=

.PHONY: demo run test check corpus soak crashes bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/service.stamp
	$(BIN)/tokenline demo

run: $(VENV)/service.stamp
	$(BIN)/tokenline run

test: $(VENV)/dev.stamp
	$(BIN)/pytest -m "not alone" --numprocesses auto --maxprocesses 4 --dist loadfile
	$(BIN)/pytest -m alone

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

corpus: $(VENV)/dev.stamp
	$(BIN)/python -m tests.malformed --files 2000 --seed 1 --at-once 4

soak: $(VENV)/dev.stamp
	$(BIN)/python -m tests.soak

crashes: $(VENV)/dev.stamp
	$(BIN)/python -m tests.crashes
	$(BIN)/python -m tests.service_crashes

bench: $(VENV)/dev.stamp
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/service.stamp: EXTRAS := cpu,demo
$(VENV)/dev.stamp: EXTRAS := cpu,demo,train,dev
$(VENV)/service.stamp $(VENV)/dev.stamp: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# ensurepip is what Debian and Ubuntu leave out of python3 and ship as python3-venv.
$(BIN)/python:
	@for python in $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11); do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found="$$python"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo 'error: no Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python3' >&2; exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "error: $$found cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	fi; \
	echo "making $(VENV) with $$("$$found" --version) and installing into it (minutes, once)"; \
	rm -rf $(VENV) && "$$found" -m venv $(VENV)
