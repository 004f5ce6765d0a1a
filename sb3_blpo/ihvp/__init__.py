"""
Inverse-Hessian-vector products: solvers of (H + alpha I) v = g for the curvature H of the critic's loss.

A solver never raises: a solve that failed says so in its :class:`Solution`.
"""

from sb3_blpo.ihvp.cg import ConjugateGradient
from sb3_blpo.ihvp.dense import MAX_DENSE, Exact, Solution, Solver
from sb3_blpo.ihvp.nystrom import Nystrom

__all__ = ["MAX_DENSE", "ConjugateGradient", "Exact", "Nystrom", "Solution", "Solver", "make_solver"]


def make_solver(ihvp_solver: str, rank: int, sketch: str, max_iter: int, tol: float) -> Solver | None:
    """The solver of this name, ``None`` for "none"; each takes those of the settings that concern it."""
    if ihvp_solver == "none":
        return None
    if ihvp_solver == "exact":
        return Exact()
    if ihvp_solver == "cg":
        return ConjugateGradient(max_iter, tol)
    nystrom = Nystrom(rank, sketch)
    return nystrom if ihvp_solver == "nystrom" else ConjugateGradient(max_iter, tol, preconditioner=nystrom)
