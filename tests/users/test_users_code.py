"""What users' own code relies on: callbacks, extractors, curricula and self-play, taken as SB3's PPO takes them."""

import copy
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from envs import BOX, DICT, IMAGE, TORQUES, SpaceEnv, vec_env
from gymnasium import spaces
from models import AtRolloutStart, actor_of, changed, critic_of, differences, logged, moved, small, state_of
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.envs import IdentityEnv
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

from sb3_blpo import BLPO
from sb3_blpo.resume import ResumableCheckpoint, resume


class Callback(BaseCallback):
    """Calls one function at each step and another at the end of each rollout."""

    def __init__(self, at_step: Callable[[Any], Any] = id, at_end: Callable[[Any], Any] = id) -> None:
        super().__init__()
        self.at_step, self.at_end = at_step, at_end

    def _on_step(self) -> bool:
        self.at_step(self)
        return True

    def _on_rollout_end(self) -> None:
        self.at_end(self)


# What the rollout buffer says counts


def pay_at_step(callback: Any) -> None:
    callback.locals["rewards"][:] = callback.locals["actions"] == 2


def pay_at_end(callback: Any) -> None:
    buffer = callback.model.rollout_buffer
    buffer.rewards[:] = 0  # nobody reads them any more
    buffer.advantages[:] = buffer.returns[:] = buffer.actions[..., 0] == 2


class PayingBuffer(RolloutBuffer):
    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        self.rewards[:] = self.actions[..., 0] == 2
        super().compute_returns_and_advantage(last_values, dones)


@pytest.mark.parametrize("way", ["reward of the step", "advantages and returns", "buffer"])
def test_a_bonus_of_the_users_is_what_is_learned(way: str) -> None:
    callback = {"reward of the step": Callback(pay_at_step), "advantages and returns": Callback(at_end=pay_at_end)}.get(way)
    buffer = PayingBuffer if way == "buffer" else None
    model = small(env=IdentityEnv(3), n_steps=128, gamma=0.0, n_epochs=8, learning_rate=1e-2, rollout_buffer_class=buffer)
    model.learn(1280, callback)
    assert (model.predict(np.arange(3), deterministic=True)[0] == 2).all()


def test_advantages_are_the_actors_and_returns_the_critics() -> None:
    def advantages(callback: Any) -> None:
        callback.model.rollout_buffer.advantages[:] = 0

    def returns(callback: Any) -> None:
        callback.model.rollout_buffer.returns[:] = callback.model.rollout_buffer.values

    model = small(critic_learning_rate=0.0, normalize_advantage=False)
    actor = actor_of(model)
    model.learn(32, Callback(at_end=advantages))
    assert not moved(actor, actor_of(model))
    # One step on all values as they are: nothing to learn, up to rounding
    model = small(batch_size=16, n_critic_updates=1, policy_kwargs={"net_arch": [8], "optimizer_class": th.optim.SGD})
    critic = critic_of(model)
    model.learn(16, Callback(at_end=returns))
    th.testing.assert_close(critic_of(model), critic, rtol=0, atol=1e-6)


@pytest.mark.parametrize("space", [BOX, DICT], ids=["Box", "Dict"])
def test_a_buffer_that_was_read_with_get(space: spaces.Space) -> None:
    """Which flattens its arrays, environments first."""
    policy = "MultiInputPolicy" if space is DICT else "MlpPolicy"
    read = Callback(at_end=lambda callback: [*callback.model.rollout_buffer.get(5)])
    first, second = (
        state_of(small(policy, vec_env(SpaceEnv(space, TORQUES), 2)).learn(64, callback)) for callback in (None, read)
    )
    assert not differences(first, second)


# What callbacks and threads see is real


@pytest.mark.parametrize("actions", [spaces.Discrete(3), TORQUES], ids=["Discrete", "Box"])
def test_numbers_at_every_step(actions: spaces.Space) -> None:
    seen = []

    @th.no_grad()
    def look(callback: Any) -> None:
        policy, given = callback.model.policy, callback.locals
        observations = given["obs_tensor"]
        _, values, _ = policy(observations)
        _, log_prob, _ = policy.evaluate_actions(observations, th.as_tensor(given["actions"]))
        assert th.equal(values, given["values"])
        th.testing.assert_close(values, policy.predict_values(observations))
        th.testing.assert_close(log_prob, given["log_probs"])
        seen.append(given["values"].mean().item())
        copy.deepcopy(policy)

    small(env=vec_env(SpaceEnv(action_space=actions), 2)).learn(64, Callback(look, look_at_end))
    assert len(set(seen)) == 32 and np.isfinite(seen).all()


def look_at_end(callback: Any) -> None:
    """The buffer holds what the policy says, and the model can be copied and trained apart."""
    model, buffer = callback.model, callback.model.rollout_buffer
    values = model.policy.predict_values(th.as_tensor(buffer.observations).flatten(0, 1)).flatten()
    np.testing.assert_allclose(values.detach(), buffer.values.flatten(), rtol=1e-5, atol=1e-6)
    before = state_of(model)
    copy.deepcopy(model).train()
    assert not differences(before, state_of(model))


@pytest.mark.parametrize("activation", [nn.Tanh, nn.PReLU])
def test_values_from_another_thread(activation: type[nn.Module]) -> None:
    """While training looks into the critic's layers, and changes nothing by looking."""
    arguments: dict[str, Any] = dict(n_steps=64, n_epochs=4, ihvp_interval=1)
    arguments["policy_kwargs"] = {"net_arch": [8], "activation_fn": activation}
    alone = small(**arguments).learn(128)
    model = small(**arguments)
    values: list[float] = []
    problems: list[Exception] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            try:
                with th.no_grad():
                    values.append(model.policy.predict_values(th.ones(2, 3)).mean().item())
            except Exception as error:
                problems.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        model.learn(128)
    finally:
        done.set()
        thread.join()
    assert not problems and np.isfinite(values).all() and len(set(values)) > 1
    assert not differences(state_of(alone), state_of(model))


# Extractors may be rude


def leaves(observations: Any) -> list[Any]:
    return [*observations.values()] if isinstance(observations, dict) else [observations]


class InPlace(BaseFeaturesExtractor):
    """Halves its input in place, and keeps what it was in training."""

    def __init__(self, space: Any, seen: list[Any]) -> None:
        super().__init__(space, sum(int(np.prod(part.shape)) for part in leaves(getattr(space, "spaces", space))))
        self.seen = seen

    def forward(self, observations: Any) -> th.Tensor:
        if self.training:
            self.seen.extend(th.cat([part.flatten(1) for part in leaves(observations)], dim=1).tolist())
        for part in leaves(observations):
            part.div_(2)
        return th.cat([part.flatten(1) for part in leaves(observations)], dim=1)


@pytest.mark.parametrize(
    "space",
    [BOX, spaces.Box(-1, 1, (3,), np.float64), spaces.Dict(x=BOX, y=spaces.Box(-1, 1, (2,), np.float64)), IMAGE],
    ids=["float32", "float64", "Dict", "image"],
)
def test_extractors_that_change_their_input(space: spaces.Space) -> None:
    seen: list[Any] = []
    kept: list[Any] = []
    policy_kwargs = {"features_extractor_class": InPlace, "features_extractor_kwargs": {"seen": seen}, "net_arch": [4]}
    policy_kwargs |= {"normalize_images": False} if space is IMAGE else {}
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
    model = small(policy, SpaceEnv(space), n_epochs=3, critic_rollouts=1, policy_kwargs=policy_kwargs)
    keep = Callback(at_end=lambda callback: kept.extend(copy.deepcopy(leaves(callback.model.rollout_buffer.observations))))
    model.learn(16, keep)
    for before, after in zip(kept, leaves(model.rollout_buffer.observations), strict=True):
        np.testing.assert_array_equal(before, after)
    # Every row that training saw is a row of the buffer, untouched by the minibatches before
    rows = np.concatenate([part.reshape(16, -1) for part in kept], axis=1).astype(np.float32)
    assert len(seen) > 100
    assert {tuple(row) for row in np.asarray(seen, np.float32).tolist()} == {tuple(row) for row in rows.tolist()}


class Counting(BaseFeaturesExtractor):
    """Keeps count in every mode."""

    def __init__(self, space: Any) -> None:
        super().__init__(space, 3)
        self.count: th.Tensor
        self.register_buffer("count", th.zeros(()))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        self.count += len(observations)
        return observations


def test_making_a_model_leaves_an_extractors_state() -> None:
    model = small(policy_kwargs={"features_extractor_class": Counting})
    extractor: Any = model.policy.features_extractor
    assert extractor.count == 0
    model.learn(16)
    assert extractor.count > 16


# Attributes change between updates

CHANGES: dict[str, Any] = {
    "learning_rate": 0.05, "critic_learning_rate": 0.05, "batch_size": 4, "n_epochs": 3, "clip_range": 0.001,
    "normalize_advantage": False, "ent_coef": 0.5, "max_grad_norm": 0.01, "target_kl": 1e-9, "n_critic_updates": 1,
    "critic_rollouts": 2, "ihvp_solver": "none", "ihvp_kwargs": {"damping": 10.0}, "ihvp_interval": 1,
    "curvature": "hessian", "max_correction_ratio": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_takes_effect_as_if_loaded_with_it(name: str) -> None:
    value = CHANGES[name]
    model = small(n_epochs=2, critic_rollouts=1, learning_rate=1e-2, max_correction_ratio=None).learn(16)
    model.save(file := io.BytesIO())

    def run(assigned: dict[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
        env = copy.deepcopy(model.get_env())
        other = BLPO.load(file, env, device="cpu", force_reset=False, **loaded)
        for attribute, new in assigned.items():
            setattr(other, attribute, new)
        other.set_random_seed(1)
        return state_of(other.learn(32, reset_num_timesteps=False))

    with_it = run({name: value}, {})
    assert differences(with_it, run({}, {}))
    assert not differences(with_it, run({}, {name: value}))


@pytest.mark.parametrize("name", ["learning_rate", "batch_size", "target_kl", "ihvp_kwargs", "curvature"])
def test_a_change_for_the_worse_is_refused(name: str) -> None:
    model = small().learn(16)
    before = state_of(model)
    setattr(model, name, "wrong")
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got .*wrong"):
        model.learn(16)
    assert not differences(before, state_of(model))


@pytest.mark.parametrize(
    ("name", "value", "of_buffer"), [("n_steps", 8, "buffer_size"), ("gamma", 0.5, "gamma"), ("gae_lambda", 0.5, "gae_lambda")]
)
def test_what_the_buffer_was_made_for(name: str, value: Any, of_buffer: str) -> None:
    """No row is trained on that was not collected."""
    model = small().learn(16)
    setattr(model, name, value)
    before = state_of(model)
    with pytest.raises(
        ValueError, match=rf"^`{name}` is {value}, but .* load the model with `load\(..., {name}={value}\)`\.$"
    ):
        model.learn(16)
    assert not differences(before, state_of(model))
    setattr(model.rollout_buffer, of_buffer, value)
    assert moved(actor_of(model), actor_of(model.learn(16)))


def test_a_rollout_that_ends_early_is_not_trained_on() -> None:
    model = small().learn(16)
    before = state_of(model)
    model.learn(16, lambda *_: False)
    with pytest.raises(ValueError, match="The rollout buffer holds 0 of 16 steps"):
        model.train()
    assert not differences(before, state_of(model))


def test_a_schedule_of_the_users() -> None:
    """Those that replace SB3's schedules, or plain numbers."""
    model = small().learn(16)
    model.lr_schedule, model.clip_range = (lambda progress: 0.5), 0.25
    model.learn(16)
    assert logged(model)["learning_rate"] == 0.5 and logged(model)["clip_range"] == 0.25


@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_a_schedule_of_the_entropy_coefficient(engine: str, tmp_path: Path) -> None:
    """It stays what the user gave, does what assigning its values would do, and is there in a model that is loaded."""
    seen: list[float] = []

    def look(model: BLPO) -> None:
        seen.extend([logged(model)["ent_coef"]] if model.num_timesteps else [])

    schedule = LinearSchedule(0.4, 0.0, 1.0)
    model = small(ent_coef=schedule, engine=engine).learn(64, AtRolloutStart(look))
    assert seen == pytest.approx([0.3, 0.2, 0.1]) and logged(model)["ent_coef"] == 0
    ent_coef: Any = model.ent_coef
    assert ent_coef is schedule

    coefficients = iter([*seen, 0.0])
    by_hand = small(engine=engine)
    by_hand.learn(64, AtRolloutStart(lambda model: setattr(model, "ent_coef", next(coefficients))))
    assert not differences(state_of(model), state_of(by_hand))
    assert differences(state_of(model), state_of(small(engine=engine).learn(64)))

    model.save(tmp_path / "model")
    loaded: Any = BLPO.load(tmp_path / "model", SpaceEnv(), device="cpu")
    assert [loaded.ent_coef(progress) for progress in (1, 0.5, 0)] == [0.4, 0.2, 0]
    loaded.learn(32, AtRolloutStart(look))
    assert seen[3:] == [0.2] and logged(loaded)["ent_coef"] == 0
    loaded.ent_coef = 0.5
    assert logged(loaded.learn(16))["ent_coef"] == loaded.ent_coef == 0.5


# Errors are BLPO's, not torch's


class Features(BaseFeaturesExtractor):
    def __init__(self, space: Any, lazy: bool = False) -> None:
        super().__init__(space, 5)
        self.net = nn.LazyLinear(5) if lazy else nn.Linear(3, 5)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.tanh(self.net(observations))


def test_a_lazy_layer() -> None:
    arguments = {"features_extractor_class": Features, "features_extractor_kwargs": {"lazy": True}, "ortho_init": False}
    with pytest.raises(ValueError, match=r"`features_extractor.net.weight` .* lazy layer\): run a dummy batch .*\.$"):
        small(policy_kwargs=arguments)


def own_method(name: str) -> type[ActorCriticPolicy]:
    """A policy with a method that expects one features tensor, as where actor and critic share the extractor."""

    class Own(ActorCriticPolicy):
        def _both(self, obs: Any) -> Any:
            return self.mlp_extractor(self.extract_features(obs))

    def forward(self: Any, obs: Any, deterministic: bool = False) -> Any:
        latent_pi, latent_vf = self._both(obs)
        distribution = self._get_action_dist_from_latent(latent_pi)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, self.value_net(latent_vf), distribution.log_prob(actions)

    def evaluate_actions(self: Any, obs: Any, actions: th.Tensor) -> Any:
        latent_pi, latent_vf = self._both(obs)
        distribution = self._get_action_dist_from_latent(latent_pi)
        return self.value_net(latent_vf), distribution.log_prob(actions), distribution.entropy()

    methods: dict[str, Any] = {
        "forward": forward,
        "evaluate_actions": evaluate_actions,
        "get_distribution": lambda self, obs: self._get_action_dist_from_latent(self._both(obs)[0]),
        "predict_values": lambda self, obs: self.value_net(self._both(obs)[1]),
    }
    setattr(Own, name, methods[name])
    return Own


@pytest.mark.parametrize("name", ["forward", "evaluate_actions", "get_distribution", "predict_values"])
def test_a_method_that_expects_one_features_tensor(name: str) -> None:
    with pytest.raises(ValueError, match=r"^Own failed .*critic has a features extractor of its own: .*pi_features, vf_"):
        small(own_method(name), policy_kwargs={"features_extractor_class": Features})

    # As the message says
    class Mended(own_method(name)):  # type: ignore[misc]
        def _both(self, obs: Any) -> Any:
            pi_features, vf_features = self.extract_features(obs)
            return self.mlp_extractor.forward_actor(pi_features), self.mlp_extractor.forward_critic(vf_features)

    small(Mended, policy_kwargs={"features_extractor_class": Features}).learn(16)
    # Where the extractor has no parameters it is shared, and there is nothing to mind
    model = small(own_method(name))
    assert changed(model, lambda: model.learn(16)) == {name for name, _ in model.policy.named_parameters()}


@pytest.mark.parametrize("actions", [spaces.Discrete(3), TORQUES], ids=["Discrete", "Box"])
def test_infinite_observations(actions: spaces.Space) -> None:
    class Infinite(SpaceEnv):
        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            observation, *rest = super().step(action)
            return np.where(self.t == 3, np.inf, observation).astype(np.float32), *rest  # type: ignore[return-value]

    model = small(env=Infinite(action_space=actions))
    before = state_of(model)
    with pytest.raises(ValueError, match="The rollout's `observations` hold NaN or infinity"):
        model.learn(16)
    assert not differences(before, state_of(model))


# Self-play


class SelfPlay(SpaceEnv):
    """The reward depends on what the current policy would do."""

    player: Any = None

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, _, *rest = super().step(action)
        player = getattr(self.player, "policy", self.player)
        with th.no_grad():
            value = player.predict_values(th.as_tensor(observation[None])).item()
        return observation, value + float(action), *rest


@pytest.mark.parametrize("what", ["model", "policy"])
def test_an_environment_that_holds_the_model(what: str, tmp_path: Any) -> None:
    """Resumed, it plays against the resumed model, not against a copy that stays behind."""

    def made() -> BLPO:
        model = small(env=vec_env(SelfPlay(), 2), learning_rate=1e-2)
        assert model.env is not None
        model.env.set_attr("player", model if what == "model" else model.policy)
        return model

    whole = made().learn(128, ResumableCheckpoint(tmp_path / "whole"))
    made().learn(64, ResumableCheckpoint(tmp_path / "part"))
    resumed = resume(tmp_path / "part", device="cpu")
    assert resumed.env is not None
    for player in resumed.env.get_attr("player"):
        assert player is (resumed if what == "model" else resumed.policy)
    resumed.learn(64, ResumableCheckpoint(tmp_path / "part"), reset_num_timesteps=False)
    assert not differences(state_of(whole), state_of(resumed))
