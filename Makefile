# MOSS: two commands from a fresh clone are enough, `make chat` and `make test`.
# Each target sets itself up in .venv; it needs Python >= 3.11, make and a compiler.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
# Where PyTorch comes from when pip has no wheel of it at hand: PyTorch's own index of CPU builds (250 MB). For a GPU:
# make TORCH_INDEX=https://download.pytorch.org/whl/cu130; TORCH_INDEX= (empty) takes pip's default index.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS   ?=

.PHONY: help chat test check format soak nano docs clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## */\1\t/p' $(MAKEFILE_LIST) | expand -t 10

chat: $(VENV)/.core  ## set up and talk to the bundled model (ARGS="--temperature 0")
	@$(BIN)/moss chat $(ARGS)

test: $(VENV)/.dev  ## set up and run every check: lint, types, the whole test suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not soak" $(ARGS)

check: $(VENV)/.dev  ## the same without the slow tests, for while you work
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow and not soak" $(ARGS)

soak: $(VENV)/.dev  ## minutes of hammering: long chats, flat memory, many random cases
	$(BIN)/pytest -m "soak or repeated" --repeats 100 $(ARGS)

format: $(VENV)/.dev  ## write every file as ruff wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev  ## write docs/commands.md and tests/flags.txt from the commands themselves
	$(BIN)/python -m docs.generate

nano: $(VENV)/.core  ## make a nano model from nothing (ARGS="--scale 0.05 --out out/small")
	runs/nano.sh $(ARGS)

clean:  ## remove the environment and everything that was built or trained into out/
	rm -rf $(VENV) out build *.egg-info .pytest_cache .ruff_cache .hypothesis

# A stamp a set of packages: made again when the requirements change.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "MOSS needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) \
	  || { echo "$(VENV) cannot be made; on Debian and Ubuntu: sudo apt install python3-venv, then again" >&2; exit 1; }
	@echo "Setting up .venv: once, some minutes"
	@$(BIN)/pip install --quiet --no-index --no-deps "$(TORCH)" 2>/dev/null \
	  || $(BIN)/pip install --quiet --no-deps $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH)"
	@touch $@

$(VENV)/.core: $(VENV)/.torch pyproject.toml
	@$(BIN)/pip install --quiet -c constraints.txt -e ".[search]"
	@$(BIN)/python -c "from moss.engine.kernels import library; library()"
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@
