"""Nyström approximation of the inverse (Hataya & Yamada, AISTATS 2023, arXiv 2302.09726)."""

from collections.abc import Callable

import torch as th

from sb3_blpo.curvature import Curvature
from sb3_blpo.ihvp.base import Solution, Solver


class Nystrom(Solver):
    """
    Replace H by its Nyström approximation C M^+ C^T, C = H Omega, M = Omega^T H Omega, whose regularised inverse is, by the
    Woodbury identity, (H_Q + alpha I)^-1 = I/alpha - (1/alpha^2) C (M + C^T C/alpha)^+ C^T.

    :param rank: Number k of columns of Omega, at least 1, clamped to the number of parameters
    :param sketch: "columns" (the paper's): k of the unit vectors, so that C are columns of H; "gaussian": k random
        orthonormal vectors, which catch more of the spectrum (Frangella, Tropp & Udell, 2023)
    """

    omega: th.Tensor

    def __init__(self, rank: int, sketch: str) -> None:
        self.rank = rank
        self.sketch = sketch

    def draw(self, like: th.Tensor, generator: th.Generator) -> None:
        rank = min(self.rank, len(like))
        if self.sketch == "columns":
            self.omega = th.randperm(len(like), generator=generator)[:rank].to(like.device)
        else:
            normal = th.randn(len(like), rank, generator=generator, dtype=like.dtype)
            self.omega = th.linalg.qr(normal.to(like.device)).Q

    def inverse(self, curvature: Curvature, alpha: th.Tensor) -> Callable[[th.Tensor], th.Tensor] | None:
        """
        :param curvature: H
        :param alpha: Damping, positive ()
        :return: The map x -> (H_Q + alpha I)^-1 x; ``None`` where the factorisation failed
        """
        C, M = curvature.sketch(self.omega)
        W = M.double() + curvature.dot(C, C).double() / alpha
        try:
            eigenvalues, Q = th.linalg.eigh((W + W.T) / 2)
        except th.linalg.LinAlgError:
            return None
        # A sampled parameter without gradient (dead ReLU) makes W singular: pseudo-inverse, cut off where rounding begins
        magnitude = eigenvalues.abs()
        kept = magnitude > len(W) * th.finfo(curvature.g.dtype).eps * magnitude.max()
        W_pinv = ((Q * th.where(kept, 1 / eigenvalues, 0)) @ Q.T).to(C.dtype)

        def apply(x: th.Tensor) -> th.Tensor:
            return (x - C @ (W_pinv @ curvature.dot(C, x)) / alpha) / alpha

        return apply

    def solve(self, curvature: Curvature, alpha: th.Tensor) -> Solution:
        inverse = self.inverse(curvature, alpha)
        if inverse is None:
            return Solution(th.zeros_like(curvature.g), th.zeros((), dtype=th.bool, device=curvature.g.device))
        x = inverse(curvature.g)
        return Solution(x, x.isfinite().all())
