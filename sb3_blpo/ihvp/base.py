"""What every solver takes and gives."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch as th

from sb3_blpo.curvature import GaussNewton


class Solution(NamedTuple):
    """
    Outcome of a solve.

    :param v: Approximate solution of (H + alpha I) v = g (n_params,)
    :param ok: Whether the solve succeeded; where not, v means nothing ()
    """

    v: th.Tensor
    ok: th.Tensor


class Solver(ABC):
    """A way to solve (H + alpha I) v = g."""

    @abstractmethod
    def solve(self, system: GaussNewton, generator: th.Generator) -> Solution:
        """
        :param system: H, alpha and g
        :param generator: Source of everything random, on the CPU
        :return: The solution, with a failure as a value: no exception leaves a solver
        """


def solve_dense(A: th.Tensor, b: th.Tensor) -> Solution:
    """
    :param A: Matrix, in float64 (k, k)
    :param b: Right side (k,)
    :return: Solution of A x = b in float64
    """
    x, info = th.linalg.solve_ex(A, b.double())
    # An infinite pivot gives a finite x
    return Solution(x, (info == 0) & (A.sum() + x.sum()).isfinite())
