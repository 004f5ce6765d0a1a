"""Conjugate gradients on H + alpha I, with the Nyström inverse as a preconditioner where wanted."""

import torch as th

from sb3_blpo.curvature import Curvature
from sb3_blpo.ihvp.base import Solution, Solver
from sb3_blpo.ihvp.nystrom import Nystrom


class ConjugateGradient(Solver):
    """
    Preconditioned conjugate gradients from zero (Hestenes & Stiefel, 1952).

    The solve has failed where a direction of no positive curvature shows up: H + alpha I, or the preconditioner, is
    indefinite there and the iteration means nothing.

    :param max_iter: Largest number of iterations, at least 1
    :param tol: Stop at this norm of the residual, relative to that of the right side
    :param preconditioner: Its inverse approximates that of H + alpha I; ``None``: plain CG
    """

    def __init__(self, max_iter: int, tol: float, preconditioner: Nystrom | None = None) -> None:
        self.max_iter = max_iter
        self.tol = tol
        self.preconditioner = preconditioner

    def draw(self, like: th.Tensor, generator: th.Generator) -> None:
        if self.preconditioner is not None:
            self.preconditioner.draw(like, generator)

    def solve(self, curvature: Curvature, alpha: th.Tensor) -> Solution:
        x = th.zeros_like(curvature.g)
        precondition = None
        if self.preconditioner is not None:
            precondition, ok = self.preconditioner.inverse(curvature, alpha)
            if not ok:
                return Solution(x, ok)
        r = curvature.g
        g_norm = _norm(curvature, r)
        stop = self.tol * g_norm
        p, r_z_old = th.zeros_like(r), th.ones_like(stop)
        for iteration in range(self.max_iter):
            r_norm = _norm(curvature, r)
            if not r_norm > stop:  # NaN ends it as well
                return Solution(x, (r_norm + stop).isfinite(), iteration)
            z = r if precondition is None else precondition(r)
            r_z = curvature.dot(r, z)
            p = z + r_z / r_z_old * p
            A_p = curvature.H_v(p) + alpha * p
            p_A_p = curvature.dot(p, A_p)
            if not (0 < p_A_p < th.inf and r_z > 0):  # NaN fails as well
                # Where only rounding is left of the residual, the signs mean nothing and x is as good as it gets
                good = r_norm <= th.finfo(x.dtype).eps ** 0.5 * g_norm
                return Solution(x, good & (p_A_p + r_z).isfinite(), iteration)
            step = r_z / p_A_p
            x = x + step * p
            r = r - step * A_p
            r_z_old = r_z
        return Solution(x, x.isfinite().all(), self.max_iter)


def _norm(curvature: Curvature, r: th.Tensor) -> th.Tensor:
    """0 where rounding makes its square negative, NaN where that is not finite."""
    squared = curvature.dot(r, r)
    return squared.where(squared.isfinite(), th.nan).clamp_min(0).sqrt()
