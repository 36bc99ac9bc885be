# Two commands set themselves up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
TEST_VENV ?= .venv-test
WORKERS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-slow lint format benchmarks clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[viz]'
	touch $@

$(TEST_VENV)/installed: pyproject.toml
	$(PYTHON) -m venv --clear $(TEST_VENV)
	$(TEST_VENV)/bin/python -m pip install --quiet --editable '.[test,viz,dev]'
	touch $@

# Trains a byte-level model on the standard library's source for about two minutes, then loads it
# back and prints what its attention heads do.
demo: $(VENV)/installed
	$(VENV)/bin/python -m launch.train --model=tiny --mesh=data:4,model:2 --simulated_devices=8 \
	  --workdir=runs/demo --resume=false --steps=600 --seq_len=128 --batch_size=16 \
	  --set train.lr=4e-3 --set train.warmup_steps=50 $(DEMO_FLAGS)
	$(VENV)/bin/python -m experiments.head_map --model=runs/demo

test: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/python -m pytest -n $(WORKERS) -m "not slow and not gpu and not network"

# Long tests run their programs often enough for optimising them to pay (see tests/conftest.py).
test-slow: export XLA_FLAGS = --xla_backend_optimization_level=3 --xla_llvm_disable_expensive_passes=false
test-slow: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/python -m pytest -n $(WORKERS) -m "slow and not gpu and not network"

lint: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/ruff format --check .
	$(TEST_VENV)/bin/pyright --pythonpath $(TEST_VENV)/bin/python

format: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/ruff check --fix .
	$(TEST_VENV)/bin/ruff format .

benchmarks: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/python -m benchmarks.train_step
	$(TEST_VENV)/bin/python -m benchmarks.load

clean:
	rm -rf $(VENV) $(TEST_VENV) runs
