"""
The leader's gradient: the direct policy gradient and the correction for the critic's best response.

Both are policy gradients with weights on the ratios rho_t = pi(a_t|s_t) / pi_old(a_t|s_t) of one minibatch,

    (1/N) sum_t (1 + 2 e_t) m_t rho_t A_t grad log pi(a_t|s_t),

so the bilevel part costs one linear solve for the critic and one further backward pass through the actor. Gradients by the
actor's parameters are flat vectors, joined in the optimizer's order.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch as th

from sb3_blpo.curvature import MAX_GRAM_ROWS, Curvature, GaussNewton, GramGaussNewton, Hessian
from sb3_blpo.ihvp import Exact, Solver
from sb3_blpo.ihvp.base import relative_residual
from sb3_blpo.jacobian import Jacobian
from sb3_blpo.segments import Segment

#: Below what numbers may be taken for 0: the smallest normal one of float32
TINY = th.finfo(th.float32).tiny


class Surrogate(NamedTuple):
    """
    PPO's clipped surrogate objective and what the two gradients need of it.

    :param objective: (1/N) sum_t min(rho_t A_t, clip(rho_t) A_t), A normalised where wanted ()
    :param log_ratio: Logarithm of rho_t (N,)
    :param ratio: rho_t (N,)
    :param advantages: A_t, normalised where wanted (N,)
    :param active: Whether the unclipped branch is active: m_t (N,)
    :param weights: Derivative of the objective by the advantage, w_t, before normalisation (N,)
    :param scale: What the advantage was multiplied by to normalise it
    """

    objective: th.Tensor
    log_ratio: th.Tensor
    ratio: th.Tensor
    advantages: th.Tensor
    active: th.Tensor
    weights: th.Tensor
    scale: th.Tensor | float


def clipped_surrogate(
    log_prob: th.Tensor, old_log_prob: th.Tensor, advantages: th.Tensor, clip_range: float, normalize_advantage: bool
) -> Surrogate:
    """
    :param log_prob: log pi(a_t|s_t) (N,)
    :param old_log_prob: The same under the rollout's policy (N,)
    :param advantages: A_t under the current critic (N,)
    :param clip_range: PPO's clipping parameter
    :param normalize_advantage: Whether to shift and scale the advantages to mean 0 and standard deviation 1
    :return: The surrogate
    """
    scale: th.Tensor | float = 1.0
    if normalize_advantage and len(advantages) > 1:
        scale = 1 / (advantages.std() + 1e-8)
        advantages = (advantages - advantages.mean()) * scale
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    active = ratio * advantages <= clipped * advantages
    weights = th.where(active, ratio, clipped) / len(advantages)
    return Surrogate(weights @ advantages, log_ratio, ratio, advantages, active, weights, scale)


class Response(NamedTuple):
    """
    How the critic's best response to the actor would move its values.

    :param u: Change of V(s_t) along v = (H + alpha I)^-1 grad_omega J (N,)
    :param ok: Whether the solve succeeded ()
    :param residual: Its residual, relative to the right side, if asked for; else NaN ()
    """

    u: th.Tensor
    ok: th.Tensor
    residual: th.Tensor


def best_response(
    jacobian: Jacobian,
    coefficients: th.Tensor,
    residuals: th.Tensor,
    solver: Solver,
    damping: float,
    curvature: str,
    with_residual: bool = True,
) -> Response:
    """
    Solve (H + alpha I) v = g for the follower.

    :param jacobian: Of the critic's values of the segment's observations
    :param coefficients: c, with g = J^T c the gradient of the leader's objective by the critic (n_rows,)
    :param residuals: V_t - R_t of the N states in the critic's loss (N,)
    :param solver: The solver
    :param damping: alpha in units of the trace of the Gauss-Newton matrix, positive
    :param curvature: "gauss_newton" or "hessian"
    :param with_residual: Whether to compute the residual, which takes further products with the Jacobian
    :return: What the solution does to the values
    """
    n_steps = len(residuals)
    alpha = damping * 2 / n_steps * jacobian.squared_norm(n_steps)
    system: Curvature
    if curvature == "hessian":
        system = Hessian(jacobian, coefficients, residuals)
    elif isinstance(solver, Exact) or not solver.needs_gram or (jacobian.cheap_gram and len(coefficients) <= MAX_GRAM_ROWS):
        system = GramGaussNewton(jacobian, coefficients, n_steps, whole=solver.needs_gram)
    else:
        system = GaussNewton(jacobian, coefficients, n_steps)
    solution = solver.solve(system, alpha)
    u = system.to_values(solution.x) if solution.values is None else solution.values
    residual = relative_residual(system, alpha, solution.x) if with_residual else u.new_full((), th.nan)
    return Response(u, solution.ok, residual)


class Comparison(NamedTuple):
    """
    Direct gradient and correction beside one another, before the cap. All () or, of several minibatches, stacked.

    :param direct_norm: Norm of the direct gradient
    :param correction_norm: Norm of the correction
    :param product: Their inner product
    :param scale: What the cap multiplies the correction by, at most 1
    :param ok: Whether it is added: the solve did not fail, and nothing overflowed
    """

    direct_norm: th.Tensor
    correction_norm: th.Tensor
    product: th.Tensor
    scale: th.Tensor
    ok: th.Tensor

    def statistics(self) -> dict[str, th.Tensor]:
        """
        :return: The correction's norm relative to the direct gradient's, the cosine of the angle between them, whether the
            cap was active, and whether the correction was skipped. No correction at all (gae_lambda=1) has ratio and cosine 0
        """
        direct_norm, norm, product, scale, ok = self
        return {
            "correction_ratio": norm / direct_norm.clamp_min(TINY),
            "correction_cosine": product / (direct_norm * norm).clamp_min(TINY),
            "correction_capped": (scale < 1) & (norm > 0),
            "correction_skipped": ~ok,
        }


def add_correction(
    direct: th.Tensor, correction: th.Tensor, ok: th.Tensor, max_correction_ratio: float | None
) -> tuple[th.Tensor, Comparison]:
    """
    :param direct: The direct gradient (n_actor_params,)
    :param correction: -(mixed second derivative of L) v, uncapped (n_actor_params,)
    :param ok: Whether the solve behind it succeeded ()
    :param max_correction_ratio: Largest norm of the correction relative to the direct gradient's; ``None``: no cap
    :return: Their sum, the direct gradient alone where the correction is skipped (n_actor_params,), and how they compare
    """
    direct_norm, norm = th.linalg.vector_norm(direct), th.linalg.vector_norm(correction)
    ok = ok & norm.isfinite()
    if max_correction_ratio is None:
        scale = th.ones_like(norm)
    else:
        scale = (direct_norm * max_correction_ratio / norm.clamp_min(TINY)).clamp(max=1)
    gradient = th.where(ok, th.addcmul(direct, scale, correction), direct)
    return gradient, Comparison(direct_norm, norm, direct @ correction, scale, ok)


class Hypergradient(NamedTuple):
    """
    Gradient of the leader's objective with the follower at its best response, and diagnostics.

    :param gradient: To be followed upwards (n_actor_params,)
    :param numbers: What :func:`statistics` makes the diagnostics of, by name
    """

    gradient: th.Tensor
    numbers: dict[str, th.Tensor]

    @property
    def stats(self) -> dict[str, th.Tensor]:
        """Scalars for the log, by name."""
        return statistics(self.numbers)


def hypergradient(
    log_prob: th.Tensor,
    entropy: th.Tensor | None,
    policy_gradient: Callable[[th.Tensor, th.Tensor | None], th.Tensor],
    segment: Segment,
    values: th.Tensor,
    jacobian: Jacobian | None,
    solver: Solver | None,
    *,
    clip_range: float,
    normalize_advantage: bool,
    ent_coef: float,
    damping: float,
    curvature: str,
    max_correction_ratio: float | None,
    with_residual: bool = True,
) -> Hypergradient:
    """
    Steps 2 to 5 of Algorithm 1 for one minibatch, after the critic's nested updates.

    :param log_prob: log pi(a_t|s_t) (N,)
    :param entropy: Entropy of pi(.|s_t) (N,); ``None`` where it has no closed form: -log pi(a_t|s_t) then
    :param policy_gradient: Maps weights w (N,) and, where not ``None``, h (N,) to sum_t w_t grad log pi(a_t|s_t) + h_t grad
        entropy_t (n_actor_params,)
    :param segment: The minibatch
    :param values: Of the segment's observations under the current critic
    :param jacobian: Of these values; ``None``: the direct gradient alone
    :param solver: Of the critic's linear system; ``None``: the direct gradient alone
    :param clip_range: PPO's clipping parameter
    :param normalize_advantage: Divide both gradients by the advantages' standard deviation, and shift the direct one's
        advantages by their mean
    :param ent_coef: Entropy coefficient
    :param damping: As in :func:`best_response`
    :param curvature: As in :func:`best_response`
    :param max_correction_ratio: As in :func:`add_correction`
    :param with_residual: As in :func:`best_response`
    :return: The gradient and its diagnostics
    """
    n = segment.n_transitions
    with th.no_grad():
        residuals = values[:n] - segment.returns
        # Step 2: advantages under the new critic
        advantages = segment.advantages(values)
        # Step 3: direct gradient
        surrogate = clipped_surrogate(log_prob, segment.old_log_prob, advantages, clip_range, normalize_advantage)
        gated = surrogate.active * surrogate.weights
        by_log_prob, by_entropy = gated * surrogate.advantages, None
        if entropy is None:
            by_log_prob = by_log_prob - ent_coef / n
        elif ent_coef:
            by_entropy = th.full_like(entropy, ent_coef / entropy.numel())
        direct = policy_gradient(by_log_prob, by_entropy)
        mean_entropy = (-log_prob if entropy is None else entropy).mean()
        change = surrogate.ratio - 1
        numbers = {
            "objective": surrogate.objective,
            "entropy": mean_entropy,
            "loss": th.sub(-surrogate.objective, mean_entropy, alpha=ent_coef),
            "approx_kl": (change - surrogate.log_ratio).mean(),
            "clip_fraction": (change.abs() > clip_range).float().mean(),
            "critic_loss_after": residuals.square().mean(),
        }
        if solver is None or jacobian is None:
            return Hypergradient(direct, numbers)
        # Step 4: how the critic's best response would move each value
        coefficients = segment.return_gradient(surrogate.weights)
        response = best_response(jacobian, coefficients, residuals, solver, damping, curvature, with_residual)
        # Step 5: the correction is a policy gradient with reweighted advantages
        e = segment.trace(response.u)
        weights = e * gated * advantages * (2 * surrogate.scale)
        correction = policy_gradient(weights, None)
        gradient, comparison = add_correction(direct, correction, response.ok, max_correction_ratio)
    return Hypergradient(gradient, numbers | comparison._asdict() | {"ihvp_residual": response.residual})


def statistics(numbers: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
    """
    :param numbers: Those of a :class:`Hypergradient`, or of several, stacked
    :return: What SB3's PPO logs, and what there is to know of the correction
    """
    stats = dict(numbers)
    stats["policy_gradient_loss"], stats["entropy_loss"] = -stats.pop("objective"), -stats.pop("entropy")
    if "ok" in stats:
        stats |= Comparison(**{name: stats.pop(name) for name in Comparison._fields}).statistics()
    return stats
