"""
Statistics of what run.py recorded, for report.py.

Intervals are rliable's: 95 % of a bootstrap that draws runs anew within each algorithm and task; here the runs of tuned PPO,
by which scores are normalised, are drawn anew too, and a task may have fewer runs than another.
"""

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

N_DRAWS = 5000
RANDOM, PPO, BLPO, NONE = "random", "PPO (tuned)", "BLPO", "BLPO none"
#: In the order of the tables, with their colours in the figures; what has none is a variant for the ablation
COLOURS = {
    BLPO: "#d55e00",
    NONE: "#777777",
    PPO: "#0072b2",
    "PPO (BLPO's schedule)": "#56b4e9",
    "TRPO (tuned)": "#009e73",
}
#: Where returns still grow at the end
GROWING = ("Hopper-v5", "HalfCheetah-v5", "Walker2d-v5", "Ant-v5", "Swimmer-v5")
#: Where good algorithms end at the same return, and the way there counts
SATURATING = ("CartPole-v1", "Acrobot-v1", "Pendulum-v1")


class Task(NamedTuple):
    """
    :param env_id: Environment
    :param n_timesteps: Length of the training
    """

    env_id: str
    n_timesteps: int

    def __str__(self) -> str:
        return f"{self.env_id}, {self.n_timesteps // 1000}k"


class Runs(NamedTuple):
    """
    An algorithm's runs on a task, with a leading axis of draws.

    :param steps: Timesteps at the evaluations (n_evaluations,)
    :param returns: Returns (n_draws, n_runs, n_evaluations)
    :param seconds: CPU seconds of training (n_draws, n_runs, n_evaluations)
    """

    steps: np.ndarray
    returns: np.ndarray
    seconds: np.ndarray


class Estimate(NamedTuple):
    """
    :param value: Of the runs as they are
    :param low: Lower end of the interval
    :param high: Upper end
    :param error: Standard error
    """

    value: float
    low: float
    high: float
    error: float

    def __str__(self) -> str:
        digits = 0 if 100 <= abs(self.value) < np.inf else 1 if 10 <= abs(self.value) < np.inf else 2
        value, low, high = ("never" if np.isinf(x) else f"{x:.{digits}f}" for x in self[:3])
        return f"{value} [{low}, {high}]"


def final(returns: np.ndarray) -> np.ndarray:
    """
    :param returns: (..., n_evaluations)
    :return: Score of each run: mean of the evaluations in the last 10 % of training, its start included (...)
    """
    return returns[..., -(-9 * returns.shape[-1] // 10) - 1 :].mean(-1)


def area(returns: np.ndarray) -> np.ndarray:
    """
    :param returns: (..., n_evaluations)
    :return: Mean of each run's evaluations, the area under its learning curve (...)
    """
    return returns.mean(-1)


def mean(scores: np.ndarray) -> np.ndarray:
    """
    :param scores: (..., n_runs)
    :return: Mean over the runs (...)
    """
    return scores.mean(-1)


def iqm(scores: np.ndarray) -> np.ndarray:
    """
    :param scores: (..., n_runs)
    :return: Interquartile mean, as rliable's: a quarter of the runs, rounded down, is left out on each side (...)
    """
    n = scores.shape[-1]
    return np.sort(scores, -1)[..., n // 4 : n - n // 4].mean(-1)


def estimate(statistic: Callable[..., np.ndarray], *arguments: Any) -> Estimate:
    """
    :param statistic: Takes the arguments and the number of draws, gives a number for each draw (n_draws,)
    :param arguments: Its arguments
    :return: The statistic with its interval
    """
    with np.errstate(invalid="ignore"):  # a time may be infinite and has no standard error then
        draws = statistic(*arguments, N_DRAWS)
        low, high = np.quantile(draws, [0.025, 0.975], method="closest_observation")
        return Estimate(float(statistic(*arguments, 0)[0]), float(low), float(high), float(draws.std()))


class Results:
    """
    All runs of a CSV, and statistics of them. ``n_draws`` is the number of draws, 0 for the runs as they are.

    :param table: Its rows
    """

    def __init__(self, table: pd.DataFrame) -> None:
        self.table = table
        trained = table[table.algorithm != RANDOM].sort_values(["seed", "step"])
        self.runs: dict[tuple[str, Task], Runs] = {}
        for (name, *task), rows in trained.groupby(["algorithm", "env_id", "n_timesteps"]):
            if rows.config.nunique() > 1:
                raise ValueError(
                    f"{name} on {task[0]} has runs with different hyperparameters: run.py has not replaced all yet."
                )
            if rows.duplicated(["seed", "step"]).any():
                raise ValueError(f"{name} on {task[0]} has the same seed twice.")
            shape = (1, rows.seed.nunique(), -1)
            returns, seconds = (rows[column].to_numpy().reshape(shape) for column in ("mean_return", "cpu_seconds"))
            self.runs[name, Task(*task)] = Runs(rows.step.to_numpy()[: returns.shape[-1]], returns, seconds)
        self.random = table[table.algorithm == RANDOM].groupby("env_id").mean_return.mean().to_dict()
        order = list(dict.fromkeys([*COLOURS, *table.algorithm]))
        self.algorithms = sorted({name for name, _ in self.runs}, key=order.index)
        self.colored = [name for name in self.algorithms if name in COLOURS]
        self.tasks = sorted({task for _, task in self.runs}, key=lambda task: (task.env_id not in GROWING, *task[::-1]))

    def have(self, *names: str, tasks: Iterable[Task] | None = None) -> list[Task]:
        """
        :param names: Algorithms, RANDOM among them
        :param tasks: Tasks, by default all
        :return: Those on which all of these have runs
        """
        return [
            task
            for task in (self.tasks if tasks is None else tasks)
            if all(task.env_id in self.random if name == RANDOM else (name, task) in self.runs for name in names)
        ]

    @property
    def complete(self) -> list[Task]:
        """Tasks to aggregate over, equal in their runs: those on which none of the algorithms with a colour lacks a seed."""
        counts = {key: runs.returns.shape[1] for key, runs in self.runs.items()}
        full = max(counts.values())
        return [
            task for task in self.have(PPO, RANDOM) if all(counts.get((name, task), full) == full for name in self.colored)
        ]

    def draw(self, name: str, task: Task, n_draws: int) -> Runs:
        """
        :param name: Algorithm
        :param task: Task
        :param n_draws: Number of draws
        :return: Runs drawn with replacement, the same ones at each call
        """
        runs = self.runs[name, task]
        if not n_draws:
            return runs
        n = runs.returns.shape[1]
        drawn = np.random.default_rng(zlib.crc32(f"{name} {task}".encode())).integers(n, size=(n_draws, n))
        return Runs(runs.steps, runs.returns[0, drawn], runs.seconds[0, drawn])

    def raw(self, center: Callable, name: str, task: Task, n_draws: int) -> np.ndarray:
        """
        :param center: Of the runs
        :param name: Algorithm
        :param task: Task
        :param n_draws: Number of draws
        :return: Center of the final returns (n_draws,)
        """
        return center(final(self.draw(name, task, n_draws).returns))

    def normalized(self, score: Callable, name: str, tasks: Iterable[Task], n_draws: int) -> np.ndarray:
        """
        :param score: Of a run
        :param name: Algorithm
        :param tasks: Tasks
        :param n_draws: Number of draws
        :return: (score - random policy) / (tuned PPO - random policy) of all runs on these tasks (n_draws, n_runs)
        """
        scores = []
        for task in tasks:
            own, ppo = (score(self.draw(who, task, n_draws).returns) for who in (name, PPO))
            scores.append((own - self.random[task.env_id]) / (ppo.mean(-1, keepdims=True) - self.random[task.env_id]))
        return np.concatenate(scores, -1)

    def relative(self, center: Callable, score: Callable, name: str, tasks: Sequence[Task], n_draws: int) -> np.ndarray:
        """
        :param center: Of the normalised scores
        :param score: Of a run
        :param name: Algorithm
        :param tasks: Tasks
        :param n_draws: Number of draws
        :return: Center of the normalised scores (n_draws,)
        """
        return center(self.normalized(score, name, tasks, n_draws))

    def raw_difference(self, name: str, other: str, task: Task, n_draws: int) -> np.ndarray:
        """
        :param name: Algorithm
        :param other: What is subtracted
        :param task: Task
        :param n_draws: Number of draws
        :return: Difference of the mean final returns (n_draws,)
        """
        return self.raw(mean, name, task, n_draws) - self.raw(mean, other, task, n_draws)

    def difference(self, center: Callable, name: str, other: str, tasks: Sequence[Task], n_draws: int) -> np.ndarray:
        """
        :param center: Of the normalised scores
        :param name: Algorithm
        :param other: What is subtracted
        :param tasks: Tasks
        :param n_draws: Number of draws
        :return: Difference of the centers of normalised final returns (n_draws,)
        """
        return self.relative(center, final, name, tasks, n_draws) - self.relative(center, final, other, tasks, n_draws)

    def improvement(self, name: str, other: str, tasks: Sequence[Task], n_draws: int) -> np.ndarray:
        """
        :param name: Algorithm
        :param other: Another
        :param tasks: Tasks
        :param n_draws: Number of draws
        :return: Probability that a run of the one ends above one of the other, mean over the tasks (n_draws,)
        """
        probabilities = []
        for task in tasks:
            x, y = (final(self.draw(who, task, n_draws).returns) for who in (name, other))
            probabilities.append(0.5 + 0.5 * np.sign(x[..., :, None] - y[..., None, :]).mean((-1, -2)))
        return np.mean(probabilities, 0)

    def arrival(self, clock: str, name: str, tasks: Sequence[Task], n_draws: int) -> np.ndarray:
        """
        :param clock: "steps" or "seconds"
        :param name: Algorithm
        :param tasks: Tasks
        :param n_draws: Number of draws
        :return: When the algorithm's mean curve first reaches tuned PPO's final return, straight lines between evaluations,
            as a part of PPO's whole training; infinite where it never does; median over the tasks (n_draws,)
        """
        parts = []
        for task in tasks:
            runs, ppo = self.draw(name, task, n_draws), self.draw(PPO, task, n_draws)
            curve, goal = runs.returns.mean(1), final(ppo.returns).mean(1)
            if clock == "steps":
                times, whole = np.broadcast_to(runs.steps, curve.shape), np.array(ppo.steps[-1])
            else:
                times, whole = runs.seconds.mean(1), ppo.seconds[..., -1].mean(1)
            reached, rows = curve >= goal[:, None], np.arange(len(curve))
            after = reached.argmax(1)
            before = np.maximum(after - 1, 0)
            rise = np.where(after > 0, curve[rows, after] - curve[rows, before], 1)
            part = np.where(after > 0, (goal - curve[rows, before]) / rise, 0)
            time = times[rows, before] + part * (times[rows, after] - times[rows, before])
            parts.append(np.where(reached.any(1), time / whole, np.inf))
        return np.median(parts, 0)


def groups(tasks: Iterable[Task]) -> dict[str, list[Task]]:
    """
    :param tasks: Tasks
    :return: What is aggregated; under "all", where that is more than one of the others, each environment once, with its
        shortest training
    """
    found: dict[str, list[Task]] = {}
    shortest: dict[str, Task] = {}
    for task in tasks:
        if task.env_id in GROWING:
            found.setdefault(f"MuJoCo, {task.n_timesteps // 1000}k", []).append(task)
        elif task.env_id in SATURATING:
            found.setdefault("tasks that saturate", []).append(task)
        shortest[task.env_id] = min(task, shortest.get(task.env_id, task))
    everything = list(shortest.values())
    return found if everything in found.values() else found | {"all": everything}
