# `make help` lists the targets. Only Python 3.11 or 3.12 and make have to be there before.
#   PYTHON=...          another interpreter for .venv
#   TORCH_PIP_ARGS=...  for example --index-url of PyTorch's CPU builds, where pip's default is a CUDA build
#   ARGS=...            arguments for pytest: make test ARGS="-k rank -x"

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-input --constraint constraints.txt
SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))

# An outer environment must not leak into .venv.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test browser check bench chaos plot fuzz soak dist site clean

help:
	@echo 'make setup   make .venv and install the pinned versions and this tree (editable)'
	@echo 'make demo    set up, then index, serve, rank and search pictures, and stop (KEEP=1: at Ctrl-C)'
	@echo 'make test    set up, then run every test'
	@echo 'make check   set up, then lint, formatting and types'
	@echo 'make bench   set up, then measure against the alternatives (40 minutes; ARGS=library for a part)'
	@echo 'make chaos   set up, then kill, hang, upgrade and overload what is served, and kill the job (40 minutes)'
	@echo 'make plot    draw what make chaos measured of overload: docs/overload.svg'
	@echo 'make fuzz    set up, then send damaged files and odd requests (ARGS="--seed 7")'
	@echo 'make soak    set up, then half an hour of mixed load: nothing may grow'
	@echo 'make dist    set up, then build what a release uploads and try each extra of it in a fresh environment (9 minutes)'
	@echo 'make site    set up, then make the pages of docs/ a site in build/site'
	@echo 'make clean   remove .venv and all that builds, tests and the demo wrote'

setup: $(STAMP)

# The stamp is written last, so an interrupted set-up starts again. An existing .venv is kept if it works.
$(STAMP): pyproject.toml constraints.txt hatch_build.py clipfleet/resample.c
	@set -e; \
	if ! { $(BIN)/python -c '$(SUITABLE)' && $(BIN)/python -m pip --version; } >/dev/null 2>&1; then \
		python=; \
		for candidate in $(or $(PYTHON),python3.11 python3.12 python3); do \
			if $$candidate -c 'import ensurepip, venv; $(SUITABLE)' >/dev/null 2>&1; then python=$$candidate; break; fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo 'clipfleet needs Python 3.11 or 3.12 with its venv module (Debian: python3.11-venv); found none as' \
				'$(or $(PYTHON),python3.11 python3.12 python3). Another one: make setup PYTHON=/path/to/python3.11' >&2; \
			exit 1; \
		fi; \
		echo "making $(VENV) with $$($$python --version)"; \
		$$python -m venv --clear $(VENV); \
	fi
	@echo 'installing torch (the largest part)'
	@$(PIP_INSTALL) $(TORCH_PIP_ARGS) torch hatchling
	@echo 'installing the other pinned packages and this tree'
	@$(PIP_INSTALL) --no-build-isolation --editable '.[serve,openvino,qdrant,tracing,test]'
	@touch $(STAMP)
	@echo 'set up: $(BIN)/clipfleet'

bench: setup
	@$(BIN)/python -m benchmarks $(ARGS)

chaos: setup
	@status=0; for kind in chaos upgrades nodes job overload; do $(BIN)/python -m faults $$kind $(ARGS) || status=1; done; exit $$status

plot: setup
	@$(PIP_INSTALL) matplotlib==3.11.2
	@$(BIN)/python -m faults.plot build/overload.json docs/overload.svg

fuzz: setup
	@$(BIN)/python -m faults fuzz $(ARGS)
	@$(BIN)/python -m faults schema $(ARGS)

soak: setup
	@$(BIN)/python -m faults soak --seconds 1800 $(ARGS)

dist: setup
	@TORCH_PIP_ARGS='$(TORCH_PIP_ARGS)' $(BIN)/python scripts/dist.py $(ARGS)

site: setup
	@$(PIP_INSTALL) mkdocs-material==9.8.2
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/site
	@echo 'build/site/index.html'

demo: setup
	@$(BIN)/python scripts/demo.py $(if $(KEEP),--keep)

test: setup browser
	@$(BIN)/python -m pytest $(ARGS)

# The page is tested in Chromium. Where there is none and nobody may install it, those tests are skipped, which pytest says.
browser:
	@if ! command -v chromium >/dev/null 2>&1 && ! command -v chromium-browser >/dev/null 2>&1 && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
		echo 'installing Chromium, in which the page is tested'; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium; } \
			>/dev/null 2>&1 || echo 'Chromium could not be installed: its tests are skipped'; \
	fi

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build dist demo clipfleet/_resample.* *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* coverage.xml htmlcov
	find . -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
