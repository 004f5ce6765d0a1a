"""
Generalized advantage estimation and its adjoint on (n_steps, n_envs) tensors.

Everything in BLPO that runs along time is one linear operator U, the discounted sum inside an episode,
(U x)_t = sum_{k >= t} (gamma lambda)^(k - t) x_k, or its transpose, an eligibility trace: lambda-returns are U applied to
rewards and the values that they bootstrap from, and both the leader's gradient by the values and the weights of the correction
are traces.
"""

import functools
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


@functools.lru_cache(maxsize=8)
def _powers(n_steps: int, discount: float, dtype: th.dtype, device: th.device) -> th.Tensor:
    """discount^(k - t) for k >= t, else 0 (n_steps, n_steps): the same for all blocks of one length."""
    time = th.arange(n_steps, device=device)
    return (th.tensor(discount, dtype=dtype, device=device) ** (time - time[:, None]).clamp_min(0)).triu()


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
            ended = done.long()
            episode = (ended.cumsum(0) - ended).T
            self.matrix = _powers(len(done), discount, done.dtype, done.device) * (episode[:, :, None] == episode[:, None])
            if len(self.matrix) == 1:  # one environment, (T, T): a plain product takes half the time of a batch of one
                self.matrix = self.matrix[0]

    def __call__(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: (n_steps, n_envs)
        :return: U x (n_steps, n_envs)
        """
        if self.matrix is None:
            return _scan(x.flip(0), self.keep.flip(0)).flip(0)
        return self._product(self.matrix, x)

    def adjoint(self, w: th.Tensor) -> th.Tensor:
        """
        Apply the transpose of U, an eligibility trace: z_t = w_t + gamma lambda (1 - d_{t-1}) z_{t-1}.

        :param w: (n_steps, n_envs)
        :return: U^T w (n_steps, n_envs)
        """
        if self.matrix is None:
            return _scan(w, self.keep.roll(1, 0))
        return self._product(self.matrix.mT, w)

    @staticmethod
    def _product(matrix: th.Tensor, x: th.Tensor) -> th.Tensor:
        return matrix @ x if matrix.ndim == 2 else (matrix @ x.T[:, :, None])[:, :, 0].T


class ValueCoefficients(NamedTuple):
    """
    Derivatives by the values that :class:`LambdaReturn` bootstraps from.

    :param next_values: By V(s_{t+1}) (n_steps, n_envs)
    :param terminal_values: By V of the terminal observations, meaningful where the step was truncated (n_steps, n_envs)
    """

    next_values: th.Tensor
    terminal_values: th.Tensor


class LambdaReturn:
    """
    The lambda-returns of a block of consecutive steps, from which Generalized Advantage Estimation (Schulman et al.,
    arXiv 1506.02438) subtracts the values V(s_t). They are affine in the values that they bootstrap from,

    Q_t = r_t + gamma (1 - d_t) [(1 - lambda) V_{t+1} + lambda Q_{t+1}] + gamma V(s+),
    Q = U (r + c V_next + gamma V(s+)),   c_t = gamma (1 - lambda) (1 - d_t),

    s+ being the terminal observation of a truncated step. What does not depend on values is computed here, once.

    :param rewards: r_t, without any bootstrap value (n_steps, n_envs)
    :param done: d_t, 1 where the step ended the episode, else 0 (n_steps, n_envs)
    :param last_returns: Q of the state after the last step where the block ends inside a rollout, held fixed (n_envs,);
        ``None`` at the rollout's end, where Q is V
    :param gamma: Discount factor, in [0, 1]
    :param gae_lambda: Trade-off of bias and variance, in [0, 1]
    """

    def __init__(
        self, rewards: th.Tensor, done: th.Tensor, last_returns: th.Tensor | None, gamma: float, gae_lambda: float
    ) -> None:
        self.rewards, self.done, self.last_returns = rewards, done, last_returns
        self.gamma, self.gae_lambda = gamma, gae_lambda
        self.U = DiscountedSum(done, gamma * gae_lambda)
        going_on = gamma * (1 - done)
        self.r, self.c = rewards.clone(), (1 - gae_lambda) * going_on
        if last_returns is None:
            self.c[-1] = going_on[-1]
        else:
            self.r[-1] += gae_lambda * going_on[-1] * last_returns

    def __call__(self, next_values: th.Tensor, terminal_values: th.Tensor | None = None) -> th.Tensor:
        """
        :param next_values: V(s_{t+1}) (n_steps, n_envs)
        :param terminal_values: V(s+) where the step was truncated, else 0 (n_steps, n_envs); ``None``: 0
        :return: Q (n_steps, n_envs)
        """
        x = th.addcmul(self.r, self.c, next_values)
        return self.U(x if terminal_values is None else x + self.gamma * terminal_values)

    def gradient(self, weights: th.Tensor) -> ValueCoefficients:
        """
        Differentiate sum_t weights_t Q_t. The baseline V_t that turns a lambda-return into an advantage takes no part.

        :param weights: (n_steps, n_envs)
        :return: The coefficients of the gradient sum_j c_j grad V(s_j)
        """
        z = self.U.adjoint(weights)
        return ValueCoefficients(self.c * z, self.gamma * z)
