"""BLPO learns: SB3's identity environments for every kind of action, and CartPole."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnv, IdentityEnvBox, IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_blpo import BLPO


@pytest.fixture(autouse=True)
def one_thread():
    threads = th.get_num_threads()
    th.set_num_threads(1)
    yield
    th.set_num_threads(threads)


@pytest.mark.parametrize("ihvp_solver", ["nystrom", "none"])
@pytest.mark.parametrize("env_class", [IdentityEnv, IdentityEnvMultiDiscrete, IdentityEnvMultiBinary])
def test_identity(env_class, ihvp_solver):
    """As SB3's own test: a policy that repeats the observation earns 100."""
    env = DummyVecEnv([lambda: env_class(10) if env_class is IdentityEnv else env_class()])
    model = BLPO(
        "MlpPolicy", env, n_steps=256, batch_size=64, gamma=0.4, learning_rate=1e-2, critic_learning_rate=1e-2, n_epochs=4,
        ihvp_solver=ihvp_solver, seed=0,
    ).learn(3000)  # fmt: skip
    assert evaluate_policy(model, env, n_eval_episodes=20, warn=False)[0] > 90


def test_identity_box():
    """The reward is 1 where the action comes within 0.5 of the observation; blind actions earn about half of that."""
    env = DummyVecEnv([lambda: IdentityEnvBox(eps=0.5)])
    model = BLPO("MlpPolicy", env, n_steps=512, batch_size=64, gamma=0.4, learning_rate=3e-3, seed=0)
    before = evaluate_policy(model, env, n_eval_episodes=20, warn=False)[0]
    after = evaluate_policy(model.learn(6000), env, n_eval_episodes=20, warn=False)[0]
    assert after > 90 > before


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_cartpole(seed):
    # The schedule of RL Zoo's tuned PPO: short rollouts, all of them one minibatch
    model = BLPO(
        "MlpPolicy", make_vec_env("CartPole-v1", 8, seed=seed), n_steps=32, batch_size=256, n_epochs=20, gamma=0.98,
        gae_lambda=0.8, learning_rate=LinearSchedule(1e-3, 0.0, 1.0), critic_learning_rate=LinearSchedule(4e-3, 0.0, 1.0),
        clip_range=LinearSchedule(0.2, 0.0, 1.0), seed=seed,
    ).learn(50_000)  # fmt: skip
    assert evaluate_policy(model, make_vec_env("CartPole-v1", 4, seed=1000 + seed), n_eval_episodes=20)[0] >= 475


@pytest.mark.slow
def test_first_example_of_the_readme(tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    example = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example[1], names)
    assert (tmp_path / "blpo_cartpole.zip").exists()
    assert evaluate_policy(names["model"], names["model"].get_env(), n_eval_episodes=20)[0] >= 475
