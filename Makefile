# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
# Tests of whole federations wait much: a third process works meanwhile, and needs 4 GB. In the order
# of the folders they come first, since the last tests should be short ones.
TESTS ?= $(shell awk '/^MemTotal/ {print ($$2 > 15000000) ? 3 : 2}' /proc/meminfo 2>/dev/null || echo 2)

.PHONY: demo demo-ceiling test test-slow cluster lint types check audit clean

demo: $(INSTALLED)
	@echo "== Running one cloud, two edges and six clients on this machine (6 to 11 minutes on 2 cores;"
	@echo "   the first samples after one to three: it says where)"
	$(BIN)/fedphd local
	@newest=$$(ls -td runs/*/ | head -1); if [ -f "$$newest"report.html ]; then \
		echo "== The run's report: $$newest"report.html; fi

demo-ceiling: $(INSTALLED)
	@echo "== What the demo's network makes of all images in one place, with as many steps (about 8 minutes)"
	$(BIN)/fedphd compare --methods centralised --seeds 0 --out runs/demo-ceiling

test: $(DEV)
	@echo "== Running the tests, $(TESTS) at a time"
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(TESTS) --dist loadfile --no-loadscope-reorder

test-slow: $(DEV)
	@echo "== Running the slow tests"
	$(BIN)/pytest -q -m slow

cluster: $(DEV)
	@echo "== Running the compose cluster of deploy/compose.yaml and checking it from outside (15 to 20 minutes)"
	$(BIN)/pytest -q -s -rs -m slow tests/e2e/test_cluster.py

lint: $(DEV)
	@echo "== ruff"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)
	@echo "== mypy, strict"
	$(BIN)/mypy -p fedphd

check: lint types

audit: $(DEV)
	@echo "== pip-audit: known vulnerabilities of the versions in constraints.txt, from a public data base"
	$(BIN)/python -m pip install -q --disable-pip-version-check pip-audit
	$(BIN)/pip-audit -r constraints.txt --no-deps --disable-pip

# Not its Python: that is there even where making the rest failed, and pip comes last.
$(VENV)/bin/pip:
	@echo "== Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "FedPhD needs Python 3.11 or newer; try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
		echo "$(VENV) could not be made. Where the lines above name ensurepip or venv, install them, on Debian"; \
		echo "and Ubuntu by: sudo apt install python3-venv (or python3.11-venv, after the version); then:"; \
		echo "make $(MAKECMDGOALS)"; exit 1; }

$(INSTALLED): pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "== Installing fedphd into $(VENV), with PyTorch, Flower, diffusers and $$(grep -c == constraints.txt)"
	@echo "   pinned packages at the most (constraints.txt): a minute or two, up to 4 GB"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(INSTALLED)
	@echo "== Installing the test tools"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache *.egg-info
