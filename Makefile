# Seven words: demo, test, lint, shapes, publish, bench, clean. Each installs what it needs into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEVELOPMENT := [train,eval,dev]
# Without an NVIDIA GPU take the tested versions, which also selects the CPU build of torch.
CONSTRAINT := $(shell nvidia-smi >/dev/null 2>&1 || echo "-c constraints-cpu.txt")
PIP := $(BIN)/python -m pip
UV := UV_FIND_LINKS="$$PIP_FIND_LINKS" $(BIN)/python -m uv --quiet pip install --python $(BIN)/python

.DEFAULT_GOAL := demo
.PHONY: demo test lint shapes publish bench clean
.SUFFIXES:

demo: $(VENV)/.core
	$(BIN)/unimm demo --output runs/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	mkdir -p runs/bench
	$(BIN)/python eval/shapes.py --json runs/bench/shapes.json

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find unimm recipes eval tests -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- set-up: uv takes seconds where pip takes minutes; pip is the fallback ----

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "unimm needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

define install
	@echo "installing unimm$(1) into $(VENV)"
	@$(PIP) install --quiet uv || echo "uv is not at hand: pip does it alone"
	@$(UV) -e '.$(1)' $(CONSTRAINT) || $(PIP) install --quiet -e '.$(1)' $(CONSTRAINT)
	@touch $@
endef

$(VENV)/.core: pyproject.toml constraints-cpu.txt | $(BIN)/python
	$(call install,)

$(VENV)/.dev: pyproject.toml constraints-cpu.txt | $(BIN)/python
	$(call install,$(DEVELOPMENT))
	@touch $(VENV)/.core

# ---- the embedded model from nothing: a finished step is skipped, an interrupted one resumes from its last checkpoint ----

SHAPES := runs/shapes
LAUNCH := $(BIN)/accelerate launch --num_cpu_threads_per_process 2

shapes: $(SHAPES)/positions/.done $(SHAPES)/stage3_more/.done

$(SHAPES)/vfm/.done: | $(VENV)/.dev
	$(LAUNCH) recipes/vfm.py --config configs/shapes/vfm.yaml
	@touch $@

$(SHAPES)/stage1/.done: $(SHAPES)/vfm/.done | $(VENV)/.dev
	$(LAUNCH) recipes/tokenizer.py --config configs/shapes/stage1.yaml
	@touch $@

$(SHAPES)/stage2/.done: $(SHAPES)/stage1/.done | $(VENV)/.dev
	$(LAUNCH) recipes/tokenizer.py --config configs/shapes/stage2.yaml
	@touch $@

$(SHAPES)/stage3/.done: $(SHAPES)/stage2/.done | $(VENV)/.dev
	$(LAUNCH) recipes/tokenizer.py --config configs/shapes/stage3.yaml
	@touch $@

$(SHAPES)/stage3_more/.done: $(SHAPES)/stage3/.done | $(VENV)/.dev
	$(LAUNCH) recipes/tokenizer.py --config configs/shapes/stage3_more.yaml
	@touch $@

$(SHAPES)/sft/.done: $(SHAPES)/stage2/.done | $(VENV)/.dev
	$(LAUNCH) recipes/sft.py --config configs/shapes/sft.yaml
	@touch $@

$(SHAPES)/t2i/.done: $(SHAPES)/sft/.done | $(VENV)/.dev
	$(LAUNCH) recipes/t2i.py --config configs/shapes/t2i.yaml
	@touch $@

$(SHAPES)/questions/.done: $(SHAPES)/t2i/.done | $(VENV)/.dev
	$(LAUNCH) recipes/t2i.py --config configs/shapes/questions.yaml
	@touch $@

$(SHAPES)/positions/.done: $(SHAPES)/questions/.done | $(VENV)/.dev
	$(LAUNCH) recipes/t2i.py --config configs/shapes/positions.yaml
	@touch $@

publish: $(SHAPES)/positions/.done $(SHAPES)/stage3_more/.done
	$(BIN)/python recipes/publish.py --config configs/shapes/publish.yaml
