"""Nyström approximation of the inverse (Hataya & Yamada, AISTATS 2023, arXiv 2302.09726)."""

from collections.abc import Callable
from typing import NamedTuple

import torch as th

from sb3_blpo.curvature import Curvature
from sb3_blpo.ihvp.base import Solution, Solver


class Inverse(NamedTuple):
    """
    An approximate inverse of H + alpha I.

    :param apply: The map x -> (H_Q + alpha I)^-1 x
    :param ok: Whether the factorisation behind it succeeded; where not, the map means nothing ()
    """

    apply: Callable[[th.Tensor], th.Tensor]
    ok: th.Tensor


class Nystrom(Solver):
    """
    Replace H by a Nyström approximation of low rank, in one of two ways.

    Among parameters (sketch "columns" or "gaussian"): H_Q = C M^+ C^T, C = H Omega, M = Omega^T H Omega, whose regularised
    inverse is, by the Woodbury identity, (H_Q + alpha I)^-1 = I/alpha - (1/alpha^2) C (M + C^T C/alpha)^-1 C^T. It is computed
    from T = C M^(-1/2), as I/alpha - (1/alpha) T (alpha I + T^T T)^-1 T^T.

    Among values (sketch "values"): the Gram matrix K = J J^T of the critic's gradients, in which the exact solution can be
    written, becomes K_Q = K[:, S] K[S, S]^+ K[S, :], S being k of the minibatch's states and at most as many of those that it
    bootstraps from besides. That is the exact solution within the span of the gradients of these values (Rudi, Camoriano &
    Rosasco, NeurIPS 2015, arXiv 1507.04717). What lies outside is left out, where the first way multiplies it by 1/alpha: what
    the sketch does not catch never makes the correction larger.

    :param rank: Number k, at least 1, clamped to what there is
    :param sketch: "values": one state from each of k equal stretches of the minibatch; "columns" (the paper's): k of the unit
        vectors, so that C are columns of H; "gaussian": k random orthonormal vectors, which catch more of the spectrum
        (Frangella, Tropp & Udell, 2023)
    """

    omega: th.Tensor

    def __init__(self, rank: int, sketch: str) -> None:
        self.rank = rank
        self.sketch = sketch
        self.needs_gram = sketch != "values"

    def draw(self, like: th.Tensor, generator: th.Generator) -> None:
        rank = min(self.rank, len(like))
        if self.sketch == "values":
            # Where in its stretch each state lies, from 0 to 1: minibatches differ in length
            self.omega = th.rand(rank, generator=generator, dtype=th.float64, device=generator.device).to(like.device)
            self._drawn_rows: dict[tuple[int, int], th.Tensor] = {}
        elif self.sketch == "columns":
            self.omega = th.randperm(len(like), generator=generator, device=generator.device)[:rank].to(like.device)
        else:
            normal = th.randn(len(like), rank, generator=generator, dtype=like.dtype, device=generator.device)
            self.omega = th.linalg.qr(normal.to(like.device)).Q

    def _rows(self, curvature: Curvature) -> th.Tensor:
        """Return S, indices among the rows of J: k of the loss's states, and as many of the others."""
        n_steps, n_rows = curvature.n_steps, len(curvature.jacobian.values)
        if (n_steps, n_rows) not in self._drawn_rows:
            rows = th.cat([self._spread(0, n_steps), self._spread(n_steps, n_rows)])
            self._drawn_rows[n_steps, n_rows] = rows
        return self._drawn_rows[n_steps, n_rows]

    def _spread(self, start: int, stop: int) -> th.Tensor:
        n, k = stop - start, len(self.omega)
        stretches = th.arange(min(k, n), device=self.omega.device)
        return start + (stretches if k >= n else ((stretches + self.omega) * (n / k)).long())

    def solve(self, curvature: Curvature, alpha: th.Tensor) -> Solution:
        if self.sketch != "values":
            inverse = self.inverse(curvature, alpha)
            x = inverse.apply(curvature.g)
            return Solution(x, inverse.ok & x.isfinite().all())
        H, inner, g, lift, values = curvature.restrict(self._rows(curvature))
        A = H.double() + alpha * _regular(inner.double(), curvature.rounding)
        y, info = th.linalg.solve_ex(A, g.double())
        # An infinite pivot gives a finite y
        return Solution(y, (info == 0) & (A.sum() + y.sum()).isfinite(), values=values(y), lift=lift)

    def inverse(self, curvature: Curvature, alpha: th.Tensor) -> Inverse:
        """
        :param curvature: H
        :param alpha: Damping, positive ()
        :return: Its approximate inverse
        """
        by_values = self.sketch == "values"
        C, M = curvature.sketch_of_rows(self._rows(curvature)) if by_values else curvature.sketch(self.omega)
        split = _semidefinite_inverse if curvature.semidefinite else _indefinite_inverse
        T, W_inverse, ok = split(curvature, C, M.double(), alpha)

        def apply(x: th.Tensor) -> th.Tensor:
            return (x - T @ (W_inverse @ curvature.dot(T, x))) / alpha

        return Inverse(apply, ok)


def _regular(M: th.Tensor, rounding: float) -> th.Tensor:
    """
    Shift a positive semi-definite matrix, in place, by its rounding errors: it is singular where a sampled parameter has no
    gradient (dead ReLU) or two sampled states are the same.
    """
    diagonal = M.diagonal()
    diagonal += diagonal.max() * (len(M) * rounding) + th.finfo(M.dtype).tiny
    return M


def _semidefinite_inverse(
    curvature: Curvature, C: th.Tensor, M: th.Tensor, alpha: th.Tensor
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """H_Q = T T^T: return T, (alpha I + T^T T)^-1 and whether all went well."""
    L, failed = th.linalg.cholesky_ex(_regular(M, curvature.rounding))
    T = th.linalg.solve_triangular(L.to(C.dtype), C.T, upper=False).T
    # As well-conditioned as H_Q + alpha I, which M + C^T C/alpha is not
    identity = th.eye(len(M), dtype=M.dtype, device=M.device)
    W = curvature.dot(T, T).double() + alpha * identity
    L, failed_too = th.linalg.cholesky_ex(W)
    # cholesky_inverse() would raise where the factorisation failed
    ok = (failed == 0) & (failed_too == 0) & (M.sum() + W.sum()).isfinite()
    return T, th.cholesky_solve(identity, L).to(C.dtype), ok


def _indefinite_inverse(
    curvature: Curvature, C: th.Tensor, M: th.Tensor, alpha: th.Tensor
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """H_Q = T S T^T with S = ±1: return T, (alpha S + T^T T)^-1, a pseudo-inverse, and whether all went well."""
    try:
        of_M, V = th.linalg.eigh(M)
        kept = _above_rounding(of_M, C.dtype)
        T = C @ (V * th.where(kept, of_M.abs().rsqrt(), 0)).to(C.dtype)
        S = th.where(kept, of_M.sign(), 1)
        of_W, V = th.linalg.eigh(curvature.dot(T, T).double() + alpha * S.diag())
    except th.linalg.LinAlgError:
        return C, M.to(C.dtype), alpha.new_zeros((), dtype=th.bool)
    kept = _above_rounding(of_W, th.float64)
    # NaN and infinity are never above rounding, but no zeros either
    return T, ((V * th.where(kept, 1 / of_W, 0)) @ V.T).to(C.dtype), (of_M.sum() + of_W.sum()).isfinite()


def _above_rounding(eigenvalues: th.Tensor, dtype: th.dtype) -> th.Tensor:
    magnitude = eigenvalues.abs()
    return magnitude > len(magnitude) * th.finfo(dtype).eps * magnitude.max()
