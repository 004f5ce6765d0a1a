"""
Returns of BLPO and of the baselines: environments × algorithms × seeds, trained and evaluated by RL Zoo.

``python benchmarks/run.py --stage returns`` trains each cell of that stage (grid.py) in a process of its own and adds its
evaluations to the stage's CSV. Cells that are there already with the same hyperparameters are left out, so that a killed run
goes on where it was. ``--print-commands`` prints the Zoo's command for each cell, which gives the same evaluations: a separate
environment with the training's normalisation, the deterministic policy, 10 episodes.
"""

import argparse
import contextlib
import csv
import hashlib
import inspect
import json
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import ablation  # noqa: F401, makes its variants known to RL Zoo
import numpy as np
import torch as th
from grid import ALGORITHMS, OUTPUTS, STAGES, Cell, cells_of
from gymnasium import spaces
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from tqdm import tqdm

from sb3_blpo import zoo
from sb3_blpo.bilevel import IHVP_DEFAULTS

zoo.register()

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "logs" / "benchmarks"

#: In as many environments: SB3 gives each the same number of them, so that short episodes are not preferred
N_EPISODES = 10
N_RANDOM_EPISODES = 100


class Row(NamedTuple):
    """
    One evaluation; the first four entries are those of its cell.

    :param step: Timesteps so far
    :param mean_return: Mean return of the episodes
    :param std_return: Their standard deviation
    :param seconds: Wall time of training so far, without the evaluations' own
    :param cpu_seconds: CPU time likewise, which depends less on what else the machine does (up to a sixth more if it is busy)
    :param config: Hash of all hyperparameters
    :param commit: Last one that changed code or hyperparameters; "+dirty" with later changes
    :param versions: Of the packages
    """

    algorithm: str
    env_id: str
    n_timesteps: int
    seed: int
    step: int
    mean_return: float
    std_return: float
    seconds: float
    cpu_seconds: float
    config: str
    commit: str
    versions: str


def experiment(cell: Cell, folder: Path) -> ExperimentManager:
    """
    :param cell: A cell
    :param folder: Where logs go, for each cell another one: the Zoo numbers its runs without a lock
    :return: RL Zoo's experiment
    """
    log_folder = folder / "".join(c if c.isalnum() else "_" for c in cell.algorithm) / f"{cell.n_timesteps}_{cell.seed}"
    params = dict(cell.what.params)

    def manager() -> ExperimentManager:
        return ExperimentManager(
            argparse.Namespace(), cell.what.algo, cell.env_id, str(log_folder), n_timesteps=cell.n_timesteps,
            eval_freq=cell.n_timesteps // cell.n_evaluations, n_eval_episodes=N_EPISODES, n_eval_envs=N_EPISODES,
            hyperparams=params, seed=cell.seed, verbose=0, log_interval=-1, device="cpu",
            config=str(cell.what.config) if cell.what.config else None,
        )  # fmt: skip

    if "ihvp_kwargs" in params:
        own = params.pop("ihvp_kwargs")
        params["ihvp_kwargs"] = manager().read_hyperparameters()[1].get("ihvp_kwargs", {}) | own
    return manager()


def config_of(cell: Cell) -> str:
    """
    :param cell: A cell
    :return: Hash of all that its result depends on, apart from code
    """
    if cell.what.algo == "random":
        return f"{N_RANDOM_EPISODES} episodes"
    with contextlib.redirect_stdout(None):
        entry = experiment(cell, LOGS).read_hyperparameters()[1]
    defaults = {name: parameter.default for name, parameter in inspect.signature(ALGOS[cell.what.algo]).parameters.items()}
    # Without the options that are off by default, so that a new one makes no result stale
    settings = {name: value for name, value in defaults.items() if value} | entry
    if settings.get("ihvp_solver", "none") != "none":
        settings["ihvp_kwargs"] = IHVP_DEFAULTS | settings.get("ihvp_kwargs", {})
    settings |= {"n_timesteps": cell.n_timesteps, "n_evaluations": cell.n_evaluations, "n_episodes": N_EPISODES}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:10]


def command_of(cell: Cell) -> str:
    """
    :param cell: A cell
    :return: RL Zoo's command for the same training and evaluations
    """
    with contextlib.redirect_stdout(None):
        manager = experiment(cell, LOGS)
    options = {
        "--algo": cell.what.algo, "--env": cell.env_id, "--seed": cell.seed, "-n": cell.n_timesteps,
        "--eval-freq": manager.eval_freq, "--eval-episodes": N_EPISODES, "--n-eval-envs": N_EPISODES,
        "--num-threads": 1, "--device": "cpu",
    }  # fmt: skip
    script = ["-m", "rl_zoo3.train"] if cell.what.algo in ("blpo", "ppo", "trpo") else ["benchmarks/ablation.py"]
    words = ["python", *script, *(str(word) for option in options.items() for word in option)]
    if cell.what.config:
        words += ["--conf-file", os.path.relpath(cell.what.config, ROOT)]
    if manager.custom_hyperparams:
        words += ["-params", *(f"{name}:{value!r}".replace("'", '"') for name, value in manager.custom_hyperparams.items())]
    return shlex.join(words)


def watch(evaluation: EvalCallback) -> list[np.ndarray]:
    """
    :param evaluation: The evaluations of a training that is about to start
    :return: Filled at each of them: seconds and CPU seconds of training so far, without the evaluations' own
    """

    def now() -> np.ndarray:
        return np.array([time.perf_counter(), time.process_time()])

    start, times, evaluate = now(), [], evaluation._on_step

    def on_step() -> bool:
        nonlocal start
        if evaluation.n_calls % evaluation.eval_freq:
            return True
        before = now()
        times.append(before - start)
        go_on = evaluate()
        start += now() - before
        return go_on

    evaluation._on_step = on_step  # type: ignore[method-assign]
    return times


class Random:
    """
    Uniformly random actions, for SB3's evaluation.

    :param space: Space of actions
    """

    def __init__(self, space: spaces.Space) -> None:
        self.space = space

    def predict(self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> Any:
        return np.array([self.space.sample() for _ in observation]), None


def commit_and_versions() -> tuple[str, str]:
    """
    :return: What the results were made with
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    code = ("--", "sb3_blpo", "hyperparams", "benchmarks", ":!benchmarks/results")
    commit = git("log", "-1", "--format=%h", *code) + ("+dirty" if git("status", "--porcelain", *code) else "")
    names = ("sb3_blpo", "stable_baselines3", "rl_zoo3", "torch", "gymnasium", "numpy")
    versions = [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)]
    return commit, ", ".join(versions)


def train(cell: Cell, folder: Path) -> list[Row]:
    """
    :param cell: What to train, in this process
    :param folder: Where logs go
    :return: Its evaluations
    """
    made_with = (config_of(cell), *commit_and_versions())
    rows = []

    def add(step: int, returns: Any, seconds: float, cpu_seconds: float) -> None:
        mean, std = (round(float(x), 4) for x in (np.mean(returns), np.std(returns)))
        rows.append(Row(*cell[:4], step, mean, std, round(seconds, 2), round(cpu_seconds, 2), *made_with))

    if cell.what.algo == "random":
        env = make_vec_env(cell.env_id, seed=cell.seed)
        add(0, evaluate_policy(Random(env.action_space), env, N_RANDOM_EPISODES, return_episode_rewards=True)[0], 0, 0)
        return rows
    th.set_num_threads(1)
    manager = experiment(cell, folder)
    prepared = manager.setup_experiment()
    assert prepared is not None
    evaluation = next(callback for callback in manager.callbacks if isinstance(callback, EvalCallback))
    times = watch(evaluation)
    manager.learn(prepared[0])
    if len(evaluation.evaluations_results) < cell.n_evaluations:
        raise RuntimeError("Training was interrupted")  # the Zoo catches KeyboardInterrupt
    for k in range(cell.n_evaluations):  # a long last rollout may have had a further one
        add(evaluation.evaluations_timesteps[k], evaluation.evaluations_results[k], *times[k])
    return rows


def train_apart(cell: Cell, folder: Path) -> list[Row]:
    """
    :param cell: What to train, in a process of its own, which ends when this one does
    :param folder: Where logs go
    :return: Its evaluations
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _end_with_parent, (folder,)) as pool:
        return pool.submit(train, cell, folder).result()


def _end_with_parent(folder: Path) -> None:
    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    # What the Zoo and MuJoCo print
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def read(path: Path) -> list[dict[str, str]]:
    """
    :param path: The CSV
    :return: Its rows
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def key(row: dict[str, str]) -> tuple[str, ...]:
    """
    :param row: A row
    :return: What names its cell
    """
    return tuple(row[name] for name in Row._fields[:4])


def record(path: Path, rows: list[Row]) -> None:
    """
    :param path: The CSV, replaced as a whole, so that a crash leaves the old or the new one
    :param rows: All rows of a cell, instead of those that are there
    """
    new = [{name: str(value) for name, value in row._asdict().items()} for row in rows]
    with (temporary := path.with_suffix(".tmp")).open("w", newline="") as file:
        writer = csv.DictWriter(file, Row._fields)
        writer.writeheader()
        writer.writerows([row for row in read(path) if key(row) != key(new[0])] + new)
    temporary.replace(path)


def missing(cells: list[Cell], path: Path) -> list[Cell]:
    """
    :param cells: Cells
    :param path: The CSV
    :return: Those that are not there, or with other hyperparameters
    """
    recorded = {key(row): row["config"] for row in read(path)}
    left = []
    for cell in cells:
        config = recorded.get(tuple(map(str, cell[:4])))
        if config != config_of(cell):
            left.append(cell)
            if config is not None:
                print(f"{cell[:4]} was trained with other hyperparameters: its rows will be replaced")
    return left


def run(cells: list[Cell], path: Path, n_jobs: int, folder: Path = LOGS) -> int:
    """
    :param cells: What to train where it is missing
    :param path: The CSV
    :param n_jobs: Number of processes
    :param folder: Where logs go
    :return: Number of cells that failed
    """
    cells, failed = missing(cells, path), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    threads = ThreadPoolExecutor(n_jobs)
    futures: dict[Future, Cell] = {threads.submit(train_apart, cell, folder): cell for cell in cells}
    try:
        with tqdm(total=sum(cell.n_timesteps for cell in cells), unit="step", unit_scale=True) as bar:
            for future in as_completed(futures):
                cell = futures[future]
                if error := future.exception():
                    failed += 1
                    bar.write(f"{cell[:4]} failed: {error!r}")
                else:
                    record(path, future.result())
                    bar.write(f"{cell[:4]}: {future.result()[-1].mean_return:.1f}")
                bar.update(cell.n_timesteps)
    finally:
        threads.shutdown(cancel_futures=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description="Returns of BLPO and of the baselines")
    parser.add_argument("--stage", choices=STAGES, default="returns")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, help="instead of the stage's own")
    parser.add_argument("--envs", nargs="+", help="a part of the stage's")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the stage's own")
    parser.add_argument("-n", "--n-timesteps", type=int, help="instead of the stage's own")
    parser.add_argument("--output", type=Path, help="the CSV, by default the stage's own")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of processes")
    parser.add_argument("--print-commands", action="store_true", help="print the Zoo's commands and train nothing")
    arguments = parser.parse_args()
    grids = [
        grid._replace(
            algorithms=arguments.algorithms or grid.algorithms,
            budgets={
                env_id: arguments.n_timesteps or budget
                for env_id, budget in grid.budgets.items()
                if not arguments.envs or env_id in arguments.envs
            },
            seeds=arguments.seeds or grid.seeds,
        )
        for grid in STAGES[arguments.stage]
    ]
    cells = cells_of(grids)
    if arguments.print_commands:
        print("\n".join(f"{cell[:4]}: {command_of(cell)}" for cell in cells if cell.what.algo != "random"))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # what else computes beside torch
    if n_failed := run(cells, arguments.output or OUTPUTS[arguments.stage], arguments.jobs):
        sys.exit(f"{n_failed} of {len(cells)} cells failed, see {LOGS / 'output.txt'}")


if __name__ == "__main__":
    main()
