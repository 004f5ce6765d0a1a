"""
The discounted sum inside an episode and its adjoint, on (n_steps, n_envs) tensors.

Everything in BLPO that runs along time is this linear operator U, (U x)_t = sum_{k >= t} (gamma lambda)^(k - t) x_k, or its
transpose, an eligibility trace: what a change of the critic adds to the advantages of Generalized Advantage Estimation
(Schulman et al., arXiv 1506.02438), the leader's gradient by the values, and the weights of the correction.
"""

import torch as th


def _scan(x: th.Tensor, decay: th.Tensor) -> th.Tensor:
    """Solve y_t = x_t + decay_t y_{t-1} along the first dimension by recursive doubling: O(log n_steps) tensor operations."""
    shift = 1
    while shift < len(x):
        # Invariant: x_t holds the sum over the `shift` latest inputs, decay_t the factor that reaches before them
        x = th.cat([x[:shift], x[shift:] + decay[shift:] * x[:-shift]])
        decay = th.cat([decay[:shift], decay[shift:] * decay[:-shift]])
        shift *= 2
    return x


class DiscountedSum:
    """
    The operator U: y_t = x_t + gamma lambda (1 - d_t) y_{t+1}.

    :param done: d_t, 1 where the step ended the episode, else 0 (n_steps, n_envs)
    :param discount: gamma * lambda, in [0, 1]
    """

    def __init__(self, done: th.Tensor, discount: float) -> None:
        self.keep = discount * (1 - done)

    def __call__(self, x: th.Tensor) -> th.Tensor:
        """U x (n_steps, n_envs)."""
        return _scan(x.flip(0), self.keep.flip(0)).flip(0)

    def adjoint(self, w: th.Tensor) -> th.Tensor:
        """U^T w (n_steps, n_envs): z_t = w_t + gamma lambda (1 - d_{t-1}) z_{t-1}."""
        return _scan(w, self.keep.roll(1, 0))
