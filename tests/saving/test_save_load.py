"""Saving and loading, continued training, and determinism: all of it bit for bit."""

import copy
import io
import random
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from envs import ACTION_SPACES, IMAGE, TORQUES, SpaceEnv, vec_env
from models import SMALL, actor_of, critic_of, differences, logged, moved, parameters_of, small, state_of
from stable_baselines3 import PPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

from sb3_blpo import BLPO


class Dropping(BaseFeaturesExtractor):
    """Draws from the global generator in training, and has buffers."""

    def __init__(self, observation_space: gym.Space[Any]) -> None:
        super().__init__(observation_space, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.body(observations)


#: Ways to train that draw differently
RECIPES: dict[str, dict[str, Any]] = {
    "values": {},
    "columns": {"ihvp_kwargs": {"sketch": "columns", "rank": 4}},
    "gaussian, hessian": {"ihvp_kwargs": {"sketch": "gaussian", "rank": 4}, "curvature": "hessian", "ihvp_interval": 1},
    "cg": {"ihvp_solver": "cg"},
    "none": {"ihvp_solver": "none"},
    "gSDE": {"env": "Pendulum-v1", "use_sde": True, "sde_sample_freq": 4},
    "extractor": {"policy_kwargs": {"features_extractor_class": Dropping, "net_arch": [4]}},
}
#: What one rollout of two environments takes
ROLLOUT = 32


def fresh(recipe: str, **others: Any) -> BLPO:
    arguments: dict[str, Any] = {"env": "CartPole-v1", "n_epochs": 2} | RECIPES[recipe] | others
    return small(**arguments | {"env": vec_env(gym.make(arguments["env"]), 2)})


@pytest.mark.parametrize("recipe", RECIPES)
def test_seeded_runs_are_equal_in_one_call_or_two(recipe: str) -> None:
    whole = fresh(recipe).learn(3 * ROLLOUT)
    small(seed=7).learn(16)
    parts = fresh(recipe).learn(ROLLOUT).learn(2 * ROLLOUT, reset_num_timesteps=False)
    assert parts.num_timesteps == whole.num_timesteps == 3 * ROLLOUT
    assert not differences(state_of(whole), state_of(parts))
    other = fresh(recipe, seed=1).learn(3 * ROLLOUT)
    assert moved(actor_of(whole), actor_of(other)) and moved(critic_of(whole), critic_of(other))


@pytest.mark.parametrize("critic_rollouts", [1, 4])
@pytest.mark.parametrize("recipe", RECIPES)
def test_continuing_from_a_zip(recipe: str, critic_rollouts: int, tmp_path: Path) -> None:
    """
    As if never interrupted, with the environment as it was and the states of the global generators, for SB3 seeds again on
    loading. The rollouts before, which the critic fits as well, are not in the zip: then it is as if they had been forgotten.
    """
    model = fresh(recipe, critic_rollouts=critic_rollouts).learn(ROLLOUT)
    model.save(tmp_path / "model")
    env = copy.deepcopy(model.get_env())
    generators = random.getstate(), np.random.get_state(), th.get_rng_state()  # noqa: NPY002
    model._former_rollouts.clear()
    model.learn(2 * ROLLOUT, reset_num_timesteps=False)

    small(seed=7).learn(16)
    loaded = BLPO.load(tmp_path / "model", env=env, device="cpu", force_reset=False)
    random.setstate(generators[0])
    np.random.set_state(generators[1])  # noqa: NPY002
    th.set_rng_state(generators[2])
    loaded.learn(2 * ROLLOUT, reset_num_timesteps=False)
    assert loaded.num_timesteps == model.num_timesteps == 3 * ROLLOUT
    assert not differences(state_of(model), state_of(loaded))
    assert logged(model) == logged(loaded)


ARGUMENTS: dict[str, Any] = {
    "learning_rate": 2e-3, "critic_learning_rate": 3e-3, "n_steps": 12, "batch_size": 6, "n_epochs": 2, "n_critic_updates": 2,
    "gamma": 0.97, "gae_lambda": 0.9, "normalize_advantage": False, "ent_coef": 0.01, "max_grad_norm": 0.7,
    "critic_rollouts": 3, "ihvp_solver": "nystrom_cg", "ihvp_kwargs": {"rank": 3, "tol": 1e-3}, "ihvp_interval": 1,
    "curvature": "hessian", "max_correction_ratio": 0.6, "target_kl": 0.5, "seed": 3,
}  # fmt: skip


def actions_of(model: BLPO, deterministic: bool = True) -> np.ndarray:
    space = copy.deepcopy(model.observation_space)
    space.seed(0)
    th.manual_seed(0)
    if model.use_sde:
        model.policy.reset_noise()
    return model.predict(np.stack([space.sample() for _ in range(16)]), deterministic=deterministic)[0]


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize(
    ("policy", "env", "arguments"),
    [
        ("MlpPolicy", SpaceEnv(), ARGUMENTS),
        ("MlpPolicy", SpaceEnv(action_space=TORQUES), {"use_sde": True, "sde_sample_freq": 2}),
        ("CnnPolicy", SpaceEnv(IMAGE), {"policy_kwargs": {"net_arch": [4]}}),
        ("MlpPolicy", SpaceEnv(), {"policy_kwargs": {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}}}),
    ],
    ids=["arguments", "gSDE", "image", "SGD"],
)
def test_round_trip(policy: str, env: gym.Env, arguments: dict[str, Any], as_file: bool, tmp_path: Path) -> None:
    model = small(policy, env, **arguments).learn(32)
    target: Any = io.BytesIO() if as_file else tmp_path / "model"
    model.save(target)
    loaded = BLPO.load(target, device="cpu")
    state = state_of(loaded)
    assert not differences(state_of(model), state)
    for optimizer in ("actor", "critic"):  # more than the settings
        assert any(name.startswith(f"{optimizer}/state/") for name in state)
    assert {name: getattr(loaded, name) for name in arguments} == arguments
    for deterministic in (True, False):
        np.testing.assert_array_equal(actions_of(model, deterministic), actions_of(loaded, deterministic))


def test_parameters_of_three_modules() -> None:
    model = small().learn(32)
    parameters: dict[str, Any] = model.get_parameters()
    assert parameters.keys() == {"policy", "policy.optimizer", "critic_optimizer"}
    for name, optimizer in (("policy.optimizer", model.policy.optimizer), ("critic_optimizer", model.critic_optimizer)):
        assert len(parameters[name]["state"]) == len(parameters_of(optimizer)) > 0
    other = small(seed=1)
    other.set_parameters(parameters)
    assert not differences(state_of(model), state_of(other))
    del parameters["policy.optimizer"]
    with pytest.raises(ValueError, match="do not match agents' parameters"):
        other.set_parameters(parameters)
    other.set_parameters(parameters, exact_match=False)


def test_loaded_optimizers_belong_to_the_loaded_networks(tmp_path: Path) -> None:
    small().learn(16).save(tmp_path / "model")
    loaded = BLPO.load(tmp_path / "model", env=SpaceEnv(), device="cpu")
    ids = [id(p) for optimizer in (loaded.policy.optimizer, loaded.critic_optimizer) for p in parameters_of(optimizer)]
    assert sorted(ids) == sorted(id(parameter) for parameter in loaded.policy.parameters())


def test_schedules_survive(tmp_path: Path) -> None:
    schedules: dict[str, Any] = {
        "learning_rate": LinearSchedule(1e-2, 0.0, 1.0),
        "critic_learning_rate": LinearSchedule(4e-2, 2e-2, 1.0),
        "clip_range": LinearSchedule(0.2, 0.1, 1.0),
    }
    small(**schedules).save(tmp_path / "model")
    log = logged(BLPO.load(tmp_path / "model", env=SpaceEnv(), device="cpu").learn(32))
    assert [log[name] for name in schedules] == pytest.approx([0.0, 2e-2, 0.1])


def test_arguments_may_be_changed_on_loading(tmp_path: Path) -> None:
    small().learn(16).save(tmp_path / "model")
    changes: dict[str, Any] = {"critic_learning_rate": 0.05, "learning_rate": 0.01, "ihvp_solver": "none", "n_steps": 8}
    loaded = BLPO.load(tmp_path / "model", env=SpaceEnv(), device="cpu", **changes)
    assert loaded.learn(8, reset_num_timesteps=False).num_timesteps == 24
    log = logged(loaded)
    assert log["critic_learning_rate"] == 0.05 and log["learning_rate"] == 0.01 and "correction_ratio" not in log


@pytest.mark.parametrize("n_envs", [1, 3])
def test_load_with_another_number_of_environments(n_envs: int, tmp_path: Path) -> None:
    small(env=vec_env(SpaceEnv(), 2)).learn(64).save(tmp_path / "model")
    loaded = BLPO.load(tmp_path / "model", env=vec_env(SpaceEnv(), n_envs), device="cpu")
    assert loaded.rollout_buffer.rewards.shape == (16, n_envs)
    assert moved(actor_of(loaded), actor_of(loaded.learn(16 * n_envs)))


def test_load_without_an_environment(tmp_path: Path) -> None:
    model = small().learn(32)
    model.save(tmp_path / "model")
    loaded = BLPO.load(tmp_path / "model", device="cpu")
    assert loaded.get_env() is None
    np.testing.assert_array_equal(actions_of(model), actions_of(loaded))
    loaded.set_env(SpaceEnv())
    assert moved(actor_of(loaded), actor_of(loaded.learn(16)))


def test_load_as_rl_zoo_enjoys(tmp_path: Path) -> None:
    """Its custom objects keep out what it cannot or need not unpickle."""
    model = small(learning_rate=LinearSchedule(1e-3, 0.0, 1.0), clip_range=LinearSchedule(0.2, 0.0, 1.0)).learn(32)
    model.save(tmp_path / "model")
    custom_objects = {
        "learning_rate": 0.0,
        "lr_schedule": lambda _: 0.0,
        "clip_range": lambda _: 0.0,
        "observation_space": model.observation_space,
        "action_space": model.action_space,
    }
    loaded = BLPO.load(tmp_path / "model", env=SpaceEnv(), seed=0, device="cpu", custom_objects=custom_objects, buffer_size=1)
    np.testing.assert_array_equal(actions_of(model), actions_of(loaded))


@pytest.mark.parametrize("actions", ["Discrete", "Box"])
def test_zips_of_ppo(actions: str, tmp_path: Path) -> None:
    env = SpaceEnv(action_space=ACTION_SPACES[actions])
    ppo = PPO("MlpPolicy", env, **SMALL).learn(16)
    ppo.save(tmp_path / "ppo")
    model = small(env=env, seed=1).learn(16)
    before = state_of(model)
    for load in (
        lambda: BLPO.load(tmp_path / "ppo", device="cpu"),
        lambda: model.set_parameters(str(tmp_path / "ppo"), exact_match=False),
        lambda: model.set_parameters(ppo.get_parameters()),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"not saved by BLPO, for `critic_optimizer` is not there: .*PPO.*\.$"):
            load()
    assert not differences(before, state_of(model))
    model.save(tmp_path / "blpo")
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        PPO.load(tmp_path / "blpo", device="cpu")
    # Its policy alone is a start, and leaves the optimizers
    weights: dict[str, Any] = {"policy": ppo.get_parameters()["policy"]}
    model.set_parameters(weights, exact_match=False)
    after = state_of(model)
    assert all(name.startswith("policy/") for name in differences(before, after))
    assert all(th.equal(after[f"policy/{name}"], value) for name, value in ppo.policy.state_dict().items())
