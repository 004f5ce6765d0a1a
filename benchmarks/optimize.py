"""
RL Zoo's ``-optimize`` within a schedule: the same arguments drawn for BLPO and for PPO with BLPO's schedule, and of BLPO
those of its critic as well. Environments, rollouts, minibatches, epochs and normalisation stay those of the hyperparameter
file.

    python benchmarks/optimize.py -optimize --algo ppo --conf-file benchmarks/baselines/ppo_schedule.py --env Walker2d-v5 \
        --seed 100 -n 150000 --n-trials 16 --eval-episodes 10 --n-evaluations 10 --no-optim-plots

The Zoo seeds the environments of a trial but not what it draws for networks and actions: a study is recorded, not repeatable.
"""

import runpy
from typing import Any

import optuna
from rl_zoo3.hyperparams_opt import HYPERPARAMS_SAMPLER
from stable_baselines3.common.utils import LinearSchedule
from torch import nn


def schedule_of(trial: optuna.Trial, rate: float) -> float | LinearSchedule:
    """
    :param trial: Optuna's trial, which draws whether rates fall linearly to zero, once for all of them
    :param rate: Learning rate at the start
    :return: What SB3 takes as ``learning_rate``
    """
    linear = trial.suggest_categorical("rate_schedule", ["constant", "linear"]) == "linear"
    return LinearSchedule(rate, 0.0, 1.0) if linear else rate


def sample_shared(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Draw what a schedule leaves open.

    :param trial: Optuna's trial
    :param n_actions: Not used, part of the Zoo's signature
    :param n_envs: Not used
    :param additional_args: Not used
    :return: Arguments that BLPO and PPO have in common
    """
    rate = trial.suggest_float("learning_rate", 1e-4, 1e-3, log=True)
    return {
        "learning_rate": schedule_of(trial, rate),
        "gamma": trial.suggest_categorical("gamma", [0.98, 0.99, 0.995]),
        "gae_lambda": trial.suggest_categorical("gae_lambda", [0.9, 0.95, 0.98]),
        "clip_range": trial.suggest_categorical("clip_range", [0.1, 0.2, 0.3]),
        "policy_kwargs": {
            "log_std_init": trial.suggest_categorical("log_std_init", [0.0, -1.0, -2.0]),
            "net_arch": {"small": [64, 64], "medium": [256, 256]}[trial.suggest_categorical("net_arch", ["small", "medium"])],
            "activation_fn": {"tanh": nn.Tanh, "relu": nn.ReLU}[trial.suggest_categorical("activation_fn", ["tanh", "relu"])],
        },
    }


def sample_blpo(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Draw the same, and how fast the critic follows.

    :param trial: Optuna's trial
    :param n_actions: Not used, part of the Zoo's signature
    :param n_envs: Not used
    :param additional_args: Not used
    :return: Arguments of BLPO
    """
    shared = sample_shared(trial, n_actions, n_envs, additional_args)
    ratio = trial.suggest_float("critic_learning_rate_ratio", 1, 10, log=True)
    return shared | {
        "critic_learning_rate": schedule_of(trial, ratio * trial.params["learning_rate"]),
        "n_critic_updates": trial.suggest_categorical("n_critic_updates", [2, 3, 5]),
    }


if __name__ == "__main__":
    HYPERPARAMS_SAMPLER |= {"ppo": sample_shared, "blpo": sample_blpo}
    runpy.run_module("rl_zoo3.train", run_name="__main__", alter_sys=True)
