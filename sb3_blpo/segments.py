"""
Minibatches of BLPO: time-ordered blocks of the rollout, each with the observations that its values bootstrap from.

SB3's rollout buffer, or the user's, is read in its (n_steps, n_envs) layout; its ``get()``, which shuffles transitions, is not
called.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import PyTorchObs
from torch.nn import functional as F

from sb3_blpo import gae


class Truncation(NamedTuple):
    """
    A step of the rollout that was cut short, and where it led.

    :param step: Index of the step in the rollout
    :param env: Index of the environment
    :param observation: Terminal observation, as the policy takes it (1, ...)
    """

    step: int
    env: int
    observation: PyTorchObs


def each(function: Callable[..., th.Tensor], *observations: Any) -> PyTorchObs:
    """
    Apply a function to observations, or to each part of them if they are dictionaries.

    :param function: Takes as many arrays or tensors as there are observations
    :param observations: One or more
    :return: What it returns, in a dictionary if they are dictionaries
    """
    if isinstance(observations[0], dict):
        return {key: function(*(obs[key] for obs in observations)) for key in observations[0]}
    return function(*observations)


def _join(first: th.Tensor, *others: th.Tensor) -> th.Tensor:
    """Join batches in the first one's shape: Discrete observations are (n, 1) in the buffer, (n,) elsewhere."""
    return th.cat([first, *(other.reshape(-1, *first.shape[1:]) for other in others)])


class Segment(NamedTuple):
    """
    A minibatch: T consecutive steps of B environments, N = T B transitions. Flat tensors join steps and environments, steps
    first.

    :param observations: s_t, then the states after the last steps, then terminal observations (N + B + n_truncated, ...)
    :param actions: (N, ...) or, if discrete, (N,)
    :param old_log_prob: log pi_old(a_t|s_t) (N,)
    :param returns: The lambda-returns of the rollout, the critic's target (N,)
    :param truncated: Flat indices of the truncated steps (n_truncated,)
    :param lambda_return: The lambda-returns as a function of values (T, B), its rewards without the bootstrap value that SB3
        adds at truncations
    :param kept: What depends on the observations alone and is computed once, by whoever needs it
    """

    observations: PyTorchObs
    actions: th.Tensor
    old_log_prob: th.Tensor
    returns: th.Tensor
    truncated: th.Tensor
    lambda_return: gae.LambdaReturn
    kept: dict[str, th.Tensor] | None = None

    @property
    def n_transitions(self) -> int:
        """Number N of transitions."""
        return len(self.old_log_prob)

    @property
    def shape(self) -> th.Size:
        """(T, B): numbers of steps and environments."""
        return self.lambda_return.rewards.shape

    @property
    def states(self) -> PyTorchObs:
        """The observations s_t (N, ...)."""
        return each(lambda obs: obs[: self.n_transitions], self.observations)

    def advantages(self, values: th.Tensor) -> th.Tensor:
        """
        :param values: Of :attr:`observations` under the current critic
        :return: Advantages under that critic (N,)
        """
        n, n_envs = self.n_transitions, self.shape[1]
        next_values = values[n_envs : n + n_envs].view(self.shape)
        terminal_values = None
        if len(self.truncated):
            terminal_values = values.new_zeros(n).index_copy(0, self.truncated, values[n + n_envs :]).view(self.shape)
        return self.lambda_return(next_values, terminal_values).flatten() - values[:n]

    def return_gradient(self, weights: th.Tensor) -> th.Tensor:
        """
        Coefficients c of sum_t weights_t grad Q_t = sum_j c_j grad V(s_j), Q_t the lambda-returns.

        :param weights: (N,)
        :return: c, one for each of :attr:`observations`
        """
        by = self.lambda_return.gradient(weights.view(self.shape))
        # No lambda-return bootstraps from the first states
        c = F.pad(by.next_values.flatten(), (self.shape[1], 0))
        return th.cat([c, by.terminal_values.flatten()[self.truncated]]) if len(self.truncated) else c

    def trace(self, x: th.Tensor) -> th.Tensor:
        """
        Eligibility trace e_k = x_k + gamma lambda e_{k-1} inside each episode of the segment.

        :param x: (N,)
        :return: e (N,)
        """
        return self.lambda_return.U.adjoint(x.view(self.shape)).flatten()


class Rollout:
    """
    A finished rollout, ready to be cut into segments.

    :param buffer: The full rollout buffer, whose discounts count, as for its returns
    :param last_observation: Observation after the last step, as the policy takes it (n_envs, ...)
    :param last_done: Whether the last step ended the episode (n_envs,)
    :param truncations: The rollout's truncated steps
    :param terminal_values: Their terminal observations' values under the rollout's critic (n_truncated,)
    :param gamma: Discount factor with which SB3 added these values to the rewards
    """

    def __init__(
        self,
        buffer: RolloutBuffer,
        last_observation: PyTorchObs,
        last_done: np.ndarray,
        truncations: list[Truncation],
        terminal_values: th.Tensor,
        gamma: float,
    ) -> None:
        self.gamma, self.gae_lambda = buffer.gamma, buffer.gae_lambda
        device = buffer.device
        self.n_steps, self.n_envs = buffer.rewards.shape
        self.last_observation = last_observation
        self.truncations = truncations

        def in_time(array: np.ndarray) -> np.ndarray:
            if not buffer.generator_ready:
                return array
            # The buffer's get(), which a callback may call, has put them environment by environment
            return array.reshape(self.n_envs, self.n_steps, *array.shape[1:]).swapaxes(0, 1)

        self.observations = each(lambda obs: th.as_tensor(in_time(obs), device=device), buffer.observations)
        # As SB3's buffer hands them out: float32, int64 for discrete actions
        actions = th.as_tensor(in_time(buffer.actions).astype(np.float32), device=device)
        self.actions = actions.long().squeeze(2) if isinstance(buffer.action_space, spaces.Discrete) else actions
        self.old_log_prob = th.as_tensor(in_time(buffer.log_probs).reshape(self.n_steps, self.n_envs), device=device)
        self.returns = th.as_tensor(in_time(buffer.returns).reshape(self.n_steps, self.n_envs), device=device)
        done = np.concatenate([buffer.episode_starts[1:], last_done[None]])
        self.done = th.as_tensor(done.astype(np.float32), device=device)
        rewards = buffer.rewards.copy()
        for truncation, value in zip(truncations, terminal_values.cpu().numpy(), strict=True):
            rewards[truncation.step, truncation.env] -= gamma * value
        self.rewards = th.as_tensor(rewards, device=device)

    def segments(self, batch_size: int) -> Iterator[Segment]:
        """
        Cut the rollout, in order.

        :param batch_size: Number of transitions: up to n_steps, consecutive steps of one environment; above, the whole
            rollouts of ``batch_size // n_steps`` environments. What does not divide gives a shorter last segment.
        :return: The segments, each transition in exactly one of them
        """
        length = min(batch_size, self.n_steps)
        width = max(1, batch_size // self.n_steps)
        for first_env in range(0, self.n_envs, width):
            for first_step in range(0, self.n_steps, length):
                yield self._segment(
                    slice(first_step, min(first_step + length, self.n_steps)),
                    slice(first_env, min(first_env + width, self.n_envs)),
                )

    def _segment(self, steps: slice, envs: slice) -> Segment:
        inside_rollout = steps.stop < self.n_steps
        states = each(lambda obs: obs[steps, envs].flatten(0, 1), self.observations)
        if inside_rollout:
            following = each(lambda obs: obs[steps.stop, envs], self.observations)
        else:
            following = each(lambda obs: obs[envs], self.last_observation)
        truncations = [t for t in self.truncations if steps.start <= t.step < steps.stop and envs.start <= t.env < envs.stop]
        width = envs.stop - envs.start
        return Segment(
            each(_join, states, following, *(t.observation for t in truncations)),
            self.actions[steps, envs].flatten(0, 1),
            self.old_log_prob[steps, envs].flatten(),
            self.returns[steps, envs].flatten(),
            th.tensor(
                [(t.step - steps.start) * width + t.env - envs.start for t in truncations],
                dtype=th.long,
                device=self.rewards.device,
            ),
            gae.LambdaReturn(
                self.rewards[steps, envs],
                self.done[steps, envs],
                self.returns[steps.stop, envs] if inside_rollout else None,
                self.gamma,
                self.gae_lambda,
            ),
            kept={},
        )
