"""What run.py trains: environments × algorithms × seeds."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from baselines.ppo_schedule import OVER_A_MILLION_STEPS

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
    :param params_of_ppo: By environment, hyperparameters of PPO with BLPO's schedule at this length
    """

    algorithms: tuple[str, ...]
    budgets: dict[str, int]
    n_evaluations: int
    seeds: Sequence[int] = range(5)
    params_of_ppo: dict[str, dict[str, Any]] = {}  # noqa: RUF012, as above


ALGORITHMS = {
    "random": Algorithm("random"),
    "BLPO": Algorithm("blpo"),
    "BLPO none": Algorithm("blpo", params={"ihvp_solver": "none"}),
    "PPO (tuned)": Algorithm("ppo", BASELINES / "ppo.yml"),
    "PPO (BLPO's schedule)": Algorithm("ppo", PPO_SCHEDULE),
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
    "BLPO, no cap": Algorithm("blpo", params={"max_correction_ratio": None}),
}
#: Candidates for the follower's side, on "none" (tuning.md)
FOLLOWERS = {
    f"BLPO none, {name}": Algorithm(algo, default_hyperparams(), {"ihvp_solver": "none"} | params)
    for name, algo, params in (
        ("more critic steps", "blpo", {"n_critic_updates": 5}),
        ("fresh returns", "blpo_fresh_returns", {}),
        ("Adam's betas 0.99", "blpo_slow_adam", {}),
        ("critic's own lambda", "blpo_critic_lambda", {}),
        ("wide critic", "blpo_wide_critic", {}),
    )
}
ALGORITHMS |= VARIANTS | FOLLOWERS
SCHEDULE = "PPO (BLPO's schedule)"
MUJOCO = ("Hopper-v5", "HalfCheetah-v5", "Walker2d-v5")
SHORT = dict.fromkeys(MUJOCO, 250_000) | {"LunarLander-v3": 300_000, "CartPole-v1": 50_000, "Acrobot-v1": 100_000}
LONG = dict.fromkeys((*MUJOCO, "Ant-v5", "Swimmer-v5", "LunarLander-v3"), 1_000_000) | {"LunarLanderContinuous-v3": 300_000}
#: Seeds of the report, which no decision has seen
REPORTED = range(20, 30)
STAGES = {
    "returns": [
        Grid(("BLPO", "BLPO none", SCHEDULE), SHORT, n_evaluations=10, seeds=REPORTED),
        Grid(("random", "PPO (tuned)"), SHORT, n_evaluations=10, seeds=range(10)),
    ],
    "follower": [
        Grid(
            ("BLPO none", *FOLLOWERS),
            {task: SHORT[task] for task in (*MUJOCO, "LunarLander-v3")},
            n_evaluations=10,
            seeds=range(110, 115),
        )
    ],
    "ablation": [
        Grid(
            tuple(VARIANTS),
            {task: SHORT[task] for task in ("LunarLander-v3", "Hopper-v5", "HalfCheetah-v5")},
            n_evaluations=10,
            seeds=REPORTED[:5],
        )
    ],
    "million": [
        Grid(("random", "BLPO", "BLPO none", SCHEDULE, "PPO (tuned)"), LONG, 20, params_of_ppo=OVER_A_MILLION_STEPS),
        Grid(("TRPO (tuned)",), {task: LONG[task] for task in LONG if task.endswith("v5")}, 20),
    ],
    "recurrent": [
        Grid(("RecurrentBLPO", "RecurrentBLPO none", "RecurrentPPO"), {"CartPoleNoVel-v1": 50_000}, n_evaluations=10)
    ],
}

#: One CSV for each report; the ablation is compared with the returns
OUTPUTS = {stage: RESULTS / stage / "returns.csv" for stage in STAGES} | {"ablation": RESULTS / "returns" / "returns.csv"}


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
            what = ALGORITHMS[name]
            if what.config == PPO_SCHEDULE:
                what = what._replace(params=grid.params_of_ppo.get(env_id, {}))
            cell = Cell(name, env_id, length, seed, n_evaluations, what)
            if cells.setdefault(cell[:4], cell) != cell:
                raise ValueError(f"{cell[:4]} is in two grids, with hyperparameters {cells[cell[:4]].what} and {what}.")
    return list(cells.values())
