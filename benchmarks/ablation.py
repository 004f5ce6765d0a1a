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
}

if __name__ == "__main__":
    runpy.run_module("rl_zoo3.train", run_name="__main__", alter_sys=True)
