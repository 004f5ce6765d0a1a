"""
Generalized advantage estimation and its adjoint on (n_steps, n_envs) tensors.

Everything in BLPO that runs along time is one linear operator U, the discounted sum inside an episode,
(U x)_t = sum_{k >= t} (gamma lambda)^(k - t) x_k, or its transpose, an eligibility trace: advantages are U delta, and both the
leader's gradient by the values and the weights of the correction are traces.
"""

from typing import NamedTuple

import torch as th


def _scan(x: th.Tensor, decay: th.Tensor) -> th.Tensor:
    """
    Solve y_t = x_t + decay_t y_{t-1} along the first dimension by recursive doubling: O(log n_steps) tensor operations.

    :param x: Inputs (n_steps, n_envs)
    :param decay: Factors (n_steps, n_envs), the first row has no effect
    :return: y (n_steps, n_envs)
    """
    shift = 1
    while shift < len(x):
        # Invariant: x_t holds the sum over the `shift` latest inputs, decay_t the factor that reaches before them
        x = th.cat([x[:shift], x[shift:] + decay[shift:] * x[:-shift]])
        decay = th.cat([decay[:shift], decay[shift:] * decay[:-shift]])
        shift *= 2
    return x


class DiscountedSum:
    """
    The operator U on (n_steps, n_envs) tensors: y_t = x_t + gamma lambda (1 - d_t) y_{t+1}.

    Short blocks keep the matrix, which is made once and applied at every epoch; for long ones, whose matrix would grow with
    the square of n_steps, U is applied by a scan.

    :param done: d_t, 1 where the step ended the episode, else 0 (n_steps, n_envs)
    :param discount: gamma * lambda, in [0, 1]
    """

    max_matrix_steps = 512

    def __init__(self, done: th.Tensor, discount: float) -> None:
        #: gamma * lambda where the next step belongs to the same episode, else 0 (n_steps, n_envs)
        self.keep = discount * (1 - done)
        self.matrix: th.Tensor | None = None
        if len(done) <= self.max_matrix_steps:
            # U[t, k] = (gamma lambda)^(k - t) from t on to the end of its episode (n_envs, T, T)
            time = th.arange(len(done), device=done.device)
            powers = th.tensor(discount, dtype=done.dtype, device=done.device) ** (time - time[:, None]).clamp_min(0)
            episode = (done.cumsum(0) - done).T
            self.matrix = (powers * (episode[:, :, None] == episode[:, None])).triu()

    def __call__(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: (n_steps, n_envs)
        :return: U x (n_steps, n_envs)
        """
        if self.matrix is not None:
            return (self.matrix @ x.T[:, :, None])[:, :, 0].T
        return _scan(x.flip(0), self.keep.flip(0)).flip(0)

    def adjoint(self, w: th.Tensor) -> th.Tensor:
        """
        Apply the transpose of U, an eligibility trace: z_t = w_t + gamma lambda (1 - d_{t-1}) z_{t-1}.

        :param w: (n_steps, n_envs)
        :return: U^T w (n_steps, n_envs)
        """
        if self.matrix is not None:
            return (w.T[:, None] @ self.matrix)[:, 0].T
        return _scan(w, self.keep.roll(1, 0))


def advantages(
    rewards: th.Tensor,
    values: th.Tensor,
    last_values: th.Tensor,
    last_returns: th.Tensor | None,
    terminal_values: th.Tensor,
    done: th.Tensor,
    gamma: float,
    U: DiscountedSum,
) -> th.Tensor:
    """
    GAE (Schulman et al., arXiv 1506.02438) of a block of consecutive steps: the lambda-return Q_t less the value V_t, where
    Q_t = r_t + gamma (1 - d_t) [(1 - lambda) V_{t+1} + lambda Q_{t+1}] + gamma V(s+), s+ being the terminal observation of a
    truncated step.

    :param rewards: r_t, without any bootstrap value (n_steps, n_envs)
    :param values: V(s_t) (n_steps, n_envs)
    :param last_values: V of the state after the last step (n_envs,)
    :param last_returns: Q of that state where the block ends inside a rollout (n_envs,); ``None`` at the rollout's end,
        where Q is V
    :param terminal_values: V of the terminal observation where the step was truncated, else 0 (n_steps, n_envs)
    :param done: 1 where the step ended the episode, else 0 (n_steps, n_envs)
    :param gamma: Discount factor, in [0, 1]
    :param U: The discounted sum with gamma * lambda
    :return: Advantages (n_steps, n_envs)
    """
    next_values = th.cat([values[1:], last_values[None]])
    delta = rewards + gamma * ((1 - done) * next_values + terminal_values) - values
    if last_returns is not None:
        tail = U.keep[-1] * (last_returns - last_values)
        delta = th.cat([delta[:-1], (delta[-1] + tail)[None]])
    return U(delta)


class ValueCoefficients(NamedTuple):
    """
    Derivatives by the values that :func:`advantages` bootstraps from.

    :param values: By V(s_t) (n_steps, n_envs)
    :param last_values: By V of the state after the last step (n_envs,)
    :param terminal_values: By V of the terminal observations, meaningful where the step was truncated (n_steps, n_envs)
    """

    values: th.Tensor
    last_values: th.Tensor
    terminal_values: th.Tensor


def return_gradient(
    weights: th.Tensor, done: th.Tensor, gamma: float, gae_lambda: float, U: DiscountedSum, inside_rollout: bool
) -> ValueCoefficients:
    """
    Differentiate sum_t weights_t Q_t, Q_t the lambda-returns of :func:`advantages`, by the values they bootstrap from. The
    baseline V_t that turns a lambda-return into an advantage takes no part.

    :param weights: (n_steps, n_envs)
    :param done: As in :func:`advantages` (n_steps, n_envs)
    :param gamma: Discount factor, in [0, 1]
    :param gae_lambda: Trade-off of bias and variance, in [0, 1]
    :param U: The discounted sum with gamma * lambda
    :param inside_rollout: Whether the block ends inside the rollout, where Q of the state that follows is held fixed
    :return: The coefficients c of the gradient sum_j c_j grad V(s_j)
    """
    z = U.adjoint(weights)
    by_next = gamma * (1 - done) * z
    last = by_next[-1] * (1 - gae_lambda) if inside_rollout else by_next[-1]
    by_values = th.cat([th.zeros_like(z[:1]), (1 - gae_lambda) * by_next[:-1]])
    return ValueCoefficients(by_values, last, gamma * z)
