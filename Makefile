# Each of these makes the virtual environment .venv the first time and installs what it needs; after that they need no
# network. OUT, SCALE, ARGS, TRITON and PYTHON can be given on the command line; so can TORCH_INSTALL, the arguments with
# which pip shall install torch, where the choice made in .ci/install_torch.py does not suit.

SCALE ?= laptop
OUT ?= out/demo
ARGS ?=
TORCH_INSTALL ?=
TRITON ?=

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && { echo $$p; break; }; done)

VENV := .venv
PY := $(VENV)/bin/python
OTHER_TRITON = $(VENV)/triton-$(TRITON)
# What is installed depends on these files and on where the checkout lies, not on the files' dates.
STATE := $(shell { pwd; cat pyproject.toml setup.py; } | cksum | cut -d ' ' -f 1)

.PHONY: help demo test lint bench compile clean
.SUFFIXES:

help:
	@echo 'make demo    train a small language model and its dictionaries, and write a site of its features: $(OUT)/index.html'
	@echo '             SCALE=tiny (minutes), laptop (up to half an hour on 2 cores) or gpu; OUT=folder'
	@echo 'make test    run the tests; ARGS="tests/test_sae.py -k topk" for some of them'
	@echo 'make lint    ruff and pyright'
	@echo 'make bench   time the training step; on a machine with an NVIDIA GPU the kernels too'
	@echo 'make compile compile all kernels for all GPUs, without a GPU; TRITON=3.9.0 with that version of Triton'
	@echo 'make clean   remove .venv and caches; what was made under out/ stays'

demo: $(VENV)/.all-$(STATE)
	@echo '== demo, scale $(SCALE), into $(OUT)'
	@$(VENV)/bin/fastsae demo --out '$(OUT)' --scale $(SCALE) $(ARGS)

test: $(VENV)/.dev-$(STATE)
	@echo '== tests'
	@$(PY) -m pytest -q $(ARGS)

lint: $(VENV)/.dev-$(STATE)
	@echo '== ruff'
	@$(PY) -m ruff check .
	@echo '== pyright'
	@$(PY) -m pyright --pythonpath $(PY)

bench: $(VENV)/.dev-$(STATE)
	@echo '== bench'
	@$(PY) -m bench all $(ARGS)

compile: $(VENV)/.dev-$(STATE)
	@echo '== compiling the kernels'
	@test -z '$(TRITON)' || test -d '$(OTHER_TRITON)' || { \
		rm -rf '$(OTHER_TRITON).part' && \
		$(PY) -m pip install --quiet --no-deps --target '$(OTHER_TRITON).part' 'triton==$(TRITON)' && \
		mv '$(OTHER_TRITON).part' '$(OTHER_TRITON)'; }
	@PYTHONPATH='$(if $(TRITON),$(OTHER_TRITON))' $(PY) -m bench compile $(ARGS)

$(VENV)/.made:
	@command -v '$(PYTHON)' >/dev/null && '$(PYTHON)' -c '$(NEW_ENOUGH)' || { \
		echo 'fastsae needs Python 3.10 or newer; none was found. If it has another name: make PYTHON=/path/to/python'; \
		exit 1; }
	@echo "== making the virtual environment $(VENV) with $$('$(PYTHON)' --version)"
	@'$(PYTHON)' -m venv --clear $(VENV) || { \
		echo 'python -m venv failed; on Debian and Ubuntu: apt install python3-venv'; exit 1; }
	@$(PY) -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.torch: $(VENV)/.made
	@echo '== installing torch'
	@$(PY) .ci/install_torch.py $(TORCH_INSTALL)
	@$(PY) -W ignore -c 'import torch; print("torch", torch.__version__, "works here")'
# What follows may not replace it: another version could be another build.
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/torch.txt
	@touch $@

$(VENV)/.all-$(STATE): $(VENV)/.torch
	@echo '== installing fastsae with all that its commands need'
	@$(PY) -m pip install --quiet --constraint $(VENV)/torch.txt --editable '.[all]'
	@touch $@

$(VENV)/.dev-$(STATE): $(VENV)/.torch
	@echo '== installing fastsae with all that its commands, tests and checks need'
	@$(PY) -m pip install --quiet --constraint $(VENV)/torch.txt --editable '.[dev]'
	@touch $(VENV)/.all-$(STATE) $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .benchmarks build fastsae.egg-info
