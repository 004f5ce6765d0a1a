"""Dense solve: the yardstick for every other solver."""

import torch as th

from sb3_blpo.curvature import GaussNewton
from sb3_blpo.ihvp.base import Solution, Solver, solve_dense

#: Largest dense matrix: of so many states for the Gauss-Newton matrix, of so many parameters for the Hessian
MAX_DENSE = 5000


class Exact(Solver):
    """
    Factorise in float64: for the Gauss-Newton matrix among values, by the Woodbury identity
    v = (g - J^T (n alpha / 2 I + J J^T)^-1 J g) / alpha, for the Hessian among parameters.
    """

    def solve(self, system: GaussNewton, generator: th.Generator) -> Solution:
        jacobian, g, alpha = system.jacobian, system.g, system.alpha
        if not system.semidefinite:
            A = th.stack([system.H_v(unit) for unit in th.eye(len(g), dtype=g.dtype, device=g.device)]).double()
            A.diagonal().add_(alpha)
            solution = solve_dense(A, g)
            return Solution(solution.v.to(g.dtype), solution.ok)
        J = jacobian.at(jacobian.curvature_states)
        K = J.gram(J).double()
        K.diagonal().add_(alpha / system.scale)
        x, ok = solve_dense(K, J.J_v(g))
        return Solution((g - J.Jt_w(x.to(g.dtype))) / alpha, ok)
