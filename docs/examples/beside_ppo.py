"""
BLPO beside PPO on an environment of your own: mean return of the seeds along training, with its 95 % interval, as a picture.
"""

import argparse

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import stats
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_blpo import BLPO

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--env", default="CartPole-v1", help="its id in Gymnasium, or make your own below")
parser.add_argument("--timesteps", type=int, default=50_000)
parser.add_argument("--seeds", type=int, default=5)
args = parser.parse_args()
torch.set_num_threads(1)
arguments = dict(n_steps=256, batch_size=256, device="cpu")

for algorithm in (BLPO, PPO):
    returns = []
    for seed in range(args.seeds):
        env = VecNormalize(make_vec_env(args.env, 8, seed=seed))
        evaluated = VecNormalize(make_vec_env(args.env, 8, seed=1000 + seed), training=False)
        every = args.timesteps // 8 // 10  # steps of each environment
        folder = f"beside_ppo/{algorithm.__name__}_{seed}"
        evaluation = EvalCallback(evaluated, n_eval_episodes=16, eval_freq=every, log_path=folder, verbose=0)
        algorithm("MlpPolicy", env, seed=seed, **arguments).learn(args.timesteps, evaluation)
        returns.append(np.mean(evaluation.evaluations_results, axis=1))
    mean, half = np.mean(returns, axis=0), stats.t.ppf(0.975, args.seeds - 1) * stats.sem(returns)
    (line,) = plt.plot(evaluation.evaluations_timesteps, mean, label=algorithm.__name__)
    plt.fill_between(evaluation.evaluations_timesteps, mean - half, mean + half, color=line.get_color(), alpha=0.2)
    print(f"{algorithm.__name__:4} mean return {mean[-1]:6.1f} ± {half[-1]:.1f} (95 %)", flush=True)
plt.xlabel("timesteps")
plt.ylabel(f"return on {args.env}")
plt.legend()
plt.savefig("beside_ppo.png")
