# Every target sets itself up: .venv is made and filled when it is missing or older than what it is made from.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
WORKERS ?= 2
export TORCH_DEVICE_BACKEND_AUTOLOAD := 0

PEERS := .cache/torchtune

.PHONY: demo serve test check openapi bench npu-proof proof-loop proof-torchtune proof-engine proof-tuning proof-training
.PHONY: e2e setup

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: setup  ## the main job on the real model: ask, fine-tune over HTTP, ask again
	$(BIN)/python examples/demo.py

serve: setup  ## the service on 127.0.0.1:8000; make serve ARGS="port=9000"
	$(BIN)/tuneserve pull smollm2-135m-instruct
	$(BIN)/tuneserve serve $(ARGS)

test: setup  ## everything that needs neither the real model nor minutes
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

e2e: setup  ## the slow proofs on the real model
	$(BIN)/tuneserve pull smollm2-135m-instruct
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

openapi: setup  ## write openapi/openapi.json from the app
	$(BIN)/python -m service.openapi

bench: setup  ## decode and training speed beside transformers, same model, same run
	$(BIN)/tuneserve pull smollm2-135m-instruct
	$(BIN)/python benchmarks/run.py

npu-proof: setup  ## the NPU path without a card: the simulated device
	$(BIN)/python -m pytest tests/npu

proof-loop: setup  ## the figures of issue "the whole loop on a real model"
	$(BIN)/tuneserve pull smollm2-135m-instruct
	$(BIN)/python -m pytest -m slow tests/proof

proof-torchtune: setup  ## the figures of issue "everything a torchtune user brings"
	$(BIN)/tuneserve pull smollm2-135m-instruct
	$(BIN)/python -m pytest tests/lm tests/trainer tests/service/test_torchtune_user.py \
		tests/service/test_families_served.py tests/service/test_hub.py tests/proof/test_torchtune.py \
		tests/test_configs.py

proof-engine proof-tuning: export TUNESERVE_PROOF_SIZE := full

proof-engine: setup  ## the figures of issue "an inference engine and an OpenAI surface"; nothing else should run
	$(BIN)/tuneserve pull smollm2-135m-instruct
	$(BIN)/python -m pytest -m slow tests/service/engine/test_mixes.py tests/proof/test_lm_eval.py \
		tests/proof/test_structured_output.py tests/proof/test_storm.py
	$(BIN)/python -m pytest -m "not slow" tests/service/test_openai_sdk.py tests/service/test_served_parameters.py \
		tests/service/test_served_responses.py tests/service/test_tool_clients.py tests/service/test_trained_loss.py
	$(BIN)/python benchmarks/engine_host_time.py
	$(BIN)/python benchmarks/http_streams.py

proof-tuning: setup  ## the figures of issue "fine-tuning as a service" that need no quiet machine
	$(BIN)/tuneserve pull smollm2-135m-instruct
	$(BIN)/python -m pytest tests/trainer
	$(BIN)/python -m pytest -m slow tests/trainer tests/proof/test_peers.py tests/proof/test_fine_tuning_sdk.py \
		tests/proof/test_resume.py tests/proof/test_jobs.py tests/service/test_trained_loss.py

proof-training: setup  ## the same issue's figures of speed and memory; nothing else should run
	$(BIN)/tuneserve pull smollm2-135m-instruct
	test -d $(PEERS)/bin || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --requirement benchmarks/peers/requirements.txt
	$(BIN)/python benchmarks/training.py $(PEERS)/bin/python
	$(BIN)/python benchmarks/large_dataset.py
	$(BIN)/python benchmarks/serving_while_training.py
