"""Acting and differentiating the actor by hand: the same as SB3 does, faster."""

from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch as th
from envs import ACTION_SPACES, OBSERVATION_SPACES, TORQUES, SpaceEnv
from models import collect_rollout, small
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn

from sb3_blpo import BLPO
from sb3_blpo.actor_critic import likelihood
from sb3_blpo.distributions import DiagGaussian
from sb3_blpo.optimizers import parameters_of


@pytest.mark.parametrize("activation", [nn.Tanh, nn.SiLU])
@pytest.mark.parametrize("by_entropy", [True, False])
@pytest.mark.parametrize("actions", ACTION_SPACES)
def test_gradient_of_the_likelihood_is_that_of_autograd(actions: str, by_entropy: bool, activation: type[nn.Module]) -> None:
    model = collect_rollout(
        small(env=SpaceEnv(action_space=ACTION_SPACES[actions]), policy_kwargs={"net_arch": [8], "activation_fn": activation})
    )
    segment = model._segments()[0]
    assert model.actor.chain is not None
    by_hand = model.actor.likelihood(segment.states, segment.actions)
    distribution = model.policy.get_distribution(segment.states)
    parameters = parameters_of(model.policy.optimizer)
    expected = likelihood(parameters, distribution.log_prob(segment.actions), distribution.entropy())
    assert by_hand.entropy is not None and expected.entropy is not None
    th.testing.assert_close(by_hand.log_prob, expected.log_prob)
    th.testing.assert_close(by_hand.entropy, expected.entropy)
    n = segment.n_transitions
    weights = th.randn(n), th.randn(n) if by_entropy else None
    wanted = expected.gradient(*weights)
    assert len(wanted) == sum(parameter.numel() for parameter in parameters) and wanted.abs().max() > 0.1
    th.testing.assert_close(by_hand.gradient(*weights), wanted, rtol=1e-4, atol=1e-5)


class OwnForward(ActorCriticPolicy):
    """A policy that acts in its own way, which BLPO must respect."""

    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        actions, values, log_prob = super().forward(obs, deterministic)
        return actions, values + 1, log_prob


@pytest.mark.parametrize("observations", OBSERVATION_SPACES)
@pytest.mark.parametrize(
    ("actions", "use_sde"),
    [*((name, False) for name in ACTION_SPACES), *((name, True) for name in ACTION_SPACES if name.startswith("Box"))],
)
def test_acting_is_that_of_the_policy(actions: str, observations: str, use_sde: bool) -> None:
    policy = "MultiInputPolicy" if observations == "Dict" else "CnnPolicy" if observations == "image" else "MlpPolicy"

    def buffers(lean: bool) -> Any:
        env = SpaceEnv(OBSERVATION_SPACES[observations], ACTION_SPACES[actions])
        model = small(policy, env, use_sde=use_sde, n_steps=24)
        assert model.actor.acts_as_sb3
        model.actor.acts_as_sb3 = lean
        return collect_rollout(model).rollout_buffer

    lean, full = buffers(True), buffers(False)
    for name in ("actions", "log_probs", "rewards", "episode_starts"):
        np.testing.assert_array_equal(getattr(lean, name), getattr(full, name), err_msg=name)
    assert np.isfinite(full.values).all() and np.abs(full.values).max() > 0
    for name in ("values", "returns", "advantages"):
        np.testing.assert_allclose(getattr(lean, name), getattr(full, name), rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_policy_that_acts_in_its_own_way_does() -> None:
    model = collect_rollout(small(OwnForward))
    assert not model.actor.acts_as_sb3
    observations = obs_as_tensor(model.rollout_buffer.observations[:, 0], model.device)
    with th.no_grad():
        values = model.policy.predict_values(observations).flatten().numpy()
    np.testing.assert_allclose(model.rollout_buffer.values[:, 0], values + 1, rtol=1e-5, atol=1e-6)


class SeesValues(BaseCallback):
    def __init__(self) -> None:
        super().__init__()
        self.values: list[np.ndarray] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        assert isinstance(self.model, BLPO)
        self.values.append(self.model.rollout_buffer.values.copy())


def test_values_are_there_when_the_rollout_ends_and_nothing_is_left_behind() -> None:
    callback = SeesValues()
    model = small().learn(32, callback=callback)
    assert len(callback.values) == 2 and all(np.isfinite(values).all() for values in callback.values)
    assert "forward" not in vars(model.policy)
    assert "compute_returns_and_advantage" not in vars(model.rollout_buffer)


@pytest.mark.parametrize(("space", "rows"), [(OBSERVATION_SPACES["Box"], 64), (OBSERVATION_SPACES["image"], 8)])
def test_values_of_images_take_no_more_memory_than_a_minibatch(space: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("CnnPolicy" if space == OBSERVATION_SPACES["image"] else "MlpPolicy", SpaceEnv(space), n_steps=64)
    values = Mock(wraps=model.critic.values)
    monkeypatch.setattr(model.critic, "values", values)
    collect_rollout(model)
    assert [len(call.args[0]) for call in values.call_args_list] == [rows] * (64 // rows)


@pytest.mark.parametrize(
    ("log_prob", "finite"), [([-3e38, -3e38], True), ([0.0, float("-inf")], False), ([1.0, float("nan")], False)]
)
def test_log_probabilities_that_are_not_finite(log_prob: list[float], finite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all of them: finite ones are, even if their sum is not."""
    model = small(env=SpaceEnv(action_space=TORQUES))
    monkeypatch.setattr(DiagGaussian, "log_prob", lambda self, actions: th.tensor(log_prob))
    observations = th.zeros(2, 3)
    if finite:
        assert model.actor.act(observations)[2].tolist() == pytest.approx(log_prob)
    else:
        with pytest.raises(ValueError, match="log_probs"):
            model.actor.act(observations)
