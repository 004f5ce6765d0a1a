"""Gradient steps with autograd and the policy's own optimizers: right for every policy, for nothing about it is special."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch as th
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F

from sb3_blpo.checks import finite
from sb3_blpo.jacobian import Jacobian, make_jacobian
from sb3_blpo.rollout import Rollout, minibatches, size, take


class ActorPass(NamedTuple):
    """
    One pass of the actor over the rollout: means over its minibatches by the names that SB3's PPO logs, ``loss`` of the last
    one, and whether ``target_kl`` ended it.
    """

    stats: dict[str, float]
    stopped: bool


class TorchEngine:
    """Both levels of a policy, whose own optimizer is the actor's. The settings are BLPO's of the same names."""

    def __init__(
        self, policy: ActorCriticPolicy, critic_optimizer: th.optim.Optimizer, *,
        batch_size: int, clip_range: float, ent_coef: float, max_grad_norm: float, target_kl: float | None,
    ) -> None:  # fmt: skip
        self.policy, self.critic_optimizer = policy, critic_optimizer
        self.batch_size = batch_size
        self.clip_range, self.ent_coef = clip_range, ent_coef
        self.max_grad_norm, self.target_kl = max_grad_norm, target_kl
        for optimizer in (policy.optimizer, critic_optimizer):
            optimizer.zero_grad()  # what was frozen since the last update has its gradient still
        self.actor_parameters, self.critic_parameters = (
            [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            for optimizer in (policy.optimizer, critic_optimizer)
        )
        # SB3's evaluate_actions() computes the values as well, which the actor's step does not need
        methods = ("evaluate_actions", "get_distribution", "extract_features")
        self._without_values = any(
            all(getattr(getattr(policy, name), "__func__", None) is getattr(plain, name) for name in methods)
            for plain in (ActorCriticPolicy, MaskableActorCriticPolicy)
        )

    def fit_critic(self, observations: PyTorchObs, returns: th.Tensor, n_updates: int) -> th.Tensor:
        """
        The follower: steps on the mean squared error of random minibatches.

        :return: The loss before each of them (n_updates,)
        """
        self.policy.set_training_mode(True)
        losses = []
        with _fused(self.critic_optimizer):
            for index in self._critic_minibatches(len(returns), n_updates):
                loss = F.mse_loss(self._values_at(observations, index), returns[index])
                if self.critic_parameters:  # not all of the critic is frozen
                    _backward(loss, self.critic_parameters)
                    self.critic_optimizer.step()
                losses.append(loss.detach())
        return finite("critic's loss", th.stack(losses))

    @th.no_grad()
    def values(self, rollout: Rollout) -> th.Tensor:
        """Of all the rollout's observations, in eval mode (n_observations,)."""
        self.policy.set_training_mode(False)
        observations = rollout.observations
        indices = th.arange(size(observations), device="cpu").split(4 * self.batch_size)  # without a graph: less memory
        return finite("critic's value", th.cat([self._values_at(observations, index) for index in indices]))

    @th.no_grad()
    def log_prob(self, rollout: Rollout) -> th.Tensor:
        """log pi(a_t|s_t) in eval mode (N,)."""
        self.policy.set_training_mode(False)
        indices = th.arange(len(rollout), device="cpu").split(4 * self.batch_size)
        return finite("actor's output", th.cat([self._evaluate(rollout, index)[0] for index in indices]))

    def improve_actor(self, rollout: Rollout, weights: th.Tensor) -> ActorPass:
        """
        The leader: one pass of PPO's steps with the weights W (N,) for advantages, unless ``target_kl`` ends it.

        :raises FloatingPointError: Before a step along a gradient that is not finite
        """
        self.policy.set_training_mode(True)
        rows: list[dict[str, th.Tensor]] = []
        stopped = False
        with _fused(self.policy.optimizer):
            for index in self._actor_minibatches(rollout):
                log_prob, entropy = self._evaluate(rollout, index)
                log_ratio = log_prob - rollout.old_log_prob[index]
                ratio = log_ratio.exp()
                W = weights[index]
                policy_loss = -th.min(ratio * W, ratio.clamp(1 - self.clip_range, 1 + self.clip_range) * W).mean()
                entropy_loss = -(-log_prob if entropy is None else entropy).mean()
                loss = policy_loss + self.ent_coef * entropy_loss
                if self.actor_parameters:  # not all of the actor is frozen
                    _backward(loss, self.actor_parameters)
                norm = th.nn.utils.clip_grad_norm_(self.actor_parameters, self.max_grad_norm)
                with th.no_grad():
                    change = ratio - 1
                    row = {
                        "approx_kl": (change - log_ratio).mean(),
                        "clip_fraction": (change.abs() > self.clip_range).float().mean(),
                        "policy_gradient_loss": policy_loss.detach(),
                        "entropy_loss": entropy_loss.detach(),
                        "loss": loss.detach(),
                    }
                rows.append(row)
                finite("actor's gradient", norm)
                if self.target_kl is not None and float(row["approx_kl"]) > 1.5 * self.target_kl:
                    stopped = True
                    break
                self.policy.optimizer.step()
        table = th.stack([th.stack([*row.values()]).float() for row in rows])
        stats = dict(zip(rows[0], table.mean(dim=0).tolist(), strict=True)) | {"loss": float(table[-1, -1])}
        return ActorPass(stats, stopped)

    def jacobian(self, rollout: Rollout, parameters: list[nn.Parameter], generator: th.Generator) -> Jacobian:
        """The critic's Jacobian at the rollout's observations, by its trainable parameters."""
        observations = rollout.observations
        return make_jacobian(
            self.policy, generator, lambda index: take(observations, index), size(observations), len(rollout), parameters,
            self.batch_size,
        )  # fmt: skip

    def write_back(self) -> None:
        """Nothing to do: each step changed the policy and its optimizers."""

    def _critic_minibatches(self, n: int, n_minibatches: int) -> Iterator[th.Tensor]:
        return minibatches(n, self.batch_size, n_minibatches)

    def _actor_minibatches(self, rollout: Rollout) -> Iterator[th.Tensor]:
        return minibatches(len(rollout), self.batch_size)

    def _values_at(self, observations: PyTorchObs, index: th.Tensor) -> th.Tensor:
        """The values of these observations (k,)."""
        return self.policy.predict_values(take(observations, index)).flatten()

    def _evaluate(self, rollout: Rollout, index: th.Tensor) -> tuple[th.Tensor, th.Tensor | None]:
        """Log-probabilities of these actions and entropies (k,), by what PPO trains."""
        observations: Any = take(rollout.observations, index)
        actions = rollout.actions[index]
        inputs = {name: x[index] for name, x in rollout.actor_inputs.items()}
        with finite_distribution():
            if self._without_values:
                distribution = self.policy.get_distribution(observations, **inputs)
                return distribution.log_prob(actions), distribution.entropy()
            _, log_prob, entropy = self.policy.evaluate_actions(observations, actions, **inputs)
        return log_prob, entropy


@contextlib.contextmanager
def finite_distribution() -> Iterator[None]:
    """A FloatingPointError where torch's distributions refuse what is not finite."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected parameter"):
            raise
        raise FloatingPointError("actor's output") from error


@contextlib.contextmanager
def _fused(optimizer: th.optim.Optimizer) -> Iterator[None]:
    """
    Let Adam step by one kernel, a third of the time for small networks, where the user has not chosen. With several threads
    the kernel waits for all of them: on a busy machine a hundred times longer.
    """
    groups = [group for group in optimizer.param_groups if {"fused", "foreach"} <= group.keys()]
    groups = [group for group in groups if group["fused"] is None and group["foreach"] is None and th.get_num_threads() == 1]
    groups = [group for group in groups if all(parameter.device.type == "cpu" for parameter in group["params"])]
    for group in groups:
        group["fused"] = True
    try:
        yield
    finally:
        for group in groups:
            group["fused"] = None


def _backward(loss: th.Tensor, parameters: list[th.Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
