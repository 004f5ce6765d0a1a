"""Nyström approximation of the inverse (Hataya & Yamada, AISTATS 2023, arXiv 2302.09726)."""

from collections.abc import Callable

import torch as th

from sb3_blpo.curvature import Curvature
from sb3_blpo.ihvp.base import Solution, Solver, failure


class Nystrom(Solver):
    """
    Replace H by its Nyström approximation H_Q = C M^+ C^T, C = H Omega, M = Omega^T H Omega, whose regularised inverse is, by
    the Woodbury identity, (H_Q + alpha I)^-1 = I/alpha - (1/alpha^2) C (M + C^T C/alpha)^-1 C^T. It is computed from
    T = C M^(-1/2), as I/alpha - (1/alpha) T (alpha I + T^T T)^-1 T^T.

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
        try:
            eigenvalues, V = th.linalg.eigh(M.double())
            # A sampled parameter without gradient (dead ReLU) makes M singular: pseudo-inverse, cut off where rounding begins
            kept = _above_rounding(eigenvalues, C.dtype)
            # H_Q = T S T^T with S = ±1, positive for the Gauss-Newton matrix. Then W below is as well-conditioned as
            # H_Q + alpha I, which M + C^T C/alpha is not
            T = C @ (V * th.where(kept, eigenvalues.abs().rsqrt(), 0)).to(C.dtype)
            S = th.where(kept, eigenvalues.sign(), 1)
            eigenvalues, V = th.linalg.eigh(curvature.dot(T, T).double() + alpha * S.diag())
        except th.linalg.LinAlgError:
            return None
        kept = _above_rounding(eigenvalues, th.float64)
        W_inverse = ((V * th.where(kept, 1 / eigenvalues, 0)) @ V.T).to(C.dtype)

        def apply(x: th.Tensor) -> th.Tensor:
            return (x - T @ (W_inverse @ curvature.dot(T, x))) / alpha

        return apply

    def solve(self, curvature: Curvature, alpha: th.Tensor) -> Solution:
        inverse = self.inverse(curvature, alpha)
        if inverse is None:
            return failure(curvature)
        x = inverse(curvature.g)
        return Solution(x, x.isfinite().all())


def _above_rounding(eigenvalues: th.Tensor, dtype: th.dtype) -> th.Tensor:
    magnitude = eigenvalues.abs()
    return magnitude > len(magnitude) * th.finfo(dtype).eps * magnitude.max()
