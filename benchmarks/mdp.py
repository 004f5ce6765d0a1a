"""
The actor-critic game of a small random MDP, exactly: expectations instead of samples, in float64, for many MDPs at once.

Nothing here is derived. The leader's objective and the follower's response are written down as README defines them, and
automatic differentiation does the rest, so that the package's formulas have something to be compared with.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch as th
from torch.nn import functional as F


class MDP(NamedTuple):
    """
    MDPs with a linear critic and GAE's constants. Leading dimensions, if any, run over MDPs.

    :param P: Transition probabilities (..., n_states, n_actions, n_states)
    :param r: Rewards (..., n_states, n_actions)
    :param features: The critic's features (..., n_states, n_features)
    :param gamma: Discount factor, in [0, 1)
    :param gae_lambda: Factor of GAE, in [0, 1]
    """

    P: th.Tensor
    r: th.Tensor
    features: th.Tensor
    gamma: float
    gae_lambda: float


def random_mdps(
    seeds: range, gae_lambda: float, n_features: int | None, n_states: int = 12, n_actions: int = 3, gamma: float = 0.95
) -> tuple[MDP, th.Tensor]:
    """
    :param n_features: Number of the critic's random features; ``None``: tabular
    :return: One MDP for each seed, and random logits for each (n_seeds, n_states, n_actions)
    """
    draws = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        P = rng.dirichlet(np.ones(n_states), size=(n_states, n_actions))
        r, logits = rng.standard_normal((2, n_states, n_actions))
        features = np.eye(n_states) if n_features is None else rng.standard_normal((n_states, n_features))
        draws.append((P, r, features, logits))
    stacked = [th.from_numpy(np.stack(parts)) for parts in zip(*draws, strict=True)]
    return MDP(stacked[0], stacked[1], stacked[2], gamma, gae_lambda), stacked[3]


def gradient(function: Callable[[th.Tensor], th.Tensor], theta: th.Tensor) -> th.Tensor:
    """The gradient of each MDP's objective by its own logits."""
    theta = theta.detach().requires_grad_()
    return th.autograd.grad(function(theta).sum(), theta)[0]


class Game:
    """
    The game as a rollout freezes it: states are visited as under the rollout's policy, and the follower's targets, the
    lambda-returns, are those of the rollout's critic.

    :param mdp: The MDPs
    :param logits: Of the rollout's policy (..., n_states, n_actions)
    :param omega: The critic's parameters (..., n_features); ``None``: the TD(lambda) fixed point
    :param ent_coef: Entropy coefficient of the leader's objective
    """

    def __init__(self, mdp: MDP, logits: th.Tensor, omega: th.Tensor | None = None, ent_coef: float = 0.0) -> None:
        self.mdp, self.logits, self.ent_coef = mdp, logits.detach(), ent_coef
        gl = mdp.gamma * mdp.gae_lambda
        identity = th.eye(logits.shape[-2], dtype=th.float64)
        self.pi = F.softmax(self.logits, dim=-1)
        P_pi, r_pi = self._under(self.pi)
        #: How often a rollout visits each state (..., n_states): the left null vector of P_pi - I that sums to 1
        balance = (P_pi - identity).mT + 1
        self.visits = th.linalg.solve(balance, th.ones_like(r_pi))
        # Sums discounted by gamma lambda, the expectation of the package's operator U; then R = U r + bootstrap V
        self.U = th.linalg.inv(identity - gl * P_pi)
        self.bootstrap = mdp.gamma * (1 - mdp.gae_lambda) * self.U @ P_pi
        self.U_r = _product(self.U, r_pi)

        weighted = self.visits[..., None] * mdp.features
        #: Fits values with the least squared error over the visited states (..., n_features, n_states)
        self.fit = th.linalg.solve(weighted.mT @ mdp.features, weighted.mT)
        if omega is None:
            projected = self.fit @ self.bootstrap @ mdp.features
            fixed_point = th.linalg.inv(th.eye(projected.shape[-1], dtype=th.float64) - projected)
            omega = _product(fixed_point @ self.fit, self.U_r)
        self.omega = omega
        self.advantages = self.action_values(omega) - self.values(omega)[..., None]

    def _under(self, pi: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Transition probabilities (..., n_states, n_states) and rewards (..., n_states) under a policy."""
        return th.einsum("...sa,...sat->...st", pi, self.mdp.P), (pi * self.mdp.r).sum(-1)

    def values(self, omega: th.Tensor) -> th.Tensor:
        """V (..., n_states)."""
        return _product(self.mdp.features, omega)

    def returns(self, omega: th.Tensor) -> th.Tensor:
        """The lambda-returns from each state under the rollout's policy and a critic (..., n_states)."""
        return self.U_r + _product(self.bootstrap, self.values(omega))

    def action_values(self, omega: th.Tensor) -> th.Tensor:
        """The lambda-returns from each state and action (..., n_states, n_actions)."""
        gae_lambda = self.mdp.gae_lambda
        following = (1 - gae_lambda) * self.values(omega) + gae_lambda * self.returns(omega)
        return self.mdp.r + self.mdp.gamma * th.einsum("...sat,...t->...sa", self.mdp.P, following)

    def response(self, logits: th.Tensor) -> th.Tensor:
        """The critic, moved as its best response moves from the rollout's policy to this one: its targets change with it."""
        change = ((F.softmax(logits, dim=-1) - self.pi) * self.advantages).sum(-1)
        return self.omega + _product(self.fit @ self.U, change)

    def objective(self, logits: th.Tensor, omega: th.Tensor, differentiate_baseline: bool = False) -> th.Tensor:
        """
        :param differentiate_baseline: Take the mean advantage for the leader's objective, its baseline included
        :return: The leader's objective for a policy and a critic (...,)
        """
        pi = F.softmax(logits, dim=-1)
        objective = (pi * self.action_values(omega)).sum(-1) - self.ent_coef * (pi * F.log_softmax(logits, dim=-1)).sum(-1)
        if differentiate_baseline:
            objective = objective - self.values(omega)
        return (self.visits * objective).sum(-1)

    def total(self, logits: th.Tensor, differentiate_baseline: bool = False) -> th.Tensor:
        """The leader's objective with the critic responding (...,)."""
        return self.objective(logits, self.response(logits), differentiate_baseline)

    def direct(self) -> th.Tensor:
        """The leader's gradient at a fixed critic (..., n_states, n_actions)."""
        return gradient(lambda logits: self.objective(logits, self.omega), self.logits)

    def hypergradient(self, differentiate_baseline: bool = False) -> th.Tensor:
        """The leader's total derivative (..., n_states, n_actions)."""
        return gradient(lambda logits: self.total(logits, differentiate_baseline), self.logits)

    def follower_gradient(self) -> th.Tensor:
        """Gradient of the follower's mean squared error (..., n_features)."""
        error = self.values(self.omega) - self.returns(self.omega)
        return 2 * _product(self.mdp.features.mT, self.visits * error)

    def policy_gradient(self) -> th.Tensor:
        """The true gradient of the discounted return, started from a visited state (..., n_states, n_actions)."""

        def discounted_return(logits: th.Tensor) -> th.Tensor:
            P_pi, r_pi = self._under(F.softmax(logits, dim=-1))
            identity = th.eye(P_pi.shape[-1], dtype=th.float64)
            return (self.visits * th.linalg.solve(identity - self.mdp.gamma * P_pi, r_pi)).sum(-1)

        return gradient(discounted_return, self.logits)


def _product(matrix: th.Tensor, vector: th.Tensor) -> th.Tensor:
    return (matrix @ vector[..., None])[..., 0]


def cosine(a: th.Tensor, b: th.Tensor) -> th.Tensor:
    """Cosine of the angle between each MDP's two gradients (...,)."""
    return F.cosine_similarity(a.flatten(-2), b.flatten(-2), dim=-1)
