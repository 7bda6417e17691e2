# Two commands for a fresh machine: `make run` and `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3
PROFILE ?= cpu
TORCH ?= torch==2.13.0
# Where the executed copies of `make milestones` go, and their results beside them.
OUT ?= executed/$(PROFILE)
# RESUME=--resume goes on with the training runs that an interrupted start left.
RESUME ?=
# AT_ONCE=4 trains so many runs at the same time, each on a GPU of its own.
AT_ONCE ?=
# Passed to `jupyter lab`.
LAB_FLAGS ?=

BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --no-compile --disable-pip-version-check
# On all cores, where pip takes one; it says no where a package holds a file of another Python, which is never imported.
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/tests?/' .venv/lib || true
HYBRIDLAB := $(BIN)/hybridlab
FIRST := 03_gpt2_small_hybrid
DEPTH := 10_predicted_depth
ALL := $(patsubst params/$(PROFILE)/%.yaml,%,$(sort $(wildcard params/$(PROFILE)/[0-9]*.yaml)))
# The report reads what the others found, and runs after them.
MILESTONES := $(filter-out 09_report,$(ALL))
# The benchmark that notebook 08 shows beside its ladder, where its parameters name one: it runs first.
OTHERS := $(shell sed -n 's/^others: *"*\([^"]*\)"*$$/\1/p' params/$(PROFILE)/08_speed_ladder.yaml 2>/dev/null)
# Its committed copy is that of the profile cpu; beside copies of your own lies one of its own.
REPORT_OUT := $(if $(filter executed/$(PROFILE),$(OUT)),executed/cpu,$(OUT))

.PHONY: help run test lab milestones check clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 22

run: .venv/run ## prediction in time, then in depth, each with its controls, on real text; opens the executed notebooks
	$(HYBRIDLAB) run notebooks/$(FIRST).ipynb -f params/cpu/$(FIRST).yaml -p device auto \
	  -o runs/first/$(FIRST).ipynb
	$(HYBRIDLAB) run notebooks/$(DEPTH).ipynb -f params/cpu/$(DEPTH).yaml -p device auto \
	  -o runs/first/$(DEPTH).ipynb
	@if [ -t 1 ] && [ "$$(id -u)" -ne 0 ]; then $(MAKE) lab; fi

test: .venv/test ## every test, the notebooks' included
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: .venv/dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lab: .venv/run ## JupyterLab, on the latest executed copy in runs/
	@latest=$$(ls -t runs/*.ipynb runs/*/*.ipynb 2>/dev/null | grep -v '\.failed\.ipynb$$' | head -n 1); \
	$(BIN)/jupyter lab --LabApp.default_url="/lab/tree/$${latest:-notebooks/$(FIRST).ipynb}" $(LAB_FLAGS)

# One that fails is named at the end, and the others run all the same; Ctrl-C ends all.
define milestone
start=$$(date +%s); code=0; \
$(HYBRIDLAB) run notebooks/$(1).ipynb -f params/$(PROFILE)/$(1).yaml -o $(OUT)/$(1).ipynb $(RESUME) $(AT_ONCE:%=-p at_once %) || code=$$?; \
[ $$code -ne 130 ] || exit 130; [ $$code -eq 0 ] || failed="$$failed $(1)"; \
times="$$times$$(printf '%7d s  %s' $$(( $$(date +%s) - start )) $(1))\n";
endef

milestones: .venv/run ## all notebooks of a profile as a batch: PROFILE=a folder of params, OUT=folder RESUME=--resume AT_ONCE=1
	@test -n "$(MILESTONES)" || { echo "there is no params/$(PROFILE): take one of $(notdir $(wildcard params/*))"; exit 2; }
	@test -z "$(OTHERS)" || test -e "$(OTHERS)" || $(BIN)/python -m hybridlab.benchmarks.against_others --out "$(OTHERS)" \
	  || echo "notebook 08 goes without it"
	@failed=; times=; $(foreach notebook,$(MILESTONES),$(call milestone,$(notebook))) \
	$(HYBRIDLAB) run notebooks/09_report.ipynb -f params/cpu/09_report.yaml -o $(REPORT_OUT)/09_report.ipynb && \
	$(HYBRIDLAB) report || failed="$$failed 09_report"; printf "$$times"; \
	test -z "$$failed" || { echo "failed:$$failed; the same command with RESUME=--resume goes on"; exit 1; }

# A stamp file for each set of packages: a second call finds it and installs nothing.
.venv/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hybridlab needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)"
	touch $@

.venv/test: EXTRA := [test]
.venv/test: HELD := .venv/run
.venv/dev: EXTRA := [dev]
.venv/dev: HELD := .venv/run .venv/test
.venv/run .venv/test .venv/dev: .venv/python pyproject.toml
	$(PIP) --editable '.$(EXTRA)'
	$(COMPILE)
	touch $@ $(HELD)

clean: ## remove the environment, caches and all of runs/, kept weights included
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
