"""
A critic that sees more than the actor: what a shop takes depends on its offers, and more on how full the town is that day.
The shopkeeper neither sees the crowd nor can change it. To the critic it explains most of what is earned, if it may see it.
"""

import argparse

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.wrappers import FilterObservation
from scipy import stats
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_blpo import BLPO


class Shop(gym.Env):
    """Each of 50 customers has a wish, which one of five goods fulfils: that earns 1. The crowd of the day adds to it."""

    def __init__(self, effect_of_crowd=3.0):
        wish, crowd = (spaces.Box(-np.inf, np.inf, (n,), np.float32) for n in (2, 1))
        self.observation_space = spaces.Dict({"wish": wish, "crowd": crowd})
        self.action_space, self.effect_of_crowd = spaces.Discrete(5), effect_of_crowd

    def next_customer(self):
        self.wish = self.np_random.normal(size=2).astype(np.float32)
        return {"wish": self.wish, "crowd": self.crowd}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.crowd, self.n_served = self.np_random.normal(size=1).astype(np.float32), 0
        return self.next_customer(), {}

    def step(self, action):
        self.n_served += 1
        wanted = int((np.arctan2(*self.wish) / (2 * np.pi) + 0.5) * 5) % 5
        reward = float(action == wanted) + self.effect_of_crowd * float(self.crowd[0])
        return self.next_customer(), reward, False, self.n_served == 50, {}


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seeds", type=int, default=10)
parser.add_argument("--timesteps", type=int, default=20_000)
args = parser.parse_args()
torch.set_num_threads(1)

for critic_keys in (["wish", "crowd"], ["wish"]):
    returns = []
    for seed in range(args.seeds):
        keys = dict(actor_keys=["wish"], critic_keys=critic_keys)
        settings = dict(learning_rate=1e-3, n_steps=128, batch_size=128, n_epochs=5, gamma=0.9, seed=seed, device="cpu")
        model = BLPO("MultiInputPolicy", make_vec_env(Shop, 8, seed=seed), policy_kwargs=keys, **settings)
        model.learn(args.timesteps)
        played = make_vec_env(lambda: FilterObservation(Shop(effect_of_crowd=0.0), ["wish"]), seed=1000)
        returns.append(evaluate_policy(model, played, 20)[0])  # what the offers earn, without the hidden key
    half = stats.t.ppf(0.975, args.seeds - 1) * stats.sem(returns)
    print(f"critic sees {' and '.join(critic_keys):14} mean return {np.mean(returns):5.1f} ± {half:.1f} (95 %)", flush=True)
