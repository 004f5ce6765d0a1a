"""
A finished rollout as tensors: what the critic's values make of it, in time order, and random minibatches of it.

SB3's rollout buffer, or the user's, is read once and copied: no forward pass reaches it. Its ``get()`` is not called.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_blpo.checks import check_finite
from sb3_blpo.gae import DiscountedSum


class Truncation(NamedTuple):
    """A step of the rollout, in one environment, that was cut short, and the terminal observation that it led to."""

    step: int
    env: int
    observation: Any


def map_parts(function: Callable[..., Any], *observations: Any) -> Any:
    """Apply a function of one or more arrays to observations, or to each part of them if they are dictionaries."""
    if isinstance(observations[0], dict):
        return {key: map_parts(function, *(obs[key] for obs in observations)) for key in observations[0]}
    return function(*observations)


def take(observations: PyTorchObs, index: th.Tensor) -> PyTorchObs:
    """A copy of k of the observations, which a features extractor may change in place (k, ...)."""
    return map_parts(lambda obs: obs[index], observations)


def size(observations: PyTorchObs) -> int:
    return size(next(iter(observations.values()))) if isinstance(observations, dict) else len(observations)


def shuffled(n: int) -> th.Tensor:
    """The numbers from 0 to n - 1 in random order (n,)."""
    return th.randperm(n, device="cpu")


def minibatches(
    n: int, batch_size: int, n_minibatches: int | None = None, draw: Callable[[int], th.Tensor] = shuffled
) -> Iterator[th.Tensor]:
    """
    Draw random minibatches, each row once before any comes again.

    :param n: Number of rows
    :param batch_size: Rows in a minibatch; the last one of a pass may have fewer
    :param n_minibatches: How many; ``None``: one pass
    :param draw: Draws the order of the rows in each pass
    :return: Indices of each minibatch's rows (batch_size,)
    """
    n_minibatches = -(-n // batch_size) if n_minibatches is None else n_minibatches
    passes = (draw(n).split(batch_size) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(passes), n_minibatches)


def joined(parts: list[tuple[PyTorchObs, th.Tensor]]) -> tuple[PyTorchObs, th.Tensor]:
    """Join several rollouts' observations and the numbers that belong to them."""
    observations, numbers = zip(*parts, strict=True)
    return map_parts(lambda *obs: th.cat(obs), *observations), th.cat(numbers)


def episode_starts(buffer: RolloutBuffer) -> np.ndarray:
    """1 where a step began an episode (n_steps, n_envs)."""
    starts = buffer.episode_starts
    flattened = starts.shape != (buffer.buffer_size, buffer.n_envs)  # by the ``get()`` of some buffers
    return starts.reshape(buffer.n_envs, buffer.buffer_size).T.copy() if flattened else starts


@dataclass
class Rollout:
    """
    T = n_steps of E = n_envs environments, N = T E transitions in time order. Flat tensors join steps and environments, steps
    first.
    """

    #: s_t, then those after the last step, then the terminal ones of truncated episodes (N + E + n_truncated, ...)
    observations: PyTorchObs
    actions: th.Tensor  # (N, ...) or, if discrete, (N,)
    old_log_prob: th.Tensor  # log pi_old(a_t|s_t) (N,)
    advantages: th.Tensor  # of GAE under the rollout's critic (N,)
    returns: th.Tensor  # the critic's targets (N,)
    done: th.Tensor  # 1 where the step ended the episode (T, E)
    truncated: th.Tensor  # flat indices of the truncated steps (n_truncated,)
    gamma: float
    gae_lambda: float
    #: What else the actor saw, by its argument of the policy's methods: action masks, each (N, ...)
    actor_inputs: dict[str, th.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, buffer: RolloutBuffer, last_observation: Any, last_done: np.ndarray, truncations: list[Truncation], device: Any,
        actor_inputs: Iterable[str] = (),
    ) -> "Rollout":  # fmt: skip
        """A copy of a full buffer and of what came after its last step. Raises ValueError if anything is not finite."""
        n_steps, n_envs = buffer.buffer_size, buffer.n_envs

        def flat(array: np.ndarray) -> np.ndarray:
            if buffer.generator_ready:  # `get()` has put environments first
                array = array.reshape(n_envs, n_steps, *array.shape[1:]).swapaxes(0, 1)
            return array.reshape(n_steps * n_envs, *array.shape[2:])

        def tensor(array: np.ndarray) -> th.Tensor:
            # What MuJoCo gives in float64, networks take in float32
            return th.tensor(array.astype(np.float32) if array.dtype == np.float64 else array, device=device)

        def join(states: np.ndarray, *others: np.ndarray) -> th.Tensor:
            # Discrete observations are (n, 1) in the buffer, (n,) elsewhere
            parts = [flat(states)]
            parts += [np.asarray(other, states.dtype).reshape(-1, *parts[0].shape[1:]) for other in others]
            return tensor(np.concatenate(parts))

        for name in ("observations", "log_probs", "advantages", "returns"):
            check_finite(name, getattr(buffer, name))
        check_finite("observations", last_observation)
        # As SB3's buffer hands them out: float32, int64 if discrete
        actions = tensor(flat(buffer.actions).astype(np.float32))
        return cls(
            observations=map_parts(join, buffer.observations, last_observation, *(t.observation for t in truncations)),
            actions=actions.long().flatten() if isinstance(buffer.action_space, spaces.Discrete) else actions,
            old_log_prob=tensor(flat(buffer.log_probs).flatten()),
            advantages=tensor(flat(buffer.advantages).flatten()),
            returns=tensor(flat(buffer.returns).flatten()),
            actor_inputs={name: tensor(flat(getattr(buffer, name))) for name in actor_inputs},
            done=tensor(np.concatenate([episode_starts(buffer)[1:], last_done[None]]).astype(np.float32)),
            truncated=th.tensor([t.step * n_envs + t.env for t in truncations], dtype=th.long, device=device),
            gamma=buffer.gamma,
            gae_lambda=buffer.gae_lambda,
        )

    @cached_property
    def U(self) -> DiscountedSum:
        return DiscountedSum(self.done, self.gamma * self.gae_lambda)

    def __len__(self) -> int:
        return self.done.numel()

    @property
    def states(self) -> PyTorchObs:
        return map_parts(lambda obs: obs[: len(self)], self.observations)

    @property
    def targets(self) -> tuple[PyTorchObs, th.Tensor]:
        """What the critic fits: states, and their values as they should be."""
        return self.states, self.returns

    def advantages_after(self, change: th.Tensor) -> th.Tensor:
        """
        Advantages of GAE under another critic (N,): the buffer's, and what the change of all observations' values adds to
        them, for they are affine in the values.
        """
        n, n_envs = self.done.numel(), self.done.shape[1]
        states, last, terminal = change.split([n, n_envs, len(self.truncated)])
        states = states.view(self.done.shape)
        delta = self.gamma * (1 - self.done) * th.cat([states[1:], last[None]]) - states
        delta.view(-1)[self.truncated] += self.gamma * terminal
        return self.advantages + self.U(delta).flatten()

    def return_gradient(self, weights: th.Tensor) -> th.Tensor:
        """
        Differentiate sum_t weights_t Q_t, Q_t = V(s_t) + A_t the lambda-returns: its gradient is sum_j c_j grad V(s_j). The
        baseline V(s_t) that turns a lambda-return into an advantage takes no part.

        :return: c, one for each of :attr:`observations`
        """
        z = self.U.adjoint(weights.view(self.done.shape))
        by_next = self.gamma * (1 - self.done) * z
        states = th.cat([th.zeros_like(z[:1]), (1 - self.gae_lambda) * by_next[:-1]])
        return th.cat([states.flatten(), by_next[-1], self.gamma * z.view(-1)[self.truncated]])

    def eligibility_trace(self, x: th.Tensor) -> th.Tensor:
        """U^T x: e_k = x_k + gamma lambda e_{k-1} inside each episode (N,)."""
        return self.U.adjoint(x.view(self.done.shape)).flatten()
