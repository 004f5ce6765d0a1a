"""What every solver takes and gives."""

from typing import NamedTuple, Protocol

import torch as th

from sb3_blpo.curvature import GaussNewton


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
