"""RecurrentBLPO: BLPO for policies with memory, used as sb3-contrib's RecurrentPPO is."""

import copy
import functools
import inspect
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from envs import ACTION_SPACES, BOX, DICT, IMAGE, OBSERVATION_SPACES, TORQUES, FaultyEnv, SpaceEnv, vec_env
from gymnasium import spaces
from models import (
    SMALL,
    actor_of,
    changed,
    collect_rollout,
    critic_of,
    differences,
    logged,
    moved,
    small,
    state_of,
)
from sb3_contrib import MaskablePPO, RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from sb3_blpo import BLPO, RecurrentBLPO
from sb3_blpo.resume import ResumableCheckpoint, resume

#: What one rollout of two environments takes. It ends within an episode, which takes 5 steps
N_STEPS, ROLLOUT = 8, 16
#: By what is special about the networks
NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "critic without LSTM": {"enable_critic_lstm": False},
    "two layers": {"n_lstm_layers": 2},
    "dropout": {"n_lstm_layers": 2, "lstm_kwargs": {"dropout": 0.3}},
    "own extractors": {"share_features_extractor": False},
    "no further layers": {"net_arch": []},
}
#: By what they see: a policy and a space
SEES: dict[str, tuple[str, spaces.Space]] = {
    "Box": ("MlpLstmPolicy", BOX),
    "Box2D": ("MlpLstmPolicy", OBSERVATION_SPACES["Box2D"]),
    "Discrete": ("MlpLstmPolicy", OBSERVATION_SPACES["Discrete"]),
    "MultiBinary": ("MlpLstmPolicy", OBSERVATION_SPACES["MultiBinary"]),
    "image": ("CnnLstmPolicy", IMAGE),
    "Dict": ("MultiInputLstmPolicy", DICT),
}
#: Small networks
SMALLER: dict[Any, dict[str, Any]] = {
    "CnnLstmPolicy": {"features_extractor_kwargs": {"features_dim": 8}},
    "MultiInputLstmPolicy": {"features_extractor_kwargs": {"cnn_output_dim": 8}},
}


def recurrent(policy: Any = "MlpLstmPolicy", env: Any = None, networks: Any = None, **arguments: Any) -> RecurrentBLPO:
    """A model of two environments with minibatches of 8 transitions."""
    settings: dict[str, Any] = SMALL | {"n_steps": N_STEPS, "n_critic_updates": 2, "ihvp_kwargs": {"rank": 4}} | arguments
    settings["policy_kwargs"] = {"lstm_hidden_size": 8, "net_arch": [8]} | SMALLER.get(policy, {}) | (networks or {})
    return RecurrentBLPO(policy, vec_env(SpaceEnv(), 2) if env is None else env, **settings)


def sees(what: str, actions: str = "Discrete", n_envs: int = 2, **arguments: Any) -> RecurrentBLPO:
    policy, space = SEES[what]
    return recurrent(policy, vec_env(SpaceEnv(space, ACTION_SPACES[actions]), n_envs), **arguments)


def names_of(model: RecurrentBLPO) -> set[str]:
    """Of all parameters."""
    return {name for name, _ in model.policy.named_parameters()}


def livelier(model: RecurrentBLPO) -> RecurrentBLPO:
    """What is remembered shows in actions and values."""
    with th.no_grad():
        for name, parameter in model.policy.named_parameters():
            parameter.mul_(100 if name.startswith("action_net.weight") else 3 if "lstm" in name else 1)
    return model


def score(model: RecurrentBLPO, env: Any, n_episodes: int = 4) -> float:
    """Mean return."""
    return float(np.mean(evaluate_policy(model, env, n_episodes, warn=False)[0]))


def refusal(action: Callable[[], Any]) -> str:
    """The message of the error that this raises: one sentence."""
    with pytest.raises(ValueError) as error:
        action()
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message
    return message


class Callback(BaseCallback):
    """Calls a function at the end of each rollout."""

    def __init__(self, at_end: Callable[[Any], Any]) -> None:
        super().__init__()
        self.at_end = at_end

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.at_end(self.model)


# Any environment, any network


@pytest.mark.parametrize(
    ("what", "actions"), [("Box", actions) for actions in ACTION_SPACES] + [(what, "Box") for what in SEES if what != "Box"]
)
def test_spaces(what: str, actions: str) -> None:
    model = sees(what, actions)
    assert changed(model, lambda: model.learn(2 * ROLLOUT)) == names_of(model)
    assert 0 < abs(score(model, model.get_env())) < 100


@pytest.mark.parametrize("networks", NETWORKS)
def test_networks(networks: str) -> None:
    model = recurrent(networks=NETWORKS[networks])
    assert changed(model, lambda: model.learn(2 * ROLLOUT)) == names_of(model)
    assert logged(model)["correction_skipped"] == 0 < logged(model)["correction_ratio"]


@pytest.mark.parametrize(
    "networks",
    [
        {"shared_lstm": True},
        {"shared_lstm": True, "enable_critic_lstm": False},
        {"shared_lstm": True, "enable_critic_lstm": False, "share_features_extractor": False},
    ],
)
def test_a_shared_lstm_is_refused(networks: dict[str, Any]) -> None:
    assert refusal(lambda: recurrent(networks=networks)).startswith("`shared_lstm`=True gives actor and critic a common LSTM")


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 16, 1000])
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size of:UserWarning")
def test_any_batch_size(batch_size: int, n_envs: int) -> None:
    model = recurrent(env=vec_env(SpaceEnv(), n_envs), batch_size=batch_size)
    assert changed(model, lambda: model.learn(16 * n_envs)) == names_of(model)


def test_a_batch_size_that_does_not_divide_the_rollout() -> None:
    with pytest.warns(
        UserWarning, match="mini-batch size of 5, but because .* there will be a truncated mini-batch of size 1"
    ):
        recurrent(batch_size=5)


class Fed(BaseFeaturesExtractor):
    """With parameters, a state, and a draw of its own in training."""

    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space, 4)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.body(observations)


def test_extractors_policies_and_optimizers_of_the_users() -> None:
    class Own(RecurrentActorCriticPolicy):
        def _build_mlp_extractor(self) -> None:
            self.net_arch = {"pi": [], "vf": [6, 4]}
            super()._build_mlp_extractor()

    networks = {"features_extractor_class": Fed, "optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.1}}
    model = recurrent(Own, networks=networks)
    assert changed(model, lambda: model.learn(2 * ROLLOUT)) == names_of(model)
    assert {f"{side}features_extractor.body.0.weight" for side in ("", "vf_")} <= names_of(model)
    assert type(model.critic_optimizer) is th.optim.AdamW


@pytest.mark.parametrize("frozen", ["lstm_critic", "mlp_extractor.value_net", "lstm_actor"])
def test_what_is_frozen_stays(frozen: str) -> None:
    model = recurrent()
    model.policy.get_submodule(frozen).requires_grad_(False)
    left = {name for name in names_of(model) if not name.startswith(f"{frozen}.")}
    assert changed(model, lambda: model.learn(2 * ROLLOUT)) == left != names_of(model)


# What is remembered


@pytest.mark.parametrize(
    ("what", "actions", "n_envs", "arguments"),
    [
        ("Box", "Discrete", 1, {}),
        ("Box", "Box", 3, {"networks": NETWORKS["two layers"]}),
        ("Box", "Box", 2, {"use_sde": True, "sde_sample_freq": 4}),
        ("Discrete", "MultiDiscrete", 2, {"networks": NETWORKS["critic without LSTM"]}),
        ("image", "MultiBinary", 2, {}),
        ("Dict", "Box", 2, {}),
    ],
)
def test_networks_that_stand_still_say_what_they_said(what: str, actions: str, n_envs: int, arguments: dict[str, Any]) -> None:
    """All that an update sees is what was collected: along episodes, from one rollout to the next, at any place in a piece."""

    def run(callback: Any = None) -> tuple[dict[str, float], float]:
        model = livelier(sees(what, actions, n_envs, learning_rate=0.0, n_critic_updates=1, critic_rollouts=1, **arguments))
        model.learn(2 * N_STEPS * n_envs, callback)
        buffer = model.rollout_buffer
        assert not buffer.episode_starts[0].any()
        return logged(model), float(np.mean((buffer.values - buffer.returns) ** 2))

    values, loss = run()
    assert values["approx_kl"] == pytest.approx(0, abs=1e-6) and values["clip_fraction"] == 0
    assert values["value_loss"] == pytest.approx(loss, rel=1e-4)

    # So it is the memory that shows
    def forget(model: Any) -> None:
        for name in ("hidden_states_pi", "cell_states_pi", "hidden_states_vf", "cell_states_vf"):
            getattr(model.rollout_buffer, name)[:] = 0

    values, loss = run(Callback(forget))
    assert values["approx_kl"] > 1e-5
    remembers = arguments.get("networks", {}).get("enable_critic_lstm", True)
    assert (values["value_loss"] != pytest.approx(loss, rel=1e-4)) == remembers


class Recall(SpaceEnv):
    """The first observation says which action is right in all of the episode."""

    def __init__(self) -> None:
        super().__init__(spaces.Box(-1, 1, (1,), np.float32), spaces.Discrete(2), episode_length=4)
        self.right = 0

    def reset(self, **arguments: Any) -> Any:
        super().reset(**arguments)
        self.right = int(self.np_random.integers(2))
        return np.array([2 * self.right - 1], np.float32), {}

    def step(self, action: Any) -> Any:
        _, _, *rest = super().step(action)
        return np.zeros(1, np.float32), float(action == self.right), *rest


def test_a_memory_task() -> None:
    """By chance an episode brings 2, without memory at most 2.5, with it 4."""
    arguments: dict[str, Any] = {"n_steps": 16, "batch_size": 32, "n_epochs": 3, "n_critic_updates": 1, "gamma": 0.9}
    model = recurrent(env=vec_env(Recall(), 8), learning_rate=1e-2, **arguments).learn(10 * 128)
    env = vec_env(Recall(), 8)
    assert score(model, env, 40) > 3.8
    memory = model.predict
    model.predict = lambda *arguments, **others: memory(arguments[0])  # type: ignore[method-assign]
    assert score(model, env, 40) < 3.2


def test_acting_step_by_step() -> None:
    """The memory goes in and comes out, is forgotten where an episode starts, and counts."""
    model = livelier(recurrent(env=vec_env(SpaceEnv(action_space=TORQUES), 2)))
    observations = np.random.default_rng(0).uniform(-1, 1, (6, 2, 3)).astype(np.float32)

    def run(starts: Any, start: int = 0, state: Any = None) -> tuple[np.ndarray, Any]:
        actions = []
        for t in range(start, 6):
            action, state = model.predict(observations[t], state, np.full(2, t in starts), deterministic=True)
            actions.append(action)
        return np.stack(actions), state

    whole, state = run({0})
    assert state[0].shape == state[1].shape == (1, 2, 8)
    assert np.abs(whole[3:] - run({0, 3})[0][3:]).min() > 1e-4
    for start in (None, state):
        np.testing.assert_array_equal(run({0, 3})[0][3:], run({3}, 3, start)[0])


# Settings


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize(
    ("solver", "sketch"),
    [("nystrom", "values"), ("nystrom", "columns"), ("nystrom", "gaussian"), ("nystrom_cg", "values"), ("cg", "values"),
     ("exact", "values")],
)  # fmt: skip
def test_solvers(solver: str, sketch: str, curvature: str) -> None:
    networks = {"lstm_hidden_size": 3, "net_arch": []}
    arguments: dict[str, Any] = {"networks": networks, "curvature": curvature, "ihvp_kwargs": {"rank": 4, "sketch": sketch}}
    without = recurrent(ihvp_solver="none", **arguments).learn(ROLLOUT)
    model = recurrent(ihvp_solver=solver, **arguments)
    assert changed(model, lambda: model.learn(ROLLOUT)) == names_of(model)
    values = logged(model)
    assert np.isfinite([*values.values()]).all()
    # CG may have to give up where the Hessian is indefinite: then the actor's step is that without a response
    assert values["correction_skipped"] == 0 or (curvature, "cg" in solver) == ("hessian", True)
    assert moved(actor_of(without), actor_of(model)) == (values["correction_skipped"] == 0)
    assert not moved(critic_of(without), critic_of(model))
    if solver == "exact":
        assert values["ihvp_residual"] < 1e-3


@pytest.mark.parametrize("networks", ["plain", "critic without LSTM", "dropout"])
def test_without_correction(networks: str) -> None:
    """Solving changes nothing but the advantages, and a correction of length 0 is none."""

    def run(**arguments: Any) -> dict[str, Any]:
        model = recurrent(networks=NETWORKS[networks], n_epochs=2, **arguments)
        return state_of(model.learn(2 * ROLLOUT))

    none = run(ihvp_solver="none")
    assert not differences(none, run(max_correction_ratio=0.0))
    assert not differences(none, run(max_correction_ratio=0.0, ihvp_solver="cg", ihvp_interval=1))
    assert differences(none, run(max_correction_ratio=0.1))


def test_settings_count() -> None:
    """Each alone changes what is learned."""
    arguments: dict[str, Any] = {"n_epochs": 2, "learning_rate": 3e-3}
    state = state_of(recurrent(**arguments).learn(ROLLOUT))
    changes: dict[str, Any] = {
        "ihvp_interval": 1, "n_critic_updates": 1, "critic_learning_rate": 1e-3, "target_kl": 1e-9,
        "max_correction_ratio": None, "curvature": "hessian", "ent_coef": 0.1, "clip_range": 0.01, "max_grad_norm": 0.01,
        "gamma": 0.5, "gae_lambda": 0.5, "normalize_advantage": False, "ihvp_kwargs": {"damping": 1.0},
    }  # fmt: skip
    for name, value in changes.items():
        assert differences(state, state_of(recurrent(**(arguments | {name: value})).learn(ROLLOUT))), name


def test_target_kl_ends_the_actors_passes() -> None:
    model = recurrent(n_epochs=5, target_kl=1e-9, learning_rate=1e-2)
    assert logged(model.learn(2 * ROLLOUT))["n_updates"] == 2
    assert logged(recurrent(n_epochs=5, target_kl=1e9, learning_rate=1e-2).learn(2 * ROLLOUT))["n_updates"] == 10


@pytest.mark.parametrize("what", ["Box", "image"])
def test_how_many_rollouts_the_critic_fits_by_default(what: str) -> None:
    """8, or with images 1, for the sake of memory."""
    states = {n: state_of(sees(what, critic_rollouts=n).learn(2 * ROLLOUT)) for n in (None, 1, 8)}
    assert not differences(states[None], states[1 if what == "image" else 8])
    assert differences(states[1], states[8])


def test_gsde() -> None:
    env = vec_env(SpaceEnv(action_space=TORQUES), 2)
    model = recurrent(env=env, use_sde=True, sde_sample_freq=4)
    assert changed(model, lambda: model.learn(2 * ROLLOUT)) == names_of(model)
    assert "log_std" in names_of(model) and logged(model)["std"] > 0


def test_schedules_and_settings_that_change_between_updates_count() -> None:
    model = recurrent(learning_rate=LinearSchedule(1e-2, 0.0, 1.0), ent_coef=lambda progress: 0.1 * progress)
    model.learn(2 * ROLLOUT)
    assert logged(model)["learning_rate"] == 0 and logged(model)["ent_coef"] == 0
    model.learning_rate, model.ent_coef, model.n_epochs, model.batch_size = 1e-3, 0.2, 3, 4
    model.learn(ROLLOUT)
    assert (logged(model)["learning_rate"], logged(model)["ent_coef"], logged(model)["n_updates"]) == (1e-3, 0.2, 5)


@pytest.mark.parametrize("n_steps", [4, 12])
def test_another_rollout_length(n_steps: int, tmp_path: Path) -> None:
    """As the message says: on loading, or with the rollout buffer changed as well."""
    model = recurrent().learn(ROLLOUT)
    model.save(tmp_path / "model")
    model.n_steps = n_steps
    assert f"`n_steps` is {n_steps}, but the rollout buffer was made for 8" in refusal(lambda: model.learn(ROLLOUT))
    model.rollout_buffer.buffer_size = n_steps
    loaded = RecurrentBLPO.load(tmp_path / "model", env=vec_env(SpaceEnv(), 2), device="cpu", n_steps=n_steps)
    for each in (model, loaded):
        assert changed(each, functools.partial(each.learn, 2 * n_steps)) == names_of(each)
        assert each.num_timesteps == 2 * n_steps


# Callbacks


@pytest.mark.parametrize(("what", "n_envs"), [("Box", 1), ("Box", 3), ("Discrete", 2), ("Dict", 2)])
def test_a_buffer_that_was_read_with_get(what: str, n_envs: int) -> None:
    """It flattens its arrays, environments first, and draws from NumPy's generator."""
    read = Callback(lambda model: next(model.rollout_buffer.get(8)))
    first, second = (
        state_of(sees(what, "MultiDiscrete", n_envs).learn(2 * N_STEPS * n_envs, callback)) for callback in (None, read)
    )
    assert not differences(first, second)


@pytest.mark.parametrize("read", [False, True])
def test_advantages_and_returns_that_a_callback_writes_count(read: bool) -> None:
    """The actor learns from the ones, the critic from the others."""

    def write(model: Any) -> None:
        buffer = model.rollout_buffer
        if read:
            next(buffer.get(8))
        buffer.rewards[:] = 0  # nobody reads them any more
        buffer.advantages[:] = buffer.actions.reshape(buffer.advantages.shape) == 2
        buffer.returns[:] = 3.0

    model = recurrent(learning_rate=1e-2, n_epochs=6, gamma=0.5, ihvp_solver="none")
    model.learn(6 * ROLLOUT, Callback(write))
    observations = np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32)
    assert (model.predict(observations, deterministic=True)[0] == 2).all()
    memory = th.zeros(1, 20, 8), th.zeros(1, 20, 8)
    with th.no_grad():
        values: Any = model.policy.predict_values(th.as_tensor(observations), memory, th.zeros(20))  # type: ignore[call-arg]
    assert 2.5 < values.min() and values.max() < 3.5


@pytest.mark.parametrize("networks", ["plain", "dropout"])
def test_advantages_are_the_actors_and_returns_the_critics(networks: str) -> None:
    def no_advantages(model: Any) -> None:
        model.rollout_buffer.advantages[:] = 0

    def no_errors(model: Any) -> None:
        model.rollout_buffer.returns[:] = model.rollout_buffer.values

    model = recurrent(critic_learning_rate=0.0, normalize_advantage=False, networks=NETWORKS[networks])
    actor = actor_of(model)
    assert not moved(actor, actor_of(model.learn(2 * ROLLOUT, Callback(no_advantages))))
    assert moved(actor, actor_of(model.learn(ROLLOUT)))
    # One step on all values as they are: nothing to learn, up to rounding
    model = recurrent(batch_size=ROLLOUT, n_critic_updates=1, networks={"optimizer_class": th.optim.SGD})
    critic = critic_of(model)
    model.learn(ROLLOUT, Callback(no_errors))
    th.testing.assert_close(critic_of(model), critic, rtol=0, atol=1e-6)
    model.learn(ROLLOUT)
    assert max(float((a - b).abs().max()) for a, b in zip(critic, critic_of(model), strict=True)) > 1e-5


def test_what_a_callback_sees() -> None:
    """The buffer holds what the policy says, and the model can be copied and trained apart."""
    seen = []

    def look(model: Any) -> None:
        buffer, policy = model.rollout_buffer, model.policy
        with th.no_grad():
            memory = tuple(th.as_tensor(part[3]) for part in (buffer.hidden_states_vf, buffer.cell_states_vf))
            starts = th.as_tensor(buffer.episode_starts[3])
            values = policy.predict_values(th.as_tensor(buffer.observations[3]), memory, starts)
        np.testing.assert_allclose(values.flatten(), buffer.values[3], rtol=1e-5, atol=1e-6)
        before = state_of(model)
        twin = copy.deepcopy(model)
        twin.train()
        assert not differences(before, state_of(model)) and differences(before, state_of(twin))
        seen.append(float(values.mean()))

    recurrent().learn(2 * ROLLOUT, Callback(look))
    assert len({*seen}) == 2


def test_evaluation_during_training(tmp_path: Path) -> None:
    """With normalised observations; what the callback saves as the best model can be loaded."""
    env, eval_env = (VecNormalize(DummyVecEnv([lambda: Monitor(SpaceEnv())] * n)) for n in (2, 1))
    callback = EvalCallback(eval_env, eval_freq=8, n_eval_episodes=3, best_model_save_path=str(tmp_path), verbose=0)
    recurrent(env=env).learn(2 * ROLLOUT, callback)
    assert callback.best_mean_reward > 0
    assert 0 < RecurrentBLPO.load(tmp_path / "best_model", device="cpu").num_timesteps <= 2 * ROLLOUT


# Reproduce, save, resume

#: Ways to train that draw differently
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "none": {"ihvp_solver": "none"},
    "columns": {"ihvp_kwargs": {"rank": 4, "sketch": "columns"}, "ihvp_interval": 1},
    "gSDE": {"actions": "Box", "use_sde": True, "sde_sample_freq": 4},
    "dropout": {"networks": NETWORKS["dropout"]},
    "extractor": {"networks": {"features_extractor_class": Fed}},
    "image": {"what": "image", "n_epochs": 1},
}


def fresh(recipe: str, **others: Any) -> RecurrentBLPO:
    arguments: dict[str, Any] = {"what": "Box", "n_epochs": 2} | RECIPES[recipe] | others
    return sees(**arguments)


@pytest.mark.parametrize("recipe", RECIPES)
def test_seeded_runs_are_equal_in_one_call_or_two(recipe: str) -> None:
    whole = fresh(recipe).learn(3 * ROLLOUT)
    recurrent(seed=7).learn(ROLLOUT)
    parts = fresh(recipe).learn(ROLLOUT).learn(2 * ROLLOUT, reset_num_timesteps=False)
    assert parts.num_timesteps == whole.num_timesteps == 3 * ROLLOUT
    assert not differences(state_of(whole), state_of(parts)) and logged(whole) == logged(parts)
    other = fresh(recipe, seed=1).learn(ROLLOUT)
    assert moved(actor_of(whole), actor_of(other)) and moved(critic_of(whole), critic_of(other))


def episode(model: RecurrentBLPO, deterministic: bool = True) -> list[np.ndarray]:
    """Actions and memory along some observations."""
    space = copy.deepcopy(model.observation_space)
    space.seed(0)
    th.manual_seed(0)
    if model.use_sde:
        model.policy.reset_noise()
    state, starts, seen = None, np.ones(1, dtype=bool), []
    for _ in range(6):
        action, state = model.predict(space.sample(), state, starts, deterministic)
        assert state is not None
        seen += [action, *state]
        starts = np.zeros(1, dtype=bool)
    return seen


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("Box", {"networks": NETWORKS["two layers"], "ihvp_solver": "cg", "critic_rollouts": 3, "target_kl": 0.5}),
        ("Discrete", {"networks": NETWORKS["critic without LSTM"], "max_correction_ratio": 0.6, "curvature": "hessian"}),
        ("Box", {"actions": "Box", "use_sde": True}),
        ("image", {}),
        ("Dict", {}),
    ],
)
def test_round_trip(what: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    model = sees(what, **arguments).learn(ROLLOUT)
    target: Any = io.BytesIO() if what == "Dict" else tmp_path / "model"
    model.save(target)
    loaded = RecurrentBLPO.load(target, device="cpu")
    assert type(loaded) is RecurrentBLPO and not differences(state_of(model), state_of(loaded))
    assert model.policy_kwargs == loaded.policy_kwargs
    for name in arguments.keys() - {"networks", "actions"}:
        assert getattr(loaded, name) == arguments[name]
    for deterministic in (True, False):
        for a, b in zip(episode(model, deterministic), episode(loaded, deterministic), strict=True):
            np.testing.assert_array_equal(a, b)
    loaded.set_env(vec_env(model.get_env().envs[0], 2))  # type: ignore[union-attr]
    assert changed(loaded, lambda: loaded.learn(ROLLOUT, reset_num_timesteps=False)) == names_of(loaded)
    assert loaded.num_timesteps == model.num_timesteps + ROLLOUT


@pytest.mark.parametrize("n_envs", [1, 3])
def test_load_with_another_number_of_environments(n_envs: int, tmp_path: Path) -> None:
    recurrent().learn(ROLLOUT).save(tmp_path / "model")
    loaded = RecurrentBLPO.load(tmp_path / "model", env=vec_env(SpaceEnv(), n_envs), device="cpu")
    assert changed(loaded, lambda: loaded.learn(N_STEPS * n_envs)) == names_of(loaded)


def test_set_parameters() -> None:
    model, other = recurrent().learn(ROLLOUT), recurrent(seed=1).learn(ROLLOUT)
    parameters: dict[str, Any] = model.get_parameters()
    assert parameters.keys() == {"policy", "policy.optimizer", "critic_optimizer"}
    before = state_of(other)
    wrong: dict[str, Any] = copy.deepcopy(parameters)
    wrong["policy"]["lstm_critic.weight_hh_l0"] = th.zeros(3)
    with pytest.raises(RuntimeError, match=r"size mismatch for lstm_critic.weight_hh_l0"):
        other.set_parameters(wrong)
    assert not differences(before, state_of(other))
    other.set_parameters(parameters)
    assert not differences(state_of(model), state_of(other))
    assert changed(other, lambda: other.learn(ROLLOUT)) == names_of(other)


class Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("not this")


def test_a_failed_save_leaves_the_old_file_alone(tmp_path: Path) -> None:
    model = recurrent()
    model.save(tmp_path / "model")
    content = (tmp_path / "model.zip").read_bytes()
    model.learn(ROLLOUT).policy.optimizer.param_groups[0]["lr"] = Unpicklable()
    with pytest.raises(RuntimeError, match="not this"):
        model.save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]
    assert (tmp_path / "model.zip").read_bytes() == content


def memory_of(model: Any) -> list[th.Tensor]:
    """What is remembered when the next rollout begins."""
    return [part for network in model._last_lstm_states for part in network]


@pytest.mark.parametrize(
    ("recipe", "reset_env"),
    [("plain", False), ("gSDE", False), ("dropout", False), ("image", False), ("Dict", False), ("gSDE", True),
     ("normalised", True)],
)  # fmt: skip
def test_resumed(recipe: str, reset_env: bool, tmp_path: Path) -> None:
    """An interrupted training goes on exactly, whether the environment is pickled or reset."""
    settings: dict[str, Any] = {"what": "Box", "actions": "Box", "critic_rollouts": 3}
    settings |= {"what": "Dict"} if recipe == "Dict" else RECIPES.get(recipe, {})

    def environment() -> Any:
        env = sees(settings["what"], settings["actions"]).env
        return VecNormalize(env) if recipe == "normalised" else env  # type: ignore[arg-type]

    def start(n_rollouts: int, path: str) -> RecurrentBLPO:
        arguments = {name: value for name, value in settings.items() if name not in ("what", "actions")}
        model = livelier(recurrent(SEES[settings["what"]][0], environment(), **arguments))
        return model.learn(n_rollouts * ROLLOUT, ResumableCheckpoint(tmp_path / path, reset_env=reset_env))

    def resumed() -> RecurrentBLPO:
        recurrent(seed=7).learn(ROLLOUT)
        env = environment() if reset_env else None
        return resume(tmp_path / "part", env, algorithm_class=RecurrentBLPO, device="cpu")

    whole, part = start(4, "whole"), start(2, "part")
    saved, model = (tmp_path / "part.zip").read_bytes(), resumed()
    assert type(model) is RecurrentBLPO and model.num_timesteps == 2 * ROLLOUT
    assert all(map(th.equal, memory_of(part), memory_of(model))) and all(part.any() for part in memory_of(model))
    model.learn(2 * ROLLOUT, ResumableCheckpoint(tmp_path / "part", reset_env=reset_env), reset_num_timesteps=False)
    assert not differences(state_of(whole), state_of(model)) and logged(whole) == logged(model)
    assert all(map(th.equal, memory_of(whole), memory_of(model)))
    if recipe == "plain" and not reset_env:
        # The comparison can fail: without the memory it is another run
        (tmp_path / "part.zip").write_bytes(saved)
        model = resumed()
        for memory in memory_of(model):
            memory.zero_()
        assert moved(actor_of(whole), actor_of(model.learn(2 * ROLLOUT, reset_num_timesteps=False)))


def test_interrupted_within_a_rollout(tmp_path: Path) -> None:
    class Crash(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps > 2.5 * ROLLOUT:
                raise KeyboardInterrupt
            return True

    whole = recurrent().learn(4 * ROLLOUT, ResumableCheckpoint(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        recurrent().learn(4 * ROLLOUT, [ResumableCheckpoint(tmp_path / "part"), Crash()])
    model = resume(tmp_path / "part", algorithm_class=RecurrentBLPO, device="cpu")
    assert model.num_timesteps == 2 * ROLLOUT
    model.learn(2 * ROLLOUT, ResumableCheckpoint(tmp_path / "part"), reset_num_timesteps=False)
    assert not differences(state_of(whole), state_of(model))


# Numbers that are none


def check_recovery(model: RecurrentBLPO, **arguments: Any) -> None:
    assert changed(model, lambda: model.learn(ROLLOUT, **arguments)) == names_of(model)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("where", "name"),
    [("reward", "`advantages`"), ("reset", "`observations`"), ("step", "`observations`"), ("terminal", "`terminal obs")],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:stable_baselines3")
def test_nan_in_a_rollout_leaves_no_trace(where: str, name: str, value: float) -> None:
    env = FaultyEnv("", value)
    model = recurrent(env=env).learn(N_STEPS)
    env.where, env.episode = where, 0
    before = state_of(model)
    message = refusal(lambda: model.learn(ROLLOUT))
    assert name in message and "hold NaN or infinity, so BLPO stopped before any weight was changed" in message
    assert not differences(before, state_of(model))
    env.where = ""
    check_recovery(model)


@pytest.mark.parametrize("actions", ["Box", "MultiDiscrete", "MultiBinary"])
def test_nan_in_observations_whatever_the_actions(actions: str) -> None:
    env = FaultyEnv("step", np.nan)
    env.action_space = ACTION_SPACES[actions]
    assert "`observations` hold NaN or infinity" in refusal(lambda: recurrent(env=env).learn(ROLLOUT))


@pytest.mark.parametrize("goes_on", [False, True])
def test_nan_in_a_network_is_not_remembered(goes_on: bool) -> None:
    """Once the network is right again, be it within an episode, so is what it says."""
    model = recurrent(env=vec_env(SpaceEnv(episode_length=50), 2)).learn(ROLLOUT)
    right: Any = copy.deepcopy(model.get_parameters())
    lstm: Any = model.policy.lstm_critic
    with th.no_grad():
        lstm.weight_hh_l0.fill_(np.nan)
    assert "`advantages` hold NaN or infinity" in refusal(lambda: model.learn(ROLLOUT, reset_num_timesteps=False))
    model.set_parameters(right)
    check_recovery(model, reset_num_timesteps=not goes_on)


@pytest.mark.parametrize("rate", ["learning_rate", "critic_learning_rate"])
def test_overflow_in_an_update_leaves_no_trace(rate: str) -> None:
    model = recurrent()
    before = state_of(model)
    setattr(model, rate, 1e39)
    assert "is not finite in update 1, after 16 timesteps; networks and optimizers" in refusal(lambda: model.learn(ROLLOUT))
    assert not differences(before, state_of(model))


class Strike:
    """
    Counts a network's calls, and strikes at one of them.

    :param model: Which model's
    :param network: Its name in the policy
    :param call: Which call, from 1; 0: none
    :param error: What is raised; ``None``: the network says NaN
    """

    def __init__(self, model: Any, network: str, call: int, error: type[BaseException] | None = None) -> None:
        self.call, self.error, self.calls = call, error, 0
        model.policy.get_submodule(network).register_forward_hook(self.count)

    def count(self, _: nn.Module, inputs: Any, output: Any) -> Any:
        self.calls += 1
        if self.calls != self.call:
            return output
        if self.error is not None:
            raise self.error("a nut came loose")
        return output[0] * np.nan, output[1]


@pytest.mark.parametrize("network", ["lstm_actor", "lstm_critic"])
def test_an_update_that_fails_leaves_no_trace(network: str) -> None:
    """Whatever hits it and where: all is as before, and the same update made again is what it would have been."""

    def learned() -> RecurrentBLPO:
        networks = NETWORKS["dropout"] | {"lstm_hidden_size": 4}
        return collect_rollout(recurrent(networks=networks, n_epochs=2).learn(ROLLOUT))

    reference = learned()
    strike = Strike(reference, network, 0)
    reference.train()
    hits = np.linspace(2, strike.calls, 3, dtype=int)
    for call, error in zip(hits, [None, KeyboardInterrupt, None], strict=True):
        model = learned()
        before, generator = state_of(model), th.get_rng_state()
        Strike(model, network, call, error)
        with pytest.raises(ValueError if error is None else error, match=r"a nut came|is not finite in update 3"):
            model.train()
        assert not differences(before, state_of(model))
        th.set_rng_state(generator)
        model.train()
        assert not differences(state_of(reference), state_of(model))


# Wrong arguments, and the relatives


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("n_steps", 0, "`n_steps` must be an integer of at least 1, got 0"),
        ("batch_size", None, "`batch_size` must be an integer of at least 1, got None"),
        ("n_epochs", 0, "`n_epochs` must be an integer of at least 1, got 0"),
        ("clip_range_vf", 0.2, "`clip_range_vf` must be None"),
        ("ent_coef", -0.1, "`ent_coef` must be a finite number >= 0 or a schedule"),
        ("critic_learning_rate", "1e-3", "`critic_learning_rate` must be a finite number >= 0 or a schedule"),
        ("ihvp_solver", "newton", "`ihvp_solver` must be one of 'nystrom', "),
        ("ihvp_kwargs", {"ranks": 5}, "`ihvp_kwargs` takes "),
        ("curvature", "fisher", "`curvature` must be one of 'gauss_newton', 'hessian'"),
    ],
)
def test_wrong_arguments(name: str, value: Any, message: str, tmp_path: Path) -> None:
    """In the constructor, when a model is loaded, and when set between two updates."""
    model = recurrent()
    model.save(tmp_path / "model")
    collect_rollout(model)
    before = state_of(model)
    assert message in refusal(lambda: recurrent(**{name: value}))
    assert message in refusal(lambda: RecurrentBLPO.load(tmp_path / "model", device="cpu", **{name: value}))
    setattr(model, name, value)
    assert message in refusal(model.train)
    assert not differences(before, state_of(model))


def test_what_else_is_refused() -> None:
    assert "`normalize_advantage`=True takes more than one transition" in refusal(
        lambda: recurrent(env=SpaceEnv(), n_steps=1, batch_size=1)
    )
    assert "`engine`='numba' cannot train this model" in refusal(lambda: recurrent(engine="numba").learn(ROLLOUT))
    assert "holds 0 of 8 steps: `learn` collects a rollout" in refusal(recurrent().train)


def test_each_class_refuses_the_policies_of_the_other() -> None:
    for policy in ("MlpLstmPolicy", "CnnLstmPolicy", "MultiInputLstmPolicy", *RecurrentPPO.policy_aliases.values()):
        assert "has memory: use `RecurrentBLPO`" in refusal(functools.partial(small, policy))
    for aliases in (BLPO.policy_aliases, MaskablePPO.policy_aliases):
        plain: Any
        for plain in aliases.values():
            message = refusal(functools.partial(RecurrentBLPO, plain, SpaceEnv()))
            assert "has no memory: RecurrentBLPO takes MlpLstmPolicy, CnnLstmPolicy, MultiInputLstmPolicy or" in message
    with pytest.raises(ValueError, match="Policy MlpPolicy unknown"):
        recurrent("MlpPolicy")


def test_each_class_refuses_what_another_has_saved(tmp_path: Path) -> None:
    recurrent().save(tmp_path / "recurrent")
    small(engine="torch").save(tmp_path / "plain")
    RecurrentPPO("MlpLstmPolicy", SpaceEnv(), **SMALL).save(tmp_path / "ppo")
    assert "use `RecurrentBLPO`" in refusal(lambda: BLPO.load(tmp_path / "recurrent", device="cpu"))
    assert "has no memory" in refusal(lambda: RecurrentBLPO.load(tmp_path / "plain", device="cpu"))
    assert "not saved by BLPO" in refusal(lambda: RecurrentBLPO.load(tmp_path / "ppo", device="cpu"))
    recurrent().learn(ROLLOUT, ResumableCheckpoint(tmp_path / "checkpoint"))
    assert "RecurrentBLPO" in refusal(lambda: resume(tmp_path / "checkpoint", device="cpu"))


@pytest.mark.parametrize("what", ["Box", "image"])
def test_weights_of_recurrent_ppo_can_be_taken_over(what: str) -> None:
    """As the message above says."""
    policy, space = SEES[what]
    arguments: dict[str, Any] = SMALL | {"seed": 5, "policy_kwargs": sees(what).policy_kwargs}
    ppo = RecurrentPPO(policy, SpaceEnv(space), **arguments)
    model = sees(what)
    model.set_parameters({"policy": ppo.policy.state_dict()}, exact_match=False)  # type: ignore[dict-item]
    for theirs, ours in zip(episode(ppo), episode(model), strict=True):  # type: ignore[arg-type]
        np.testing.assert_array_equal(theirs, ours)
    assert changed(model, lambda: model.learn(ROLLOUT)) == names_of(model)


def parameters(cls: Any) -> list[tuple[str, Any]]:
    return [(name, parameter.default) for name, parameter in inspect.signature(cls).parameters.items()]


def test_signature_begins_with_that_of_recurrent_ppo() -> None:
    of_ppo, of_blpo = parameters(RecurrentPPO), parameters(BLPO)
    assert parameters(RecurrentBLPO)[: len(of_ppo)] == of_ppo
    own = [parameter for parameter in of_blpo if parameter[0] not in dict(of_ppo) and "buffer" not in parameter[0]]
    assert parameters(RecurrentBLPO)[len(of_ppo) :] == own
    learn = dict(parameters(RecurrentPPO.learn)) | {"tb_log_name": "RecurrentBLPO"}
    assert parameters(RecurrentBLPO.learn) == [*learn.items()]


def test_docstring_has_each_parameter() -> None:
    documented = re.findall(r"^ *:param (\w+):", RecurrentBLPO.__doc__ or "", re.MULTILINE)
    assert documented == [name for name, _ in parameters(RecurrentBLPO)]


@pytest.mark.parametrize("solver", ["nystrom", "none"])
def test_logs_what_blpo_logs(solver: str) -> None:
    env = SpaceEnv(action_space=TORQUES)
    of_blpo = logged(small(env=env, engine="torch", ihvp_solver=solver).learn(16))
    values = logged(recurrent(env=env, ihvp_solver=solver).learn(N_STEPS))
    assert values.keys() == of_blpo.keys() and len(values) > 10
    assert np.isfinite([*values.values()]).all()


def test_arguments_arrive_as_those_of_recurrent_ppo_and_blpo() -> None:
    of_ppo: dict[str, Any] = {
        "learning_rate": 1e-3, "n_steps": 12, "batch_size": 6, "n_epochs": 2, "gamma": 0.9, "gae_lambda": 0.8,
        "clip_range": 0.3, "clip_range_vf": None, "normalize_advantage": False, "ent_coef": 0.01, "vf_coef": 0.5,
        "max_grad_norm": 0.4, "use_sde": True, "sde_sample_freq": 3, "target_kl": 0.7, "stats_window_size": 5,
        "tensorboard_log": None, "policy_kwargs": {"lstm_hidden_size": 4}, "verbose": 0, "seed": 3,
    }  # fmt: skip
    own: dict[str, Any] = {
        "critic_learning_rate": 3e-3, "n_critic_updates": 2, "critic_rollouts": 5, "ihvp_solver": "cg",
        "ihvp_kwargs": {"damping": 0.1}, "ihvp_interval": 1, "curvature": "hessian", "max_correction_ratio": 0.5,
        "engine": "torch",
    }  # fmt: skip

    def env() -> Any:
        return SpaceEnv(action_space=TORQUES)

    ppo: Any = RecurrentPPO("MlpLstmPolicy", env(), **of_ppo, device="cpu")
    by_position: list[Any] = ["MlpLstmPolicy", env(), *of_ppo.values(), "cpu", True, *own.values()]
    for model in (RecurrentBLPO("MlpLstmPolicy", env(), **of_ppo, device="cpu", **own), RecurrentBLPO(*by_position)):
        for name in of_ppo.keys() - {"clip_range", "stats_window_size"}:
            assert getattr(model, name) == getattr(ppo, name), name
        assert {name: getattr(model, name) for name in own} == own
        assert model.clip_range(1) == 0.3 and model._stats_window_size == 5
        model.learn(12)


def test_vf_coef_has_no_effect_and_says_so() -> None:
    model = recurrent().learn(ROLLOUT)
    with pytest.warns(UserWarning, match=r"`vf_coef`=0.1 has no effect"):
        other = recurrent(vf_coef=0.1)
    assert not differences(state_of(model), state_of(other.learn(ROLLOUT)))


@pytest.mark.filterwarnings("error::UserWarning")
def test_no_warning_where_there_is_nothing_to_say() -> None:
    recurrent().learn(ROLLOUT)
