"""Saving and loading, continued training, and determinism: all of it bit for bit."""

import copy
import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from envs import ACTION_SPACES, IMAGE, TORQUES, SpaceEnv, vec_env
from models import SMALL, AtRolloutStart, actor_of, critic_of, differences, logged, moved, small, state_of
from stable_baselines3 import PPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_blpo import BLPO
from sb3_blpo.optimizers import parameters_of


class Dropping(BaseFeaturesExtractor):
    """Draws from the global generator in training, and has buffers."""

    def __init__(self, observation_space: gym.Space[Any]) -> None:
        super().__init__(observation_space, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.body(observations)


#: Ways to train that draw differently
RECIPES: dict[str, dict[str, Any]] = {
    "gaussian": {"ihvp_kwargs": {"sketch": "gaussian", "rank": 4}},
    "columns": {"ihvp_kwargs": {"sketch": "columns", "rank": 4}},
    "cg": {"ihvp_solver": "cg"},
    "nystrom_cg": {"ihvp_solver": "nystrom_cg"},
    "exact": {"ihvp_solver": "exact"},
    "none": {"ihvp_solver": "none"},
    "hessian": {"curvature": "hessian", "ihvp_kwargs": {"rank": 3}, "n_epochs": 1},
    "gSDE": {"env": "Pendulum-v1", "use_sde": True, "sde_sample_freq": 4},
    "extractor": {
        "policy_kwargs": {"features_extractor_class": Dropping, "net_arch": [4]},
        "ihvp_kwargs": {"rank": 3},
        "n_epochs": 1,
    },
}
#: What one rollout of `trained` takes
ROLLOUT = 32


def fresh(recipe: str, seed: int = 0) -> BLPO:
    arguments: dict[str, Any] = {"env": "CartPole-v1", "n_epochs": 2} | RECIPES[recipe] | {"seed": seed}
    name = arguments.pop("env")
    return small(env=vec_env(gym.make(name), 2), **arguments)


def generator_states() -> dict[str, Any]:
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": th.get_rng_state()}  # noqa: NPY002


def set_generator_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    th.set_rng_state(states["torch"])


@contextmanager
def other_things() -> Iterator[None]:
    """What a user may do between two calls, afterwards forgotten by the global generators."""
    states = generator_states()
    yield
    set_generator_states(states)


@pytest.mark.parametrize("recipe", RECIPES)
def test_seeded_runs_are_equal(recipe: str) -> None:
    first = state_of(fresh(recipe).learn(2 * ROLLOUT))
    small(seed=7).learn(16)
    assert not differences(first, state_of(fresh(recipe).learn(2 * ROLLOUT)))


@pytest.mark.parametrize("recipe", ["gaussian", "columns", "cg", "exact"])
def test_other_seeds_give_other_runs(recipe: str) -> None:
    first, second = (fresh(recipe, seed).learn(2 * ROLLOUT) for seed in (0, 1))
    assert moved(actor_of(first), actor_of(second)) and moved(critic_of(first), critic_of(second))


def test_the_seed_reaches_the_sketch() -> None:
    """With everything else equal, another sketch is another run: the draws matter, so that the tests above mean something."""
    first, second = fresh("columns"), fresh("columns")
    assert first.sketch_generator is not None and second.sketch_generator is not None
    assert th.equal(first.sketch_generator.get_state(), second.sketch_generator.get_state())
    second.sketch_generator.manual_seed(12345)
    with other_things():
        first.learn(ROLLOUT)
    second.learn(ROLLOUT)
    assert moved(actor_of(first), actor_of(second))


@pytest.mark.parametrize("recipe", RECIPES)
def test_learning_in_two_calls_is_learning_in_one(recipe: str) -> None:
    whole = fresh(recipe).learn(3 * ROLLOUT)
    parts = fresh(recipe).learn(ROLLOUT).learn(2 * ROLLOUT, reset_num_timesteps=False)
    assert parts.num_timesteps == whole.num_timesteps == 3 * ROLLOUT
    assert not differences(state_of(whole), state_of(parts))


@pytest.mark.parametrize("recipe", RECIPES)
def test_continuing_from_a_zip_is_as_if_never_interrupted(recipe: str, tmp_path: Path) -> None:
    """
    At the end of a rollout's training the zip, the environment and the states of the global generators are all there is: SB3
    seeds again on loading, so the latter are put back after it; `force_reset=False` keeps the episode going.
    """
    model = fresh(recipe).learn(ROLLOUT)
    model.save(tmp_path / "model")
    env, generators = copy.deepcopy(model.get_env()), generator_states()
    model.learn(2 * ROLLOUT, reset_num_timesteps=False)

    small(seed=7).learn(16)
    loaded = BLPO.load(tmp_path / "model", env=env, device="cpu", force_reset=False)
    set_generator_states(generators)
    loaded.learn(2 * ROLLOUT, reset_num_timesteps=False)
    assert loaded.num_timesteps == model.num_timesteps == 3 * ROLLOUT
    assert not differences(state_of(model), state_of(loaded))
    assert logged(model) == logged(loaded)


def test_continuing_from_a_checkpoint_during_training(tmp_path: Path) -> None:
    """Saved by a callback at the start of the third rollout of four."""
    kept: dict[str, Any] = {}

    def save(model: BLPO) -> None:
        if model.num_timesteps == 2 * ROLLOUT:
            model.save(tmp_path / "model")
            kept.update(env=copy.deepcopy(model.get_env()), generators=generator_states())

    model = fresh("gaussian").learn(4 * ROLLOUT, callback=AtRolloutStart(save))
    env: VecEnv = kept["env"]
    loaded = BLPO.load(tmp_path / "model", env=env, device="cpu", force_reset=False)
    set_generator_states(kept["generators"])
    loaded.learn(2 * ROLLOUT, reset_num_timesteps=False)
    assert not differences(state_of(model), state_of(loaded))


ARGUMENTS: dict[str, Any] = {
    "learning_rate": 2e-3, "critic_learning_rate": 3e-3, "n_steps": 12, "batch_size": 6, "n_epochs": 2, "n_critic_updates": 2,
    "gamma": 0.97, "gae_lambda": 0.9, "normalize_advantage": True, "ent_coef": 0.01, "max_grad_norm": 0.7,
    "ihvp_solver": "nystrom_cg", "ihvp_kwargs": {"rank": 3, "tol": 1e-3}, "curvature": "hessian", "max_correction_ratio": 0.6,
    "target_kl": 0.5, "seed": 3,
}  # fmt: skip


def observations_for(model: BLPO) -> np.ndarray:
    space = copy.deepcopy(model.observation_space)
    space.seed(0)
    return np.stack([space.sample() for _ in range(16)])


@pytest.mark.parametrize(
    ("policy", "env", "arguments"),
    [
        ("MlpPolicy", SpaceEnv(), ARGUMENTS),
        ("MlpPolicy", SpaceEnv(action_space=TORQUES), {"use_sde": True, "sde_sample_freq": 2}),
        ("MlpPolicy", SpaceEnv(action_space=ACTION_SPACES["MultiBinary"]), {"ihvp_solver": "exact"}),
        ("CnnPolicy", SpaceEnv(IMAGE), {"policy_kwargs": {"net_arch": [4]}}),
        ("MlpPolicy", SpaceEnv(), {"policy_kwargs": {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}}}),
    ],
    ids=["arguments", "gSDE", "MultiBinary", "image", "SGD"],
)
def test_round_trip(policy: str, env: gym.Env, arguments: dict[str, Any], tmp_path: Path) -> None:
    model = small(policy, env, **arguments).learn(32)
    model.save(tmp_path / "model")
    loaded = BLPO.load(tmp_path / "model", device="cpu")
    assert not differences(state_of(model), state_of(loaded))
    # Of both optimizers, more than the settings
    for optimizer in ("actor", "critic"):
        assert any(name.startswith(f"{optimizer}/state/") for name in state_of(loaded))
    assert model.sketch_generator is not None and loaded.sketch_generator is not None
    assert th.equal(model.sketch_generator.get_state(), loaded.sketch_generator.get_state())
    for name, value in arguments.items():
        assert getattr(loaded, name) == value
    observations = observations_for(model)
    for deterministic in (True, False):
        actions = []
        for m in (model, loaded):
            th.manual_seed(0)
            if m.use_sde:
                m.policy.reset_noise()
            actions.append(m.predict(observations, deterministic=deterministic)[0])
        np.testing.assert_array_equal(actions[0], actions[1])


def test_optimizers_are_saved_under_their_names() -> None:
    model = small().learn(32)
    parameters: dict[str, Any] = model.get_parameters()
    assert parameters.keys() == {"policy", "policy.optimizer", "critic_optimizer"}
    for name, optimizer in (("policy.optimizer", model.policy.optimizer), ("critic_optimizer", model.critic_optimizer)):
        assert len(parameters[name]["state"]) == len(parameters_of(optimizer)) > 0
    other = small(seed=1)
    other.set_parameters(parameters)
    assert not differences(state_of(model), state_of(other))


@pytest.mark.parametrize("missing", ["policy", "policy.optimizer"])
def test_incomplete_parameters_are_an_error(missing: str) -> None:
    parameters: dict[str, Any] = small().get_parameters()
    del parameters[missing]
    with pytest.raises(ValueError, match="do not match agents' parameters"):
        small().set_parameters(parameters)
    small().set_parameters(parameters, exact_match=False)


def test_loaded_optimizers_belong_to_the_loaded_networks(tmp_path: Path) -> None:
    small().learn(16).save(tmp_path / "model")
    loaded = BLPO.load(tmp_path / "model", env=SpaceEnv(), device="cpu")
    actor, critic = actor_of(loaded), critic_of(loaded)
    loaded.learn(16)
    assert moved(actor, actor_of(loaded)) and moved(critic, critic_of(loaded))
    ids = [id(p) for optimizer in (loaded.policy.optimizer, loaded.critic_optimizer) for p in parameters_of(optimizer)]
    assert sorted(ids) == sorted(id(parameter) for parameter in loaded.policy.parameters())


def test_schedules_survive(tmp_path: Path) -> None:
    schedules: dict[str, Any] = {
        "learning_rate": LinearSchedule(1e-2, 0.0, 1.0),
        "critic_learning_rate": LinearSchedule(4e-2, 2e-2, 1.0),
        "clip_range": LinearSchedule(0.2, 0.1, 1.0),
    }
    small(**schedules).save(tmp_path / "model")
    loaded = BLPO.load(tmp_path / "model", env=SpaceEnv(), device="cpu").learn(32)
    assert logged(loaded)["learning_rate"] == 0.0
    assert logged(loaded)["critic_learning_rate"] == pytest.approx(2e-2)
    assert logged(loaded)["clip_range"] == pytest.approx(0.1)


def test_arguments_may_be_changed_on_loading(tmp_path: Path) -> None:
    small().learn(16).save(tmp_path / "model")
    changes: dict[str, Any] = {"critic_learning_rate": 0.05, "learning_rate": 0.01, "ihvp_solver": "none", "batch_size": 4}
    loaded = BLPO.load(tmp_path / "model", env=SpaceEnv(), device="cpu", **changes).learn(16)
    assert logged(loaded)["critic_learning_rate"] == loaded.critic_optimizer.param_groups[0]["lr"] == 0.05
    assert logged(loaded)["learning_rate"] == loaded.policy.optimizer.param_groups[0]["lr"] == 0.01
    assert "correction_ratio" not in logged(loaded)
    twin = BLPO.load(tmp_path / "model", env=SpaceEnv(), device="cpu", ihvp_kwargs={"rank": 2}).learn(16)
    assert twin.solver is not None and len(twin.solver.omega) == 2  # type: ignore[attr-defined]


def test_file_objects() -> None:
    model = small().learn(16)
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    assert not differences(state_of(model), state_of(BLPO.load(file, device="cpu")))


@pytest.mark.parametrize("actions", ["Discrete", "Box"])
def test_zip_of_ppo(actions: str, tmp_path: Path) -> None:
    env = SpaceEnv(action_space=ACTION_SPACES[actions])
    PPO("MlpPolicy", env, **SMALL).learn(16).save(tmp_path / "ppo")
    model = small(env=env).learn(16)
    before = state_of(model)
    with pytest.raises(ValueError, match="These parameters were not saved by BLPO"):
        model.set_parameters(PPO.load(tmp_path / "ppo", device="cpu").get_parameters())  # type: ignore[arg-type]
    for load in (
        lambda: BLPO.load(tmp_path / "ppo", device="cpu"),
        lambda: model.set_parameters(str(tmp_path / "ppo.zip")),
        lambda: model.set_parameters(str(tmp_path / "ppo"), exact_match=False),
    ):
        with pytest.raises(ValueError, match=f"`{tmp_path / 'ppo'}.* was not saved by BLPO") as error:
            load()
        message = str(error.value)
        assert "PPO" in message and "`critic_optimizer`" in message and "\n" not in message and message.endswith(".")
    assert not differences(before, state_of(model))


@pytest.mark.parametrize("actions", ["Discrete", "Box"])
def test_ppo_refuses_the_zip_of_blpo(actions: str, tmp_path: Path) -> None:
    small(env=SpaceEnv(action_space=ACTION_SPACES[actions])).learn(16).save(tmp_path / "blpo")
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        PPO.load(tmp_path / "blpo", device="cpu")


def test_start_from_the_policy_of_ppo() -> None:
    ppo = PPO("MlpPolicy", SpaceEnv(), **(SMALL | {"seed": 1})).learn(16)
    model = small()
    optimizers = {name: value for name, value in state_of(model).items() if not name.startswith("policy/")}
    weights: dict[str, Any] = {"policy": ppo.get_parameters()["policy"]}
    model.set_parameters(weights, exact_match=False)
    state = state_of(model)
    assert not differences({k: v for k, v in state.items() if not k.startswith("policy/")}, optimizers)
    for name, value in ppo.policy.state_dict().items():
        assert th.equal(state[f"policy/{name}"], value)
    actor, critic = actor_of(model), critic_of(model)
    model.learn(16)
    assert moved(actor, actor_of(model)) and moved(critic, critic_of(model))


def test_save_with_another_policy(tmp_path: Path) -> None:
    model = small().learn(16)
    model.policy = PPO("MlpPolicy", SpaceEnv(), **(SMALL | {"seed": 1})).policy
    model.save(tmp_path / "model")
    loaded = BLPO.load(tmp_path / "model", device="cpu")
    assert not differences(state_of(model), state_of(loaded))
    model.policy = PPO("MlpPolicy", SpaceEnv(), **(SMALL | {"seed": 2})).policy
    model.set_parameters(str(tmp_path / "model.zip"))
    assert not differences(state_of(model), state_of(loaded))


@pytest.mark.parametrize("n_envs", [1, 3])
def test_load_with_another_number_of_environments(n_envs: int, tmp_path: Path) -> None:
    model = small(env=vec_env(SpaceEnv(), 2)).learn(32)
    model.save(tmp_path / "model")
    loaded = BLPO.load(tmp_path / "model", env=vec_env(SpaceEnv(), n_envs), device="cpu")
    assert loaded.n_envs == n_envs and loaded.rollout_buffer.rewards.shape == (16, n_envs)
    actor = actor_of(loaded)
    loaded.learn(16 * n_envs)
    assert moved(actor, actor_of(loaded))


def test_load_without_an_environment(tmp_path: Path) -> None:
    model = small().learn(32)
    model.save(tmp_path / "model")
    loaded = BLPO.load(tmp_path / "model", device="cpu")
    assert loaded.get_env() is None
    observations = observations_for(model)
    np.testing.assert_array_equal(
        loaded.predict(observations, deterministic=True)[0], model.predict(observations, deterministic=True)[0]
    )
    loaded.set_env(SpaceEnv())
    actor = actor_of(loaded)
    assert moved(actor, actor_of(loaded.learn(16)))


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
    observations = observations_for(model)
    np.testing.assert_array_equal(
        loaded.predict(observations, deterministic=True)[0], model.predict(observations, deterministic=True)[0]
    )


def test_a_fresh_model_can_be_copied() -> None:
    policy = small().policy
    assert th.equal(copy.deepcopy(policy).value_net.weight, policy.value_net.weight)
