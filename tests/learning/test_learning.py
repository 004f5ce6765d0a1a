"""BLPO learns: SB3's identity environments for every kind of action, and CartPole."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnv, IdentityEnvBox, IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_blpo import BLPO


def score(model: BLPO, env: Any) -> float:
    """Mean return of 20 episodes."""
    return float(np.mean(evaluate_policy(model, env, n_eval_episodes=20, warn=False)[0]))


@pytest.mark.parametrize(
    ("make", "ihvp_solver"),
    [
        (lambda: IdentityEnv(10), "nystrom"),
        (lambda: IdentityEnv(10), "none"),
        (IdentityEnvMultiDiscrete, "nystrom"),
        (IdentityEnvMultiBinary, "nystrom"),
    ],
)
def test_identity(make: Any, ihvp_solver: str) -> None:
    """As SB3's own test: a policy that repeats the observation earns 100."""
    env = DummyVecEnv([make])
    model = BLPO("MlpPolicy", env, n_steps=256, gamma=0.4, learning_rate=3e-3, n_epochs=4, ihvp_solver=ihvp_solver, seed=0)
    assert score(model.learn(3000), env) > 90


def test_identity_box() -> None:
    """The reward is 1 where the action comes within 0.5 of the observation; blind actions earn about half of that."""
    env = DummyVecEnv([lambda: IdentityEnvBox(eps=0.5)])
    model = BLPO("MlpPolicy", env, n_steps=512, batch_size=128, n_epochs=5, gamma=0.4, learning_rate=3e-3, seed=0)
    before = score(model, env)
    assert score(model.learn(4096), env) > 90 > before


def test_cartpole() -> None:
    """Within 15,000 steps; what does not learn ends near 22."""
    env = make_vec_env("CartPole-v1", 8, seed=0)
    model = BLPO("MlpPolicy", env, n_steps=64, batch_size=128, n_epochs=5, gamma=0.98, learning_rate=2e-3, seed=0)
    assert score(model.learn(15_000), env) >= 200


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_cartpole_is_solved(seed: int) -> None:
    # The schedule of RL Zoo's tuned PPO: short rollouts, all of them one minibatch
    model = BLPO(
        "MlpPolicy", make_vec_env("CartPole-v1", 8, seed=seed), n_steps=32, batch_size=256, n_epochs=20, gamma=0.98,
        gae_lambda=0.8, learning_rate=LinearSchedule(1e-3, 0.0, 1.0), clip_range=LinearSchedule(0.2, 0.0, 1.0), seed=seed,
    ).learn(50_000)  # fmt: skip
    assert score(model, make_vec_env("CartPole-v1", 4, seed=1000 + seed)) >= 475


@pytest.mark.slow
def test_first_example_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    example = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example[1], names)
    assert (tmp_path / "blpo_cartpole.zip").exists()
    assert score(names["model"], names["model"].get_env()) >= 475
