"""
Inverse-Hessian-vector products: solvers of (H + alpha I) v = g for the curvature H of the critic's loss.

A solver never raises: a solve that failed says so in its :class:`Solution`.
"""

from sb3_blpo.ihvp.base import Solution, Solver
from sb3_blpo.ihvp.cg import ConjugateGradient
from sb3_blpo.ihvp.exact import MAX_DENSE, Exact
from sb3_blpo.ihvp.nystrom import Nystrom

__all__ = ["MAX_DENSE", "ConjugateGradient", "Exact", "Nystrom", "Solution", "Solver", "make_solver"]


def make_solver(ihvp_solver: str, rank: int, sketch: str, max_iter: int, tol: float) -> Solver | None:
    """
    Make the solver that bears this name; each takes those of the settings that concern it.

    :param ihvp_solver: "nystrom", "cg", "nystrom_cg", "exact" or "none"
    :param rank: Rank of the Nyström approximation, at least 1
    :param sketch: "values", "gaussian" or "columns"
    :param max_iter: Largest number of CG iterations, at least 1
    :param tol: CG stops at this norm of the residual, relative to that of the right side
    :return: The solver, ``None`` for "none"
    """
    if ihvp_solver == "none":
        return None
    if ihvp_solver == "exact":
        return Exact()
    if ihvp_solver == "cg":
        return ConjugateGradient(max_iter, tol)
    nystrom = Nystrom(rank, sketch)
    return nystrom if ihvp_solver == "nystrom" else ConjugateGradient(max_iter, tol, preconditioner=nystrom)
