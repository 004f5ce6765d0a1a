# make train: RL Zoo trains and evaluates BLPO. The rest is for developers. All in an environment of its own, .venv
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
# Small networks: more threads would only wait for each other
export OMP_NUM_THREADS ?= 1

.PHONY: train test test-benchmarks slow conformance zoo fuzz soak mutation results ablation million docs lint

train: $(INSTALLED)
	$(BIN)/python -m rl_zoo3.train --algo blpo --env CartPole-v1 --seed 1 --log-folder logs
	$(BIN)/python -m rl_zoo3.enjoy --algo blpo --env CartPole-v1 --folder logs -n 5000 --no-render | tee logs/CartPole-v1.txt
	@grep -q "^Mean reward" logs/CartPole-v1.txt

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not zoo and not benchmarks"

slow: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

# Of benchmarks/, and the theory on exactly solvable problems
test-benchmarks: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "benchmarks and not slow"

# SB3's and sb3-contrib's own tests, of the installed versions
conformance: $(INSTALLED)
	$(BIN)/python tests/conformance/sb3_tests.py -n 2

# RL Zoo's commands (but push_to_hub, broken upstream), with the packages that only plots and tracking need
zoo: $(INSTALLED)
	$(BIN)/python -m pip install -c constraints.txt -e '.[envs,dev,docs,plots]' wandb
	$(BIN)/python -m pytest tests/zoo

# 1000 random faults, 500 random configurations
fuzz: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --hypothesis-profile fuzz tests/faults/test_random_faults.py tests/faults/test_fuzz.py

# Millions of steps: no NaN, memory flat. More than two hours; a killed run goes on where it was
soak: $(INSTALLED)
	$(BIN)/python benchmarks/soak.py

# Small changes to the numerics, one at a time: does the module's own test file notice?
mutation: $(INSTALLED)
	$(BIN)/python -m pip install -c constraints.txt mutmut
	$(BIN)/python tests/definition/mutation.py

# Returns beside PPO's, ten seeds of six tasks. About 7 core-hours; a killed run goes on where it was
results: $(INSTALLED)
	$(BIN)/python benchmarks/run.py --stage returns
	$(BIN)/python benchmarks/report.py

# What in BLPO does the work: its variants, five seeds of three tasks. About 4 core-hours after `results`
ablation: $(INSTALLED)
	$(BIN)/python benchmarks/run.py --stage ablation
	$(BIN)/python benchmarks/report.py

# Returns over a million steps. About 30 core-hours
million: $(INSTALLED)
	$(BIN)/python benchmarks/run.py --stage million
	$(BIN)/python benchmarks/report.py benchmarks/results/million/returns.csv

# The site, in docs/_build; a warning, such as for a link that leads nowhere, is an error
docs: $(INSTALLED)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The constraints name the tested torch, so that pip looks for no other
$(INSTALLED): pyproject.toml constraints.txt $(wildcard sb3_blpo/startup/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[envs,dev,docs]'
	touch $@
