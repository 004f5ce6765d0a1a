"""
An Optuna study of BLPO on CartPole: which rates, and how closely should the critic follow?
"""

import argparse

import optuna
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_blpo import BLPO

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--trials", type=int, default=20)
parser.add_argument("--timesteps", type=int, default=20_000)
args = parser.parse_args()
torch.set_num_threads(1)


def objective(trial: optuna.Trial) -> float:
    """Train with what the trial draws, and return the mean return afterwards."""
    drawn = dict(
        learning_rate=trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True),
        n_critic_updates=trial.suggest_int("n_critic_updates", 1, 5),
        critic_rollouts=trial.suggest_categorical("critic_rollouts", [1, 4, 16]),
    )
    env = make_vec_env("CartPole-v1", 8, seed=trial.number)
    model = BLPO("MlpPolicy", env, n_steps=128, batch_size=128, seed=trial.number, device="cpu", **drawn)
    return evaluate_policy(model.learn(args.timesteps), env, n_eval_episodes=20)[0]


study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
study.optimize(objective, n_trials=args.trials)
print("best:", study.best_value, study.best_params)
