"""A finished rollout as tensors: what of the buffer counts, terminal observations, random minibatches."""

import copy
from typing import Any

import numpy as np
import pytest
import torch as th
from envs import ACTION_SPACES, BOX, DICT, DISCRETE, IMAGE, OBSERVATION_SPACES, SpaceEnv, vec_env
from gymnasium import spaces
from problems import random_rollout
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecNormalize

from sb3_blpo import BLPO
from sb3_blpo.rollout import Rollout, map_parts, minibatches, take


class Recorder(BaseCallback):
    """
    Keeps the rollout before it is trained on, and the terminal observations of truncated episodes.

    :param at_end: What else to do with the model then
    """

    def __init__(self, at_end: Any = lambda model: None) -> None:
        super().__init__()
        self.at_end = at_end

    def _on_rollout_start(self) -> None:
        self.terminal: list[Any] = []

    def _on_step(self) -> bool:
        self.terminal += [
            info["terminal_observation"] for info in self.locals["infos"] if info.get("TimeLimit.truncated", False)
        ]
        return True

    def _on_rollout_end(self) -> None:
        self.rollout = rollout_of(self.model)
        self.buffer = copy.deepcopy(self.model.rollout_buffer)  # type: ignore[attr-defined]
        self.at_end(self.model)


def rollout_of(model: Any) -> Rollout:
    arguments = model.rollout_buffer, model._last_obs, model._last_episode_starts, model._truncations
    return Rollout.of(*arguments, model.device)


SMALL: dict[str, Any] = dict(n_steps=10, batch_size=10, n_epochs=1, seed=0, device="cpu", policy_kwargs={"net_arch": [8]})


def make(space: Any = BOX, actions: Any = DISCRETE, normalize: bool = False, **arguments: Any) -> BLPO:
    """A model of three environments with episodes of 5 steps, cut and ended in turn, and rollouts of 10 steps."""
    policy = "MultiInputPolicy" if space is DICT else "CnnPolicy" if space is IMAGE else "MlpPolicy"
    env = vec_env(SpaceEnv(space, actions), 3)
    return BLPO(policy, VecNormalize(env) if normalize else env, **(SMALL | arguments))


@pytest.mark.parametrize("name", OBSERVATION_SPACES)
def test_observations_and_values_are_those_of_sb3(name: str) -> None:
    """In time order; behind the states what comes after the rollout, and the terminal observations. In the second rollout."""
    recorder = Recorder()
    model = make(OBSERVATION_SPACES[name], learning_rate=0.0, normalize=name == "Box").learn(60, recorder)
    assert model._last_obs is not None
    rollout, buffer = recorder.rollout, recorder.buffer
    N, E = 30, 3
    assert len(rollout) == N and 0 < len(rollout.truncated) == len(recorder.terminal) < rollout.done.sum()
    with th.no_grad():
        values = model.policy.predict_values(rollout.observations).flatten()
        last = model.policy.predict_values(model.policy.obs_to_tensor(model._last_obs)[0]).flatten()
        of_terminal = [model.policy.predict_values(model.policy.obs_to_tensor(one)[0]) for one in recorder.terminal]
    np.testing.assert_allclose(values[:N], buffer.values.flatten(), rtol=1e-5, atol=1e-6)
    th.testing.assert_close(values[N : N + E], last)
    th.testing.assert_close(values[N + E :], th.cat(of_terminal).flatten())
    assert (rollout.done.flatten()[rollout.truncated] == 1).all()
    np.testing.assert_array_equal(rollout.done[:-1], buffer.episode_starts[1:])
    assert rollout.done[-1].all()  # the fourth episode
    # Images stay as they are, and what MuJoCo gives is as networks take it
    dtypes = {"Box2D": th.float32, "image": th.uint8}
    assert name not in dtypes or getattr(rollout.observations, "dtype", None) == dtypes[name]
    for ours, of_buffer in (("advantages", "advantages"), ("returns", "returns"), ("old_log_prob", "log_probs")):
        np.testing.assert_array_equal(getattr(rollout, ours), getattr(buffer, of_buffer).flatten())


@pytest.mark.parametrize("name", ACTION_SPACES)
def test_actions_are_as_ppo_takes_them(name: str) -> None:
    recorder = Recorder()
    model = make(actions=ACTION_SPACES[name], learning_rate=0.0).learn(30, recorder)
    rollout = recorder.rollout
    with th.no_grad():
        log_prob = model.policy.evaluate_actions(rollout.states, rollout.actions)[1]
    th.testing.assert_close(log_prob, rollout.old_log_prob, rtol=1e-5, atol=1e-5)


def test_returns_that_a_callback_writes_are_the_critics_targets() -> None:
    """And advantages the actor's: test_definition.py compares with PPO."""

    def sevens(model: Any) -> None:
        model.rollout_buffer.returns[:] = 7

    model = make(n_epochs=20, critic_learning_rate=0.01).learn(30, Recorder(sevens))
    assert (model.policy.predict_values(th.rand(50, 3)) - 7).abs().max() < 1


@pytest.mark.parametrize("space", [BOX, OBSERVATION_SPACES["Discrete"], IMAGE, DICT])
def test_a_buffer_that_was_read_and_whose_arrays_go_on_living(space: spaces.Space) -> None:
    """``get()`` puts the buffer's arrays in another order, for good; what is done to them later does not reach the rollout."""
    kept: list[Rollout] = []

    def at_end(model: Any) -> None:
        for _ in model.rollout_buffer.get(5):
            pass
        kept.append(rollout_of(model))
        kept.append(copy.deepcopy(kept[0]))
        for holder in (vars(model.rollout_buffer), model.rollout_buffer.observations, model._last_obs):
            for array in holder.values() if isinstance(holder, dict) else [holder]:
                if isinstance(array, np.ndarray):
                    array.fill(0)

    recorder = Recorder(at_end)
    make(space, ihvp_solver="none").learn(30, recorder)
    assert recorder.rollout.advantages.any()
    for rollout in kept:
        for name in ("actions", "old_log_prob", "advantages", "returns", "done", "truncated"):
            assert th.equal(getattr(rollout, name), getattr(recorder.rollout, name)), name
        map_parts(
            lambda a, b: th.testing.assert_close(a, b, rtol=0, atol=0), rollout.observations, recorder.rollout.observations
        )


def test_what_a_forward_pass_does_to_its_input_reaches_nothing() -> None:
    observations = {"a": th.ones(6, 2), "b": th.ones(6)}
    for index in th.arange(6).split(4):
        map_parts(lambda part: part.mul_(0.5), take(observations, index))
    assert all(part.eq(1).all() for part in observations.values())


@pytest.mark.parametrize(("n", "batch_size"), [(12, 4), (13, 5), (3, 8), (1, 1)])
def test_minibatches_hold_each_row_once_in_a_pass(n: int, batch_size: int) -> None:
    th.manual_seed(0)
    n_minibatches = -(-n // batch_size)
    assert sorted(th.cat([*minibatches(n, batch_size)]).tolist()) == [*range(n)]
    several = [*minibatches(n, batch_size, 3 * n_minibatches)]
    assert len(several) == 3 * n_minibatches and max(map(len, several)) <= batch_size
    orders = [th.cat(several[i * n_minibatches : (i + 1) * n_minibatches]) for i in range(3)]
    assert all(sorted(order.tolist()) == [*range(n)] for order in orders)
    assert n < 12 or not (th.equal(orders[0], orders[1]) or th.equal(orders[0], th.arange(n)))


@pytest.mark.parametrize(("name", "value"), [("n_steps", 4), ("gamma", 0.5), ("gae_lambda", 0.5)])
def test_what_the_buffer_was_made_for_changes_in_both_places_or_not_at_all(name: str, value: float) -> None:
    model, recorder = make(), Recorder()
    model.learn(30, recorder)
    setattr(model, name, value)
    with pytest.raises(ValueError, match=rf"`{name}`.*load\(\.\.\., {name}={value}\)"):
        model.learn(30, reset_num_timesteps=False)
    setattr(model.rollout_buffer, "buffer_size" if name == "n_steps" else name, value)
    model.learn(30, recorder, reset_num_timesteps=False)
    assert len(recorder.rollout) == 3 * model.n_steps
    assert (recorder.rollout.gamma, recorder.rollout.gae_lambda) == (model.gamma, model.gae_lambda)


def test_the_gradient_by_values_is_that_of_automatic_differentiation() -> None:
    generator = th.Generator().manual_seed(0)
    for T, E in ((1, 2), (9, 3), (20, 1)):
        rollout = random_rollout(T, E, generator)
        values = th.randn(len(rollout.observations), generator=generator, dtype=th.float64, requires_grad=True)
        weights = th.randn(T * E, generator=generator, dtype=th.float64)
        returns = rollout.advantages_after(values) + values[: T * E]
        (expected,) = th.autograd.grad(weights @ returns, values)
        th.testing.assert_close(rollout.return_gradient(weights), expected, rtol=1e-12, atol=1e-12)
