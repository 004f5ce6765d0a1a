"""
The definition of BLPO's update by loops and dense automatic differentiation in float64: the naive twin of the package.

Everything here takes functions of flat parameter vectors and knows nothing of the closed forms that it is compared with.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch as th
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from sb3_blpo.segments import Segment

FlatFunction = Callable[[th.Tensor], th.Tensor]


def as_flat_function(module: nn.Module, observations: th.Tensor) -> tuple[FlatFunction, th.Tensor]:
    """Return the module's outputs as a function of its flat parameters, and these parameters."""
    shapes = [(name, p.shape, p.numel()) for name, p in module.named_parameters()]

    def function(flat: th.Tensor) -> th.Tensor:
        parts = flat.split([n for _, _, n in shapes])
        return functional_call(
            module, {name: part.view(shape) for (name, shape, _), part in zip(shapes, parts, strict=True)}, (observations,)
        )

    return function, parameters_to_vector(module.parameters()).detach()


def lambda_returns(segment: Segment, values: th.Tensor) -> th.Tensor:
    """Return Q_t (T, B) by the recursion of the definition, differentiable by the values of the segment's observations."""
    block = segment.lambda_return
    gamma, gae_lambda = block.gamma, block.gae_lambda
    T, B = segment.shape
    V = [[values[t * B + b] for b in range(B)] for t in range(T)] + [[values[T * B + b] for b in range(B)]]
    terminal = {int(index): values[T * B + B + i] for i, index in enumerate(segment.truncated)}
    Q = [[th.zeros(())] * B for _ in range(T)]
    for b in range(B):
        following = V[T][b] if block.last_returns is None else block.last_returns[b]
        for t in reversed(range(T)):
            q = block.rewards[t, b]
            if not block.done[t, b]:
                q = q + gamma * ((1 - gae_lambda) * V[t + 1][b] + gae_lambda * following)
            elif t * B + b in terminal:
                q = q + gamma * terminal[t * B + b]
            Q[t][b] = following = q
    return th.stack([th.stack(row) for row in Q])


def discounted_sums(segment: Segment, x: th.Tensor) -> th.Tensor:
    """Return sum_{k >= t} (gamma lambda)^(k - t) x_k inside each episode of the segment (N,)."""
    block = segment.lambda_return
    B, done, totals = segment.shape[1], block.done.flatten(), []
    for start in range(len(x)):
        total, weight, k = x[start], 1.0, start
        while not done[k] and k + B < len(x):
            weight, k = weight * block.gamma * block.gae_lambda, k + B
            total = total + weight * x[k]
        totals.append(total)
    return th.stack(totals)


class Truth(NamedTuple):
    g: th.Tensor
    v: th.Tensor
    u: th.Tensor
    direct: th.Tensor
    correction: th.Tensor


def truth(
    segment: Segment,
    critic: FlatFunction,
    omega: th.Tensor,
    log_prob: FlatFunction,
    theta: th.Tensor,
    clip_range: float,
    damping: float,
    curvature: str,
    normalize_advantage: bool = False,
) -> Truth:
    """
    Differentiate the definition: J(theta, omega) and L_theta(omega) with R_theta as its target, dense Hessians and solves.

    :param critic: Flat critic parameters -> values of the segment's observations
    :param log_prob: Flat actor parameters -> log pi(a_t|s_t)
    """
    N = segment.n_transitions
    values = critic(omega)
    A = lambda_returns(segment, values).flatten() - values[:N]
    scale = 1 / (A.std() + 1e-8) if normalize_advantage else th.ones(())
    A_direct = (A - A.mean()) * scale if normalize_advantage else A
    low, high = 1 - clip_range, 1 + clip_range

    def ratio(theta_: th.Tensor) -> th.Tensor:
        return th.exp(log_prob(theta_) - segment.old_log_prob)

    def clipped_branch(theta_: th.Tensor) -> th.Tensor:
        """The factor of the advantage in PPO's surrogate, its branch chosen at the current parameters."""
        unclipped_smaller = ratio(theta) * A_direct <= ratio(theta).clamp(low, high) * A_direct
        return th.where(unclipped_smaller, ratio(theta_), ratio(theta_).clamp(low, high))

    def J(theta_: th.Tensor, omega_: th.Tensor) -> th.Tensor:
        return (clipped_branch(theta_) * lambda_returns(segment, critic(omega_)).flatten()).mean()

    def surrogate(theta_: th.Tensor) -> th.Tensor:
        r = ratio(theta_)
        return th.minimum(r * A_direct, r.clamp(low, high) * A_direct).mean()

    def R(theta_: th.Tensor) -> th.Tensor:
        return segment.returns + discounted_sums(segment, (clipped_branch(theta_) - clipped_branch(theta)) * A)

    def L(target: th.Tensor, omega_: th.Tensor) -> th.Tensor:
        return (critic(omega_)[:N] - target).square().mean()

    jacobian = th.autograd.functional.jacobian(critic, omega)[:N]
    gauss_newton = 2 / N * jacobian.T @ jacobian
    H = gauss_newton
    if curvature == "hessian":
        target = R(theta)
        H = th.autograd.functional.hessian(lambda omega_: L(target, omega_), omega)
    alpha = damping * gauss_newton.trace()
    g = th.autograd.functional.jacobian(lambda omega_: J(theta, omega_), omega)
    v = th.linalg.solve(H + alpha * th.eye(len(omega), dtype=omega.dtype), g)

    def slope(theta_: th.Tensor) -> th.Tensor:
        """grad_omega L along v, as a function of theta."""
        omega_ = omega.clone().requires_grad_()
        (gradient,) = th.autograd.grad(L(R(theta_), omega_), omega_, create_graph=True)
        return gradient @ v

    theta_ = theta.clone().requires_grad_()
    (mixed,) = th.autograd.grad(slope(theta_), theta_)
    (direct,) = th.autograd.grad(surrogate(theta_), theta_)
    return Truth(g, v, jacobian @ v, direct, -mixed * scale)
