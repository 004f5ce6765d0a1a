"""
The critic's best response to the actor, and the advantages that follow from it.

The leader's hypergradient is a policy gradient with the advantages (1 + 2 e_t) A_t: the direct gradient, and the correction
-(mixed second derivative of the critic's loss) v for how the critic would respond. Nothing is differentiated twice.
"""

from typing import NamedTuple

import torch as th

from sb3_blpo.curvature import GaussNewton, Hessian
from sb3_blpo.ihvp import Solver
from sb3_blpo.jacobian import Jacobian
from sb3_blpo.rollout import Rollout

#: Below what numbers may be taken for 0: the smallest normal one of float32
TINY = th.finfo(th.float32).tiny


class Response(NamedTuple):
    """
    The critic's response: e = U^T u, u_t the change of V(s_t) along v = (H + alpha I)^-1 grad_omega J (N,), whether the solve
    succeeded and e is finite (), and the relative residual of the solve ().
    """

    e: th.Tensor
    ok: th.Tensor
    residual: th.Tensor


def surrogate_derivative(ratio: th.Tensor, advantages: th.Tensor, clip_range: float) -> th.Tensor:
    """
    Derivative of PPO's surrogate (1/N) sum_t min(rho_t A_t, clip(rho_t) A_t) by the advantages.

    :return: The ratio rho_t where the unclipped branch is active, else the bound, over N (N,)
    """
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return th.where(ratio * advantages <= clipped * advantages, ratio, clipped) / len(ratio)


def best_response(
    rollout: Rollout, jacobian: Jacobian, by_returns: th.Tensor, values: th.Tensor,
    solver: Solver, damping: float, curvature: str, generator: th.Generator,
) -> Response | None:  # fmt: skip
    """
    Solve (H + alpha I) v = g for the follower, and trace what v does to the values.

    :param jacobian: Of the values of the rollout's observations
    :param by_returns: Derivative of the leader's objective by the lambda-returns (N,)
    :param values: Of the rollout's observations
    :param damping: alpha in units of the trace of the Gauss-Newton matrix, positive
    :param curvature: "gauss_newton" or "hessian"
    :return: The response; ``None`` where the critic cannot respond, its values do not depend on any parameter
    """
    g = jacobian.gradient(rollout.return_gradient(by_returns))
    if curvature == "hessian":
        system: GaussNewton = Hessian(jacobian, g, damping, values[: len(rollout)] - rollout.returns)
    else:
        system = GaussNewton(jacobian, g, damping)
    if system.trace == 0:
        return None
    v, ok = solver.solve(system, generator)
    e = rollout.eligibility_trace(jacobian.to_values(v))
    return Response(e, ok & e.isfinite().all(), system.residual(v))


class Correction(NamedTuple):
    """
    The corrected advantages W (N,). ``stats`` compares the correction 2 e A, before the cap, with A: empty where there is no
    correction, and ``skipped`` says whether a failed solve is why.
    """

    weights: th.Tensor
    stats: dict[str, float]
    skipped: bool


def correct(advantages: th.Tensor, response: Response | None, max_correction_ratio: float | None) -> Correction:
    """
    W = (A + B) ‖A‖ / ‖A + B‖ with B = 2 c e A, c such that ‖B‖ is at most ``max_correction_ratio`` ‖A‖: the correction turns
    the advantages, and does not lengthen them.

    :param response: The critic's response, or ``None``: W = A
    :param max_correction_ratio: At least 0; ``None``: W = A + 2 e A, the hypergradient itself
    """
    if response is None:
        return Correction(advantages, {}, False)
    correction = 2 * response.e * advantages
    norm, correction_norm = th.linalg.vector_norm(advantages), th.linalg.vector_norm(correction)
    if not (response.ok & correction_norm.isfinite()):
        return Correction(advantages, {}, True)
    ratio = float(correction_norm / norm.clamp_min(TINY))
    cosine = float(advantages @ correction / (norm * correction_norm).clamp_min(TINY))
    scale = 1.0 if max_correction_ratio is None else min(1.0, max_correction_ratio / max(ratio, TINY))
    weights = advantages + scale * correction
    if max_correction_ratio is not None:
        weights = weights * (norm / th.linalg.vector_norm(weights).clamp_min(TINY))
    stats = {"correction_ratio": ratio, "correction_cosine": cosine, "correction_capped": float(scale < 1)}
    return Correction(weights, stats, False)
