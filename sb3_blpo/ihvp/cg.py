"""Conjugate gradients on H + alpha I, with the Nyström inverse as a preconditioner where wanted."""

from dataclasses import dataclass

import torch as th

from sb3_blpo.curvature import GaussNewton
from sb3_blpo.ihvp.dense import Solution, Solver
from sb3_blpo.ihvp.nystrom import Nystrom


@dataclass
class ConjugateGradient(Solver):
    """
    Preconditioned conjugate gradients from zero (Hestenes & Stiefel, 1952).

    The solve has failed where a direction of no positive curvature shows up: H + alpha I, or the preconditioner, is
    indefinite there and the iteration means nothing.

    :param max_iter: Largest number of iterations, at least 1
    :param tol: Stop at this norm of the residual, relative to that of the right side
    :param preconditioner: Its inverse approximates that of H + alpha I; ``None``: plain CG
    """

    max_iter: int
    tol: float
    preconditioner: Nystrom | None = None

    def solve(self, system: GaussNewton, generator: th.Generator) -> Solution:
        v = th.zeros_like(system.g)
        precondition = None
        if self.preconditioner is not None:
            precondition, ok = self.preconditioner.inverse(system, generator)
            if not ok:
                return Solution(v, ok)
        r = system.g
        g_norm = th.linalg.vector_norm(r)
        stop = self.tol * g_norm
        p, r_z_old = th.zeros_like(r), th.ones_like(stop)
        for _ in range(self.max_iter):
            r_norm = th.linalg.vector_norm(r)
            if not r_norm > stop:  # NaN ends it as well
                return Solution(v, (r_norm + stop).isfinite())
            z = r if precondition is None else precondition(r)
            r_z = r @ z
            p = z + r_z / r_z_old * p
            A_p = system.H_v(p) + system.alpha * p
            p_A_p = p @ A_p
            if not (0 < p_A_p < th.inf and r_z > 0):  # NaN fails as well
                # Where only rounding is left of the residual, the signs mean nothing and v is as good as it gets
                good = r_norm <= th.finfo(v.dtype).eps ** 0.5 * g_norm
                return Solution(v, good & (p_A_p + r_z).isfinite())
            step = r_z / p_A_p
            v = v + step * p
            r = r - step * A_p
            r_z_old = r_z
        return Solution(v, v.isfinite().all())
