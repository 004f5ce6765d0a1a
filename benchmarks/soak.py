"""
Long runs: no NaN, and memory that does not grow.

``python benchmarks/soak.py`` trains each task of :data:`TASKS` with the hyperparameters of hyperparams/blpo.yml, one run after
another, and adds a line for each to ``benchmarks/results/soak.csv``; runs that are there already are left out. BLPO raises on
NaN by itself; here the weights are looked at as well.
"""

import argparse
import csv
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.callbacks import BaseCallback

RESULTS = Path(__file__).parent / "results" / "soak.csv"


class Task(NamedTuple):
    """
    One line of the results.

    :param env_id: Environment
    :param seed: Seed
    :param n_timesteps: Length
    :param rates: Factor of both learning rates
    """

    env_id: str
    seed: int
    n_timesteps: int
    rates: float


TASKS = [
    *(Task(env_id, seed, 2_000_000, 1.0) for seed in (0, 1, 2) for env_id in ("CartPole-v1", "Hopper-v5")),
    *(Task("Pendulum-v1", seed, 2_000_000, 30.0) for seed in (0, 1, 2)),
]


class Watch(BaseCallback):
    """Resident memory (MiB) at the end of each rollout, and whether all weights are finite."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.memory: list[float] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.steps.append(self.num_timesteps)
        self.memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        assert all(parameter.isfinite().all() for parameter in self.model.policy.parameters()), self.num_timesteps

    def slope(self) -> float:
        """Return MiB per million steps, over the last three quarters of the run."""
        late = len(self.steps) // 4
        return float(np.polyfit(self.steps[late:], self.memory[late:], 1)[0] * 1e6)


def soak(task: Task) -> dict[str, Any]:
    """
    :param task: What to train
    :return: Its line of the results
    """
    with tempfile.TemporaryDirectory() as folder:
        manager = ExperimentManager(
            argparse.Namespace(), "blpo", task.env_id, folder, n_timesteps=task.n_timesteps, eval_freq=-1, seed=task.seed,
            verbose=0, log_interval=-1, device="cpu",
        )  # fmt: skip
        experiment = manager.setup_experiment()
        assert experiment is not None
        model: Any = experiment[0]
        if task.rates != 1:  # the critic's follows
            model.learning_rate = task.rates * model.lr_schedule(1)
        watch, start = Watch(), time.perf_counter()
        manager.callbacks.append(watch)
        manager.learn(model)
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())
    return task._asdict() | {
        "seconds": round(time.perf_counter() - start),
        "MiB_at_the_end": round(watch.memory[-1]),
        "MiB_per_million_steps": round(watch.slope(), 2),
        "last_100_episodes": round(float(np.mean([episode["r"] for episode in model.ep_info_buffer])), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Long runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    th.set_num_threads(1)
    done = []
    if RESULTS.exists():
        with RESULTS.open() as file:
            done = [(row["env_id"], row["seed"], row["n_timesteps"], row["rates"]) for row in csv.DictReader(file)]
    for task in TASKS:
        if task.seed in seeds and tuple(map(str, task)) not in done:
            line = soak(task)
            with RESULTS.open("a", newline="") as file:
                writer = csv.DictWriter(file, line)
                if not file.tell():
                    writer.writeheader()
                writer.writerow(line)
            print(line, flush=True)


if __name__ == "__main__":
    main()
