"""What every solver takes and gives, and the dense solve: the yardstick for the others."""

from typing import NamedTuple, Protocol

import torch as th

from sb3_blpo.curvature import GaussNewton

#: Largest dense matrix: of so many states for the Gauss-Newton matrix, of so many parameters for the Hessian
MAX_DENSE = 5000


class Solution(NamedTuple):
    """An approximate solution v (n_params,), which means nothing where the solve was not ``ok``, a tensor ()."""

    v: th.Tensor
    ok: th.Tensor


class Solver(Protocol):
    def solve(self, system: GaussNewton, generator: th.Generator) -> Solution:
        """Solve (H + alpha I) v = g. Everything random comes from the generator, which is on the CPU. Never raises."""
        ...


def solve_dense(A: th.Tensor, b: th.Tensor) -> Solution:
    """Solve A x = b, A (k, k) and x in float64."""
    x, info = th.linalg.solve_ex(A, b.double())
    # An infinite pivot gives a finite x
    return Solution(x, (info == 0) & (A.sum() + x.sum()).isfinite())


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
