"""Dense solve: the yardstick for every other solver."""

import torch as th

from sb3_blpo.curvature import Curvature
from sb3_blpo.ihvp.base import Solution, Solver


class Exact(Solver):
    """Factorise H + alpha I in float64: among values for the Gauss-Newton matrix, among parameters for the Hessian."""

    def draw(self, like: th.Tensor, generator: th.Generator) -> None:
        """Nothing is random here."""

    def solve(self, curvature: Curvature, alpha: th.Tensor) -> Solution:
        A = curvature.dense().double()
        A.diagonal().add_(alpha)
        x, info = th.linalg.solve_ex(A, curvature.g.double())
        x = x.to(curvature.g.dtype)
        # An infinite pivot gives a finite x
        return Solution(x, (info == 0) & A.isfinite().all() & x.isfinite().all())
