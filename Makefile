# make train: RL Zoo trains and evaluates BLPO. The rest is for developers. All in an environment of its own, .venv
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
# Small networks: more threads would only wait for each other
export OMP_NUM_THREADS ?= 1

.PHONY: train test test-benchmarks slow conformance zoo fuzz soak mutation results replication stage2 defaults ablation lint

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
	$(BIN)/python -m pip install -c constraints.txt -e '.[envs,dev,plots]' wandb
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

# Returns beside PPO's, 5 seeds of 6 tasks. 4 to 10 core-hours; a killed run goes on where it was
results: $(INSTALLED)
	$(BIN)/python benchmarks/run.py --stage stage1
	$(BIN)/python benchmarks/report.py

# The same on five other seeds, which no decision has seen, and all ten together. 4 to 10 core-hours
replication: $(INSTALLED)
	$(BIN)/python benchmarks/run.py --stage replication
	$(BIN)/python benchmarks/report.py benchmarks/results/replication/returns.csv
	$(BIN)/python benchmarks/report.py benchmarks/results/returns.csv benchmarks/results/replication/returns.csv \
		--folder benchmarks/results/ten_seeds

# The same over a million steps, and on more tasks. About 30 core-hours
stage2: $(INSTALLED)
	$(BIN)/python benchmarks/run.py --stage stage2
	$(BIN)/python benchmarks/report.py benchmarks/results/stage2/returns.csv

# Which runs decide the constructor's defaults: benchmarks/tuning.md. About 4 core-hours
defaults: $(INSTALLED)
	$(BIN)/python benchmarks/run.py --stage rollouts
	$(BIN)/python benchmarks/run.py --stage caps

# What in BLPO does the work: its variants, 5 seeds of 3 tasks. About 6 core-hours, 5 after `results`; a killed run goes
# on where it was
ablation: $(INSTALLED)
	$(BIN)/python benchmarks/run.py --stage ablation
	$(BIN)/python benchmarks/report.py

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The constraints name the tested torch, so that pip looks for no other
$(INSTALLED): pyproject.toml constraints.txt $(wildcard sb3_blpo/startup/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[envs,dev]'
	touch $@
