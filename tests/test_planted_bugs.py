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
from models import Seen, actor_of, logged, small
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

    def first_gradients(offset: float) -> list[th.Tensor]:
        seen = Seen(monkeypatch)
        env = Offset(vec_env(TerminalsAt({8: end}), 1), set(range(9, 17)), offset)
        # No network moves, so that the order of the segments is of no account
        model = small(env=env, learning_rate=0.0, critic_learning_rate=0.0).learn(16)
        log_probs = model.rollout_buffer.log_probs[:8, 0]
        first = [np.array_equal(segment.old_log_prob, log_probs) for segment in seen.segments].index(True)
        monkeypatch.undo()
        return seen.gradients[first]

    equal = all(th.equal(a, b) for a, b in zip(first_gradients(0.0), first_gradients(100.0), strict=True))
    assert equal == (end != "")


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


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "ends",
    [{}, {1: "terminated"}, {2: "truncated"}, {3: "terminated"}, {3: "truncated"}, {1: "truncated", 2: "terminated"}],
    ids=str,
)
def test_three_steps_by_hand(ends: dict[int, str], solver: str) -> None:
    """
    All observations are 0, so that the critic is one number b, H = 2, tr(H) = 2 and everything can be worked out: v = g/(H +
    alpha), which is u at every step, and the step of an actor that is nothing but a mean and a standard deviation.
    """
    gamma, gae_lambda, damping, b, learning_rate, n = 0.9, 0.5, 0.25, 0.5, 1e-2, 3
    model = small(
        env=TerminalsAt(ends, spaces.Box(0, 0, (3,), np.float32)), n_steps=n, batch_size=n, gamma=gamma,
        gae_lambda=gae_lambda, learning_rate=learning_rate, critic_learning_rate=0.0, max_grad_norm=math.inf,
        max_correction_ratio=None, ihvp_solver=solver, ihvp_kwargs={"damping": damping},
        policy_kwargs={"net_arch": [], "optimizer_class": th.optim.SGD},
    )  # fmt: skip
    policy: Any = model.policy
    nn.init.constant_(policy.value_net.bias, b)
    model.learn(n)

    actions = model.rollout_buffer.actions[:, 0].astype(np.float64)
    rewards, t = np.clip(actions, -2, 2).mean(axis=1), 0
    # How much of the value, and of the lambda-return, of the state that follows is in the lambda-return
    of_value, of_return = np.full(n, 1 - gae_lambda), np.full(n, gae_lambda)
    of_value[-1], of_return[-1] = 1, 0
    for k in range(n):
        t += 1
        rewards[k] += 0.3 * t
        if k + 1 in ends:
            of_value[k], of_return[k], t = float(ends[k + 1] == "truncated"), 0, 0
    returns = np.zeros(n + 1)
    for k in reversed(range(n)):
        returns[k] = rewards[k] + gamma * (of_value[k] * b + of_return[k] * returns[k + 1])
    z, e, g = np.zeros(n + 1), np.zeros(n + 1), 0.0
    for k in range(n):
        z[k] = 1 / n + gamma * of_return[k - 1] * z[k - 1]
        g += gamma * of_value[k] * z[k]
    u = g / (2 + 2 * damping)
    for k in range(n):
        e[k] = u + gamma * of_return[k - 1] * e[k - 1]
    weights = (1 + 2 * e[:n]) / n * (returns[:n] - b)
    np.testing.assert_allclose(policy.action_net.bias.detach(), learning_rate * weights @ actions, rtol=1e-4)
    np.testing.assert_allclose(policy.log_std.detach(), learning_rate * weights @ (actions**2 - 1), rtol=1e-4)
