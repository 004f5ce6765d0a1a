"""What run.py trains: environments × algorithms × seeds."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from baselines.ppo_schedule import NOT_SHARED, OF_ITS_OWN, OVER_A_MILLION_STEPS

from sb3_blpo.zoo import default_hyperparams

BASELINES = Path(__file__).parent / "baselines"
PPO_SCHEDULE = BASELINES / "ppo_schedule.py"
RESULTS = Path(__file__).parent / "results"


class Algorithm(NamedTuple):
    """
    :param algo: Name in RL Zoo, or "random": what scores are measured from
    :param config: Hyperparameter file, ``None``: the Zoo's, for BLPO its own
    :param params: Hyperparameters instead of the file's; of ``ihvp_kwargs``, those named here
    """

    algo: str
    config: Path | None = None
    params: dict[str, Any] = {}  # noqa: RUF012, for nobody changes it


class Cell(NamedTuple):
    """
    One training.

    :param algorithm: Name of the algorithm in the results
    :param env_id: Environment
    :param n_timesteps: Length of the training, over which schedules run; 0 for "random"
    :param seed: Seed
    :param n_evaluations: Number of evaluations, at equal distances
    :param what: The algorithm
    """

    algorithm: str
    env_id: str
    n_timesteps: int
    seed: int
    n_evaluations: int
    what: Algorithm


class Grid(NamedTuple):
    """
    :param algorithms: Names
    :param budgets: Timesteps by environment
    :param n_evaluations: As in :class:`Cell`
    :param seeds: Seeds
    :param params: By environment, hyperparameters instead of those of BLPO's entry, and so of PPO's with its schedule
    :param params_of_ppo: By environment, hyperparameters instead of the latter's alone
    """

    algorithms: tuple[str, ...]
    budgets: dict[str, int]
    n_evaluations: int
    seeds: Sequence[int] = range(5)
    params: dict[str, dict[str, Any]] = {}  # noqa: RUF012, as above
    params_of_ppo: dict[str, dict[str, Any]] = {}  # noqa: RUF012, as above


ALGORITHMS = {
    "random": Algorithm("random"),
    "BLPO": Algorithm("blpo"),
    "BLPO none": Algorithm("blpo", params={"ihvp_solver": "none"}),
    "PPO (tuned)": Algorithm("ppo", BASELINES / "ppo.yml"),
    "PPO (BLPO's schedule)": Algorithm("ppo", PPO_SCHEDULE),
    "PPO (BLPO's schedule), not normalized": Algorithm("ppo", PPO_SCHEDULE, {"normalize_advantage": False}),
    "TRPO (tuned)": Algorithm("trpo", BASELINES / "trpo.yml"),
    "RecurrentBLPO": Algorithm("blpo_lstm"),
    "RecurrentBLPO none": Algorithm("blpo_lstm", params={"ihvp_solver": "none"}),
    "RecurrentPPO": Algorithm("ppo_lstm", BASELINES / "ppo_lstm.yml"),
}

#: Of the ablation, one part of the recipe replaced at a time: what BLPO's arguments offer, and what ablation.py adds
VARIANTS = {
    "BLPO, one rollout": Algorithm("blpo", params={"critic_rollouts": 1}),
    "BLPO, one critic pass": Algorithm("blpo", params={"n_critic_updates": 1}),
    "BLPO, one rate": Algorithm("blpo_one_rate", default_hyperparams()),
    "BLPO, rollout's advantages": Algorithm("blpo_rollout_advantages", default_hyperparams()),
    "BLPO, time-ordered": Algorithm("blpo_time_ordered", default_hyperparams()),
    "BLPO, solve every epoch": Algorithm("blpo", params={"ihvp_interval": 1}),
    "BLPO, no curvature": Algorithm("blpo_no_curvature", default_hyperparams()),
    "BLPO, capped at 1": Algorithm("blpo", params={"max_correction_ratio": 1.0}),
    "BLPO, no cap": Algorithm("blpo", params={"max_correction_ratio": None}),
}
#: From which the constructor's defaults come, by the rules in tuning.md
ROLLOUTS = {
    f"BLPO none, critic_rollouts {n}": Algorithm("blpo", params={"ihvp_solver": "none", "critic_rollouts": n})
    for n in (1, 4, 8, 16)
}
CAPS = {
    f"BLPO, cap {cap}": Algorithm("blpo", params={"critic_rollouts": 4, "max_correction_ratio": cap})
    for cap in (0.1, 0.25, 1.0)
}
NOT_NORMALIZED, NORMALIZED = ({"normalize_advantage": value} for value in (False, True))
SMALL_CHEETAH = {"n_envs": 2, "batch_size": 128, "learning_rate": "lin_5e-4"}
SMALL_WALKER = {"n_envs": 2, "n_steps": 256, "batch_size": 128, "learning_rate": "lin_3e-4"}
#: By task, what the trials for the second edition's entries change in the entry: of BLPO, of PPO with its schedule (tuning.md)
TRIALS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "CartPole-v1": (
        [{}, NOT_NORMALIZED, {"n_critic_updates": 1}, {"n_critic_updates": 3}, {"batch_size": 64}],
        [{}, NOT_NORMALIZED, {"batch_size": 64}, {"batch_size": 256}, {"learning_rate": "lin_2e-3"}],
    ),
    "Acrobot-v1": (
        [{}, NOT_NORMALIZED, {"n_critic_updates": 1}, {"n_critic_updates": 3}, {"n_epochs": 10}],
        [{}, NOT_NORMALIZED, {"batch_size": 64}, {"learning_rate": 6e-4}, {"n_epochs": 10}],
    ),
    "LunarLander-v3": (
        [{}, NOT_NORMALIZED, {"n_critic_updates": 1}, {"critic_rollouts": 8}, {"batch_size": 128}],
        [{}, NOT_NORMALIZED, {"batch_size": 64}, {"batch_size": 128}, {"clip_range": 0.1}],
    ),
    "Hopper-v5": (
        [{}, *({"critic_rollouts": 16} | more for more in ({}, NORMALIZED, {"n_critic_updates": 1}, {"batch_size": 64}))],
        [{}, NOT_NORMALIZED, {"batch_size": 64}, {"clip_range": 0.1}, NOT_NORMALIZED | {"learning_rate": "lin_5e-4"}],
    ),
    "HalfCheetah-v5": (
        [
            {},
            {"critic_rollouts": 8},
            NOT_NORMALIZED,
            {"critic_rollouts": 8, "n_critic_updates": 1},
            SMALL_CHEETAH | {"critic_rollouts": 8},
        ],
        [{}, SMALL_CHEETAH, NOT_NORMALIZED, {"batch_size": 128}, {"clip_range": 0.1}],
    ),
    "Walker2d-v5": (
        [{}, NORMALIZED, {"n_critic_updates": 1}, SMALL_WALKER, SMALL_WALKER | NORMALIZED],
        [{}, NOT_NORMALIZED, {"batch_size": 64}, {"n_envs": 2, "n_steps": 256}, {"clip_range": 0.2}],
    ),
}
FOR_ENTRIES = ("BLPO", Algorithm("blpo")), ("PPO (BLPO's schedule)", Algorithm("ppo", PPO_SCHEDULE))


def _trials(task: str) -> dict[str, Algorithm]:
    return {
        ", ".join([name, *(f"{argument} {value}" for argument, value in changes.items())]): what._replace(params=changes)
        for (name, what), changed in zip(FOR_ENTRIES, TRIALS[task], strict=True)
        for changes in changed
    }


for _task in TRIALS:
    ALGORITHMS |= _trials(_task)
ALGORITHMS |= VARIANTS | ROLLOUTS | CAPS
MAIN = ("random", "BLPO", "BLPO none", "PPO (tuned)", "PPO (BLPO's schedule)")
TRPO = ("TRPO (tuned)",)
MUJOCO = ("Hopper-v5", "HalfCheetah-v5", "Walker2d-v5")
SHORT = dict.fromkeys(MUJOCO, 250_000) | {"LunarLander-v3": 300_000, "CartPole-v1": 50_000, "Acrobot-v1": 100_000}
#: Tasks of the runs that decide defaults
DEFAULTS = ("Hopper-v5", "Walker2d-v5", "HalfCheetah-v5", "LunarLander-v3")
LONG = dict.fromkeys(MUJOCO, 1_000_000)
#: What was chosen at a quarter of the length for which the entries are now made (tuning.md)
SHORT_PARAMS = {
    "HalfCheetah-v5": {
        "n_envs": 2,
        "batch_size": 128,
        "learning_rate": "lin_5e-4",
        "critic_learning_rate": "lin_2e-3",
    },
    "Walker2d-v5": {
        "n_envs": 2,
        "n_steps": 256,
        "batch_size": 128,
        "learning_rate": "lin_3e-4",
        "critic_learning_rate": "lin_1.2e-3",
        "gamma": 0.995,
        "gae_lambda": 0.98,
    },
}


def _short(algorithms: tuple[str, ...], tasks: Iterable[str] = SHORT) -> Grid:
    return Grid(algorithms, {task: SHORT[task] for task in tasks}, n_evaluations=10, params=SHORT_PARAMS)


# The second one: is what BLPO has over PPO on MuJoCo bilevel?
STAGE1 = [_short(MAIN), _short(("PPO (BLPO's schedule), not normalized",), MUJOCO)]
STAGES = {
    "stage1": STAGE1,
    # Seeds that were first seen when every hyperparameter was fixed
    "replication": [grid._replace(seeds=range(5, 10)) for grid in STAGE1],
    "stage2": [
        Grid(MAIN + TRPO, LONG, n_evaluations=20, params_of_ppo=OVER_A_MILLION_STEPS),
        Grid(MAIN + TRPO, {"Ant-v5": 1_000_000, "Swimmer-v5": 1_000_000}, n_evaluations=20),
        Grid(MAIN, {"Pendulum-v1": 100_000, "LunarLanderContinuous-v3": 300_000}, n_evaluations=20),
    ],
    "rollouts": [_short(tuple(ROLLOUTS), DEFAULTS)._replace(seeds=range(100, 105))],
    "caps": [_short(tuple(CAPS), DEFAULTS)._replace(seeds=range(100, 105))],
    "entries": [Grid(tuple(_trials(task)), {task: SHORT[task]}, n_evaluations=10, seeds=(100, 101)) for task in TRIALS],
    "recurrent": [
        Grid(("RecurrentBLPO", "RecurrentBLPO none", "RecurrentPPO"), {"CartPoleNoVel-v1": 50_000}, n_evaluations=10)
    ],
    "ablation": [_short((*MAIN, *VARIANTS), ("Hopper-v5", "LunarLander-v3", "CartPole-v1"))],
}

#: One CSV for each report; the ablation is compared with what stage 1 trained
OUTPUTS = {
    "recurrent": RESULTS / "recurrent" / "returns.csv",
    "stage1": RESULTS / "returns.csv",
    "replication": RESULTS / "replication" / "returns.csv",
    "stage2": RESULTS / "stage2" / "returns.csv",
    "ablation": RESULTS / "returns.csv",
    "rollouts": RESULTS / "defaults" / "returns.csv",
    "caps": RESULTS / "defaults" / "returns.csv",
    "entries": RESULTS / "entries" / "returns.csv",
}


def _with_params(what: Algorithm, env_id: str, grid: Grid) -> Algorithm:
    params = grid.params.get(env_id, {})
    if what.config == PPO_SCHEDULE:  # what its own trials found stays
        apart = NOT_SHARED | OF_ITS_OWN.get(env_id, {}).keys()
        params = {name: value for name, value in params.items() if name not in apart} | grid.params_of_ppo.get(env_id, {})
    elif not what.algo.startswith("blpo"):
        return what
    return what._replace(params=params | what.params)


def cells_of(grids: Iterable[Grid]) -> list[Cell]:
    """
    :param grids: A stage
    :return: Its cells, seed by seed, so that the first ones say something about every task already
    :raises ValueError: If two grids have the same cell with different hyperparameters
    """
    cells: dict[tuple[str, str, int, int], Cell] = {}
    for grid in grids:
        for seed, (env_id, budget), name in itertools.product(grid.seeds, grid.budgets.items(), grid.algorithms):
            length, n_evaluations = (0, 1) if name == "random" else (budget, grid.n_evaluations)
            what = _with_params(ALGORITHMS[name], env_id, grid)
            cell = Cell(name, env_id, length, seed, n_evaluations, what)
            if cells.setdefault(cell[:4], cell) != cell:
                raise ValueError(f"{cell[:4]} is in two grids, with hyperparameters {cells[cell[:4]].what} and {what}.")
    return list(cells.values())
