# What one types here: `make speak` on a fresh machine, `make test` before a commit, `make help` for the rest.
# The environment lives in .venv; its stamps are newer than pyproject.toml and requirements.lock
# while it is up to date, and pip is called only when they are not.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
LOCK := requirements.lock
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev

# Settings, for the command line only: make speak TEXT="Good night."
TEXT := Good morning! The kettle is on, and there is time for one more page.
OUT := out.wav
GOLDENS := tests/golden
MODEL := $(GOLDENS)/model
JOBS := 2
DTYPE := auto
PARTS :=

# The lock keeps this version of torch until told otherwise: make lock TORCH=2.14.0
TORCH := $(shell sed -n 's/^torch==//p' $(LOCK))
LOCK_VENV := build/lock-venv

# To the shell as they are, quotes and all.
export TEXT OUT PYTHON

.NOTPARALLEL: # two pips in one environment
.PHONY: help speak test check format parity bench lock clean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F '|' '{ printf "  make %-7s %s\n", $$1, $$2 }'

speak: $(RUNTIME) ## install what is needed and say TEXT="..." into OUT=out.wav
	$(BIN)/cosyvoice synthesize "$$TEXT" -o "$$OUT"

test: check ## check, then every test, JOBS=2 at a time
	$(BIN)/python -m pytest -n $(JOBS) -m 'not (gpu or checkpoint or slow)'

check: $(DEV) ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(DEV) ## let ruff rewrite what check would complain about
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

parity: $(RUNTIME) ## compare every stage of MODEL with the recorded tensors in GOLDENS
	$(BIN)/cosyvoice parity --model-dir $(MODEL) --goldens $(GOLDENS)

bench: $(RUNTIME) ## measure MODEL in the format DTYPE; PARTS=llm,flow for some of it
	$(BIN)/cosyvoice bench engine --model-dir $(MODEL) --dtype $(DTYPE) --only "$(PARTS)"

lock: ## write requirements.lock anew, from a clean environment with every extra
	scripts/make_venv.sh $(LOCK_VENV)
	extras=$$($(LOCK_VENV)/bin/python -c 'import tomllib; \
	    print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"], sep=",")') \
	&& $(LOCK_VENV)/bin/python -m pip install "torch==$(TORCH)" --editable ".[$$extras]"
	$(LOCK_VENV)/bin/python -m pip freeze --all --exclude pip --exclude-editable > $(LOCK_VENV)/frozen
	{ sed '/^#/!d' $(LOCK); sed 's/+[a-z0-9.]*$$//' $(LOCK_VENV)/frozen; } > $(LOCK).new
	mv $(LOCK).new $(LOCK)
	rm -rf $(LOCK_VENV)

clean: ## remove the environment, caches and what was made
	rm -rf $(VENV) build dist out.wav .hypothesis .pytest_cache .mypy_cache .ruff_cache \
	    src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	scripts/make_venv.sh $(VENV)

# pip prints what it fetches; torch alone is some 200 MB, unpacked in silence for about a minute.
$(RUNTIME): pyproject.toml $(LOCK) $(BIN)/python
	@echo "Installing the package and what it needs into $(VENV) (once; a minute or two)"
	$(PIP) install --constraint $(LOCK) --editable .
	@touch $@

$(DEV): pyproject.toml $(LOCK) $(BIN)/python
	@echo "Installing the package and its development tools into $(VENV) (once; a minute or two)"
	$(PIP) install --constraint $(LOCK) --editable '.[dev]'
	@touch $(RUNTIME) $@
