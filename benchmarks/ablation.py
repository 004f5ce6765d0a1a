"""
What in BLPO does the work: variants that its arguments, and PPO's, do not offer.

As a command it is RL Zoo's training script that knows them too: ``python benchmarks/ablation.py --algo blpo_constant_u --env
Hopper-v5 --conf-file hyperparams/blpo.yml``.
"""

import operator
import runpy
from typing import Any

import torch as th
from rl_zoo3.utils import ALGOS
from stable_baselines3 import PPO
from stable_baselines3.common.utils import update_learning_rate

from sb3_blpo import BLPO
from sb3_blpo.curvature import Curvature
from sb3_blpo.hypergradient import Hypergradient
from sb3_blpo.ihvp import Solution, Solver
from sb3_blpo.segments import Segment, each


class SegmentOfRollout(Segment):
    """A minibatch whose advantages stay those of the rollout."""

    rollout_advantages: th.Tensor

    def advantages(self, values: th.Tensor) -> th.Tensor:
        return self.rollout_advantages


class RolloutAdvantages(BLPO):
    """Advantages under the rollout's critic, as PPO's, and not under the critic after its nested updates."""

    def _segments(self) -> list[SegmentOfRollout]:
        segments: list[SegmentOfRollout] = []
        with self.critic.mode(training=False):
            for segment in super()._segments():
                kept = SegmentOfRollout(*segment)
                kept.rollout_advantages = segment.advantages(self.critic.values(segment.observations))
                segments.append(kept)
        return segments


class Shuffled(RolloutAdvantages):
    """
    Minibatches of transitions in random order, as PPO's, but drawn once a rollout and not for each epoch. For "none" alone:
    they are no stretch of time any more.
    """

    def _segments(self) -> list[SegmentOfRollout]:
        whole = super()._segments()
        states = each(lambda *parts: th.cat(parts), *(segment.states for segment in whole))
        actions, old_log_prob, returns, advantages = (
            th.cat(parts)
            for parts in zip(*((s.actions, s.old_log_prob, s.returns, s.rollout_advantages) for s in whole), strict=True)
        )
        segments: list[SegmentOfRollout] = []
        for index in th.randperm(len(returns), device=returns.device).split(self.batch_size):
            shuffled = SegmentOfRollout(
                each(operator.itemgetter(index), states),
                actions[index],
                old_log_prob[index],
                returns[index],
                truncated=index[:0],
                lambda_return=whole[0].lambda_return,
            )
            shuffled.rollout_advantages = advantages[index]
            segments.append(shuffled)
        return segments


class OneRate(BLPO):
    """The critic's learning rate is the actor's, as PPO's."""

    def _setup_model(self) -> None:
        self.critic_learning_rate = self.learning_rate
        super()._setup_model()


class TowardsPPO(Shuffled, OneRate):
    """Both."""


class ClippedApart(PPO):
    """PPO whose ``max_grad_norm`` clips the actor's gradient alone, as BLPO's, instead of the two networks' together."""

    def _setup_model(self) -> None:
        super()._setup_model()
        actor = [parameter for name, parameter in self.policy.named_parameters() if "value_net" not in name]
        max_norm, self.max_grad_norm = self.max_grad_norm, float("inf")

        def clip(*_: Any) -> None:
            th.nn.utils.clip_grad_norm_(actor, max_norm)

        self.policy.optimizer.register_step_pre_hook(clip)


class LargerStep(BLPO):
    """
    The direct gradient alone, with a learning rate larger by the norm of the capped correction: times 1 + ratio. Adam takes
    no notice of a larger gradient, hence the rate.
    """

    def _hypergradient(self, *args: Any, **kwargs: Any) -> Hypergradient:
        leader = super()._hypergradient(*args, **kwargs)
        solver, self.solver = self.solver, None
        direct = super()._hypergradient(*args, **kwargs)
        self.solver = solver
        ratio = 0.0 if leader.stats["correction_skipped"] else float(leader.stats["correction_ratio"])
        if self.max_correction_ratio is not None:
            ratio = min(ratio, self.max_correction_ratio)
        rate = self.lr_schedule(self._current_progress_remaining)
        update_learning_rate(self.policy.optimizer, (1 + ratio) * rate)
        return Hypergradient(direct.gradient, leader.numbers)


class Unsolved(Solver):
    """v = g / alpha: the linear system without its curvature."""

    needs_gram = False

    def draw(self, like: th.Tensor, generator: th.Generator) -> None:
        """Nothing is random here."""

    def solve(self, curvature: Curvature, alpha: th.Tensor) -> Solution:
        return Solution(curvature.g / alpha, alpha > 0)


class NoCurvature(BLPO):
    """The correction with v = g / alpha."""

    def _setup_model(self) -> None:
        super()._setup_model()
        self.solver = Unsolved()


class Constant(Unsolved):
    """
    The same change of all values: that of a critic which can only shift them.

    :param u: The change
    """

    def __init__(self, u: float) -> None:
        self.u = u

    def solve(self, curvature: Curvature, alpha: th.Tensor) -> Solution:
        values = curvature.jacobian.values
        return Solution(th.zeros_like(curvature.g), alpha > 0, values=values.new_full((curvature.n_steps,), self.u))


class ConstantU(BLPO):
    """The correction whose weights only ramp up from the start of each segment, without any curvature."""

    def _setup_model(self) -> None:
        super()._setup_model()
        self.solver = Constant(self.gamma * (1 - self.gae_lambda) / (2 * (1 - self.gamma * self.gae_lambda)))


ALGOS |= {
    "blpo_rollout_advantages": RolloutAdvantages,
    "blpo_shuffled": Shuffled,
    "blpo_one_rate": OneRate,
    "blpo_towards_ppo": TowardsPPO,
    "blpo_larger_step": LargerStep,
    "blpo_no_curvature": NoCurvature,
    "blpo_constant_u": ConstantU,
    "ppo_clipped_apart": ClippedApart,
}

if __name__ == "__main__":
    runpy.run_module("rl_zoo3.train", run_name="__main__", alter_sys=True)
