"""
What a wrong BLPO could do without anyone noticing: it would still run, log, save, and often learn. Each check passes for the
package as it is, and fails where one thing in it is replaced by a bug.
"""

import functools
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from envs import TORQUES, SpaceEnv
from gymnasium import spaces
from models import changed, differences, small, state_of
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_blpo import BLPO, bilevel, policies
from sb3_blpo.bilevel import Bilevel
from sb3_blpo.checks import scheduled
from sb3_blpo.engines import ActorPass, TorchEngine
from sb3_blpo.gae import DiscountedSum
from sb3_blpo.ihvp import Nystrom
from sb3_blpo.policies import _split
from sb3_blpo.rollout import Rollout


class TerminalsAt(SpaceEnv):
    """
    Episodes that end where they are told to, and show nothing but zeros.

    :param ends: "terminated" or "truncated" by step of the environment's life, counted from 1
    """

    def __init__(self, ends: dict[int, str]) -> None:
        super().__init__(spaces.Box(0, 0, (3,), np.float32), TORQUES, episode_length=10**9)
        self.ends = ends
        self.life = 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, *_, info = super().step(action)
        self.life += 1
        end = self.ends.get(self.life, "")
        return observation, reward, end == "terminated", end == "truncated", info


#: What three steps of each of some environments may be: no end, ends in the middle and at the end of the rollout
ENDS: list[list[dict[int, str]]] = [
    [{}],
    [{1: "terminated"}, {3: "truncated"}],
    [{2: "truncated"}, {}, {3: "terminated"}],
    [{3: "terminated"}, {1: "truncated", 2: "terminated"}],
]


def discounts(ends: list[dict[int, str]], n: int, gae_lambda: float) -> tuple[np.ndarray, np.ndarray]:
    """How much of the value, and of the lambda-return, of the state that follows is in the lambda-return of each step."""
    of_value, of_return = np.full((n, len(ends)), 1 - gae_lambda), np.full((n, len(ends)), gae_lambda)
    of_value[-1], of_return[-1] = 1, 0
    for i, e in enumerate(ends):
        for step, end in e.items():
            of_value[step - 1, i], of_return[step - 1, i] = float(end == "truncated"), 0
    return of_value, of_return


def check_three_steps_by_hand(ends: list[dict[int, str]], normalize_advantage: bool = False, solver: str = "nystrom") -> None:
    """
    All observations are 0, so that the critic is one number b, H = 2, tr(H) = 2 and all of Algorithm 1 can be worked out: two
    nested steps of b, v = g/(H + alpha), which is u at every step, and the step of an actor that is nothing but a mean and a
    standard deviation.
    """
    gamma, gae_lambda, damping, b, actor_rate, critic_rate, n = 0.9, 0.5, 0.25, 0.5, 1e-2, 0.2, 3
    model = small(
        env=DummyVecEnv([functools.partial(TerminalsAt, e) for e in ends]), n_steps=n, batch_size=n * len(ends),
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

    of_value, of_return = discounts(ends, n, gae_lambda)

    def returns() -> np.ndarray:
        Q = np.zeros((n + 1, len(ends)))
        for k in reversed(range(n)):
            Q[k] = rewards[k] + gamma * (of_value[k] * b + of_return[k] * Q[k + 1])
        return Q[:n]

    targets = returns()
    for _ in range(2):
        b -= critic_rate * 2 * (b - targets).mean()
    advantages = returns() - b
    if normalize_advantage:
        advantages = (advantages - advantages.mean()) / advantages.std(ddof=1)
    trace = np.ones((n, len(ends)))
    for k in range(1, n):
        trace[k] += gamma * of_return[k - 1] * trace[k - 1]
    g = (gamma * of_value * trace).sum() / rewards.size
    u = g / (2 + 2 * damping)
    weights = (1 + 2 * u * trace) * advantages / rewards.size
    np.testing.assert_allclose(policy.value_net.bias.detach(), b, rtol=1e-6)
    for actual, gradient in ((policy.action_net.bias, actions), (policy.log_std, actions**2 - 1)):
        expected = actor_rate * (weights[:, :, None] * gradient).sum(axis=(0, 1))
        np.testing.assert_allclose(actual.detach(), expected, rtol=1e-5, atol=1e-8)


def check_both_networks_step() -> None:
    model = small(engine="torch")
    assert changed(model, lambda: model.learn(16)) == {name for name, _ in model.policy.named_parameters()}


def check_each_optimizer_has_its_network() -> None:
    """Without a rate one network stands still, and the other does not."""
    for actor_rate, critic_rate in ((0.0, 1e-2), (1e-2, 0.0)):
        model = small(learning_rate=actor_rate, critic_learning_rate=critic_rate)
        names = changed(model, functools.partial(model.learn, 32))
        assert names == {name for name, _ in model.policy.named_parameters() if ("value" in name) == (critic_rate > 0)}


def check_rates_follow_their_schedules() -> None:
    """In the update at half of the training and in the last one."""
    model = small(
        learning_rate=LinearSchedule(1e-2, 0.0, 1.0), critic_learning_rate=LinearSchedule(4e-2, 2e-2, 1.0), batch_size=16,
        n_critic_updates=1,
    )  # fmt: skip
    rates: list[float] = []
    for optimizer in (model.critic_optimizer, model.policy.optimizer):
        optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    model.learn(32)
    assert rates == pytest.approx([3e-2, 5e-3, 2e-2, 0.0])


def check_a_saved_model_is_the_same() -> None:
    model, file = small().learn(32), io.BytesIO()
    model.save(file)
    file.seek(0)
    assert not differences(state_of(model), state_of(BLPO.load(file, device="cpu")))


def check_seeded_runs_are_equal() -> None:
    first, second = (small(ihvp_kwargs={"rank": 2, "sketch": "columns"}).learn(32) for _ in range(2))
    assert not differences(state_of(first), state_of(second))


CHECKS: list[Callable[[], None]] = [
    *(functools.partial(check_three_steps_by_hand, ends) for ends in ENDS),
    functools.partial(check_three_steps_by_hand, ENDS[3], normalize_advantage=True),
    *(functools.partial(check_three_steps_by_hand, ENDS[2], solver=solver) for solver in ("cg", "nystrom_cg", "exact")),
    check_both_networks_step,
    check_each_optimizer_has_its_network,
    check_rates_follow_their_schedules,
    check_a_saved_model_is_the_same,
    check_seeded_runs_are_equal,
]


def name_of(check: Any) -> str:
    return getattr(check, "func", check).__name__


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_check(check: Callable[[], None]) -> None:
    check()


# Each replaces one thing


def leaks_across_episodes(self: DiscountedSum, done: th.Tensor, discount: float) -> None:
    self.keep = discount * th.ones_like(done)


def bootstraps_from_terminal_states(self: Bilevel, infos: list[dict[str, Any]], dones: Any = None) -> None:
    update_info_buffer(self, [info | {"TimeLimit.truncated": True} for info in infos], dones)


def ignores_the_critics_schedule(name: str, schedule: Any, progress: float) -> float:
    return scheduled(name, schedule, 1.0 if name == "critic_learning_rate" else progress)


def draws_without_seed(self: Nystrom, system: Any, generator: th.Generator) -> Any:
    unseeded = th.Generator()
    unseeded.seed()
    return sketch(self, system, unseeded)


update_info_buffer, sketch, trace = Bilevel._update_info_buffer, Nystrom._sketch, Rollout.eligibility_trace
#: Where the bug is, the bug, and the check that sees it
BUGS: dict[str, tuple[Any, str, Any, Callable[[], None]]] = {
    "critic's optimizer not saved": (
        BLPO, "_get_torch_save_params", OnPolicyAlgorithm._get_torch_save_params, check_a_saved_model_is_the_same,
    ),
    "hypergradient zero": (Rollout, "eligibility_trace", lambda self, x: 0 * x, CHECKS[0]),
    "correction's sign flipped": (Rollout, "eligibility_trace", lambda self, x: -trace(self, x), CHECKS[0]),
    "critic's schedule ignored": (
        bilevel, "scheduled", ignores_the_critics_schedule, check_rates_follow_their_schedules,
    ),
    "GAE leaks across episodes": (DiscountedSum, "__init__", leaks_across_episodes, CHECKS[1]),
    "terminal states bootstrapped from": (
        Bilevel, "_update_info_buffer", bootstraps_from_terminal_states, CHECKS[2],
    ),
    "actor's optimizer has the critic's parameters": (
        policies, "_split", lambda policy: (set().union(*_split(policy)), _split(policy)[1]),
        check_each_optimizer_has_its_network,
    ),
    "columns unseeded": (Nystrom, "_sketch", draws_without_seed, check_seeded_runs_are_equal),
    "actor never steps": (
        TorchEngine, "improve_actor", lambda *_: ActorPass({"loss": 0.0, "approx_kl": 0.0}, False), check_both_networks_step,
    ),
    "critic never steps": (
        TorchEngine, "fit_critic", lambda self, obs, returns, n_updates: th.zeros(n_updates), check_both_networks_step,
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, replacement, check = BUGS[bug]
    monkeypatch.setattr(where, name, replacement)
    # A ValueError where the package itself refuses to go on
    with pytest.raises((AssertionError, ValueError)):
        check()
