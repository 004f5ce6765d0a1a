"""Minibatches: what they hold, and that their advantages are SB3's."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from brute_force import discounted_sums, lambda_returns
from envs import ACTION_SPACES, IMAGE, SpaceEnv, vec_env
from gymnasium import spaces
from models import OwnRollouts, collect_rollout, differences, small, state_of
from problems import random_segment
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_blpo import BLPO
from sb3_blpo.segments import Segment


class EndingEnv(gym.Env):
    """Random observations; episodes end after 2 to 7 steps, terminated or truncated in turn."""

    action_space = spaces.Discrete(2)

    def __init__(self, dict_observations: bool = False):
        box = spaces.Box(-1, 1, (3,))
        self.observation_space = spaces.Dict({"a": box, "b": box}) if dict_observations else box
        self.episodes = 0

    def observation(self):
        if isinstance(self.observation_space, spaces.Dict):
            return {key: self.np_random.uniform(-1, 1, 3).astype(np.float32) for key in self.observation_space}
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episodes += 1
        self.left = int(self.np_random.integers(2, 8))
        return self.observation(), {}

    def step(self, action):
        self.left -= 1
        over = self.left == 0
        reward = float(self.np_random.normal() + action)
        return self.observation(), reward, over and self.episodes % 2 == 0, over and self.episodes % 2 == 1, {}


def collect(n_steps: int, n_envs: int, dict_observations=False, normalize=False, **kwargs) -> BLPO:
    """A model that has collected its second rollout and not trained on it."""
    env = make_vec_env(EndingEnv, n_envs, seed=1, env_kwargs={"dict_observations": dict_observations})
    if normalize:
        env = VecNormalize(env, gamma=0.97)
    policy = "MultiInputPolicy" if dict_observations else "MlpPolicy"
    arguments = {"gamma": 0.97, "gae_lambda": 0.9, "seed": 3, "batch_size": n_steps * n_envs} | kwargs
    model = BLPO(policy, env, n_steps=n_steps, **arguments)
    return collect_rollout(collect_rollout(model))


def rows(segment: Segment, key: str | None = None) -> th.Tensor:
    observations = segment.observations if key is None else segment.observations[key]  # type: ignore[index]
    assert isinstance(observations, th.Tensor)
    return observations


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dict_observations", [False, True])
@pytest.mark.parametrize(
    ("n_steps", "n_envs", "batch_size"),
    [(32, 1, 32), (32, 3, 8), (32, 3, 7), (32, 3, 1), (32, 3, 64), (32, 5, 70), (32, 3, 1000), (1, 4, 1), (1, 4, 2)],
)
def test_advantages_under_the_rollouts_critic_are_those_of_sb3(n_steps, n_envs, batch_size, dict_observations, normalize):
    """However the rollout is cut: a segment's end inside it truncates no lambda-return."""
    model = collect(n_steps, n_envs, dict_observations, normalize, batch_size=batch_size)
    buffer = model.rollout_buffer
    found = []
    for segment in model._segments():
        with th.no_grad():
            values = model.critic(segment.observations)
        advantages = segment.advantages(values)
        th.testing.assert_close(segment.returns, advantages + values[: len(advantages)], rtol=1e-4, atol=1e-5)
        found.append(th.stack([segment.old_log_prob, segment.returns, advantages], dim=1))
    actual = th.cat(found).numpy()
    expected = np.stack([buffer.log_probs.ravel(), buffer.returns.ravel(), buffer.advantages.ravel()], axis=1)
    order = np.lexsort(actual.T[:2]), np.lexsort(expected.T[:2])
    # Every transition is there exactly once, with its advantage
    np.testing.assert_allclose(actual[order[0]], expected[order[1]], rtol=1e-4, atol=1e-5)
    if n_steps == 32:
        truncated = sum(len(segment.truncated) for segment in model._segments())
        assert 0 < truncated < sum(int(segment.lambda_return.done.sum()) for segment in model._segments())


@pytest.mark.parametrize("dict_observations", [False, True])
@pytest.mark.parametrize(
    ("batch_size", "blocks"), [(8, [(8, 1)] * 12), (7, [(7, 1)] * 4 + [(4, 1)]), (64, [(32, 2), (32, 1)])]
)
def test_blocks_keep_time_order_and_bootstrap_from_what_follows(batch_size, blocks, dict_observations):
    model = collect(32, 3, dict_observations, batch_size=batch_size)
    buffer, segments = model.rollout_buffer, model._segments()
    key = "a" if dict_observations else None
    observations = buffer.observations["a"] if dict_observations else buffer.observations
    last = model._last_obs["a"] if dict_observations else model._last_obs
    assert [tuple(s.shape) for s in segments[: len(blocks)]] == blocks
    first_step, first_env = 0, 0
    for segment in segments:
        T, B = segment.shape
        envs = slice(first_env, first_env + B)
        np.testing.assert_array_equal(
            rows(segment, key)[: T * B], observations[first_step : first_step + T, envs].reshape(T * B, 3)
        )
        np.testing.assert_array_equal(segment.actions, buffer.actions[first_step : first_step + T, envs].ravel())
        following = observations[first_step + T, envs] if first_step + T < 32 else last[envs]
        np.testing.assert_array_equal(rows(segment, key)[T * B : T * B + B], following)
        done = np.append(buffer.episode_starts[1:], model._last_episode_starts[None], axis=0)
        np.testing.assert_array_equal(segment.lambda_return.done, done[first_step : first_step + T, envs])
        if first_step + T < 32:
            np.testing.assert_array_equal(segment.lambda_return.last_returns, buffer.returns[first_step + T, envs])
        else:
            assert segment.lambda_return.last_returns is None
        first_step = (first_step + T) % 32
        first_env += B if first_step == 0 else 0


def test_rewards_lose_the_bootstrap_of_the_rollouts_critic():
    """SB3 adds gamma V(terminal observation) to a truncated step's reward; BLPO's critic moves on, so it comes off again."""
    true_rewards = []

    class Recorder(EndingEnv):
        def step(self, action):
            result = super().step(action)
            true_rewards.append(result[1])
            return result

    model = BLPO("MlpPolicy", DummyVecEnv([Recorder]), n_steps=64, batch_size=64, seed=0, n_epochs=1)
    # A critic that is far from 0, so that the bootstrap is no small number
    with th.no_grad():
        model.policy.value_net.bias.fill_(50.0)
    collect_rollout(model)
    (segment,) = model._segments()
    assert len(segment.truncated) > 2
    np.testing.assert_allclose(segment.lambda_return.rewards[:, 0], true_rewards, atol=1e-4)
    assert np.abs(model.rollout_buffer.rewards[:, 0] - true_rewards).max() > 40


def test_segments_of_a_second_rollout_forget_the_first():
    model = collect(16, 2)
    assert all(truncation.step < 16 for truncation in model._truncations)
    starts = model.rollout_buffer.episode_starts
    ended = np.append(starts[1:], model._last_episode_starts[None], axis=0)
    assert all(ended[truncation.step, truncation.env] for truncation in model._truncations)


def test_a_subclass_that_collects_rollouts_in_its_own_way():
    """Truncated episodes of earlier rollouts must not take anything from the rewards."""

    class One(EndingEnv):
        def step(self, action):
            observation, _, *end = super().step(action)
            return observation, 1.0, *end

    model = OwnRollouts("MlpPolicy", DummyVecEnv([One]), n_steps=64, batch_size=64, seed=0, n_epochs=1)
    with th.no_grad():
        model.policy.value_net.bias.fill_(50.0)
    for _ in range(3):
        collect_rollout(model)
        (segment,) = model._segments()
        assert len(segment.truncated) > 2
        np.testing.assert_allclose(segment.lambda_return.rewards, 1, atol=1e-4)


@pytest.mark.parametrize("lean", [True, False])
def test_a_reset_at_the_end_of_the_rollout(lean):
    """Which a curriculum may want for the next rollout: the finished one goes on as it did."""

    class Reset(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            self.model._last_obs = self.training_env.reset()
            self.model._last_episode_starts = np.ones(1, dtype=bool)

    states = []
    for callback in (Reset(), None):
        model = small(env=SpaceEnv(episode_length=100), n_steps=8, batch_size=8)
        if not lean:
            model.policy.register_forward_hook(lambda *_: None)
        states.append(state_of(model.learn(8, callback)))
    assert not differences(*states)


def test_a_buffer_of_another_size():
    model = small(env=vec_env(SpaceEnv(), 2))
    _, callback = model._setup_learn(100)
    buffer = RolloutBuffer(40, model.observation_space, model.action_space, "cpu", n_envs=2)
    assert model.collect_rollouts(model.env, callback, buffer, 40)
    with th.no_grad():
        values = model.policy.predict_values(th.as_tensor(buffer.observations[39]))
    np.testing.assert_allclose(buffer.values[39], values.flatten(), rtol=1e-5)


def test_get_is_not_called_and_the_buffer_is_left_alone():
    model = collect(16, 2)
    before = {name: value.copy() for name, value in vars(model.rollout_buffer).items() if isinstance(value, np.ndarray)}
    model.rollout_buffer.get = None
    model.train()
    for name, value in before.items():
        np.testing.assert_array_equal(value, getattr(model.rollout_buffer, name))


@pytest.mark.parametrize("inside_rollout", [True, False])
def test_what_runs_along_time_is_the_recursion(inside_rollout):
    generator = th.Generator().manual_seed(0)
    segment = random_segment(9, 3, 2, inside_rollout, generator)
    values = th.randn(len(rows(segment)), generator=generator, dtype=th.float64, requires_grad=True)
    weights, x = th.randn(2, segment.n_transitions, generator=generator, dtype=th.float64)
    returns = lambda_returns(segment, values).flatten()
    th.testing.assert_close(segment.advantages(values), returns - values[: len(x)], rtol=1e-12, atol=1e-12)
    (gradient,) = th.autograd.grad(weights @ returns, values)
    th.testing.assert_close(segment.return_gradient(weights), gradient, rtol=1e-12, atol=1e-12)
    # The trace is the transpose of the discounted sum
    th.testing.assert_close(segment.trace(x) @ weights, x @ discounted_sums(segment, weights), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("actions", ACTION_SPACES)
def test_actions_are_as_sb3_hands_them_out(actions):
    model = collect_rollout(small(env=SpaceEnv(action_space=ACTION_SPACES[actions]), batch_size=16))
    (segment,) = model._segments()
    np.testing.assert_array_equal(segment.actions.reshape(16, -1), model.rollout_buffer.actions[:, 0].reshape(16, -1))
    handed_out = next(model.rollout_buffer.get()).actions
    if actions == "Discrete":
        handed_out = handed_out.long().flatten()
    assert segment.actions.dtype == handed_out.dtype and segment.actions.shape == handed_out.shape


def test_segments_are_where_the_buffer_is():
    model = collect(16, 2)
    (expected,) = model._segments()
    with th.device("meta"):  # a default device on which nothing can be computed
        (segment,) = model._segments()
    for actual, wanted in zip(segment, expected, strict=True):
        if isinstance(wanted, th.Tensor):
            th.testing.assert_close(actual, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (3,)), spaces.Discrete(4), IMAGE], ids=["Box", "Discrete", "image"])
def test_a_callback_that_reads_the_buffer(space, n_envs):
    """``get()`` puts the buffer's arrays in another order, for good."""

    class Reads(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            next(self.model.rollout_buffer.get(4))

    states = []
    for callback in (None, Reads()):
        model = small("CnnPolicy" if space is IMAGE else "MlpPolicy", vec_env(SpaceEnv(space), n_envs), n_steps=8)
        model.collect_rollouts = seeded(model.collect_rollouts)
        states.append(state_of(model.learn(16 * n_envs, callback)))
    assert not differences(*states)


def seeded(collect_rollouts):
    """The same random numbers after each rollout, whatever a callback has drawn."""

    def collect(*args, **kwargs):
        th.manual_seed(0)
        go_on = collect_rollouts(*args, **kwargs)
        th.manual_seed(0)
        return go_on

    return collect


@pytest.mark.parametrize("discount", ["gamma", "gae_lambda"])
def test_discounts_are_the_buffers(discount):
    """As for PPO: what is changed on the model afterwards does not reach the returns."""
    states = []
    for value in (None, 0.5):
        model = small(env="CartPole-v1")
        setattr(model, discount, getattr(model, discount) if value is None else value)
        states.append(state_of(model.learn(32)))
    assert not differences(*states)
