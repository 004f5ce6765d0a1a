"""
What a wrong BLPO could do without anyone noticing: it would still run, log, save, and often learn. Each test here goes through
a whole training step. Optimizers and rates mixed up, and networks that never step, are in test_run.py, an optimizer that is
not saved and draws that are not seeded in test_save_load.py.
"""

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch as th
from envs import BOX, DICT, TORQUES, SpaceEnv, vec_env
from gymnasium import spaces
from models import Seen, actor_of, critic_of, logged, small
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecNormalize
from torch import nn

from sb3_blpo import BLPO

SOLVERS = ["nystrom", "cg", "nystrom_cg", "exact"]
SGD: dict[str, Any] = {"net_arch": [8], "optimizer_class": th.optim.SGD}


class TerminalsAt(SpaceEnv):
    """
    Episodes that end where they are told to.

    :param ends: "terminated" or "truncated" by step of the environment's life, counted from 1
    """

    def __init__(self, ends: dict[int, str], observation_space: spaces.Space = BOX) -> None:
        super().__init__(observation_space, TORQUES, episode_length=10**9)
        self.ends = ends
        self.life = 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, *_, info = super().step(action)
        self.life += 1
        end = self.ends.get(self.life, "")
        return observation, reward, end == "terminated", end == "truncated", info


#: A rollout of 16 steps: both ends inside a segment of 8, at its end, at its start, and at the rollout's last step
ENDS = [
    {3: "terminated", 8: "truncated", 12: "truncated"},
    {3: "truncated", 8: "terminated", 9: "truncated", 16: "terminated"},
    {1: "truncated", 2: "truncated", 16: "truncated"},
    {},
]


def rollout_of(ends: list[dict[int, str]], observation_space: spaces.Space = BOX, **arguments: Any) -> BLPO:
    """A model after one rollout and one epoch in which the critic stood still, so that its values are the rollout's."""
    vec = DummyVecEnv([functools.partial(TerminalsAt, e, observation_space) for e in ends])
    policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    env = VecNormalize(vec) if arguments.pop("normalize", False) else vec
    return small(policy, env, critic_learning_rate=0.0, **arguments).learn(16 * len(ends))


@pytest.mark.parametrize("gae_lambda", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("batch_size", [1, 4, 8, 16, 32, 64])
def test_advantages_are_those_of_the_rollout(batch_size: int, gae_lambda: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    With the rollout's critic, the advantages in every minibatch are SB3's, however the rollout is cut: nothing leaks over the
    end of an episode, terminal states are worth nothing, and truncated ones what the critic says.
    """
    seen = Seen(monkeypatch)
    model = rollout_of(ENDS, batch_size=batch_size, gae_lambda=gae_lambda)
    compare_advantages(model, seen)


@pytest.mark.parametrize("space", [spaces.Discrete(5), DICT], ids=["Discrete", "Dict"])
def test_advantages_with_other_observations(space: spaces.Space, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    compare_advantages(rollout_of(ENDS[:2], space, ihvp_solver="none"), seen)


def test_advantages_with_normalised_observations_and_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    compare_advantages(rollout_of(ENDS, normalize=True), seen)


def compare_advantages(model: BLPO, seen: Seen) -> None:
    buffer = model.rollout_buffer
    by_log_prob = {float(log_prob): place for place, log_prob in np.ndenumerate(buffer.log_probs)}
    assert len(by_log_prob) == buffer.log_probs.size == sum(segment.n_transitions for segment in seen.segments)
    for segment, values in zip(seen.segments, seen.values, strict=True):
        places = tuple(np.array([by_log_prob[float(log_prob)] for log_prob in segment.old_log_prob]).T)
        n = segment.n_transitions
        np.testing.assert_allclose(values[:n], buffer.values[places], atol=1e-5)
        np.testing.assert_allclose(segment.returns, buffer.returns[places], atol=1e-5)
        advantages = segment.advantages(values)
        np.testing.assert_allclose(advantages, buffer.advantages[places], atol=1e-4)


class Offset(VecEnvWrapper):
    """Adds a number to the rewards of some steps of the first rollout."""

    def __init__(self, env: Any, steps: set[int], offset: float) -> None:
        super().__init__(env)
        self.steps, self.offset, self.step_count = steps, offset, 0

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        self.step_count += 1
        return observations, rewards + self.offset * (self.step_count in self.steps), dones, infos


@pytest.mark.parametrize("end", ["terminated", "truncated", ""])
def test_rewards_of_the_next_episode_change_nothing_in_this_one(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first segment, which ends where an episode does, has the same gradient whatever comes after it."""

    def first_gradient(offset: float) -> th.Tensor:
        seen = Seen(monkeypatch)
        env = Offset(vec_env(TerminalsAt({8: end}), 1), set(range(9, 17)), offset)
        # No network moves, so that the order of the segments is of no account
        model = small(env=env, learning_rate=0.0, critic_learning_rate=0.0).learn(16)
        log_probs = model.rollout_buffer.log_probs[:8, 0]
        first = [np.array_equal(segment.old_log_prob, log_probs) for segment in seen.segments].index(True)
        monkeypatch.undo()
        return seen.gradients[first]

    assert th.equal(first_gradient(0.0), first_gradient(100.0)) == (end != "")


def actor_step(solver: str, **arguments: Any) -> tuple[BLPO, th.Tensor]:
    """A model after one step of plain gradient ascent on one minibatch, and the step."""
    settings: dict[str, Any] = {"batch_size": 16, "policy_kwargs": SGD, "max_grad_norm": math.inf, "learning_rate": 1e-2}
    model = small(env=SpaceEnv(action_space=TORQUES), ihvp_solver=solver, **(settings | arguments))
    before = actor_of(model)
    model.learn(16)
    return model, th.cat([(b - a).flatten() for a, b in zip(before, actor_of(model), strict=True)])


@pytest.mark.parametrize(
    ("solver", "curvature"), [*((solver, "gauss_newton") for solver in SOLVERS), ("nystrom", "hessian"), ("exact", "hessian")]
)
def test_the_correction_reaches_the_actor(solver: str, curvature: str) -> None:
    """It is there, it points where the better actor is, and it is no larger than the cap says."""
    direct = actor_step("none")[1]
    model, free = actor_step(solver, curvature=curvature, max_correction_ratio=None)
    correction = free - direct
    assert logged(model)["correction_skipped"] == 0
    ratio, cosine = logged(model)["correction_ratio"], logged(model)["correction_cosine"]
    assert float(correction.norm() / direct.norm()) == pytest.approx(ratio, rel=1e-3) and ratio > 0.1
    assert float(correction @ direct / (correction.norm() * direct.norm())) == pytest.approx(cosine, abs=1e-3)
    if curvature == "gauss_newton":
        assert cosine > 0.3
    cap = ratio / 3
    model, capped = actor_step(solver, curvature=curvature, max_correction_ratio=cap)
    assert logged(model)["correction_capped"] == 1 and logged(model)["correction_ratio"] == pytest.approx(ratio)
    th.testing.assert_close(capped - direct, correction / 3, rtol=1e-3, atol=1e-6)
    model, loose = actor_step(solver, curvature=curvature, max_correction_ratio=3 * ratio)
    assert logged(model)["correction_capped"] == 0
    assert th.equal(loose, free)


def discounts(ends: dict[int, str], n: int, gae_lambda: float) -> tuple[np.ndarray, np.ndarray]:
    """How much of the value, and of the lambda-return, of the state that follows is in the lambda-return of each step."""
    of_value, of_return = np.full(n, 1 - gae_lambda), np.full(n, gae_lambda)
    of_value[-1], of_return[-1] = 1, 0
    for step, end in ends.items():
        of_value[step - 1], of_return[step - 1] = float(end == "truncated"), 0
    return of_value, of_return


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("normalize_advantage", [False, True])
@pytest.mark.parametrize(
    "ends",
    [
        [{}],
        [{1: "terminated"}, {3: "truncated"}],
        [{2: "truncated"}, {}, {3: "terminated"}],
        [{3: "terminated"}, {1: "truncated", 2: "terminated"}],
    ],
    ids=str,
)
def test_three_steps_by_hand(ends: list[dict[int, str]], normalize_advantage: bool, solver: str) -> None:
    """
    All observations are 0, so that the critic is one number b, H = 2, tr(H) = 2 and all of Algorithm 1 can be worked out: two
    nested steps of b, v = g/(H + alpha), which is u at every step, and the step of an actor that is nothing but a mean and a
    standard deviation.
    """
    gamma, gae_lambda, damping, b, actor_rate, critic_rate, n = 0.9, 0.5, 0.25, 0.5, 1e-2, 0.2, 3
    nothing = spaces.Box(0, 0, (3,), np.float32)
    model = small(
        env=DummyVecEnv([functools.partial(TerminalsAt, e, nothing) for e in ends]), n_steps=n, batch_size=n * len(ends),
        n_critic_updates=2, gamma=gamma, gae_lambda=gae_lambda, learning_rate=actor_rate, critic_learning_rate=critic_rate,
        max_grad_norm=math.inf, max_correction_ratio=None, normalize_advantage=normalize_advantage, ihvp_solver=solver,
        ihvp_kwargs={"damping": damping}, policy_kwargs={"net_arch": [], "optimizer_class": th.optim.SGD},
    )  # fmt: skip
    policy: Any = model.policy
    nn.init.constant_(policy.value_net.bias, b)
    model.learn(n * len(ends))

    actions = model.rollout_buffer.actions.astype(np.float64)
    rewards = np.clip(actions, -2, 2).mean(axis=2)
    for k in range(n):
        for i, e in enumerate(ends):
            rewards[k, i] += 0.3 * (k + 1 - max((step for step in e if step <= k), default=0))

    def returns() -> np.ndarray:
        Q = np.zeros((n + 1, len(ends)))
        for i, e in enumerate(ends):
            of_value, of_return = discounts(e, n, gae_lambda)
            for k in reversed(range(n)):
                Q[k, i] = rewards[k, i] + gamma * (of_value[k] * b + of_return[k] * Q[k + 1, i])
        return Q[:n]

    targets = returns()
    for _ in range(2):
        b -= critic_rate * 2 * (b - targets).mean()
    advantages = returns() - b
    N, g = rewards.size, 0.0
    trace = np.ones((n, len(ends)))
    for i, e in enumerate(ends):
        of_value, of_return = discounts(e, n, gae_lambda)
        for k in range(1, n):
            trace[k, i] += gamma * of_return[k - 1] * trace[k - 1, i]
        g += (gamma * of_value * trace[:, i]).sum() / N
    u = g / (2 + 2 * damping)
    mean, std = (advantages.mean(), advantages.std(ddof=1)) if normalize_advantage else (0, 1)
    weights = ((advantages - mean) + 2 * u * trace * advantages) / std / N
    np.testing.assert_allclose(policy.value_net.bias.detach(), b, rtol=1e-5)
    for actual, gradient in ((policy.action_net.bias, actions), (policy.log_std, actions**2 - 1)):
        expected = actor_rate * (weights[:, :, None] * gradient).sum(axis=(0, 1))
        np.testing.assert_allclose(actual.detach(), expected, rtol=1e-4, atol=1e-7)


def test_max_grad_norm_is_the_actors() -> None:
    free, step = actor_step("nystrom", n_critic_updates=3)
    clipped, short_step = actor_step("nystrom", n_critic_updates=3, max_grad_norm=0.02)
    assert step.norm() > 4e-4
    th.testing.assert_close(short_step, step * 2e-4 / step.norm(), rtol=1e-2, atol=2e-7)
    assert all(th.equal(a, b) for a, b in zip(critic_of(free), critic_of(clipped), strict=True))
