"""
The definition of BLPO's update by loops and dense automatic differentiation in float64: the naive twin of the package.

Everything here takes functions of flat parameter vectors and knows nothing of the closed forms that it is compared with.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch as th
from torch import nn
from torch.func import functional_call

from sb3_blpo.rollout import Rollout

FlatFunction = Callable[[th.Tensor], th.Tensor]


def as_flat_function(module: nn.Module, parameters: Iterable[nn.Parameter], *inputs: Any) -> tuple[FlatFunction, th.Tensor]:
    """Return the module's outputs (n,) as a function of these of its parameters, flattened and joined, and their values."""
    parameters = list(parameters)
    names = {id(parameter): name for name, parameter in module.named_parameters()}

    def function(flat: th.Tensor) -> th.Tensor:
        parts = flat.split([parameter.numel() for parameter in parameters])
        changed = {names[id(p)]: part.view_as(p) for p, part in zip(parameters, parts, strict=True)}
        return functional_call(module, changed, inputs).flatten()

    return function, th.cat([parameter.detach().flatten() for parameter in parameters])


def lambda_returns(rollout: Rollout, values: th.Tensor) -> th.Tensor:
    """Return what the values of the rollout's observations contribute to its lambda-returns, by the recursion (N,)."""
    T, E = rollout.done.shape
    gamma, gae_lambda = rollout.gamma, rollout.gae_lambda
    terminal = dict(zip(rollout.truncated.tolist(), values[T * E + E :], strict=True))
    Q = [values.new_zeros(())] * (T * E)
    for env in range(E):
        following = values[T * E + env]
        for t in reversed(range(T)):
            k = t * E + env
            if not rollout.done[t, env]:
                # `values[k + E]` is that of the next state, and of the observation after the rollout behind its last step
                following = gamma * ((1 - gae_lambda) * values[k + E] + gae_lambda * following)
            else:
                following = gamma * terminal[k] if k in terminal else values.new_zeros(())
            Q[k] = following
    return th.stack(Q)


def discounted_sums(rollout: Rollout, x: th.Tensor) -> th.Tensor:
    """Return sum_{k >= t} (gamma lambda)^(k - t) x_k inside each episode (N,)."""
    E, done = rollout.done.shape[1], rollout.done.flatten()
    totals = []
    for start in range(len(x)):
        total, weight, k = x[start], 1.0, start
        while not done[k] and k + E < len(x):
            weight, k = weight * rollout.gamma * rollout.gae_lambda, k + E
            total = total + weight * x[k]
        totals.append(total)
    return th.stack(totals)


class Bilevel:
    """
    The two objectives of the definition, and everything that follows from them by automatic differentiation.

    :param rollout: In float64
    :param values_of_rollout: Of its observations, under the critic that its advantages were made with
    :param critic: Flat parameters of the critic -> values of the rollout's observations
    :param omega: These parameters
    :param log_prob: Flat parameters of the actor -> log pi(a_t|s_t)
    :param theta: These parameters
    :param clip_range: PPO's clipping parameter
    """

    def __init__(
        self,
        rollout: Rollout,
        values_of_rollout: th.Tensor,
        critic: FlatFunction,
        omega: th.Tensor,
        log_prob: FlatFunction,
        theta: th.Tensor,
        clip_range: float,
    ) -> None:
        self.rollout, self.N = rollout, len(rollout)
        self.critic, self.omega = critic, omega
        self.log_prob, self.theta = log_prob, theta
        self.clip_range = clip_range
        # Lambda-returns are affine in the values, and those under the rollout's critic are known
        self.offset = rollout.advantages + values_of_rollout[: self.N] - lambda_returns(rollout, values_of_rollout)
        self.baseline = critic(omega)[: self.N]
        self.A = self.Q(omega) - self.baseline

    def Q(self, omega: th.Tensor) -> th.Tensor:
        return self.offset + lambda_returns(self.rollout, self.critic(omega))

    def surrogate(self, theta: th.Tensor, A: th.Tensor) -> th.Tensor:
        """min(rho_t A_t, clip(rho_t) A_t) (N,)."""
        ratio = (self.log_prob(theta) - self.rollout.old_log_prob).exp()
        return th.minimum(ratio * A, ratio.clamp(1 - self.clip_range, 1 + self.clip_range) * A)

    def J(self, theta: th.Tensor, omega: th.Tensor) -> th.Tensor:
        """The leader's objective."""
        return self.surrogate(theta, self.Q(omega) - self.baseline).mean()

    def R(self, theta: th.Tensor) -> th.Tensor:
        """The follower's targets, as the actor would move them (N,)."""
        gain = self.surrogate(theta, self.A) - self.surrogate(self.theta, self.A)
        return self.rollout.returns + discounted_sums(self.rollout, gain)

    def L(self, theta: th.Tensor, omega: th.Tensor) -> th.Tensor:
        """The follower's loss."""
        return (self.critic(omega)[: self.N] - self.R(theta)).square().mean()


class Truth(NamedTuple):
    g: th.Tensor
    v: th.Tensor
    u: th.Tensor
    e: th.Tensor
    direct: th.Tensor
    correction: th.Tensor


def truth(problem: Bilevel, damping: float, curvature: str) -> Truth:
    """Differentiate the two objectives: dense Hessians, a dense solve, a mixed second derivative."""
    theta, omega = problem.theta, problem.omega
    derivative = th.autograd.functional.jacobian
    J = derivative(problem.critic, omega)[: problem.N]
    H = gauss_newton = 2 / problem.N * J.T @ J
    if curvature == "hessian":
        H = th.autograd.functional.hessian(lambda x: problem.L(theta, x), omega)
    g = derivative(lambda x: problem.J(theta, x), omega)
    v = th.linalg.solve(H + damping * gauss_newton.trace() * th.eye(len(omega)).to(H), g)
    U = derivative(lambda x: discounted_sums(problem.rollout, x), th.zeros_like(problem.A))

    def slope(theta: th.Tensor) -> th.Tensor:
        """grad_omega L along v, as a function of theta."""
        x = omega.clone().requires_grad_()
        return th.autograd.grad(problem.L(theta, x), x, create_graph=True)[0] @ v

    x = theta.clone().requires_grad_()
    (mixed,) = th.autograd.grad(slope(x), x)
    direct = derivative(lambda x: problem.J(x, omega), theta)
    return Truth(g, v, J @ v, U.T @ J @ v, direct, -mixed)
