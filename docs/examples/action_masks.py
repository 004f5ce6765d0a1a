"""
Action masks: learn the way to square 0 of a town, with MaskableBLPO and with BLPO, which warns that it ignores the masks.
An action names the square to go to next, one of 100, but streets lead to four at most. The shortest ways average 3.4 steps.
"""

import argparse

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from scipy import stats
from stable_baselines3.common.env_util import make_vec_env

from sb3_blpo import BLPO, MaskableBLPO


class Town(gym.Env):
    """Each step costs 1. Where no street leads the agent does not come: the step is lost. A day has 50 steps."""

    def __init__(self, n_squares=100):
        self.observation_space = self.action_space = spaces.Discrete(n_squares)
        self.streets = np.zeros((n_squares, n_squares), dtype=bool)
        others = np.random.default_rng(0).permutation(n_squares)
        for square in range(n_squares):
            for other in ((square + 1) % n_squares, others[square]):
                self.streets[square, other] = self.streets[other, square] = square != other

    def action_masks(self):
        return self.streets[self.square]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.square, self.n_steps = int(self.np_random.integers(1, len(self.streets))), 0
        return self.square, {}

    def step(self, action):
        self.n_steps += 1
        if self.streets[self.square, action]:
            self.square = int(action)
        return self.square, -1.0, self.square == 0, self.n_steps == 50, {}


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seeds", type=int, default=5)
parser.add_argument("--timesteps", type=int, default=20_000)
args = parser.parse_args()
torch.set_num_threads(1)

for algorithm in (MaskableBLPO, BLPO):
    returns = []
    for seed in range(args.seeds):
        settings = dict(learning_rate=1e-3, n_steps=128, batch_size=128, device="cpu")
        model = algorithm("MlpPolicy", make_vec_env(Town, 8, seed=seed), seed=seed, **settings).learn(args.timesteps)
        evaluation = make_vec_env(Town, 8, seed=1000)
        returns.append(evaluate_policy(model, evaluation, 200, False, use_masking=algorithm is MaskableBLPO)[0])
    half = stats.t.ppf(0.975, args.seeds - 1) * stats.sem(returns)
    print(f"{algorithm.__name__:12} mean return {np.mean(returns):5.1f} ± {half:.1f} (95 %)", flush=True)
