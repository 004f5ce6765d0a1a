"""
BLPO with one part of its recipe replaced: variants that its arguments do not offer.

As a command it is RL Zoo's training script that knows them too: ``python benchmarks/ablation.py --algo blpo_one_rate --env
Hopper-v5 --conf-file hyperparams/blpo.yml``.
"""

import functools
import itertools
import runpy
from collections.abc import Iterator
from unittest import mock

import torch as th
from rl_zoo3.utils import ALGOS

from sb3_blpo import BLPO
from sb3_blpo.curvature import GaussNewton
from sb3_blpo.gae import DiscountedSum
from sb3_blpo.ihvp import Solution, Solver
from sb3_blpo.rollout import Rollout


class FixedAdvantages(Rollout):
    """A rollout whose advantages do not follow the critic."""

    def advantages_after(self, change: th.Tensor) -> th.Tensor:
        return self.advantages


class RolloutAdvantages(BLPO):
    """Advantages under the rollout's critic in every epoch, as PPO's, and not under the critic after its nested updates."""

    def _finished_rollout(self) -> Rollout:
        return FixedAdvantages(**vars(super()._finished_rollout()))


def stretches(n_envs: int, n: int, batch_size: int, n_minibatches: int | None = None) -> Iterator[th.Tensor]:
    """
    Draw minibatches of consecutive steps of one environment, in random order: :func:`sb3_blpo.rollout.minibatches` in time
    order. Where an environment has fewer steps than a minibatch, the next one's follow.

    :param n_envs: Number of environments
    :param n: Number of rows, steps first
    :param batch_size: Rows in a minibatch
    :param n_minibatches: How many; ``None``: one pass
    :return: Indices of each minibatch's rows (batch_size,)
    """
    parts = th.arange(n).view(-1, n_envs).T.flatten().split(batch_size)
    passes = (th.randperm(len(parts)).tolist() for _ in itertools.count())
    chosen = itertools.islice(itertools.chain.from_iterable(passes), n_minibatches or len(parts))
    return (parts[i] for i in chosen)


class TimeOrdered(BLPO):
    """Minibatches of consecutive steps for both levels, and not of shuffled transitions: by torch's engine."""

    def _setup_model(self) -> None:
        self.engine = "torch"
        super()._setup_model()

    def train(self) -> None:
        with mock.patch("sb3_blpo.engines.torch.minibatches", functools.partial(stretches, self.n_envs)):
            super().train()


class OneRate(BLPO):
    """The critic's learning rate is the actor's, as PPO's."""

    def _setup_model(self) -> None:
        self.critic_learning_rate = self.learning_rate
        super()._setup_model()


class FreshReturns(BLPO):
    """Former rollouts' returns are computed anew, under the critic as it is at each new rollout."""

    def _finished_rollout(self) -> Rollout:
        rollout = super()._finished_rollout()
        self.policy.set_training_mode(False)
        kept: list[tuple[Rollout, th.Tensor]] = getattr(self, "_kept", [])[-self._n_critic_rollouts :]
        with th.no_grad():
            now = [self.policy.predict_values(one.observations).flatten() for one, _ in kept]
            own = self.policy.predict_values(rollout.observations).flatten()
        self._former_rollouts = [
            (one.states, one.advantages_after(values - before) + values[: len(one)])
            for (one, before), values in zip(kept, now, strict=True)
        ]
        self._kept = [*kept, (rollout, own)]
        return rollout


class CriticLambda(BLPO):
    """The critic's targets have a lambda of their own, 0.98 where the advantages' is at most 0.95, else 0.9."""

    def _finished_rollout(self) -> Rollout:
        rollout = super()._finished_rollout()
        decay = rollout.gamma * rollout.gae_lambda * (1 - rollout.done)
        advantages = rollout.advantages.view(rollout.done.shape)
        later = th.cat([advantages[1:], th.zeros_like(advantages[:1])])
        temporal_differences = advantages - decay * later
        other = 0.98 if rollout.gae_lambda <= 0.95 else 0.9
        change = DiscountedSum(rollout.done, rollout.gamma * other)(temporal_differences) - advantages
        rollout.returns = rollout.returns + change.flatten()
        return rollout


class SlowAdam(BLPO):
    """Both of Adam's betas are 0.99, as in Dohare et al. (2023)."""

    def _setup_model(self) -> None:
        self.policy_kwargs = self.policy_kwargs | {"optimizer_kwargs": {"betas": (0.99, 0.99), "eps": 1e-5}}
        super()._setup_model()


class WideCritic(BLPO):
    """The critic's layers are twice as wide as the actor's, and have 256 units at least."""

    def _setup_model(self) -> None:
        actor = self.policy_kwargs.get("net_arch", [64, 64])
        self.policy_kwargs = self.policy_kwargs | {"net_arch": {"pi": actor, "vf": [max(256, 2 * n) for n in actor]}}
        super()._setup_model()


class Unsolved(Solver):
    """v = g / alpha: the linear system without its curvature."""

    def solve(self, system: GaussNewton, generator: th.Generator) -> Solution:
        return Solution(system.g / system.alpha, system.alpha > 0)


class NoCurvature(BLPO):
    """The correction with v = g / alpha."""

    def train(self) -> None:
        with mock.patch("sb3_blpo.bilevel.make_solver", lambda *_, **__: Unsolved()):
            super().train()


ALGOS |= {
    "blpo_rollout_advantages": RolloutAdvantages,
    "blpo_time_ordered": TimeOrdered,
    "blpo_one_rate": OneRate,
    "blpo_no_curvature": NoCurvature,
    "blpo_fresh_returns": FreshReturns,
    "blpo_critic_lambda": CriticLambda,
    "blpo_slow_adam": SlowAdam,
    "blpo_wide_critic": WideCritic,
}

if __name__ == "__main__":
    runpy.run_module("rl_zoo3.train", run_name="__main__", alter_sys=True)
