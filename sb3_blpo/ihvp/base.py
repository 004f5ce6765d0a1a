"""What every solver takes and gives."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch as th

from sb3_blpo.curvature import Curvature


class Solution(NamedTuple):
    """
    Outcome of a solve.

    :param coefficients: Of the approximate solution x of (H + alpha I) x = g: x itself, or what :attr:`lift` makes x of
    :param ok: Whether the solve succeeded; where not, x means nothing ()
    :param iterations: Number of iterations, 0 for direct solvers
    :param values: What x does to the values of the loss's states, where the solver knows it anyway (n_steps,)
    :param lift: Maps the coefficients to x; ``None``: they are x
    """

    coefficients: th.Tensor
    ok: th.Tensor
    iterations: int = 0
    values: th.Tensor | None = None
    lift: Callable[[th.Tensor], th.Tensor] | None = None

    @property
    def x(self) -> th.Tensor:
        """The solution in the curvature's representation (n,)."""
        return self.coefficients if self.lift is None else self.lift(self.coefficients)


class Solver(ABC):
    """A way to solve (H + alpha I) x = g."""

    #: Whether the Gauss-Newton system is solved with the whole Gram matrix, where that is cheap: see ``best_response``
    needs_gram = True

    @abstractmethod
    def draw(self, like: th.Tensor, generator: th.Generator) -> None:
        """
        Make this solver's random choices, once per ``train()``.

        :param like: A parameter vector, for its length, dtype and device (n_params,)
        :param generator: Source of the randomness, on the CPU
        """

    @abstractmethod
    def solve(self, curvature: Curvature, alpha: th.Tensor) -> Solution:
        """
        :param curvature: H and g
        :param alpha: Damping, positive ()
        :return: The solution, with a failure as a value: no exception leaves a solver
        """


def relative_residual(curvature: Curvature, alpha: th.Tensor, x: th.Tensor) -> th.Tensor:
    """
    :param curvature: H and g
    :param alpha: Damping ()
    :param x: Approximate solution (n,)
    :return: Norm of g - (H + alpha I) x relative to that of g, 0 where g is 0 ()
    """
    g = curvature.g
    r = g - curvature.H_v(x) - alpha * x
    r_squared, g_squared = curvature.dot(r, r).clamp_min(0), curvature.dot(g, g).clamp_min(0)
    return th.where(g_squared > 0, (r_squared / g_squared).sqrt(), r_squared.sqrt())
