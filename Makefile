# make forget: the main job on the embedded data. make test: the tests. make bench: speed against a
# plain baseline, in build/bench (PHOTOS=folder with train/ and val/, else images are drawn;
# MINUTES of repeating each setting, BENCH for more options of bench_end_to_end.py). All install
# first, once.
PYTHON ?= python3
MINUTES ?= 6
# Three processes of tests keep two cores busy: many tests wait for ranks of their own.
WORKERS ?= 3
BIN := .venv/bin
# Compiled modules are kept: else each process that a test starts compiles the package anew.
unexport PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 1)

.PHONY: install forget test test-all test-gpu drill cluster bench docs pictures extras ffcv check clean

install: .venv/installed

.venv/installed: setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: got $$($(PYTHON) --version); Letheon needs Python 3.11 or newer; pass PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv || \
	  { echo "error: python3 -m venv failed; on Debian: apt-get install python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

forget: install
	PATH="$(CURDIR)/$(BIN):$$PATH" sh launch/recipes/digits.sh

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist worksteal

test-all: install
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: install
	$(BIN)/python -m pytest -m gpu

# Kills, flipped bits, full disks, a hung rank, resumes, fuzzed files (docs/drills.md): goes on
# where it was stopped. DRILL="--minutes 2" is a small form.
drill: install
	$(BIN)/python -m tests.drill $(DRILL)

# Many nodes on this machine: a SLURM of two, two hosts with a cable, nodes that differ. What the rights
# or packages are missing for is skipped, and it is said. Prints the table of docs/drills.md.
cluster: install
	@mkdir -p build && rm -f build/cluster.md
	LETHEON_DRILLS=build/cluster.md $(BIN)/python -m pytest -rs tests/cluster
	@echo '| drill | fault | outcome | seconds lost |'; echo '|---|---|---|---|'; cat build/cluster.md

# Fails where a result differs from the baseline's, or something grows too fast; never for seconds.
bench: install
	@failed=0; \
	$(BIN)/python benchmarks/bench_growth.py --out build/bench/growth_cpu.csv || failed=1; \
	$(BIN)/python benchmarks/bench_end_to_end.py --minutes $(MINUTES) $(BENCH) $(if $(PHOTOS),--photos "$(PHOTOS)") \
	  --out build/bench/end_to_end_cpu.csv || failed=1; \
	$(BIN)/python benchmarks/regression.py build/bench/end_to_end_cpu.csv \
	  benchmarks/results/end_to_end_cpu.csv || true; \
	$(BIN)/python benchmarks/plot.py --results build/bench --pictures build/bench \
	  --readme build/bench/none; \
	exit $$failed

# The site of the docs, in build/site; every link and anchor of every page is checked.
docs: install
	$(BIN)/python -m pip install --quiet --editable '.[dev,docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "file://$(CURDIR)/build/site/index.html"

# The screenshots of the docs, from the runs of `make forget`; needs chromium on PATH.
pictures: install
	$(BIN)/python -m tests.screenshots runs

# The optional packages whose tests need no GPU: DALI, the JPEG libraries, faiss, optuna; what judges
# our manifests by Kubernetes' own schemas; and axe-core, by which the browser tests judge the pages: a
# file in a package whose own dependency, a browser's driver, is not needed.
extras: install
	$(BIN)/python -m pip install --quiet --editable '.[dev,dali,fast,turbojpeg,faiss,tune,pandas]' \
	  'kubernetes-validate>=1.37'
	$(BIN)/python -m pip install --quiet --no-deps 'axe-playwright-python>=0.1.8'

ffcv: install
	sh launch/recipes/install_ffcv.sh $(BIN)/python

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
