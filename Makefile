# The two commands of the README are `make demo` and `make test`; `make page` shows the demo in a browser; `make check` is the quick half of the gate.
# Each creates .venv by itself and installs again only when pyproject.toml or constraints.txt changed.

SHELL := /bin/bash
unexport PYTHONDONTWRITEBYTECODE  # hundreds of processes are started, and each would compile anew what it imports
PYTHON ?= $(shell for each in python3.11 python3.12 python3.13 python3; do \
	$$each -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$each && break; done)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check --constraint constraints.txt

.PHONY: benchmarks demo page test check nightly docs clean

demo: .venv/demo.stamp  ## Fine-tune a small encoder across eight data owners and show what each gained
	@out=runs/demo; number=1; \
	while [ -e $$out/summary.json ]; do number=$$((number + 1)); out=runs/demo-$$number; done; \
	[ $$number = 1 ] || echo "Earlier demos are finished; see their report.html. This one goes to $$out."; \
	resume=; [ ! -e $$out/config.toml ] || { resume=--resume; echo "Going on with the demo in $$out."; }; \
	$(BIN)/molehill simulate --out $$out $$resume

page: .venv/demo.stamp  ## Run the finished demo in your browser, with gates of its owners and one of your own
	@test -e runs/demo/summary.json || { echo "There is no finished demo yet: make demo" >&2; exit 1; }
	@test -e bundles/page/manifest.pb || $(BIN)/molehill export runs/demo --out bundles/page --id demo \
		--gate global --gate amazon-1 --gate movie-1 --gate nyt-1 --gate tweets-1
	$(BIN)/molehill edge site bundles/page --insecure-local --out site --open

test: .venv/dev.stamp  ## The whole gate: what CI runs
	@test -z "$$CI" || scripts/browser
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

check: .venv/dev.stamp  ## The gate without the tests: seconds
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check static

nightly: .venv/dev.stamp  ## Kills of processes at random moments, 29 of deployments and 500 of simulations, with what became of them, every family of decoders, and a graphics card of software: an hour
	PATH="$(CURDIR)/$(BIN):$$PATH" MOLEHILL_NIGHTLY=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 0 -s tests/deploy/test_faults.py tests/e2e/test_kills.py \
		tests/deploy/test_surroundings.py tests/edge/test_export_families.py tests/web/test_graphics.py

benchmarks: .venv/benchmarks.stamp  ## Measure all speeds and fill docs/reference/speed.md: an hour on a quiet machine
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run.py

docs: .venv/dev.stamp  ## Write the generated pages of docs/reference
	$(BIN)/python scripts/docs.py

clean:  ## Remove the environment and caches; runs/ stays
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Molehill needs Python 3.11 or newer; set PYTHON=/path/to/python." >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/%.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing Molehill and its $* dependencies into .venv (a few minutes the first time)"
	$(INSTALL) --editable ".[$*]"
	@$(BIN)/python -m compileall -q -j 0 .venv/lib > /dev/null || true  # pip does it on one core; some files are for other Pythons
	@touch $@
